"""The file of tuned choices: its entries, and reading them with every field checked.

``tuned.py`` looks up in it, ``rlrr_kernels.tune.store`` writes it::

    {"format": 1, "entries": [{"gpu": ..., "kernel": "forward", "m": 12608, ..., "config": {...}}]}
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from rlrr_kernels import cachefile
from rlrr_kernels.backends.triton import compiler
from rlrr_kernels.backends.triton import config as configs
from rlrr_kernels.backends.triton.config import Arithmetic, Config
from rlrr_kernels.backends.triton.config import Path as LoadPath
from rlrr_kernels.backends.triton.start import ceil_div
from rlrr_kernels.cachefile import text

Kernel = Literal["forward", "grad_input", "grad_scales"]

#: The version of the file's layout.
FORMAT = 1

#: Files of this folder that no entry's timing depends on: they choose, look up, or belong to LayerNorm.
_NOT_KERNELS = {
    "__init__.py",
    "config.py",
    "cost.py",
    "layer_norm.py",
    "tiles_table.py",
    "tuned.py",
    "tuned_file.py",
}

_MAX_SPLITS = 1024
_BLOCKS = tuple(2**i for i in range(4, 10))
_CONFIG: Mapping[str, Iterable[int]] = {
    "block_m": _BLOCKS,
    "block_n": _BLOCKS,
    "block_k": _BLOCKS,
    "num_warps": (1, 2, 4, 8, 16),
    "num_stages": range(1, 11),
    "splits": range(1, _MAX_SPLITS + 1),
}


class Where(NamedTuple):
    """What a measurement holds for: GPU, compute capability, Triton and ptxas, and a digest of the kernels' sources."""

    gpu: str
    capability: tuple[int, int]
    triton: str
    kernels: str

    @classmethod
    def on(cls, gpu: str, capability: tuple[int, int]) -> Where:
        """A GPU with the Triton and the kernels that are installed."""
        return cls(gpu, capability, compiler.name(), kernels_digest())


class Layer(NamedTuple):
    """One kernel at one layer: x ``[m, k]``, W ``[n, k]``; sizes of an element of x and W in bytes."""

    kernel: Kernel
    n: int
    k: int
    groups: int
    kind: Arithmetic
    path: LoadPath
    x_size: int
    weight_size: int


@dataclass(frozen=True)
class Entry:
    """What was found for one M.

    Attributes:
        config: what beat the heuristic, or None where nothing did.
        split_tokens: of grad_scales, beside ``config``.
        measured: what the tuner wrote down for people; nothing is decided by it.
    """

    where: Where
    layer: Layer
    m: int
    config: Config | None
    split_tokens: int | None = None
    measured: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def to_json(self) -> dict[str, Any]:
        """One object of the file."""
        config = None if self.config is None else asdict(self.config)
        return {
            **self.where._asdict(),
            **self.layer._asdict(),
            "m": self.m,
            "config": config,
            "split_tokens": self.split_tokens,
            "measured": dict(self.measured),
        }


@functools.cache
def kernels_digest(folder: Path = Path(__file__).parent) -> str:
    """Of the sources that decide how the kernels are compiled and launched: any change of them counts."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        if path.name not in _NOT_KERNELS:
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def read(path: Path) -> list[Any]:
    """The raw entries of a file, as :func:`rlrr_kernels.cachefile.read`."""
    return cachefile.read(path, FORMAT)


def parse(raw: Any) -> Entry:
    """One entry, every field checked.

    Raises:
        ValueError: the first field that is not as expected.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"expected an object, got {raw!r:.40}")
    values = {"split_tokens": None, "measured": {}, **raw}
    kernel = _one_of(values, "kernel", get_args(Kernel))
    capability = values.get("capability")
    if not isinstance(capability, list | tuple) or len(capability) != 2 or {type(c) for c in capability} != {int}:
        raise ValueError(f"capability: expected two integers, got {capability!r:.40}")
    layer = Layer(
        kernel=kernel,
        n=_count(values, "n"),
        k=_count(values, "k"),
        groups=_count(values, "groups"),
        kind=_one_of(values, "kind", get_args(Arithmetic)),
        path=_one_of(values, "path", get_args(LoadPath)),
        x_size=_one_of(values, "x_size", (2, 4)),
        weight_size=_one_of(values, "weight_size", (2, 4)),
    )
    if layer.n % layer.groups:
        raise ValueError(f"groups: expected a divisor of n = {layer.n}, got {layer.groups}")
    where = Where(text(values, "gpu"), (capability[0], capability[1]), text(values, "triton"), text(values, "kernels"))
    if not isinstance(values["measured"], dict):
        raise ValueError(f"measured: expected an object, got {values['measured']!r:.40}")
    if values.get("config", 0) is None:
        return Entry(where, layer, _count(values, "m"), None, None, values["measured"])
    entry = Entry(
        where,
        layer,
        _count(values, "m"),
        _config(values.get("config")),
        _count(values, "split_tokens") if kernel == "grad_scales" else None,
        values["measured"],
    )
    _check_choice(entry)
    return entry


def _config(raw: Any) -> Config:
    names = [f.name for f in fields(Config)]
    if not isinstance(raw, dict) or set(raw) != set(names):
        raise ValueError(f"config: expected {', '.join(names)}, got {raw!r:.80}")
    for name in names:
        if type(raw[name]) is not int or raw[name] not in _CONFIG[name]:
            raise ValueError(f"config.{name}: {raw[name]!r:.40} is none that a kernel takes")
    return Config(**raw)


def _check_choice(entry: Entry) -> None:
    """Raise ``ValueError`` for a choice with which the launch would be wrong."""
    layer, config = entry.layer, entry.config
    assert config is not None
    if layer.kernel == "grad_scales":
        if config.splits != 1:
            raise ValueError(f"config.splits: expected 1 for grad_scales, got {config.splits}")
        if entry.split_tokens is None or entry.split_tokens % config.block_m:
            raise ValueError(f"split_tokens: expected a multiple of block_m, got {entry.split_tokens}")
        splits = ceil_div(entry.m, entry.split_tokens)
        if splits > _MAX_SPLITS:
            raise ValueError(f"split_tokens: {splits} splits at m = {entry.m}, expected {_MAX_SPLITS} at most")
        return
    # the copy engine wants the stages of a box of v, which is float32, 128 bytes apart
    if layer.kernel == "forward" and layer.path == "boxes" and config.block_k < 32:
        raise ValueError(f"config.block_k: expected 32 or more with boxes, got {config.block_k}")
    # a box may not run into the next group's rows
    across = layer.kernel == "grad_input" and layer.path == "boxes" and layer.groups > 1
    if across and configs.GROUP_STEP % config.block_n:
        raise ValueError(f"config.block_n: expected a divisor of {configs.GROUP_STEP}, got {config.block_n}")
    if not fits_workspace(layer, config, entry.m):
        raise ValueError(f"config.splits: {config.splits} exceed the workspace at m = {entry.m}")


def _one_of(values: Mapping[str, Any], name: str, allowed: tuple[object, ...]) -> Any:
    value = values.get(name)
    if value not in allowed or isinstance(value, bool | float):
        raise ValueError(f"{name}: expected one of {', '.join(map(str, allowed))}, got {value!r:.40}")
    return value


def _count(values: Mapping[str, Any], name: str) -> int:
    value = values.get(name)
    if type(value) is not int or not 1 <= value < 2**40:
        raise ValueError(f"{name}: expected an integer of 1 or more, got {value!r:.40}")
    return value


def fits_workspace(layer: Layer, config: Config, m: int) -> bool:
    """Whether partial sums of a product that is split over its depth stay within their bound."""
    columns = layer.n if layer.kernel == "forward" else layer.k
    return config.splits == 1 or 4 * config.splits * m * columns <= configs.WORKSPACE_BYTES
