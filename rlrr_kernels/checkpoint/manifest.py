"""``adapter_config.json``: what an adapter was trained on and how, and checks that a model fits it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from rlrr_kernels._version import __version__
from rlrr_kernels.backends.reference import accumulation_dtype
from rlrr_kernels.io.checks import expect, expect_dict, expect_names, read_json
from rlrr_kernels.layers.linear import FusedRLRRLinear
from rlrr_kernels.layers.options import check_scaling
from rlrr_kernels.models.config import RLRRConfig
from rlrr_kernels.models.modules import adapters, plain_name
from rlrr_kernels.ops.route import whole

FORMAT_VERSION = 1
FILE_NAME = "adapter_config.json"

#: Largest file in bytes. Real ones have some kilobytes, and the names of the classes.
LARGEST_FILE = 4 * 2**20

#: Largest relative difference of the means, and absolute difference of the signed sums, of two fingerprints. Storage in
#: bfloat16 changes the first by less than 1e-3 and the second by about 1e-3.
TOLERANCES = (1e-2, 2e-2)


@dataclass(frozen=True)
class Manifest:
    """The content of ``adapter_config.json``.

    Attributes:
        base_model: ``class``, and for a timm model ``architecture`` and ``tag`` of its pretrained weights.
        num_classes: Number of classes, or None if the model has no such attribute.
        rlrr: The :class:`~rlrr_kernels.RLRRConfig`; None if the model was not prepared by
            :func:`~rlrr_kernels.apply_rlrr` (a linear probe, full fine-tuning).
        parameters: Number of trained values.
        fingerprint: Name of a frozen linear -> :func:`fingerprint` of its W; convolutions if no linear is frozen.
        versions: Library -> version that wrote the adapter.
        class_names: In the order of the logits; None if they are unknown, as in older adapters.
        scalings: Name of an adapted linear -> its scaling, where that is not the one of ``rlrr`` (1 without); None in
            older adapters.
    """

    base_model: Mapping[str, str | None]
    num_classes: int | None
    rlrr: RLRRConfig | None
    parameters: int
    fingerprint: Mapping[str, tuple[float, float]]
    versions: Mapping[str, str]
    class_names: tuple[str, ...] | None = None
    scalings: Mapping[str, float] | None = None

    @classmethod
    def of(cls, model: nn.Module, parameters: int, class_names: Sequence[str] | None = None) -> Manifest:
        """Describe a model with this number of trained values.

        Raises:
            ValueError: If the scaling of a layer is not a finite number above 0.
        """
        config = getattr(model, "rlrr_config", None)
        config = config if isinstance(config, RLRRConfig) else None
        usual = 1.0 if config is None else config.scaling
        linears = [(plain_name(n), module) for n, module in adapters(model) if isinstance(module, FusedRLRRLinear)]
        classes = getattr(model, "num_classes", None)
        return cls(
            base_model=describe_base(model),
            num_classes=classes if isinstance(classes, int) else None,
            rlrr=config,
            parameters=parameters,
            fingerprint={name: fingerprint(weight) for name, weight in _frozen_weights(model).items()},
            versions=_versions(),
            class_names=None if class_names is None else tuple(class_names),
            scalings={n: s for n, layer in linears if (s := _scaling(n, layer.scaling)) != usual},
        )

    def to_json(self) -> bytes:
        """The content of the file."""
        values = {
            "format_version": FORMAT_VERSION,
            "base_model": dict(self.base_model),
            "num_classes": self.num_classes,
            "rlrr": None if self.rlrr is None else self.rlrr.to_dict(),
            "parameters": self.parameters,
            "fingerprint": {name: list(values) for name, values in self.fingerprint.items()},
            "versions": dict(self.versions),
            **({} if self.class_names is None else {"class_names": list(self.class_names)}),
            **({} if self.scalings is None else {"scalings": dict(self.scalings)}),
        }
        return (json.dumps(values, indent=2) + "\n").encode()

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the file from an adapter's folder.

        Raises:
            ValueError: If there is no such file, :func:`~rlrr_kernels.io.checks.read_json` refuses it, or it has
                another format version or a bad value.
        """
        path = folder / FILE_NAME
        if not path.is_file():
            raise ValueError(f"{folder} is not an adapter folder: it has no {FILE_NAME}")
        values = read_json(path, LARGEST_FILE)
        version = values.get("format_version")
        if version != FORMAT_VERSION or type(version) is not int:
            raise ValueError(f"{path}: expected format_version {FORMAT_VERSION}, got {version!r}")
        try:
            return cls(
                base_model=expect_dict(values, "base_model", str, type(None)),
                num_classes=(classes := expect(values, "num_classes", int, type(None))),
                rlrr=None if values.get("rlrr") is None else RLRRConfig.from_dict(expect(values, "rlrr", dict)),
                parameters=expect(values, "parameters", int),
                fingerprint={k: _pair(k, v) for k, v in expect_dict(values, "fingerprint", list).items()},
                versions=expect_dict(values, "versions", str),
                class_names=expect_names(values, "class_names", classes),
                scalings=None if "scalings" not in values else _scalings(expect(values, "scalings", dict)),
            )
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"{path}: {error}") from error

    def agrees_with(self, other: Manifest) -> bool:
        """Whether two adapters differ at most in their tensors, versions, and initial values of u and v."""
        return (
            (self.base_model, self.num_classes, self.parameters, self.class_names)
            == (other.base_model, other.num_classes, other.parameters, other.class_names)
            and _comparable(self.rlrr) == _comparable(other.rlrr)
            and (self.scalings or {}) == (other.scalings or {})
            and self.fingerprint.keys() == other.fingerprint.keys()
            and all(same_weights(values, other.fingerprint[name]) for name, values in self.fingerprint.items())
        )

    def check_architecture(self, model: nn.Module) -> None:
        """Check that a model has the class and timm architecture that the adapter was trained on.

        Raises:
            ValueError: If it does not.
        """
        found = describe_base(model)
        for key in ("class", "architecture"):
            expected, got = self.base_model.get(key), found[key]
            if expected is not None and got is not None and expected != got:
                raise ValueError(f"base model: the adapter was trained on {key} {expected}, the model's is {got}")

    def check_weights(self, model: nn.Module) -> None:
        """Check that a model has the frozen weights that the adapter was trained on.

        Layers on the meta device are skipped, as they have no weights yet.

        Raises:
            ValueError: If a weight differs; names the first such layer.
        """
        modules = {plain_name(name): module for name, module in model.named_modules()}
        for name, expected in self.fingerprint.items():
            weight = _weight(modules[name]) if name in modules else None
            if weight is None:
                raise ValueError(f"base model: expected a layer {name}, {type(model).__name__} has none")
            if weight.is_meta:
                continue
            got = fingerprint(weight)
            if not same_weights(got, expected):
                raise ValueError(
                    f"base model: {name}.weight differs from the one that the adapter was trained on "
                    f"(fingerprint {got[0]:.4g}, {got[1]:.4g}, expected {expected[0]:.4g}, {expected[1]:.4g}); "
                    "load the same pretrained weights, or pass check_base=False"
                )


@torch.no_grad()
def fingerprint(weight: Tensor) -> tuple[float, float]:
    """Two numbers that distinguish pretrained weights and survive rounding to 16 bits.

    The first is the mean of |W|. The second is the sum of W with a sign for each row and column, divided by W's
    Euclidean norm: it differs by about 1 for weights of one distribution, or in another order of rows.

    Args:
        weight: W ``[N, K]``, or with more dimensions, which are flattened.
    """
    values = whole(weight).detach()
    values = values.to(accumulation_dtype(values.dtype)).flatten(1)
    norm = values.norm().clamp_min(torch.finfo(values.dtype).tiny)
    rows, columns = (_signs(count, values) for count in values.shape)
    mean, signed = torch.stack((values.abs().mean(), rows @ (values @ columns) / norm)).tolist()
    return float(f"{mean:.8g}"), float(f"{signed:.8g}")


def _signs(count: int, like: Tensor) -> Tensor:
    """+1 and -1 in an order without a period: the top bit of multiples of 2^32 / golden ratio."""
    bits = (torch.arange(count, device=like.device) * 2654435769 >> 31) & 1
    return (2 * bits - 1).to(like.dtype)


def describe_base(model: nn.Module) -> dict[str, str | None]:
    """The model's class, and its architecture and tag in timm."""
    # FSDP replaces the class by a subclass of its own
    kind = next(kind for kind in type(model).__mro__ if not kind.__module__.startswith("torch.distributed"))
    config = getattr(model, "pretrained_cfg", None)
    config = config if isinstance(config, dict) else {}
    return {
        "class": kind.__name__,
        "architecture": config.get("architecture") or None,
        "tag": config.get("tag") or None,
    }


def _weight(module: nn.Module) -> Tensor | None:
    # state_dict also has the frozen W of a merged layer
    return module.state_dict().get("weight") if isinstance(module, (nn.Linear, _ConvNd)) else None


def _frozen_weights(model: nn.Module) -> dict[str, Tensor]:
    """W of every adapted linear; if there is none, of every frozen linear; if there is none, of every convolution."""
    layers: dict[str, nn.Module] = {n: module for n, module in adapters(model) if isinstance(module, FusedRLRRLinear)}
    for kind in (nn.Linear, _ConvNd):
        layers = layers or {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, kind) and not module.weight.requires_grad
        }
    weights = {name: _weight(module) for name, module in layers.items()}
    return {plain_name(name): w for name, w in weights.items() if w is not None and not w.is_meta}


def same_weights(got: tuple[float, float], expected: tuple[float, float]) -> bool:
    """Whether two fingerprints agree within :data:`TOLERANCES`. NaN agrees with nothing."""
    return abs(got[0] - expected[0]) <= TOLERANCES[0] * abs(expected[0]) and abs(got[1] - expected[1]) <= TOLERANCES[1]


def _comparable(config: RLRRConfig | None) -> dict[str, Any] | None:
    if config is None:
        return None
    return {name: value for name, value in config.to_dict().items() if name != "init"}


def _versions() -> dict[str, str]:
    versions = {"rlrr_kernels": __version__, "torch": torch.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # timm is optional
        versions["timm"] = importlib.metadata.version("timm")
    return versions


def _scalings(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: _scaling(name, value) for name, value in values.items()}


def _scaling(name: str, value: Any) -> float:
    try:
        return check_scaling(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"scalings: {name!r:.80}: {error}") from error


def _pair(name: str, values: list[Any]) -> tuple[float, float]:
    if len(values) != 2 or not all(type(value) in (int, float) for value in values):
        raise ValueError(f"fingerprint: expected two numbers for {name!r}, got {values!r:.80}")
    return float(values[0]), float(values[1])
