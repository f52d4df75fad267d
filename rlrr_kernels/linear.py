"""FusedRLRRLinear: ``nn.Linear`` with a frozen weight and a trained rescaling of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rlrr_kernels.functional import rescaled_linear
from rlrr_kernels.reference import accumulation_dtype, rescaled_weight

#: The starts of u and v that have a name, see :class:`FusedRLRRLinear`.
INITS = ("paper", "identity")

#: One of :data:`INITS`, or a function that fills (scale_out, scale_in) in place.
Init = str | Callable[[Tensor, Tensor], None]


class FusedRLRRLinear(nn.Linear):
    """y = x (W * (1 + u v))^T + b + f, with W and b frozen and u, v, f trained.

    Takes the place of ``nn.Linear``: same first arguments, same ``weight`` and
    ``bias`` keys, so checkpoints of the plain layer load (with ``strict=False``, as
    they lack the three new tensors). Source: RLRR, arXiv 2403.19067, Eq. 16 and 20.

    Args:
        in_features: K.
        out_features: N.
        bias: whether the frozen layer has a bias.
        device, dtype: of ``weight`` and ``bias``.
        groups: equal blocks of output rows with a v each: 3 for a fused qkv.
        init: ``"paper"`` draws v from U(+-sqrt(6/K)) and u from U(+-sqrt(6)), so
            W' differs from W at the start; ``"identity"`` sets u = 0 and draws v, so
            the layer starts as the plain one; a callable gets ``(scale_out, scale_in)``
            and fills both in place.

    Attributes:
        weight: W ``[N, K]``, frozen. bias: b ``[N]`` or None, frozen.
        scale_out: u ``[N, 1]``. scale_in: v ``[1, K]``, or ``[groups, 1, K]``.
        shift: f ``[N]``, 0 at the start.
            These three are trained, in float32 (float64 with a float64 weight).

    Raises:
        ValueError: ``groups`` does not divide N, or ``init`` is an unknown name.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        groups: int = 1,
        init: Init = "paper",
    ) -> None:
        if groups < 1 or out_features % groups:
            raise ValueError(f"groups: expected a divisor of out_features = {out_features}, got {groups}")
        if isinstance(init, str) and init not in INITS:
            raise ValueError(f"init: expected 'paper', 'identity' or a callable, got {init!r}")
        self.groups = groups
        self.init = init
        super().__init__(in_features, out_features, bias, device, dtype)
        new: dict[str, Any] = {"device": self.weight.device, "dtype": accumulation_dtype(self.weight.dtype)}
        v_shape = (1, in_features) if groups == 1 else (groups, 1, in_features)
        self.scale_out = nn.Parameter(torch.empty((out_features, 1), **new))
        self.scale_in = nn.Parameter(torch.empty(v_shape, **new))
        self.shift = nn.Parameter(torch.empty(out_features, **new))
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.reset_scales()

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, groups: int = 1, init: Init = "paper") -> FusedRLRRLinear:
        """Take over a layer's own weight and bias (no copy) and freeze them.

        Args:
            linear: the layer to replace; its parameters are shared and frozen.
            groups, init: as in the constructor.
        """
        layer = cls(linear.in_features, linear.out_features, False, "meta", groups=groups, init=init)
        new: dict[str, Any] = {"device": linear.weight.device, "dtype": accumulation_dtype(linear.weight.dtype)}
        linear.requires_grad_(False)
        layer.weight, layer.bias = linear.weight, linear.bias
        for name in ("scale_out", "scale_in", "shift"):
            shape = getattr(layer, name).shape
            setattr(layer, name, nn.Parameter(torch.empty(shape, **new)))
        layer.reset_scales()
        return layer.train(linear.training)

    @torch.no_grad()
    def reset_scales(self) -> None:
        """Draw u and v anew as ``init`` says and set f to zero; W and b stay. Does nothing on the meta device."""
        if self.shift.is_meta:
            return
        self.shift.zero_()
        if callable(self.init):
            self.init(self.scale_out, self.scale_in)
            return
        bound = math.sqrt(6 / self.in_features) if self.in_features else 0.0
        self.scale_in.uniform_(-bound, bound)
        if self.init == "identity":
            self.scale_out.zero_()
        else:
            self.scale_out.uniform_(-math.sqrt(6), math.sqrt(6))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` to ``[..., N]`` in x's dtype, or autocast's."""
        return rescaled_linear(x, self.weight, self.scale_out, self.scale_in, self.bias, self.shift)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain ``nn.Linear`` that computes the same: weight W', bias b + f.

        Formed in float32 and rounded once to the frozen weight's dtype; shares no memory.
        """
        dtype, device = self.weight.dtype, self.weight.device
        linear = nn.Linear(self.in_features, self.out_features, True, device, dtype)
        scale_in = self.scale_in.view(self.groups, 1, self.in_features)
        linear.weight.copy_(rescaled_weight(self.weight, self.scale_out, scale_in, dtype))
        linear.bias.copy_(self.shift if self.bias is None else self.bias.to(self.shift.dtype) + self.shift)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        init = self.init if isinstance(self.init, str) else getattr(self.init, "__name__", repr(self.init))
        return f"{super().extra_repr()}, groups={self.groups}, init={init}"
