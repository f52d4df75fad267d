"""Made-up raw results with round numbers; they must never be written beside measured ones."""

from dataclasses import asdict
from typing import Any

from benchmarks import results
from benchmarks.results import LaunchCase, LayerCase, StepCase

GPU = "NVIDIA H200"


def chunk(rows: list[dict[str, Any]], suite: str = "layer", device: str = GPU, **head: Any) -> dict[str, Any]:
    """Return a chunk with these rows."""
    return {
        "suite": suite,
        "chunk": f"{suite}-made-up",
        "date": "2020-02-29",
        "device": device,
        "processor": "Made-up 9000, 2 cores used",
        "versions": {"rlrr_kernels": "0.0.1", "torch": "9.9.9", "triton": None},
        "command": f"make made-up CHUNK={suite}",
        "complete": True,
        "results": rows,
    } | head


def _times(seconds: float | str, spread: float) -> dict[str, Any]:
    """Return quartiles ``spread`` (a share) around a median, or the error of a case that failed."""
    if isinstance(seconds, str):
        return {"error": seconds}
    q1, q3 = seconds * (1 - spread), seconds * (1 + spread)
    return {"seconds": [q1, seconds, q3], "median": seconds, "q1": q1, "q3": q3}


def layer(
    implementation: str,
    seconds: float | str,
    *,
    direction: str = "both",
    model: str = "ViT-B/16",
    name: str = "fc1",
    n: int = 3072,
    k: int = 768,
    m: int = 6304,
    groups: int = 1,
    dtype: str = "bfloat16",
    spread: float = 0.01,
    rank: int = 1,
    **more: Any,
) -> dict[str, Any]:
    """Return a row of the suites "layer" and "norm"."""
    backend = "triton" if implementation == results.OURS else None
    same = implementation not in results.OTHER_FUNCTIONS
    case = LayerCase(model, name, n, k, groups, m, m // 197, dtype, direction, implementation, backend, same, rank)
    return asdict(case) | _times(seconds, spread) | more


def step(
    implementation: str,
    seconds: float | str,
    *,
    batch: int = 64,
    dtype: str = "bfloat16",
    spread: float = 0.01,
    **more: Any,
) -> dict[str, Any]:
    """Return a row of the suite "step"."""
    rate = {} if isinstance(seconds, str) else {"images_per_second": batch / seconds}
    same = implementation not in results.OTHER_FUNCTIONS
    return asdict(StepCase("ViT-B/16", batch, 224, dtype, implementation, same)) | _times(seconds, spread) | rate | more


def launch(implementation: str, seconds: float | str, call: str = "forward", dtype: str = "bfloat16") -> dict[str, Any]:
    """Return a row of the suite "launch"."""
    return asdict(LaunchCase(call, dtype, implementation, None)) | _times(seconds, 0.01)
