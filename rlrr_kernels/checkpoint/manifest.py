"""``adapter_config.json``: what an adapter was trained on and how, so that it is not loaded onto something else."""

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
from rlrr_kernels.io.reading import expect_names, read_json
from rlrr_kernels.layers.linear import FusedRLRRLinear
from rlrr_kernels.models.config import RLRRConfig
from rlrr_kernels.models.modules import adapters, plain_name
from rlrr_kernels.ops.route import whole

FORMAT_VERSION = 1
FILE_NAME = "adapter_config.json"

#: A real one has some kilobytes, and the names of its classes; more is refused before it is parsed.
LARGEST_FILE = 4 * 2**20

#: Largest difference of fingerprints: relative of the means, absolute of the signed sums. bfloat16
#: storage moves the first by less than 1e-3 and the second by about 1e-3.
TOLERANCES = (1e-2, 2e-2)


@dataclass(frozen=True)
class Manifest:
    """The content of ``adapter_config.json``.

    Attributes:
        base_model: ``class``, and of a timm model ``architecture`` and ``tag`` of its pretrained weights.
        num_classes: of the model, or None if it does not say.
        rlrr: the :class:`~rlrr_kernels.RLRRConfig`; None if the model was not prepared by
            :func:`~rlrr_kernels.apply_rlrr` (a linear probe, full fine-tuning).
        parameters: how many numbers train.
        fingerprint: name of a frozen linear (or, without any, convolution) -> :func:`fingerprint` of its W.
        versions: of the libraries it was written with.
        class_names: in the order of the logits; None if they are not known, as of adapters of before they were kept.
    """

    base_model: Mapping[str, str | None]
    num_classes: int | None
    rlrr: RLRRConfig | None
    parameters: int
    fingerprint: Mapping[str, tuple[float, float]]
    versions: Mapping[str, str]
    class_names: tuple[str, ...] | None = None

    @classmethod
    def of(cls, model: nn.Module, parameters: int, class_names: Sequence[str] | None = None) -> Manifest:
        """Describe a model of which ``parameters`` numbers train."""
        config = getattr(model, "rlrr_config", None)
        classes = getattr(model, "num_classes", None)
        return cls(
            base_model=describe_base(model),
            num_classes=classes if isinstance(classes, int) else None,
            rlrr=config if isinstance(config, RLRRConfig) else None,
            parameters=parameters,
            fingerprint={name: fingerprint(weight) for name, weight in _frozen_weights(model).items()},
            versions=_versions(),
            class_names=None if class_names is None else tuple(class_names),
        )

    def to_json(self) -> bytes:
        values = {
            "format_version": FORMAT_VERSION,
            "base_model": dict(self.base_model),
            "num_classes": self.num_classes,
            "rlrr": None if self.rlrr is None else self.rlrr.to_dict(),
            "parameters": self.parameters,
            "fingerprint": {name: list(values) for name, values in self.fingerprint.items()},
            "versions": dict(self.versions),
            **({} if self.class_names is None else {"class_names": list(self.class_names)}),
        }
        return (json.dumps(values, indent=2) + "\n").encode()

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read it from an adapter's folder.

        Raises:
            ValueError: no such file, more than 1 MiB, no JSON, a key twice, another format version, or a bad value.
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
                base_model=_mapping(values, "base_model", str, type(None)),
                num_classes=(classes := _value(values, "num_classes", int, type(None))),
                rlrr=None if values.get("rlrr") is None else RLRRConfig.from_dict(_mapping(values, "rlrr", object)),
                parameters=_value(values, "parameters", int),
                fingerprint={k: _pair(k, v) for k, v in _mapping(values, "fingerprint", list).items()},
                versions=_mapping(values, "versions", str),
                class_names=expect_names(values, "class_names", classes),
            )
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"{path}: {error}") from error

    def agrees_with(self, other: Manifest) -> bool:
        """Whether the tensors of one could stand in the other's folder: all but versions and the start of u, v."""
        return (
            (self.base_model, self.num_classes, self.parameters, self.class_names)
            == (other.base_model, other.num_classes, other.parameters, other.class_names)
            and _comparable(self.rlrr) == _comparable(other.rlrr)
            and self.fingerprint.keys() == other.fingerprint.keys()
            and all(same_weights(values, other.fingerprint[name]) for name, values in self.fingerprint.items())
        )

    def check_architecture(self, model: nn.Module) -> None:
        """See that a model has the class and timm architecture that the adapter was trained on.

        Raises:
            ValueError: it has not.
        """
        found = describe_base(model)
        for key in ("class", "architecture"):
            expected, got = self.base_model.get(key), found[key]
            if expected is not None and got is not None and expected != got:
                raise ValueError(f"base model: the adapter was trained on {key} {expected}, the model's is {got}")

    def check_weights(self, model: nn.Module) -> None:
        """See that a model has the frozen weights that the adapter was trained on.

        Layers on the meta device have no weights yet and pass.

        Raises:
            ValueError: it has not; names the first layer that differs.
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
    """Two numbers that tell pretrained weights apart and survive rounding to 16 bits.

    The mean of |W|, and the sum of W with signs that rows and columns have, over its Euclidean
    norm. Two draws from one distribution, or another order of rows, agree in the first; in the second
    they differ by about 1.
    """
    values = whole(weight).detach()
    values = values.to(accumulation_dtype(values.dtype)).flatten(1)
    norm = values.norm().clamp_min(torch.finfo(values.dtype).tiny)
    rows, columns = (_signs(count, values) for count in values.shape)
    mean, signed = torch.stack((values.abs().mean(), rows @ (values @ columns) / norm)).tolist()
    return float(f"{mean:.8g}"), float(f"{signed:.8g}")


def _signs(count: int, like: Tensor) -> Tensor:
    """+1 and -1 in an order without a period (the top bit of multiples of 2^32 over the golden ratio)."""
    bits = (torch.arange(count, device=like.device) * 2654435769 >> 31) & 1
    return (2 * bits - 1).to(like.dtype)


def describe_base(model: nn.Module) -> dict[str, str | None]:
    """The model's class, and the architecture and tag that timm gave it."""
    # FSDP puts a class of its own before the model's
    kind = next(kind for kind in type(model).__mro__ if not kind.__module__.startswith("torch.distributed"))
    config = getattr(model, "pretrained_cfg", None)
    config = config if isinstance(config, dict) else {}
    return {
        "class": kind.__name__,
        "architecture": config.get("architecture") or None,
        "tag": config.get("tag") or None,
    }


def _weight(module: nn.Module) -> Tensor | None:
    # state_dict, as it gives the frozen W of a merged layer too
    return module.state_dict().get("weight") if isinstance(module, (nn.Linear, _ConvNd)) else None


def _frozen_weights(model: nn.Module) -> dict[str, Tensor]:
    """W of every adapted linear; without any, of every frozen linear; without any, of every frozen convolution."""
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
    """Whether two fingerprints are of one weight, as far as :data:`TOLERANCES` go."""
    # written so that NaN is not close to anything
    return abs(got[0] - expected[0]) <= TOLERANCES[0] * abs(expected[0]) and abs(got[1] - expected[1]) <= TOLERANCES[1]


def _comparable(config: RLRRConfig | None) -> dict[str, Any] | None:
    if config is None:
        return None
    return {name: value for name, value in config.to_dict().items() if name != "init"}


def _versions() -> dict[str, str]:
    versions = {"rlrr_kernels": __version__, "torch": torch.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # models of other libraries need no timm
        versions["timm"] = importlib.metadata.version("timm")
    return versions


def _value(values: dict[str, Any], name: str, *kinds: type) -> Any:
    value = values.get(name)
    if type(value) not in kinds:
        raise ValueError(f"{name}: expected {' or '.join(kind.__name__ for kind in kinds)}, got {value!r:.80}")
    return value


def _mapping(values: dict[str, Any], name: str, *kinds: type) -> dict[str, Any]:
    mapping = _value(values, name, dict)
    for key, value in mapping.items():
        if not isinstance(value, kinds):
            raise ValueError(f"{name}: {key!r} has a bad value: {value!r:.80}")
    return mapping


def _pair(name: str, values: list[Any]) -> tuple[float, float]:
    if len(values) != 2 or not all(type(value) in (int, float) for value in values):
        raise ValueError(f"fingerprint: expected two numbers for {name!r}, got {values!r:.80}")
    return float(values[0]), float(values[1])
