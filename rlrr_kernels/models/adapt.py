"""Put the method into a whole model, and say what trains."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rlrr_kernels.layers.linear import FusedRLRRLinear
from rlrr_kernels.layers.norm import SSFAffine, SSFLayerNorm
from rlrr_kernels.layers.ownership import check_linear
from rlrr_kernels.models import bypass, running
from rlrr_kernels.models.architectures import Architecture, architecture_of
from rlrr_kernels.models.config import RLRRConfig
from rlrr_kernels.models.heads import check_head, head
from rlrr_kernels.models.wrappers import check_replaceable, plain_name, unwrapped

#: The modules that train something; each has ``enabled``.
Adapter = FusedRLRRLinear | SSFLayerNorm | SSFAffine

#: Where timm's patch embeddings have their norm, which is where the affine goes.
PATCH_NORM = "patch_embed.norm"


def apply_rlrr(
    model: nn.Module, config: RLRRConfig | None = None, *, example_input: Any = None, **options: Any
) -> nn.Module:
    """Make a model train by RLRR, in place: u, v, f of its linears, the affines, and the head; nothing else.

    Args:
        model: a timm ViT, DeiT, CLIP-style ViT, DINOv2 or v3, EVA-02, BEiT, Swin or Swin V2; or
            any module, with ``target_modules`` named. May be compiled, or wrapped by ``DataParallel``.
        config: see :class:`~rlrr_kernels.RLRRConfig`; by default the published method.
        example_input: what one calls ``model`` with (a tensor, or a tuple of arguments; its
            values do not matter). The model is tried with it, without data, to find layers that
            its code bypasses. Not needed for timm's image models. Without it, a bypassed layer
            of another model is warned of in the first training pass.
        **options: fields of the config, in place of ``config``'s.

    Returns:
        The same model, with the config as ``model.rlrr_config`` (of what is inside of a wrapper).

    Raises:
        TypeError: no ``target_modules`` for a model of another family; an option that is none;
            a chosen linear that computes something else than ``nn.Linear`` or has no weight of its own, see
            :meth:`FusedRLRRLinear.from_linear`; a LayerNorm of a kind that has no affine here; a model that
            DDP or FSDP has taken over.
        ValueError: a pattern that matches nothing, groups that do not divide a layer, a model that already
            holds adapters or a lazy module that was never called, that has classes and no head to train, or
            whose code reads the weights of a chosen layer instead of calling it. The model is then as it was.

    Warns:
        UserWarning: norms that would have an affine were they LayerNorms.
    """
    if not isinstance(config, RLRRConfig | None):
        raise TypeError(
            f"config: expected an RLRRConfig, got {type(config).__name__}; linears are named in target_modules"
        )
    config = dataclasses.replace(config or RLRRConfig(), **options)
    check_replaceable(model)
    given, model = model, unwrapped(model)
    if next(adapters(model), None) is not None:
        raise ValueError("model: it already holds RLRR adapters; apply_rlrr goes on a plain model")
    lazy = next((name for name, parameter in model.named_parameters() if is_lazy(parameter)), None)
    if lazy is not None:
        raise ValueError(f"model: {lazy} has no shape yet, as its module is lazy; call the model once before")
    classifier = head(model, config.head_names)
    if config.train_head:
        check_head(model, classifier)
    plan = _Plan.of(model, config, classifier)
    separate_bias = qkv_readers(model, plan.linears)
    try:
        for module in separate_bias:
            module.qkv_bias_separate = True
        tried = _try(model, plan, example_input)
    except BaseException:
        for module in separate_bias:
            module.qkv_bias_separate = False
        raise

    model.requires_grad_(False)
    made: dict[int, nn.Module] = {}
    for name, groups in plan.linears.items():
        linear: Any = model.get_submodule(name)
        if id(linear) not in made:
            made[id(linear)] = FusedRLRRLinear.from_linear(
                linear, groups=groups, init=config.init, dtype=config.frozen_dtype
            )
        replace(model, name, made[id(linear)])
    for name, norm in plan.norms.items():
        if id(norm) not in made:
            made[id(norm)] = _norm_adapter(norm, model, config)
        replace(model, name, made[id(norm)])
    changed: Any = model
    changed.rlrr_config = config
    if config.train_head:
        for parameter in head_parameters(model).values():
            parameter.requires_grad_(True)
    if config.train_batch_norm:
        for _, module in running.norms(model):
            module.requires_grad_(True)
    if not tried:
        bypass.Watch(model, plan.names)
    changed._rlrr_base = Base(
        head={},
        separate_bias=[name for name, module in model.named_modules() if module in separate_bias],
        fast_paths=_leave_fast_path(model),
    )
    running.hold(model)
    remember_head(model)
    if plan.other_norms:
        warnings.warn(
            f"norm_affine: no affine after {bypass.shown(plan.other_norms)}, which are norms but no LayerNorm and stay "
            "frozen as they are (name them in exclude_modules if that is meant)",
            stacklevel=2,
        )
    return given


def remember_head(model: nn.Module) -> None:
    """Take the head, and norms that train, as they are now for the base model's, which
    :func:`~rlrr_kernels.disable_adapter` puts back.
    """
    trained = {name: p for name, p in head_parameters(model).items() if p.requires_grad}
    base: Any = model
    base._rlrr_base.head = {name: p.detach().clone() for name, p in trained.items() if not p.is_meta}
    base._rlrr_base.norms = {name: t.detach().clone() for name, t in trained_norms(model).items() if not t.is_meta}


def trained_norms(model: nn.Module) -> dict[str, Tensor]:
    """Full name -> running statistic of all that trains, and trained parameter of such a norm outside of the head."""
    outer = {id(parameter) for parameter in head(model).parameters()}
    modules = dict(running.trained(model))
    values = running.statistics(modules.items())
    for name, module in modules.items():
        own = module.named_parameters(name, recurse=False)
        values |= {full: p for full, p in own if p.requires_grad and id(p) not in outer}
    return values


@dataclass
class Base:
    """What :func:`~rlrr_kernels.disable_adapter` puts back besides switching adapters off.

    Attributes:
        head: the trained parameters of the head as they were.
        norms: what :func:`trained_norms` gave.
        separate_bias: attention modules whose ``qkv_bias_separate`` was set.
        fast_paths: ``nn.TransformerEncoderLayer`` modules, and what their switch of the fast path was.
    """

    head: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    separate_bias: list[str] = field(default_factory=list)
    fast_paths: dict[str, int] = field(default_factory=dict)


@dataclass
class _Plan:
    """Names of the linears with their groups, and of the norms: nothing is changed yet."""

    linears: dict[str, int] = field(default_factory=dict)
    norms: dict[str, nn.Module] = field(default_factory=dict)
    other_norms: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [*self.linears, *self.norms]

    @classmethod
    def of(cls, model: nn.Module, config: RLRRConfig, classifier: nn.Module) -> _Plan:
        known = architecture_of(model)
        if known is None and config.target_modules is None:
            raise TypeError(
                f"model: expected a ViT, EVA, BEiT or Swin of timm, got {type(model).__name__}. "
                "For another model name the linears in target_modules"
            )
        published = known if known is not None and config.target_modules is None else None
        # a layer used in two places has two names; the model itself has none and cannot be replaced in place
        modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
        plan = cls()
        groups = config.groups if config.groups is not None else (known.groups if known else {})
        # the projection inside of nn.MultiheadAttention is read, never called
        read = nn.modules.linear.NonDynamicallyQuantizableLinear
        linears = [name for name, m in modules.items() if isinstance(m, nn.Linear) and type(m) is not read]
        for pattern in published.linears if published else config.target_modules or ():
            matches = _matching([pattern], linears)
            if not matches and published is None:
                raise ValueError(f"target_modules: {pattern!r} matches no nn.Linear of {type(model).__name__}")
            for name in matches:
                if not (published and _matching(published.excluded, [name])):
                    plan.linears[name] = 1
        plan._add_norms(model, config, published, modules)
        plan._exclude(config.exclude_modules, type(model).__name__)
        plan._leave_head(classifier, modules, config.target_modules or ())
        if not plan.linears:
            raise ValueError(
                f"target_modules: they leave no nn.Linear of {type(model).__name__} to adapt "
                "(those of its head are adapted only where they are named in full)"
            )
        plan._settle_norms()
        for name in plan.linears:
            try:
                check_linear(modules[name], name)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{error}. Name it in exclude_modules to leave it as it is") from None
            plan.linears[name] = _groups_of(name, modules[name], groups)
        if config.groups is not None:
            for pattern in config.groups:
                if not _matching([pattern], plan.linears):
                    raise ValueError(f"groups: {pattern!r} matches no adapted nn.Linear of {type(model).__name__}")
        return plan

    def _exclude(self, patterns: Iterable[str], model: str) -> None:
        for pattern in patterns:
            out = _matching([pattern, f"{pattern}.*"], self.names)
            if not out:
                raise ValueError(f"exclude_modules: {pattern!r} matches nothing that would be adapted in {model}")
            for name in out:
                self.linears.pop(name, None)
                self.norms.pop(name, None)

    def _leave_head(self, classifier: nn.Module, modules: Mapping[str, nn.Module], named: Iterable[str]) -> None:
        """Patterns do not reach into the head, where they would freeze weights that are new; full names do."""
        inside = {id(module) for module in classifier.modules()}
        for name in self.names:
            if id(modules.get(name)) in inside and plain_name(name) not in named:
                self.linears.pop(name, None)
                self.norms.pop(name, None)

    def _settle_norms(self) -> None:
        """Keep the LayerNorms; ``TypeError`` or ``ValueError`` for those that have no affine here."""
        refused: dict[str, TypeError | ValueError] = {}
        for name, norm in list(self.norms.items()):
            if isinstance(norm, nn.LayerNorm):
                try:
                    SSFLayerNorm.check(norm, name)
                except (TypeError, ValueError) as error:
                    refused[name] = error
            elif name != PATCH_NORM:
                self.other_norms.append(name)
                del self.norms[name]
        if refused:
            first = next(iter(refused.values()))
            raise type(first)(
                f"{first}. Name {bypass.shown(list(refused))} in exclude_modules to leave it as it is, or set "
                "norm_affine=False"
            )

    def _add_norms(
        self,
        model: nn.Module,
        config: RLRRConfig,
        published: Architecture | None,
        modules: dict[str, nn.Module],
    ) -> None:
        norms = [name for name, module in modules.items() if _is_norm(module) and name != PATCH_NORM]
        chosen: Iterable[str] = ()
        if config.norm_affine is None and published is not None:
            chosen = _matching(published.norms, norms)
        elif config.norm_affine:
            chosen = norms
        self.norms = {name: modules[name] for name in chosen}
        wanted = config.patch_affine
        if wanted is None:
            wanted = published is not None and published.patch_affine
        if wanted:
            norm = modules.get(PATCH_NORM, nn.Identity())
            excluded = _matching(config.exclude_modules, [PATCH_NORM, "patch_embed"])
            fits = PATCH_NORM in modules and isinstance(norm, (nn.Identity, nn.LayerNorm))
            if not fits and not excluded:
                raise ValueError(
                    f"patch_affine: {type(model).__name__} has no {PATCH_NORM} that is nothing or a LayerNorm; "
                    "set patch_affine=False"
                )
            self.norms[PATCH_NORM] = norm


def _matching(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    patterns = list(patterns)
    return [name for name in names if any(fnmatchcase(plain_name(name), pattern) for pattern in patterns)]


def _is_norm(module: nn.Module) -> bool:
    """A LayerNorm, or what is called a norm and has a weight of its own."""
    other = "Norm" in type(module).__name__ and next(module.parameters(recurse=False), None) is not None
    return isinstance(module, nn.LayerNorm) or other


def _groups_of(name: str, linear: Any, groups: Mapping[str, int]) -> int:
    count = next((count for pattern, count in groups.items() if _matching([pattern], [name])), 1)
    rows = linear.out_features
    if rows % count:
        raise ValueError(f"groups: {count} does not divide the {rows} rows of {name}")
    return count


def qkv_readers(model: nn.Module, linears: Iterable[str]) -> list[Any]:
    """Attention modules of EVA, BEiT and Swin V2 that call qkv only if its bias is added apart."""
    parents = [model.get_submodule(name.rpartition(".")[0]) for name in linears if name.endswith(".qkv")]
    return [parent for parent in parents if getattr(parent, "qkv_bias_separate", None) is False]


def _leave_fast_path(model: nn.Module) -> dict[str, int]:
    """In evaluation PyTorch's encoder layer reads its linears' weights itself, unless this says it cannot."""
    left: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer) and next(adapters(module), None) is not None:
            left[name] = module.activation_relu_or_gelu
            module.activation_relu_or_gelu = 0
    return left


def _try(model: nn.Module, plan: _Plan, example_input: Any) -> bool:
    """Whether the model could be tried; ``ValueError`` if it then bypassed a chosen layer."""
    inputs = bypass.example_input(model) if example_input is None else example_input
    if inputs is None:
        return False
    try:
        missing = bypass.uncalled(model, plan.names, inputs)
    except Exception as error:
        if example_input is not None:
            raise ValueError(f"example_input: {type(model).__name__} cannot be run on it: {error}") from error
        return False
    if missing:
        raise ValueError(f"model: {bypass.describe(model, missing)}")
    return True


def _norm_adapter(norm: nn.Module, model: nn.Module, config: RLRRConfig) -> SSFLayerNorm | SSFAffine:
    """The module that takes a norm's place: affines of a callable ``init`` start as published."""
    init = config.init if isinstance(config.init, str) else "paper"
    if isinstance(norm, nn.LayerNorm):
        device = next((p.device for p in model.parameters()), None)
        return SSFLayerNorm.from_layer_norm(norm, init=init, device=device)
    proj: Any = model.get_submodule("patch_embed.proj")
    weight: Tensor = proj.weight
    return SSFAffine(weight.shape[0], weight.device, weight.dtype, init=init).train(norm.training)


#: What is called around a module's forward and backward, where ``nn.Module`` keeps it.
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` at a full name, under the hooks of the module that was there."""
    parent, _, leaf = name.rpartition(".")
    replaced = vars(model.get_submodule(name))
    # the very dicts: whoever holds a hook's handle can still remove it
    vars(module).update({hooks: replaced[hooks] for hooks in _HOOKS})
    setattr(model.get_submodule(parent), leaf, module)


def adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """(name, module) of everything :func:`apply_rlrr` put in; a module used in two places comes once."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Adapter))


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name in the head -> parameter, without those of adapters."""
    return {
        f"{place}.{leaf}".removeprefix("."): parameter
        for place, module in head(model).named_modules()
        if not isinstance(module, Adapter)
        for leaf, parameter in module.named_parameters(recurse=False)
    }
