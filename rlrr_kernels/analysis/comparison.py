"""Compares all tuned models with their base, layer by layer, as one JSON-ready record with medians over layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from statistics import median
from typing import Any

import torch
from torch import Tensor

from rlrr_kernels.analysis.measures import decompose, layer_view, scales_view
from rlrr_kernels.analysis.sources import Tuned

FORMAT = "rlrr_kernels.analysis/1"

#: Figures of a layer that are summarised by their medians over layers.
SUMMARY = (
    "relative_update",
    "rotation_out",
    "rotation_in",
    "update_rank",
    "update_effective_rank",
    "share_out",
    "share_in",
    "share_rescaling",
    "share_low_rank",
)


def parts(name: str, weight: Tensor) -> Iterator[tuple[str, slice]]:
    """Name and rows of the maps in one weight: q, k and v of a fused one (``qkv`` with 3 K rows), else the weight."""
    n, k = weight.shape
    if name.rpartition(".")[2] == "qkv" and n == 3 * k:
        stem = name.removesuffix("qkv")
        yield from ((f"{stem}{letter}", slice(i * k, (i + 1) * k)) for i, letter in enumerate("qkv"))
    else:
        yield name, slice(0, n)


def analyze(
    base: Mapping[str, Tensor],
    tuned: Sequence[Tuned],
    *,
    layers: str = "*",
    top: int = 8,
    device: torch.device | str = "cpu",
    progress: Callable[[Sequence[str]], Iterable[str]] = iter,
) -> dict[str, Any]:
    """Compare tuned models with their common base, layer by layer. A fused qkv is split into q, k and v.

    Args:
        base: Layer name -> W ``[N, K]``.
        tuned: Models that were tuned from the base.
        layers: Shell pattern for layer names (of a fused qkv, its own name).
        top: Number of leading singular vectors to compare.
        device: Where to compute: in float64 on a CPU, in float32 elsewhere.
        progress: Wraps the list of layer names, as ``tqdm`` does.

    Returns:
        ``{"format", "top", "layers", "methods": [{"label", "method", "path", "skipped", "layers", "summary"}]}``, where
        ``layers`` of a method maps a layer's name to the fields of :class:`~rlrr_kernels.analysis.LayerView` and
        ``scales``: the fields of :class:`~rlrr_kernels.analysis.ScalesView`, or None. JSON-ready.

    Raises:
        ValueError: If no layer matches, a tuned model does not fit the base, or a weight has no decomposition; names
            the layer.
    """
    names = [name for name in base if fnmatchcase(name, layers) and any(name in each.updates for each in tuned)]
    if not names:
        raise ValueError(f"layers: {layers!r} matches no layer that was tuned")
    found: list[dict[str, Any]] = [{} for _ in tuned]
    for name in progress(names):
        weight = base[name].to(device)
        updated = {}
        for i, each in enumerate(tuned):
            if name in each.updates:
                try:
                    updated[i] = each.updates[name](weight)
                except ValueError as error:
                    raise ValueError(f"{each.path}: {name}: {error}") from error
        for part, rows in parts(name, weight):
            try:
                old = decompose(weight[rows])
                for i, new in updated.items():
                    scales = tuned[i].updates[name].scales(rows)
                    found[i][part] = dataclasses.asdict(layer_view(old, new[rows], top=top)) | {
                        "scales": None if scales is None else dataclasses.asdict(scales_view(*scales))
                    }
            except ValueError as error:
                raise ValueError(f"{part}: {error}") from error
    methods = [
        {
            "label": label,
            "method": each.method,
            "path": each.path,
            "skipped": list(each.skipped),
            "layers": views,
            "summary": summary(views),
        }
        for label, each, views in zip(_labels(tuned), tuned, found, strict=True)
        if views
    ]
    return {"format": FORMAT, "top": top, "layers": layers, "methods": methods}


def summary(views: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Median over layers of each figure in :data:`SUMMARY`; None if no layer has it."""
    values = {key: [view[key] for view in views.values() if view[key] is not None] for key in SUMMARY}
    return {key: float(median(found)) if found else None for key, found in values.items()}


def _labels(tuned: Sequence[Tuned]) -> list[str]:
    methods = [each.method for each in tuned]
    return [
        method if methods.count(method) == 1 else f"{method} {methods[: i + 1].count(method)}"
        for i, method in enumerate(methods)
    ]
