"""``RLRRConfig``: which layers of a model are adapted and how, checked when it is made, and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlrr_kernels.layers.options import Init, check_groups, check_init, check_rank, check_scaling

#: Dtypes in which frozen weights can be kept, by name.
FROZEN_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class RLRRConfig:
    """Which layers are adapted, and how.

    Attributes:
        target_modules: Names of ``nn.Linear`` modules, or shell patterns over full names (``"blocks.*.mlp.fc1"``).
            None: those of the published method, for the families in :mod:`rlrr_kernels.models.selection`.
        exclude_modules: Names or patterns of linears and norms to leave out, or of modules that hold them.
        groups: Pattern over linears to the number of row blocks with a v each. None: three for the fused qkv of a
            plain vision transformer (published as three layers), one for Swin's (published as one). Linears that
            match no pattern have one.
        norm_affine: Whether to train a scale and a shift after each LayerNorm (SSF). True: after every LayerNorm of
            the model. None: after those of the published method if ``target_modules`` is None, else after none. Other
            norms (RMSNorm, BatchNorm, ...) get no affine, and a warning says so. A LayerNorm that computes something
            else (ConvNeXt's over channels) must be named in ``exclude_modules``.
        patch_affine: Whether to train a scale and a shift after the patch embedding. None: as published.
        init: Start of u and v, see :class:`~rlrr_kernels.FusedRLRRLinear`. Affines start at the identity with
            ``"identity"``, else as published.
        train_head: Whether to train the head, which is new for each task. True: what ``model.get_classifier()``
            returns (timm), or the modules called ``classifier``, ``head``, ``heads``, ``fc`` or ``score``
            (torchvision, transformers; :data:`rlrr_kernels.models.modules.HEAD_NAMES` lists all). Names of modules, or
            patterns over full names: those instead, as PEFT's ``modules_to_save``. Patterns in ``target_modules`` and
            affines do not reach into the head, whether it trains or not; a linear of the head that is named in full
            is adapted.
        train_batch_norm: Whether to train the weights, biases and running statistics of batch norms and similar
            layers, and save them with the adapter. Otherwise they are frozen and stay in evaluation mode, also after
            ``model.train()``. Those in the head train with it.
        frozen_dtype: Dtype (or its name) in which to keep the frozen weights and biases of the adapted linears.
            None: as they are.
        rank: r in S = 1 + s u v, 1 (as published) to 128.
        scaling: s, which is not trained: a finite number above 0. 1, the default, is the published method.

    Raises:
        TypeError: If a value is of another type.
        ValueError: If a value is not one of those above.
    """

    target_modules: Sequence[str] | None = None
    exclude_modules: Sequence[str] = ()
    groups: Mapping[str, int] | None = None
    norm_affine: bool | None = None
    patch_affine: bool | None = None
    init: Init = "paper"
    train_head: bool | str | Sequence[str] = True
    train_batch_norm: bool = False
    frozen_dtype: torch.dtype | None = None
    rank: int = 1
    scaling: float = 1.0

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))
        if not isinstance(self.train_head, bool):
            object.__setattr__(self, "train_head", _head_names(self.train_head))
        if self.groups is not None:
            object.__setattr__(self, "groups", _groups(self.groups))
        for name, allowed in (
            ("norm_affine", (True, False, None)),
            ("patch_affine", (True, False, None)),
            ("train_batch_norm", (True, False)),
        ):
            if not any(getattr(self, name) is value for value in allowed):
                raise TypeError(f"{name}: expected one of {allowed}, got {getattr(self, name)!r}")
        check_init(self.init)
        object.__setattr__(self, "rank", check_rank(self.rank))
        object.__setattr__(self, "scaling", check_scaling(self.scaling))
        if self.frozen_dtype is not None:
            object.__setattr__(self, "frozen_dtype", _frozen_dtype(self.frozen_dtype))

    def __hash__(self) -> int:
        # equal configs must have equal hashes, and equality of groups ignores their order
        groups = None if self.groups is None else frozenset(self.groups.items())
        others = (getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "groups")
        return hash((groups, *others))

    @property
    def head_names(self) -> tuple[str, ...]:
        """The names in ``train_head``; empty if it is True or False."""
        return self.train_head if isinstance(self.train_head, tuple) else ()

    def to_dict(self) -> dict[str, Any]:
        """Return the config as lists, strings and numbers. A function as ``init`` becomes ``"custom"``."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("target_modules", "exclude_modules"):
            values[name] = None if values[name] is None else list(values[name])
        values["train_head"] = list(self.head_names) or self.train_head
        values["groups"] = None if self.groups is None else dict(self.groups)
        values["init"] = "custom" if callable(self.init) else self.init
        if self.frozen_dtype is not None:
            values["frozen_dtype"] = str(self.frozen_dtype).removeprefix("torch.")
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RLRRConfig:
        """Return the config that :meth:`to_dict` gave these values for. A ``"custom"`` init becomes ``"paper"``.

        Raises:
            TypeError: If a value is of a wrong type.
            ValueError: If a field is unknown, or a value is not allowed.
        """
        unknown = sorted(values.keys() - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"RLRRConfig: unknown field {unknown[0]!r}")
        given = dict(values)
        if given.get("init") == "custom":
            given["init"] = "paper"
        return cls(**given)


def _patterns(name: str, given: Any) -> tuple[str, ...] | None:
    if given is None and name == "target_modules":
        return None
    patterns = (given,) if isinstance(given, str) else given
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{name}: expected a sequence of names or patterns, got {given!r}")
    return tuple(patterns)


def _head_names(given: Any) -> tuple[str, ...]:
    names = (given,) if isinstance(given, str) else given
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) for name in names):
        raise TypeError(f"train_head: expected True, False, or names of modules, got {given!r}")
    return tuple(names)


def _groups(given: Any) -> dict[str, int]:
    if not isinstance(given, Mapping):
        raise TypeError(f"groups: expected a mapping of patterns to numbers of groups, got {given!r}")
    for pattern in given:
        if not isinstance(pattern, str):
            raise TypeError(f"groups: expected patterns of type str, got {pattern!r}")
    return {pattern: check_groups(count, f"groups[{pattern!r}]") for pattern, count in given.items()}


def _frozen_dtype(given: Any) -> torch.dtype:
    for name, dtype in FROZEN_DTYPES.items():
        if given is dtype or given == name:
            return dtype
    raise ValueError(f"frozen_dtype: expected one of {', '.join(FROZEN_DTYPES)}, got {given!r}")
