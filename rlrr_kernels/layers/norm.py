"""SSF's affine: fused with the LayerNorm before it, or alone, as after a patch embedding.

SSF (Lian et al., NeurIPS 2022, arXiv 2210.08823, Eq. 2) scales and shifts the features of a layer. The published code
of RLRR trains such an affine after each LayerNorm and after the patch embedding, besides the rescaled linears.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlrr_kernels.backends.reference import accumulation_dtype, compose_affine
from rlrr_kernels.layers.linear import refuse_script
from rlrr_kernels.layers.options import Init, check_init, init_name
from rlrr_kernels.ops import layer_norm


class _Affine(nn.Module):
    """The parameters s and t ``[D]`` and their initialisation, which both layers below have."""

    ssf_scale: nn.Parameter
    ssf_shift: nn.Parameter
    init: Init
    enabled: bool

    def _add_affine(self, dim: int, device: torch.device | str | None, dtype: torch.dtype | None, init: Init) -> None:
        check_init(init)
        wide = accumulation_dtype(torch.get_default_dtype() if dtype is None else dtype)
        self.enabled = True
        self.init = init
        self.ssf_scale = nn.Parameter(torch.empty(dim, device=device, dtype=wide))
        self.ssf_shift = nn.Parameter(torch.empty(dim, device=device, dtype=wide))
        self.reset_affine()

    @torch.no_grad()
    def reset_affine(self) -> None:
        """Initialise s and t anew as ``init`` says. Does nothing on the meta device."""
        if self.ssf_scale.is_meta:
            return
        if callable(self.init):
            self.init(self.ssf_scale, self.ssf_shift)
        elif self.init == "identity":
            self.ssf_scale.fill_(1.0)
            self.ssf_shift.zero_()
        else:
            self.ssf_scale.normal_(1.0, 0.02)
            self.ssf_shift.normal_(0.0, 0.02)

    def reset_parameters(self) -> None:
        """Initialise all parameters anew: s and t as :meth:`reset_affine`, a LayerNorm's w and b to 1 and 0."""
        self.reset_affine()

    __prepare_scriptable__ = refuse_script


class SSFLayerNorm(nn.LayerNorm, _Affine):
    """y = LN(x) * s + t, with the LayerNorm's own weight and bias frozen and s, t trained.

    A drop-in replacement for ``nn.LayerNorm`` over the last dimension: same first arguments, same ``weight`` and
    ``bias`` keys. On an NVIDIA GPU one kernel applies both affines in float32. Elsewhere, and under
    ``torch.compile``, which fuses it itself, PyTorch's LayerNorm computes it with the weight w s and the bias b s + t,
    formed in float32. Backward needs what LayerNorm's needs: x and two numbers for each row. Source: SSF, Eq. 2.

    Args:
        normalized_shape: D, or a sequence of that one number.
        eps, elementwise_affine, bias, device, dtype: as ``nn.LayerNorm`` takes them.
        init: ``"paper"`` draws s from N(1, .02) and t from N(0, .02). ``"identity"`` sets them to 1 and 0, so that
            the layer starts as the plain one. A callable gets ``(ssf_scale, ssf_shift)`` and fills both in place.

    Attributes:
        weight, bias: w and b ``[D]`` or None, frozen.
        ssf_scale, ssf_shift: s and t ``[D]``, trained, in float32 (float64 with a float64 weight).
        enabled: if False, the layer computes the frozen LayerNorm, bit for bit.
        autocast_output: if True, the result has autocast's dtype under autocast, rounded once, instead of the frozen
            layer's float32. It saves a conversion where only linear layers read the result. ``apply_rlrr`` sets it in
            the blocks where that is so.
        base: the class that this layer replaces: ``nn.LayerNorm``, or one of timm's.

    Raises:
        ValueError: If ``normalized_shape`` has more than one dimension, or ``init`` is an unknown name.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        init: Init = "paper",
    ) -> None:
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        if len(shape) != 1:
            raise ValueError(f"normalized_shape: expected one dimension, got {list(shape)}")
        super().__init__(shape, eps, elementwise_affine, bias, device, dtype)
        self.base: type[nn.LayerNorm] = nn.LayerNorm
        self.autocast_output = False
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self._add_affine(shape[0], device, dtype, init)

    @classmethod
    def from_layer_norm(
        cls, norm: nn.LayerNorm, *, init: Init = "paper", device: torch.device | str | None = None
    ) -> SSFLayerNorm:
        """Make a layer that shares and freezes the weight and bias of ``norm``.

        Args:
            norm: the layer to replace: an ``nn.LayerNorm``, timm's ``LayerNorm``, or timm's ``LayerNormFp32`` (which
                computes in float32 whatever x is), over one dimension. Its parameters are not copied.
            init: as in the constructor.
            device: of s and t, if ``norm`` has no weight whose device they could take.

        Raises:
            TypeError: If ``norm`` is of another class, a subclass of these included.
            ValueError: As the constructor.
        """
        cls.check(norm)
        like = torch.empty(0, device=device) if norm.weight is None else norm.weight
        layer = cls(norm.normalized_shape, norm.eps, False, device="meta", init=init)
        norm.requires_grad_(False)
        layer.base = type(norm)
        layer.elementwise_affine = norm.elementwise_affine
        layer.weight, layer.bias = norm.weight, norm.bias
        # attributes of a subclass, such as timm's _fast_norm
        vars(layer).update({name: value for name, value in vars(norm).items() if name not in vars(layer)})
        layer._add_affine(norm.normalized_shape[0], like.device, like.dtype, init)
        return layer.train(norm.training)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "ssf_scale"):  # nn.LayerNorm's constructor calls this before it exists
            self.reset_affine()

    @staticmethod
    def check(norm: nn.LayerNorm, name: str = "norm") -> None:
        """Check that :meth:`from_layer_norm` can replace this layer.

        Args:
            norm: the layer.
            name: what errors call it.

        Raises:
            TypeError, ValueError: As from_layer_norm.
        """
        if not _is_plain(type(norm)):
            raise TypeError(
                f"{name}: expected nn.LayerNorm, timm.layers.LayerNorm or timm.layers.LayerNormFp32, got "
                f"{type(norm).__module__}.{type(norm).__qualname__}"
            )
        if len(norm.normalized_shape) != 1:
            raise ValueError(f"{name}: expected a LayerNorm over one dimension, got {list(norm.normalized_shape)}")

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer.

        Args:
            x: ``[..., D]``.

        Returns:
            y ``[..., D]`` in the dtype that the frozen LayerNorm returns: x's, or float32 where autocast runs
            LayerNorm in float32; with ``autocast_output``, in autocast's.

        Raises:
            TypeError: If x is not a floating-point tensor, or only one of x and the layer is float64.
            ValueError: If x's last dimension is not D, or x is on another device.
        """
        if not self.enabled:
            return self._frozen(x)
        layer_norm.check(x, self.ssf_scale)
        dtype = self._dtype(x)
        if x.dtype is torch.float64 and self._always_float32:
            x = x.float()
        elif (x.dtype is torch.float64) != (self.ssf_scale.dtype is torch.float64) and not self._always_float32:
            raise TypeError(
                f"x: float64 goes with float64 only, got {x.dtype} with ssf_scale of {self.ssf_scale.dtype}"
            )
        return layer_norm.affine_layer_norm(x, self.weight, self.bias, self.ssf_scale, self.ssf_shift, self.eps, dtype)

    def _frozen(self, x: Tensor) -> Tensor:
        """The frozen LayerNorm, computed by its own class; weights narrower than x are widened first."""
        weight = self.weight
        own_casts = self._always_float32 or getattr(self, "_fast_norm", False)
        if weight is None or weight.dtype.itemsize >= x.dtype.itemsize or own_casts:
            return self.base.forward(self, x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight.to(x.dtype), bias, self.eps)

    @property
    def _always_float32(self) -> bool:
        """Whether the frozen layer is timm's LayerNormFp32, which computes in float32 and returns x's dtype."""
        return self.base.__name__ == "LayerNormFp32"

    def _dtype(self, x: Tensor) -> torch.dtype:
        """The dtype of the result."""
        device = x.device.type
        if x.is_meta or x.dtype is torch.float64 or not torch.is_autocast_enabled(device):
            return x.dtype
        if self.autocast_output or getattr(self, "_fast_norm", False):
            return torch.get_autocast_dtype(device)
        # on the CPU autocast leaves LayerNorm alone
        return x.dtype if device == "cpu" or self._always_float32 else torch.float32

    @torch.no_grad()
    def to_layer_norm(self) -> nn.LayerNorm:
        """Make a layer of the original class that computes the same, with weight w s and bias b s + t.

        Both are formed in float32 and rounded once to the frozen weight's dtype (s's dtype without a weight). The
        result shares no memory with this layer, and always has a weight and a bias.
        """
        wide = accumulation_dtype(self.ssf_scale.dtype)
        dtype = wide if self.weight is None else self.weight.dtype
        composed = compose_affine(self.weight, self.bias, self.ssf_scale, self.ssf_shift, wide)
        norm = self.base(self.normalized_shape[0], eps=self.eps)
        norm.weight, norm.bias = (nn.Parameter(values.to(dtype, copy=True)) for values in composed)
        if hasattr(self, "_fast_norm"):
            norm._fast_norm = self._fast_norm
        return norm.train(self.training)

    def extra_repr(self) -> str:
        base = "" if self.base is nn.LayerNorm else f", base={self.base.__module__}.{self.base.__qualname__}"
        return f"{super().extra_repr()}, init={init_name(self.init)}{base}"


class SSFAffine(_Affine):
    """y = x * s + t over the last dimension, with s and t trained (SSF, Eq. 2).

    Args:
        dim: D.
        device: of s and t.
        dtype: of the layer before it; s and t are float32 (float64 with float64).
        init: as in :class:`SSFLayerNorm`.

    Attributes:
        ssf_scale, ssf_shift: s and t ``[D]``, trained.
        enabled: if False, the layer returns x itself.

    Raises:
        ValueError: If ``init`` is an unknown name.
    """

    def __init__(
        self,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        init: Init = "paper",
    ) -> None:
        super().__init__()
        self._add_affine(dim, device, dtype, init)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer.

        Args:
            x: ``[..., D]``.

        Returns:
            y ``[..., D]``, computed in s's dtype and returned in x's; under autocast in s's, as in the published code.

        Raises:
            TypeError: If x is not a floating-point tensor.
            ValueError: If x's last dimension is not D, or x is on another device.
        """
        if not self.enabled:
            return x
        layer_norm.check(x, self.ssf_scale)
        y = x * self.ssf_scale + self.ssf_shift
        return y if not x.is_meta and torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.ssf_scale.shape[0]}, init={init_name(self.init)}"


def _is_plain(kind: type) -> bool:
    """Whether a class is a LayerNorm over the last dimension and nothing else."""
    timm = sys.modules.get("timm.layers")  # a layer of timm's exists only if timm is imported
    return kind in (nn.LayerNorm, getattr(timm, "LayerNorm", None), getattr(timm, "LayerNormFp32", None))
