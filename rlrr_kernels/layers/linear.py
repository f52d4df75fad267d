"""FusedRLRRLinear: an ``nn.Linear`` whose weight is frozen and rescaled by trained vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlrr_kernels.backends.reference import accumulation_dtype, rescaled_weight
from rlrr_kernels.layers.options import (
    Init,
    check_groups,
    check_init,
    check_rank,
    check_scaling,
    draw_scales,
    init_name,
)
from rlrr_kernels.layers.ownership import check_dtype, check_linear, check_not_in_fsdp, check_own_parameters
from rlrr_kernels.ops import route
from rlrr_kernels.ops.linear import rescaled_linear


def refuse_script(module: nn.Module) -> nn.Module:
    """What ``torch.jit.script`` calls first (``__prepare_scriptable__``).

    Raises:
        RuntimeError: Always, and says what to use instead.
    """
    raise RuntimeError(
        f"{type(module).__name__}: torch.jit.script cannot compile it; use torch.export or torch.jit.trace, "
        "or script what merge_and_unload returns"
    )


class FusedRLRRLinear(nn.Linear):
    """y = x (W * (1 + s u v))^T + b + f, with W and b frozen, u, v and f trained, and s a constant, 1 by default.

    A drop-in replacement for ``nn.Linear``: same first arguments, same ``weight`` and ``bias`` keys. A checkpoint of
    the plain layer lacks u, v and f: load it before :func:`~rlrr_kernels.apply_rlrr`, or with ``strict=False``.
    Source: RLRR, arXiv 2403.19067, Eq. 16 and 20.

    Args:
        in_features: K.
        out_features: N.
        bias: whether the frozen layer has a bias.
        device, dtype: of ``weight`` and ``bias``.
        groups: number of equal blocks of output rows that have their own v: 3 for a fused qkv projection.
        init: ``"paper"`` draws v from U(+-sqrt(6/(K r))) and u from U(+-sqrt(6)), so that W' differs from W at the
            start: as published at rank 1, with a variance of u v that does not depend on the rank. ``"identity"`` sets
            u = 0 and draws v in the same way, so that the layer starts as the plain one. A callable gets
            ``(scale_out, scale_in)`` and fills both in place.
        rank: r, the rank of u v, 1 to 128.
        scaling: s, a finite number above 0.

    Attributes:
        weight: W ``[N, K]``, frozen.
        bias: b ``[N]`` or None, frozen.
        scale_out: u ``[N, r]``, trained, in float32 (float64 with a float64 weight), as are the next two.
        scale_in: v ``[r, K]``, or ``[groups, r, K]``.
        shift: f ``[N]``, zero at the start.
        enabled: if False, the layer computes x W^T + b, bit for bit.
        merged: whether :meth:`merge` has replaced W and b by W' and b + f.

    While the layer is merged, ``state_dict`` still returns the frozen W and b, and a layer without b has a ``bias``.

    Raises:
        TypeError: If ``dtype`` is not float16, bfloat16, float32 or float64, ``rank`` or ``groups`` no integer, or
            ``scaling`` no number.
        ValueError: If ``groups`` does not divide N, ``init`` is an unknown name, or ``rank`` or ``scaling`` is out of
            range.
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
        rank: int = 1,
        scaling: float = 1.0,
    ) -> None:
        groups = check_groups(groups)
        if out_features % groups:
            raise ValueError(f"groups: expected a divisor of out_features = {out_features}, got {groups}")
        check_init(init)
        rank, scaling = check_rank(rank), check_scaling(scaling)
        check_dtype("dtype", dtype or torch.get_default_dtype())
        super().__init__(in_features, out_features, bias, device, dtype)
        self.groups = groups
        self.init = init
        self.rank = rank
        # not 1.0: under dynamic=True TorchDynamo compares a float in a guard, and compiles once more
        self.scaling = 1 if scaling == 1 else scaling
        self.enabled = True
        self.merged = False
        #: whether the frozen layer has a bias; the merged one always has
        self.frozen_bias = bias
        #: the frozen W and b while the layer is merged, if they were kept
        self._frozen: tuple[nn.Parameter, nn.Parameter | None] | None = None
        new: dict[str, Any] = {"device": self.weight.device, "dtype": accumulation_dtype(self.weight.dtype)}
        v_shape = (rank, in_features) if groups == 1 else (groups, rank, in_features)
        self.scale_out = nn.Parameter(torch.empty((out_features, rank), **new))
        self.scale_in = nn.Parameter(torch.empty(v_shape, **new))
        self.shift = nn.Parameter(torch.empty(out_features, **new))
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.reset_scales()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        groups: int = 1,
        init: Init = "paper",
        dtype: torch.dtype | None = None,
        rank: int = 1,
        scaling: float = 1.0,
    ) -> FusedRLRRLinear:
        """Make a layer that shares and freezes the weight and bias of ``linear``.

        Args:
            linear: the layer to replace. Its parameters are not copied.
            groups, init, rank, scaling: as in the constructor.
            dtype: store weight and bias in this dtype instead; they are then copied.

        Raises:
            TypeError: If ``linear`` is not a plain ``nn.Linear``, or its weight is computed from other tensors
                (``torch.nn.utils.parametrize``, prune, weight_norm), has no data yet, is quantised or held by FSDP.
            ValueError: As the constructor.
        """
        check_linear(linear)
        dtype = dtype or linear.weight.dtype
        check_dtype("dtype", dtype)
        options: dict[str, Any] = {"groups": groups, "init": init, "rank": rank, "scaling": scaling}
        layer = cls(linear.in_features, linear.out_features, False, "meta", **options)
        new: dict[str, Any] = {"device": linear.weight.device, "dtype": accumulation_dtype(dtype)}
        linear.requires_grad_(False)
        layer.weight, layer.bias = linear.weight, linear.bias
        if dtype is not linear.weight.dtype:
            layer.weight = nn.Parameter(linear.weight.to(dtype), requires_grad=False)
            if linear.bias is not None:
                layer.bias = nn.Parameter(linear.bias.to(dtype), requires_grad=False)
        for name in ("scale_out", "scale_in", "shift"):
            shape = getattr(layer, name).shape
            setattr(layer, name, nn.Parameter(torch.empty(shape, **new)))
        layer.reset_scales()
        return layer.train(linear.training)

    def reset_parameters(self) -> None:
        """Initialise all parameters anew: W and b as ``nn.Linear``, u, v and f as :meth:`reset_scales`.

        FSDP calls this after ``to_empty``. Pretrained W and b must be loaded afterwards.

        Raises:
            RuntimeError: If the layer is merged, or a tensor is computed from other tensors.
        """
        if not hasattr(self, "shift"):  # called by nn.Linear's constructor
            super().reset_parameters()
            return
        if self.merged:
            raise RuntimeError("FusedRLRRLinear: cannot reset while it is merged; unmerge first")
        check_own_parameters(self, "reset", "weight", "bias", "scale_out", "scale_in", "shift")
        super().reset_parameters()
        self.reset_scales()

    @torch.no_grad()
    def reset_scales(self) -> None:
        """Initialise u and v anew as ``init`` says and set f to zero. Does nothing on the meta device.

        Raises:
            RuntimeError: If one of them is computed from other tensors.
        """
        check_own_parameters(self, "reset", "scale_out", "scale_in", "shift")
        if self.shift.is_meta:
            return
        self.shift.zero_()
        draw_scales(self.init, self.scale_out, self.scale_in)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer.

        Args:
            x: ``[..., K]``.

        Returns:
            y ``[..., N]`` in x's dtype, or in autocast's.

        Raises:
            RuntimeError: If the layer is merged and in training mode: u, v and f would not train.
        """
        if self.merged or not self.enabled:
            return self._plain(x)
        u = self.scale_out if self.scaling == 1 else self.scale_out * self.scaling
        return rescaled_linear(x, self.weight, u, self.scale_in, self.bias, self.shift)

    def _plain(self, x: Tensor) -> Tensor:
        if self.merged and self.enabled and self.training and torch.is_grad_enabled():
            raise RuntimeError("FusedRLRRLinear: u, v, f are merged and would not train; unmerge first")
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if self.merged and not self.enabled:
            if self._frozen is None:
                raise RuntimeError("FusedRLRRLinear: disabled, but the frozen weight was not kept when merging")
            weight, bias = self._frozen
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @torch.inference_mode(False)  # else a merged layer could not be part of a backward pass
    @torch.no_grad()  # inside, as the other switches gradients on
    def merged_weight(self) -> tuple[Tensor, Tensor]:
        """Form W' ``[N, K]`` and b + f ``[N]`` in new memory, in float32, rounded once to the frozen weight's dtype.

        Raises:
            RuntimeError: If the layer is merged already.
        """
        if self.merged:
            raise RuntimeError("FusedRLRRLinear: u, v and f are already merged")
        dtype = self.weight.dtype
        scale_in = self.scale_in.view(self.groups, self.rank, self.in_features)
        sharding = route.sharding_of(self.weight)
        form = rescaled_weight if sharding is None else sharding.rescaled_weight
        weight = form(self.weight, self.scale_out * self.scaling, scale_in, dtype)
        bias = self.shift if self.bias is None else self.bias.to(self.shift.dtype) + self.shift
        return weight, bias.to(dtype, copy=True)

    def check_merge(self) -> None:
        """Check that :meth:`merge` can replace W and b.

        Raises:
            RuntimeError: If they are already merged, W or b is computed from other tensors, or FSDP manages them.
        """
        if self.merged:
            raise RuntimeError("FusedRLRRLinear: u, v and f are already merged")
        check_own_parameters(self, "merge", "weight", "bias")
        check_not_in_fsdp(self, "merge")

    def merge(self, keep: bool = True) -> None:
        """Replace W and b by W' and b + f, for inference at the cost of the plain layer.

        Args:
            keep: Keep W and b for :meth:`unmerge`, at the cost of a second weight in memory.

        Raises:
            RuntimeError: As :meth:`check_merge`.
        """
        self.check_merge()
        self._merge(keep)

    @torch.inference_mode(False)
    def _merge(self, keep: bool) -> None:
        weight, bias = self.merged_weight()
        self._frozen = (cast(nn.Parameter, self.weight), self.bias) if keep else None
        self.frozen_bias = self.bias is not None
        # new parameters: W may be tied to a layer that is not merged
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.merged = True

    @property
    def kept(self) -> bool:
        """Whether the layer is merged and has kept the frozen W and b."""
        return self._frozen is not None

    def check_unmerge(self) -> None:
        """Check that :meth:`unmerge` can replace W' and b + f.

        Raises:
            RuntimeError: If nothing is merged, W' is computed from other tensors, or FSDP manages it.
        """
        if not self.merged:
            raise RuntimeError("FusedRLRRLinear: nothing is merged")
        check_own_parameters(self, "unmerge", "weight", "bias")
        check_not_in_fsdp(self, "unmerge")

    def unmerge(self, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        """Undo :meth:`merge`: put the same W and b back.

        Args:
            weight: W ``[N, K]``, loaded anew; needed if it was not kept.
            bias: b ``[N]``, loaded anew; needed if it was not kept and the layer has one.

        Raises:
            RuntimeError: As :meth:`check_unmerge`; or if W was not kept and is not given.
            ValueError: If a weight or bias has another shape.
        """
        self.check_unmerge()
        if self._frozen is None:
            if weight is None:
                raise RuntimeError("FusedRLRRLinear: the frozen weight was not kept; give it to unmerge")
            if (bias is not None) is not self.frozen_bias:
                wanted = "the frozen bias" if self.frozen_bias else "none, as the frozen layer has none"
                raise ValueError(f"bias: expected {wanted}, got {'one' if bias is not None else 'none'}")
            for name, given, expected in (("weight", weight, self.weight.shape), ("bias", bias, self.shift.shape)):
                if given is not None and given.shape != expected:
                    raise ValueError(f"{name}: expected shape {list(expected)}, got {list(given.shape)}")
        self._unmerge(weight, bias)

    @torch.inference_mode(False)
    def _unmerge(self, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        if self._frozen is None:
            assert weight is not None
            self._frozen = _frozen_as(self.weight, weight), None if bias is None else _frozen_as(self.bias, bias)
        self.weight, self.bias = self._frozen  # type: ignore[assignment]  # nn.Linear's bias may be None
        self._frozen, self.merged = None, False

    @torch.inference_mode(False)
    def to_linear(self) -> nn.Linear:
        """Make a plain ``nn.Linear`` with a bias that computes the same. It shares no memory with this layer."""
        if self.merged:
            weight, bias = self.weight.detach().clone(), self.bias.detach().clone()
        else:
            weight, bias = self.merged_weight()
        linear = nn.Linear(self.in_features, self.out_features, True, "meta", weight.dtype)
        linear.weight, linear.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
        return linear.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedRLRRLinear:
        super()._apply(fn, recurse)
        if self._frozen is not None:
            weight, bias = self._frozen
            self._frozen = _moved(weight, fn), None if bias is None else _moved(bias, fn)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.merged:
            return
        if self._frozen is None:
            where = prefix.rstrip(".") or "model"
            raise RuntimeError(f"{where}: the frozen weight was not kept when merging; unmerge first")
        check_own_parameters(self, "give a state dict", "weight", "bias")
        # replaced in their places, so that the keys have the order of the unmerged layer
        for name, kept in zip(("weight", "bias"), self._frozen, strict=True):
            if kept is None:
                del destination[prefix + name]
            else:
                destination[prefix + name] = kept if keep_vars else kept.detach()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if self.merged:
            words = "model: it is merged; unmerge before loading"
            if words not in error_msgs:
                error_msgs.append(words)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    __prepare_scriptable__ = refuse_script

    def extra_repr(self) -> str:
        state = "" if self.enabled else ", disabled"
        state += ", merged" if self.merged else ""
        rank = "" if self.rank == 1 else f", rank={self.rank}"
        rank += "" if self.scaling == 1 else f", scaling={self.scaling:g}"
        return f"{super().extra_repr()}, groups={self.groups}{rank}, init={init_name(self.init)}{state}"


def _frozen_as(like: Tensor, values: Tensor) -> nn.Parameter:
    return nn.Parameter(route.laid_out_as(values, like).to(like), requires_grad=False)


def _moved(parameter: nn.Parameter, fn: Callable[[Tensor], Tensor]) -> nn.Parameter:
    """A parameter after ``nn.Module.to``: the same object if possible, so that tied parameters stay tied."""
    data = fn(parameter.data)
    if not torch._has_compatible_shallow_copy_type(parameter.data, data):
        return nn.Parameter(data, parameter.requires_grad)
    parameter.data = data
    return parameter
