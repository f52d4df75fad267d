"""Made-up raw results for tests: round numbers, never to be written where measured ones are kept."""

from typing import Any

from benchmarks import results

GPU = "NVIDIA H200"


def chunk(rows: list[dict[str, Any]], suite: str = "layer", device: str = GPU, **head: Any) -> dict[str, Any]:
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
    """Quartiles ``spread`` (a share) around a median; or the error of a case that failed."""
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
    **more: Any,
) -> dict[str, Any]:
    return {
        "model": model,
        "layer": name,
        "n": n,
        "k": k,
        "groups": groups,
        "m": m,
        "images": m // 197,
        "dtype": dtype,
        "direction": direction,
        "implementation": implementation,
        "backend": "triton" if implementation == results.OURS else None,
        "same_function": implementation not in results.OTHER_FUNCTIONS,
        **_times(seconds, spread),
        **more,
    }


def step(
    implementation: str,
    seconds: float | str,
    *,
    batch: int = 64,
    dtype: str = "bfloat16",
    spread: float = 0.01,
    **more: Any,
) -> dict[str, Any]:
    rate = {} if isinstance(seconds, str) else {"images_per_second": batch / seconds}
    return {
        "model": "ViT-B/16",
        "batch": batch,
        "image_size": 224,
        "dtype": dtype,
        "implementation": implementation,
        "same_function": implementation not in results.OTHER_FUNCTIONS,
        **_times(seconds, spread),
        **rate,
        **more,
    }


def launch(implementation: str, seconds: float | str, call: str = "forward", dtype: str = "bfloat16") -> dict[str, Any]:
    return {"call": call, "dtype": dtype, "implementation": implementation, "backend": None, **_times(seconds, 0.01)}
