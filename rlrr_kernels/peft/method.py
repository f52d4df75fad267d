"""RLRR as a method of PEFT, registered from outside: y = x (W * (1 + s u v))^T + b + f for each adapter.

Several active adapters add up: their u and v side by side are one u and v of the sum of their ranks.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, register_peft_method
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import Tensor, nn

from rlrr_kernels.backends.problem import MAX_RANK
from rlrr_kernels.backends.reference import accumulation_dtype, rescaled_weight
from rlrr_kernels.layers.options import check_groups, check_rank, check_scaling, draw_scales
from rlrr_kernels.layers.ownership import check_own_parameters
from rlrr_kernels.models.merge import ADDED_BIAS_REMEDY, has_effect
from rlrr_kernels.ops.linear import rescaled_linear
from rlrr_kernels.peft.base import call, check_base, is_conv1d, weight_of


def _add_peft_type(name: str) -> None:
    """Add a member to PEFT's enumeration of methods, which ``register_peft_method`` asks for and cannot extend."""
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    type.__setattr__(PeftType, name, member)  # enum's own refuses; from Python 3.12 on members are attributes
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member


if "RLRR" not in PeftType.__members__:
    _add_peft_type("RLRR")


@dataclass
class RlrrConfig(PeftConfig):
    """An RLRR adapter of PEFT.

    Attributes:
        r: Rank of u v, 1 to 128.
        scaling: s, by which u v is multiplied.
        target_modules, exclude_modules, layers_to_transform, layers_pattern: Which linears are adapted, as in
            ``HiraConfig`` of PEFT.
        modules_to_save: Modules that are trained and saved whole, as a head.
        init_weights: True or ``"identity"`` sets u = 0, so that the model starts as it was; False or ``"paper"`` draws
            u and v as the paper does, and the model starts differently.
        shift: Whether f is trained. Merging f gives a bias to layers that have none.
        rank_pattern: Name or regular expression of modules to a rank other than ``r``.
        groups: Number of equal blocks of W's rows with a v each.
        groups_pattern: Name or regular expression of modules to another number, as ``{"qkv": 3}`` for timm's ViTs.
    """

    r: int = 1
    scaling: float = 1.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    init_weights: bool | str = True
    shift: bool = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    groups: int = 1
    groups_pattern: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.RLRR
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if isinstance(self.target_modules, str) and (self.layers_to_transform, self.layers_pattern) != (None, None):
            raise ValueError("layers_to_transform, layers_pattern: expected none with a target_modules of type str")
        if self.init_weights not in (True, False, "identity", "paper"):
            raise ValueError(f"init_weights: expected True, False, 'identity' or 'paper', got {self.init_weights!r}")
        self.r, self.groups = check_rank(self.r, "r"), check_groups(self.groups)
        self.scaling = check_scaling(self.scaling)
        for name, check in (("rank_pattern", check_rank), ("groups_pattern", check_groups)):
            pattern = getattr(self, name)
            if not isinstance(pattern, dict):
                raise TypeError(f"{name}: expected a dict, got {type(pattern).__name__}")
            setattr(self, name, {key: check(value, f"{name}[{key!r}]") for key, value in pattern.items()})


class RlrrLayer(BaseTunerLayer):
    """What the RLRR layers of PEFT have in common: an adapter is a u ``[N, r]``, a v ``[groups, r, K]`` and an f."""

    adapter_layer_names = ("rlrr_scale_out", "rlrr_scale_in", "rlrr_shift")
    other_param_names = ("r", "scaling")

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.rlrr_scale_out = nn.ParameterDict()
        self.rlrr_scale_in = nn.ParameterDict()
        self.rlrr_shift = nn.ParameterDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        #: the frozen W as the layer stores it, and b, while adapters are merged
        self._frozen: tuple[Tensor, Tensor | None] | None = None
        self.out_features, self.in_features = weight_of(base_layer).shape

    def update_layer(self, adapter_name: str, r: int, groups: int, config: RlrrConfig) -> None:
        """Create an adapter.

        Args:
            adapter_name: Its name.
            r: Its rank.
            groups: Number of equal blocks of W's rows with a v each, a divisor of N.
            config: Scaling, initialisation and whether f is there.
        """
        wide = accumulation_dtype(weight_of(self.base_layer).dtype)
        u = torch.empty(self.out_features, r, dtype=wide)
        v = torch.empty(groups, r, self.in_features, dtype=wide)
        draw_scales("paper" if config.init_weights in (False, "paper") else "identity", u, v)
        # not 1.0: under dynamic=True TorchDynamo compares a float in a guard, and compiles once more
        self.r[adapter_name], self.scaling[adapter_name] = r, 1 if config.scaling == 1 else config.scaling
        self.rlrr_scale_out[adapter_name] = nn.Parameter(u)
        self.rlrr_scale_in[adapter_name] = nn.Parameter(v)
        if config.shift:
            self.rlrr_shift[adapter_name] = nn.Parameter(torch.zeros(self.out_features, dtype=wide))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def adapter_of(self, names: Sequence[str]) -> tuple[Tensor, Tensor, Tensor | None]:
        """The sum of adapters as one: s u ``[N, r]``, v ``[groups, r, K]`` and f ``[N]`` or None."""
        us, vs = [], [self.rlrr_scale_in[name] for name in names]
        for name in names:
            u, scaling = self.rlrr_scale_out[name], self.scaling[name]
            us.append(u if scaling == 1 else u * scaling)
        shifts = [self.rlrr_shift[name] for name in names if name in self.rlrr_shift]
        shift = shifts[0] if shifts else None
        for other in shifts[1:]:
            shift = shift + other
        if len(names) == 1:
            return us[0], vs[0], shift
        groups = math.lcm(*(v.shape[0] for v in vs))
        vs = [v if v.shape[0] == groups else v.repeat_interleave(groups // v.shape[0], 0) for v in vs]
        return torch.cat(us, 1), torch.cat(vs, 1), shift


class RlrrLinear(nn.Module, RlrrLayer):
    """A frozen linear, or a ``Conv1D`` of transformers, with RLRR adapters.

    Args:
        base_layer: The frozen layer. It is called where no adapter acts, or, with the adapted pass between its hooks,
            if it has any.
        adapter_name, r, groups, config: As :meth:`RlrrLayer.update_layer`.
    """

    base_layer: Any
    active_adapters: list[str]

    def __init__(self, base_layer: nn.Module, adapter_name: str, r: int, groups: int, config: RlrrConfig) -> None:
        super().__init__()
        RlrrLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, groups, config)

    def forward(self, x: Tensor, adapter_names: list[str] | None = None) -> Tensor:
        """Compute the layer.

        Args:
            x: ``[..., K]``.
            adapter_names: The adapter of each row of the first dimension, ``"__base__"`` for none.

        Returns:
            y ``[..., N]`` in x's dtype, or in autocast's.

        Raises:
            ValueError: If ``adapter_names`` are given while adapters are merged, or their number is not that of rows;
                or if adapters that act together have more than 128 ranks in sum.
            RuntimeError: If the frozen layer was given a forward of its own.
        """
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x)
        if adapter_names is not None:
            return self._mixed(x, adapter_names)
        return self.base_layer(x) if self.merged else self._adapted(x, self.active_adapters)

    def _adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        names = [name for name in names if name in self.rlrr_scale_out]
        if not names:
            return self.base_layer(x)
        if len(names) > 1 and (rank := sum(self.r[name] for name in names)) > MAX_RANK:
            raise ValueError(f"adapters {', '.join(names)}: expected ranks of at most {MAX_RANK} in sum, got {rank}")
        u, v, shift = self.adapter_of(names)
        base = self.base_layer
        # W is read when a hook before it has set it (prune, spectral_norm)
        return call(base, lambda x: rescaled_linear(x, weight_of(base), u, v, base.bias, shift), x)

    def _mixed(self, x: Tensor, adapter_names: list[str]) -> Tensor:
        if self.merged:
            raise ValueError("adapter_names: expected none while adapters are merged; call unmerge_adapter first")
        if len(adapter_names) != len(x):
            raise ValueError(f"adapter_names: expected {len(x)}, one for each row of x, got {len(adapter_names)}")
        if not adapter_names:
            return self.base_layer(x)
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(adapter_names):
            rows.setdefault(name, []).append(row)
        parts = torch.cat([self._adapted(x[which], [name]) for name, which in rows.items()])
        order = [row for which in rows.values() for row in which]
        return parts[torch.tensor(order, device=x.device).argsort()]

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace W and b by W' and b + f of all merged adapters, formed from the frozen W in float32.

        Args:
            safe_merge: Check that the merged values are finite before they replace anything.
            adapter_names: What to merge; the active adapters by default.

        Raises:
            ValueError: If a value is not finite, with ``safe_merge``.
            RuntimeError: If W or b is computed from other tensors (parametrize, prune).
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.rlrr_scale_out]
        if not names:
            return
        base = self.base_layer
        check_own_parameters(base, "merge", "weight", "bias")
        weight, bias = self._frozen or (base.weight.data, None if base.bias is None else base.bias.data)
        dtype = weight.dtype
        u, v, shift = self.adapter_of([*self.merged_adapters, *names])
        merged = rescaled_weight(weight.mT if is_conv1d(base) else weight, u, v, dtype)
        merged = merged.mT.contiguous() if is_conv1d(base) else merged
        merged_bias = bias
        if shift is not None and has_effect("bias", shift):
            total = shift if bias is None else bias.to(shift.dtype) + shift
            merged_bias = total.to(dtype, copy=True)
        if safe_merge and not all(bool(t.isfinite().all()) for t in (merged, merged_bias) if t is not None):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {','.join(names)} seems to be broken")
        if bias is None and merged_bias is not None:
            warnings.warn(
                "merging gives a bias that holds f to layers that had none, which the library that built the model "
                f"does not build: {ADDED_BIAS_REMEDY}",
                stacklevel=4,  # the decorators are callers, too
            )
        self._frozen = weight, bias
        base.weight.data = merged
        if bias is not None:
            base.bias.data = merged_bias
        else:
            base.bias = None if merged_bias is None else nn.Parameter(merged_bias, requires_grad=False)
        self.merged_adapters.extend(names)

    @torch.inference_mode(False)
    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the frozen W and b back, bit for bit."""
        if self._frozen is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=4)
            return
        base = self.base_layer
        weight, bias = self._frozen
        base.weight.data = weight.to(base.weight)
        if bias is None:
            base.bias = None
        else:
            base.bias.data = bias.to(base.weight)
        self._frozen = None
        self.merged_adapters.clear()

    def __repr__(self) -> str:
        return "rlrr." + super().__repr__()


class RlrrModel(BaseTuner):
    """A model with RLRR adapters, as ``peft.get_peft_model`` makes it from an :class:`RlrrConfig`."""

    prefix = "rlrr_"
    tuner_layer_cls = RlrrLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(
        self,
        config: RlrrConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        layer: Any = target
        if not isinstance(layer, RlrrLayer):
            if isinstance(parent, nn.MultiheadAttention):
                raise TypeError(
                    f"{current_key}: nn.MultiheadAttention reads the weight of this layer and does not call it"
                )
            check_base(layer, current_key)
        r = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), current_key), config.r)
        key = get_pattern_key(config.groups_pattern.keys(), current_key)
        groups = config.groups_pattern.get(key, config.groups)
        n = len(weight_of(layer.base_layer if isinstance(layer, RlrrLayer) else layer))
        if n % groups:
            name = f"groups_pattern[{key!r}]" if key in config.groups_pattern else "groups"
            raise ValueError(f"{current_key}: {name}: expected a divisor of out_features = {n}, got {groups}")
        if isinstance(layer, RlrrLayer):
            layer.update_layer(adapter_name, r, groups, config)
            return
        self._replace_module(parent, target_name, RlrrLinear(target, adapter_name, r, groups, config), target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Give each layer the ``adapter_names`` that a mixed batch was called with; PEFT's wrappers call this.

        Raises:
            ValueError: If the model is in training mode, or an adapter does not exist.
        """
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers = [m for m in self.modules() if isinstance(m, (RlrrLayer, AuxiliaryTrainingWrapper))]
        known = {name for m in layers if isinstance(m, RlrrLayer) for name in m.rlrr_scale_out}
        unknown = set(names) - known - {"__base__"}
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        beams = kwargs.get("num_beams")
        beams = beams if isinstance(beams, int) else 1
        encoder = getattr(self.model, "get_encoder", lambda: None)()
        # beam search repeats the rows of the decoder only; a model without an encoder returns itself
        in_encoder = set() if encoder is None or encoder is self.model else set(encoder.modules())
        handles = []
        try:
            for layer in layers:
                rows = names if layer in in_encoder else [name for name in names for _ in range(beams)]
                hook = partial(_with_adapter_names, rows)
                handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _with_adapter_names(names: list[str], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, {**kwargs, "adapter_names": names}


register_peft_method(name="rlrr", config_cls=RlrrConfig, model_cls=RlrrModel)
