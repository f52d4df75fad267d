"""Raw results: a JSON file for each chunk under ``benchmarks/results/<device>/``, and the names used in it.

A chunk is what one command measures::

    {"suite", "chunk", "date", "device", "processor", "versions", "command",
     "commit", "dirty", "environment", "tf32", "tuned", "rounds", "complete", "results": [one object a line]}

- ``commit``, ``dirty``: Of the git checkout, and whether the sources differ from it; without git, RLRR_COMMIT or null,
  and null.
- ``environment``: The variables RLRR_*. ``tf32``: Whether float32 products may be TF32. ``tuned``: Whether a table of
  ``rlrr-tune`` was in use. ``rounds``: The least and most that were asked for.
- ``complete``: Whether every case of the chunk was tried. An incomplete run is kept beside the complete one, as
  ``<chunk>-partial.json`` or ``<chunk>-partial-<what was asked for>.json``, so that sessions that were narrowed in
  different ways keep what each measured.

Each object of ``results`` holds a case's fields (:class:`LayerCase`, :class:`LaunchCase`, :class:`StepCase`), then
``seconds`` (one value a round), ``median``, ``q1``, ``q3``, ``clock``, ``copies`` (of the inputs, used in turn) and
what else the suite measured; or, if the case failed, ``error`` in one line.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlrr_kernels import __version__
from rlrr_kernels.backends import tuned
from rlrr_kernels.io.files import write_atomically

ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).parent / "results"
PARTIAL = "-partial"
#: Fields that a file must have to be read.
FIELDS = ("suite", "chunk", "date", "device", "processor", "versions", "command", "results")

#: What read the time: a CUDA graph's replay, CUDA events around single calls, the wall clock.
GRAPH, EVENTS, WALL = "graph", "events", "wall"

OURS = "rlrr_kernels"
GLUON, TRITON, CUDA = "rlrr_kernels/gluon", "rlrr_kernels/triton", "rlrr_kernels/cuda"
CUDA_HOPPER, CPU, PANELS = "rlrr_kernels/cuda-hopper", "rlrr_kernels/cpu", "rlrr_kernels/panels"
FORMULA, FORMULA_COMPILED, FORMULA_MAX = "formula", "formula compiled", "formula max-autotune"
RECOMPUTE, RECOMPUTE_COMPILED = "recompute", "recompute compiled"
FACTORED = "factored"
PLAIN = "plain linear"
#: Ranks of u v, and PEFT's HiRA at each
RANKS = (1, 8, 32)
HIRAS = {rank: f"HiRA r={rank} (PEFT)" for rank in RANKS}
LORA, HIRA = "LoRA r=8 (PEFT)", HIRAS[1]
PRODUCTS, THREE_OPS = "bare products", "our three ops"
#: Of direction "grad_scales": the third product alone, with and without its reductions.
GRAD_SCALES, BARE_GRAD = "our grad_scales", "bare dy^T x"

#: LayerNorm and SSF's affine: ours and "formula" (two operations), both compared with
COMPOSED, LAYER_NORM = "composed weights", "LayerNorm alone"

OURS_COMPILED = "rlrr_kernels compiled"
OFFICIAL, OFFICIAL_COMPILED = "official formula", "official formula compiled"
SSF, FULL, PROBE = "SSF", "full fine-tuning", "linear probe"

LAYER_IMPLEMENTATIONS = (
    *(OURS, GLUON, TRITON, CUDA, CUDA_HOPPER, CPU, PANELS, FORMULA, FORMULA_COMPILED, FORMULA_MAX),
    *(RECOMPUTE, RECOMPUTE_COMPILED, FACTORED, PLAIN, LORA, *HIRAS.values(), PRODUCTS, THREE_OPS),
)
NORM_IMPLEMENTATIONS = (OURS, FORMULA, FORMULA_COMPILED, COMPOSED, LAYER_NORM)
STEP_IMPLEMENTATIONS = (OURS, OURS_COMPILED, OFFICIAL, OFFICIAL_COMPILED, LORA, *HIRAS.values(), SSF, FULL, PROBE)
DIRECTIONS = ("forward", "forward_no_grad", "backward", "both", "grad_scales")

#: These compute or train something else, or only a part: limits and other methods, not rivals.
OTHER_FUNCTIONS = frozenset(
    (PLAIN, LORA, *HIRAS.values(), PRODUCTS, THREE_OPS, GRAD_SCALES, BARE_GRAD, LAYER_NORM, SSF, FULL, PROBE)
)
#: Of rank 1, of a rank of their own, or of none.
_WITHOUT_RANKS = frozenset((FORMULA_MAX, FACTORED, LORA, PRODUCTS, THREE_OPS, SSF, PROBE))


def of_rank(name: str, rank: int) -> bool:
    """Return whether an implementation is measured at this rank."""
    return HIRAS.get(rank) == name if name in HIRAS.values() else rank == 1 or name not in _WITHOUT_RANKS


@dataclass(frozen=True)
class LayerCase:
    """One row of the suites "layer" and "norm".

    Attributes:
        model: As "ViT-B/16".
        layer: "qkv", "proj", "fc1", "fc2", with the stage before it for Swin ("1.qkv"); "norm" in the suite "norm",
            where n and k are both the width D.
        n, k, groups: Output features, input features, row blocks with a v each.
        m: Tokens of all images together.
        images: How many.
        dtype: Of x and W, as "bfloat16".
        direction: "forward" (graph recorded), "forward_no_grad", "backward" (alone), "both"; or "grad_scales" for du,
            dv and df alone.
        implementation: One of the constants above.
        backend: The backend that served ours; None for others.
        same_function: Whether it computes y = x (W * (1 + u v))^T + b + f and all its gradients.
        rank: Of u v, as in the other cases; results from before ranks have no such field and are of rank 1.
    """

    model: str
    layer: str
    n: int
    k: int
    groups: int
    m: int
    images: int
    dtype: str
    direction: str
    implementation: str
    backend: str | None
    same_function: bool
    rank: int = 1


@dataclass(frozen=True)
class LaunchCase:
    """One row of the suite "launch": CPU time of one call. ``call``: "no_grad", "forward" or "both"."""

    call: str
    dtype: str
    implementation: str
    backend: str | None
    rank: int = 1


@dataclass(frozen=True)
class StepCase:
    """One row of the suite "step": a whole training step. ``dtype``: of autocast, or "float32"."""

    model: str
    batch: int
    image_size: int
    dtype: str
    implementation: str
    same_function: bool
    rank: int = 1


Case = LayerCase | LaunchCase | StepCase


@dataclass
class Result:
    """A case and its rounds (seconds each), or why there are none.

    Attributes:
        more: What else was measured: ``extra_bytes``, ``saved_bytes``, ``saved_x`` of a layer; ``images_per_second``,
            ``peak_bytes`` of a step; for the same function also ``error_vs_formula``, the relative Frobenius error of
            its worst result.
        clock: What read the time.
        copies: Number of copies of the inputs.
    """

    case: Case
    seconds: list[float] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    clock: str | None = None
    copies: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Return the object for the file."""
        case = dataclasses.asdict(self.case)
        if self.error is not None:
            return case | {"error": self.error}
        rounds = [round(s, 9) for s in self.seconds]
        q1, median, q3 = (round(s, 10) for s in quartiles(rounds))
        times = {"seconds": rounds, "median": median, "q1": q1, "q3": q3}
        return case | times | {"clock": self.clock, "copies": self.copies} | self.more


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the first quartile, the median and the third quartile of one value or more."""
    if len(values) == 1:
        return (values[0],) * 3
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


def device_name() -> str:
    """Return ``cpu``, or the name of the first GPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def results_folder() -> Path:
    """Return the folder for the results of this device."""
    return FOLDER / device_name().replace(" ", "_")


def write(
    folder: Path,
    suite: str,
    chunk: str,
    command: str,
    results: Iterable[Result],
    complete: bool = True,
    rounds: Sequence[int] | None = None,
    narrowing: str = "",
) -> Path:
    """Write ``<folder>/<chunk>.json``, whole or not at all, and return its path.

    Args:
        folder: It is made if missing.
        suite: "layer", "norm", "launch" or "step".
        chunk: As "layer-vit_b".
        command: The command that measures it again.
        results: The rows.
        complete: Whether every case of the chunk was tried. If not, the file is named ``<chunk>-partial.json`` and is
            deleted once the complete one is written.
        rounds: Least and most rounds of a group.
        narrowing: Which part of the chunk was asked for, in letters, digits and hyphens, for an incomplete file's name.
    """
    own = {
        "suite": suite,
        "chunk": chunk,
        **head(command),
        "tf32": torch.backends.cuda.matmul.fp32_precision == "tf32",
        "tuned": _tuned(),
        "rounds": rounds,
        "complete": complete,
    }
    path = folder / (f"{chunk}.json" if complete else f"{chunk}{PARTIAL}{narrowing and f'-{narrowing}'}.json")
    save(path, own, (result.to_dict() for result in results))
    if complete:
        for partial in (*folder.glob(f"{chunk}{PARTIAL}.json"), *folder.glob(f"{chunk}{PARTIAL}-*.json")):
            partial.unlink(missing_ok=True)
    return path


def head(command: str) -> dict[str, Any]:
    """Return date, device, versions and source of a file's numbers."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": device_name(),
        "processor": f"{_processor()}, {torch.get_num_threads()} cores used",
        "versions": versions(),
        "command": command,
        **source(),
        "environment": _environment(),
    }


def save(path: Path, head: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a head and its ``results``, whole or not at all; the folder is made if missing."""
    # a line for each result, so that a diff of two runs is readable
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    text = f'{json.dumps(head, indent=1)[:-2]},\n "results": [\n  {lines}\n ]\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())


def read(path: Path) -> dict[str, Any] | None:
    """Return the chunk in a file, or None if the JSON has no "suite" and is another kind of result.

    Raises:
        ValueError: If the file is not JSON, or lacks a field.
    """
    try:
        chunk = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON: {error}") from error
    if not isinstance(chunk, dict) or "suite" not in chunk:
        return None
    for name in FIELDS:
        if name not in chunk:
            raise ValueError(f"{path}: expected the field {name!r}, got {', '.join(chunk)}")
    return chunk


def load(folder: Path) -> list[dict[str, Any]]:
    """Return the chunks in a folder, by file name, without the partial ones of a complete chunk.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If a file is not JSON, or lacks a field.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"folder: expected a folder of results, got {folder}")
    chunks = []
    for path in sorted(folder.glob("*.json")):
        whole, partial, _ = path.stem.partition(PARTIAL)
        if not (partial and path.with_stem(whole).exists()) and (chunk := read(path)) is not None:
            chunks.append(chunk)
    return chunks


def versions() -> dict[str, str | None]:
    """Return the version of everything that affects a time; None for what is not here."""
    found: dict[str, str | None] = {"rlrr_kernels": __version__, "torch": torch.__version__}
    for name in ("triton", "peft", "timm"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found | {"python": platform.python_version(), "cuda": torch.version.cuda, "driver": _driver()}


@functools.cache
def source() -> dict[str, Any]:
    """Return ``commit`` and ``dirty`` of the checkout; results and pages do not count as changes.

    A copy without git's folder has the commit that RLRR_COMMIT names, or None, and None for ``dirty``.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    copied = {"commit": os.environ.get("RLRR_COMMIT") or None, "dirty": None}
    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT.resolve():
            return copied
        changed = git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results", ":(exclude)docs")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return copied


def _environment() -> dict[str, str]:
    """Return the variables RLRR_*; of a path only the last part, as the rest is specific to this machine."""
    found = {name: value for name, value in sorted(os.environ.items()) if name.startswith("RLRR_")}
    return {name: Path(value).name if os.path.isabs(value) else value for name, value in found.items()}


@functools.cache
def _tuned() -> bool:
    """Return whether a file of ``rlrr-tune`` is in use."""
    return bool(tuned.of_user())


def _driver() -> str | None:
    if not torch.cuda.is_available():
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
