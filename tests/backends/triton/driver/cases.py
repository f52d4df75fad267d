"""Problems to launch on the stand-in for a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from rlrr_kernels.backends.triton import launch, norm
from rlrr_kernels.backends.triton.choose import Choice, Device
from tests.backends.triton.driver.stand_in import Machine

#: The machine's GPUs: data sheets' multiprocessors and shared memory.
DEVICES = (
    Device((9, 0), 132, 232448),
    Device((8, 0), 108, 166912),
    Device((12, 0), 170, 101376),
)
HOPPER, AMPERE, BLACKWELL = range(3)

SMALL = Choice(64, 64, 64, num_warps=4, num_stages=3)
NARROW = Choice(64, 32, 32, num_warps=4, num_stages=2)
OPS = ("forward", "grad_input", "grad_scales", "layer_norm")
PASSES = OPS[:3]


@dataclass(frozen=True)
class Case:
    """A problem; ``choice`` None leaves it to the launcher.

    ``layout``, of x and dy: ``rows``, ``transposed``, ``expanded`` (a row for all), ``sum`` (one element for all),
    ``offset`` (4 elements from 16 bytes), ``padded`` (rows apart). ``current``: PyTorch's current GPU.
    """

    name: str
    shape: tuple[int, int, int, int] = (128, 256, 128, 2)  # M, N, K, groups
    dtype: str = "bfloat16"
    weight: str | None = None  # x's
    scales: str = "float32"
    offsets: str = "float32"  # of b and f; b None if "no bias"
    tf32: bool = False
    layout: str = "rows"
    choice: Choice | None = SMALL
    device: int = HOPPER
    current: int = HOPPER
    ops: tuple[str, ...] = OPS
    rank: int = 1


#: Cheap enough for every run of the tests.
QUICK = (
    Case("plain"),
    # what no compiled code depends on: in this order, after "plain"
    Case("another M", shape=(130, 256, 128, 2)),
    Case("one token", shape=(1, 256, 128, 2)),
    Case("split", choice=replace(SMALL, splits=2), ops=("forward",)),
    Case("another GPU", device=AMPERE, ops=("forward",)),
    Case("rank 4", rank=4, ops=PASSES),
)

#: All but the first differ from "plain" in one thing.
VARIANTS = (
    Case("plain"),
    Case("float16", dtype="float16"),
    Case("no bias", offsets="no bias"),
    Case("bfloat16 offsets", offsets="bfloat16"),
    Case("8 warps", choice=replace(SMALL, num_warps=8)),
    Case("2 stages", choice=replace(SMALL, num_stages=2)),
    Case("split all", choice=replace(SMALL, splits=2)),
    Case("unaligned f", offsets="unaligned", ops=("forward",)),
)

_SHAPES = {
    "one token": (1, 64, 64, 1),
    "smallest": (1, 8, 8, 1),
    "no whole tiles": (37, 72, 40, 1),
    "three groups": (200, 3 * 64, 136, 3),
}
_DTYPES = {
    "bf16": {"dtype": "bfloat16"},
    "fp16": {"dtype": "float16", "scales": "float16"},
    "bf16 of fp32": {"dtype": "bfloat16", "weight": "float32"},
    "tf32": {"dtype": "float32", "tf32": True, "choice": NARROW},
}

#: Odd shapes, dtypes, layouts and GPUs; tiles of the launcher's choice.
GRID = (
    *(
        Case(f"{shape}, {dtype}", shape=sizes, ops=PASSES, **given)
        for shape, sizes in _SHAPES.items()
        for dtype, given in _DTYPES.items()
    ),
    Case("full float32", dtype="float32", choice=NARROW),
    Case("odd sizes", shape=(131, 250, 131, 2), ops=PASSES),
    Case("odd sizes, float32", shape=(131, 250, 131, 2), dtype="float32", choice=NARROW, ops=PASSES),
    Case("groups that are no whole steps", shape=(128, 240, 128, 3), ops=("forward", "grad_scales")),
    Case("slices that do not start at 16 bytes", shape=(128, 3 * 4100, 1030, 3), ops=("grad_scales",)),
    Case("slices", shape=(64, 16_384, 8192, 2), choice=None, ops=("grad_scales",)),
    *(
        Case(layout, shape=(2048, 768, 768, 1), layout=layout, choice=None)
        for layout in ("padded", "transposed", "sum", "offset")
    ),
    Case("expanded", shape=(2048, 768, 768, 1), layout="expanded", choice=None),
    Case("many tokens", shape=(2**25 + 5, 16, 16, 1), choice=Choice(16, 16, 16, num_warps=1, num_stages=2)),
    Case("ViT-L fc1", shape=(50_432, 4096, 1024, 1), choice=None),
    Case("ViT-B qkv of few tokens", shape=(197, 2304, 768, 3), choice=None),
    *(
        Case(f"{name} on {gpu}", device=gpu, shape=shape, dtype=dtype, choice=None, ops=PASSES)
        for gpu in (AMPERE, BLACKWELL)
        for name, shape in (("aligned", (394, 768, 3072, 1)), ("odd", (1, 9, 7, 3)))
        for dtype in ("bfloat16", "float32")
    ),
    *(
        Case(f"rank {rank}, {dtype}", rank=rank, shape=shape, dtype=dtype, choice=None, ops=PASSES)
        for rank in (32, 128)
        for dtype, shape in (("bfloat16", (394, 768, 3072, 1)), ("float32", (131, 256, 128, 2)))
    ),
    Case("a GPU that is not current", device=HOPPER, current=BLACKWELL),
)


def _rows(shape: tuple[int, int], dtype: torch.dtype, layout: str) -> torch.Tensor:
    rows, cols = shape
    if layout == "transposed":
        return torch.empty((cols, rows), dtype=dtype).T
    if layout in ("expanded", "sum"):
        return torch.empty((1, cols if layout == "expanded" else 1), dtype=dtype).expand(shape)
    if layout == "offset":
        return torch.empty(rows * cols + 4, dtype=dtype)[4:].view(shape)
    if layout == "padded":
        return torch.empty((rows, cols + 16), dtype=dtype)[:, :cols]
    return torch.empty(shape, dtype=dtype)


def tensors(case: Case) -> dict[str, torch.Tensor]:
    """Return x, dy, W, u, v, b and f of a case, by name."""
    m, n, k, groups = case.shape
    dtype, weight, scales = (getattr(torch, d) for d in (case.dtype, case.weight or case.dtype, case.scales))
    offsets = torch.float32 if case.offsets in ("no bias", "unaligned") else getattr(torch, case.offsets)
    f = torch.empty(n + 1, dtype=offsets)[1:] if case.offsets == "unaligned" else torch.empty(n, dtype=offsets)
    given = {
        "x": _rows((m, k), dtype, case.layout),
        "dy": _rows((m, n), dtype, case.layout),
        "w": torch.empty((n, k), dtype=weight),
        "u": torch.empty((n, case.rank), dtype=scales),
        "v": torch.empty((groups, case.rank, k), dtype=scales),
        "f": f,
    }
    return given if case.offsets == "no bias" else given | {"b": torch.empty(n, dtype=offsets)}


def calls(case: Case, t: dict[str, torch.Tensor]) -> dict[str, Callable[[], Any]]:
    """Return the launcher's calls for a case, by op; ``layer_norm`` is forward and backward over x's rows."""
    x, dy, w, u, v, b, f = (t.get(name) for name in ("x", "dy", "w", "u", "v", "b", "f"))
    scales = case.choice and replace(case.choice, splits=2)
    args: Any = (w, u, v)

    def layer_norm_passes() -> None:
        s = v[0, 0]
        y, mean, rstd = norm.layer_norm(x, w[0], None, s, s, 1e-6, x.dtype)
        norm.layer_norm_backward(y, x, mean, rstd, w[0], None, s, True)

    found: dict[str, Callable[[], Any]] = {
        "forward": lambda: launch.forward(x, *args, b, f, choice=case.choice),
        "grad_input": lambda: launch.grad_input(dy, *args, choice=case.choice),
        "grad_scales": lambda: launch.grad_scales(dy, x, *args, True, choice=scales),
        "layer_norm": layer_norm_passes,
    }
    return {op: found[op] for op in case.ops}


def while_capturing(machine: Machine) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield (name, call) of forward passes while a CUDA graph is captured and between captures, after ``QUICK``."""

    def forward(**options: Any) -> Callable[[], Any]:
        case = Case("", ops=("forward",), **options)
        return calls(case, tensors(case))["forward"]

    warm, larger, cold = forward(), forward(shape=(144, 256, 128, 2)), forward(dtype="float16")
    machine.capture(True)
    yield "a kernel that has run", warm
    yield "another size, for the same kernel", larger
    yield "first use", cold
    machine.capture(False)
    yield "first use after the capture", cold
    machine.capture(True)
    yield "after a first use", cold
    machine.capture(False)
