"""Plots of measured results, as PNGs that contain a digest of the data behind them."""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks import results
from benchmarks.groups import Group, groups, is_ours, on_gpu
from benchmarks.tables import PRODUCT_COUNT, implementations, largest

_KEY = "drawn-from-sha256"
_DTYPES = ("bfloat16", "float16", "float32")
# Okabe and Ito's colours, which the colour-blind can distinguish; each line also has its own marker
_LINES = {
    results.OURS: ("#D55E00", "o"),
    results.RECOMPUTE_COMPILED: ("#E69F00", "v"),
    results.RECOMPUTE: ("#009E73", "^"),
    results.FORMULA_COMPILED: ("#56B4E9", "D"),
    results.FORMULA: ("#0072B2", "s"),
    results.FACTORED: ("#CC79A7", "P"),
    results.PRODUCTS: ("#000000", "x"),
}
_OURS, _RIVAL, _OTHER = "#D55E00", "#0072B2", "#BBBBBB"
_GREY = "#777777"
_COLOURS = "orange: this package; blue: another way to the same function; grey: another function"
#: Part of the name that PyTorch reports -> dense bfloat16 TFLOP/s and TB/s of the maker's data sheet; the first
#: that matches counts. Sheets that give rates with sparsity are halved.
PEAKS = {
    "B200": (2250, 8.0),
    "H200": (989, 4.8),
    "H100 NVL": (835, 3.9),
    "H100 PCIe": (756, 2.0),
    "H100 80GB HBM3": (989, 3.35),
    "A100-SXM4-80GB": (312, 2.039),
    "A100 80GB PCIe": (312, 1.935),
    "A100-SXM4-40GB": (312, 1.555),
    "A100-PCIE-40GB": (312, 1.555),
    "L40S": (362, 0.864),
    "RTX 4090": (165, 1.008),
}


@dataclass(frozen=True)
class Plot:
    """A figure that is not drawn yet.

    Attributes:
        kind: "throughput", "memory" or "step".
        alt: What it shows, in a sentence.
        digest: Digest of the results and of the drawing code.
        draw: Returns the PNG.
    """

    kind: str
    alt: str
    digest: str
    draw: Callable[[], bytes]


def plots(chunks: Sequence[Mapping[str, Any]]) -> dict[str, Plot]:
    """Return the plots of one device at rank 1, by file name."""
    found = groups(chunks)
    parts: dict[tuple[str, str], list[Group]] = {}
    for group in found:
        if group.case["rank"] > 1:
            continue
        if group.case.get("direction") == "both" and group.suite == "layer":
            parts.setdefault(("throughput", group.case["model"]), []).append(group)
            parts.setdefault(("memory", group.case["model"]), []).append(group)
        if group.suite == "step":
            parts.setdefault(("step", ""), []).append(group)
    drawn = {}
    for (kind, model), own in parts.items():
        draw, alt = _KINDS[kind]
        device = own[0].chunk["device"]
        name = "-".join(part for part in (device, kind, model) if part)
        name = name.replace(" ", "_").replace("/", "-") + ".png"
        key = _digest(own)
        what = alt(own)
        title = f"{model or 'Training steps'} on {'a CPU' if device == 'cpu' else device}"
        drawn[name] = Plot(kind, f"{title}: {what}", key, functools.partial(_png, draw, own, title, key))
    return drawn


def digest(path: Path) -> str | None:
    """Return the digest in a PNG; None if there is no file, or it is not of this program."""
    if not path.is_file():
        return None
    with Image.open(path) as image:
        return image.info.get(_KEY)


def roofline(device: str, case: Mapping[str, Any], m: np.ndarray) -> np.ndarray | None:
    """Return the most TFLOP/s of forward and backward that the data sheet allows at these M.

    No implementation avoids these bytes: x and W read and y written in forward; x, W and dy read and dx written in
    backward, once each.

    Returns:
        One value for each M, or None for an unknown GPU or dtype.
    """
    peak = next((value for name, value in PEAKS.items() if name in device), None)
    if peak is None or case["dtype"] not in ("bfloat16", "float16"):
        return None
    n, k = case["n"], case["k"]
    moved = 2 * (3 * m * k + 2 * m * n + 2 * n * k)
    flops = 2 * PRODUCT_COUNT["both"] * m * n * k
    return np.minimum(peak[0], peak[1] * flops / moved)


def _digest(found: Iterable[Group]) -> str:
    """Return the digest of results and of this file: if the code that draws changes, so does the plot."""
    data = [Path(__file__).read_text(), *([g.chunk["device"], dict(g.case), dict(g.rows)] for g in found)]
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _png(draw: Callable[[list[Group]], Figure], found: list[Group], title: str, key: str) -> bytes:
    figure = draw(found)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left", fontweight="bold")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=160, format="png")
    # 256 colours take a third of the bytes
    image = Image.open(buffer).convert("RGB").quantize(256)
    info = PngInfo()
    info.add_text(_KEY, key)
    smaller = io.BytesIO()
    image.save(smaller, format="png", optimize=True, pnginfo=info)
    return smaller.getvalue()


def _dtypes(found: Iterable[Group]) -> list[str]:
    """Return at most two dtypes that were measured."""
    there = {group.case["dtype"] for group in found}
    return [name for name in _DTYPES if name in there][:2] or sorted(there)[:2]


def _layers(found: Iterable[Group]) -> list[str]:
    """Return at most four layers for panels; of a model with more layers, fc1 of each stage."""
    names = list(dict.fromkeys(group.case["layer"] for group in found))
    return names if len(names) <= 4 else ([name for name in names if name.endswith("fc1")] or names)[:4]


def _throughput(found: list[Group]) -> Figure:
    dtypes, layers = _dtypes(found), _layers(found)
    gpu = on_gpu(found[0].chunk)
    figure = Figure(figsize=(9.2, 2.5 * len(dtypes) + 0.7), layout="constrained")
    grid = figure.subplots(len(dtypes), len(layers), sharey="row", squeeze=False)
    for line, dtype in zip(grid, dtypes, strict=True):
        ends: dict[str, tuple[float, str]] = {}
        for axes, layer in zip(line, layers, strict=True):
            own = [g for g in found if (g.case["dtype"], g.case["layer"]) == (dtype, layer)]
            ends |= _panel(axes, sorted(own, key=lambda g: g.case["m"]), gpu)
            axes.set_title(f"{layer}, {dtype}", fontsize=9)
        line[0].set_ylabel("TFLOP/s" if gpu else "plain linear's time / its time", fontsize=9)
        line[0].set_ylim(bottom=0)
        _label_ends(line[-1], ends)
    for axes in grid[-1]:
        axes.set_xlabel("M, tokens", fontsize=9)
    return figure


def _panel(axes: Axes, own: list[Group], gpu: bool) -> dict[str, tuple[float, str]]:
    """Draw one layer, and return the last value and the colour of each line, by name."""
    ends: dict[str, tuple[float, str]] = {}
    tokens = sorted({g.case["m"] for g in own})
    for name, (colour, marker) in _LINES.items():
        points = [(g.case["m"], *rates) for g in own if (rates := _rates(g, name, gpu)) is not None]
        if points:
            m, low, middle, high = np.array(points).T
            width = 2.2 if name == results.OURS else 1.1
            axes.plot(m, middle, color=colour, marker=marker, ms=4, lw=width, zorder=3 if width > 2 else 2)
            axes.fill_between(m, low, high, color=colour, alpha=0.15, lw=0)
            ends[name] = float(middle[-1]), colour
    if not gpu:
        axes.axhline(1, color=_GREY, lw=1, ls=":")
        ends["plain linear (dx only)"] = 1.0, _GREY
    elif own:
        m = np.geomspace(tokens[0], tokens[-1], 100)
        limit = roofline(own[0].chunk["device"], own[0].case, m)
        if limit is not None:
            axes.plot(m, limit, color=_GREY, lw=1, ls=":")
            ends["roofline (data sheet)"] = float(limit[-1]), _GREY
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(tokens))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.tick_params(axis="x", rotation=40)
    axes.grid(axis="y", color="#EEEEEE", lw=0.8)
    return ends


def _rates(group: Group, name: str, gpu: bool) -> tuple[float, float, float] | None:
    """Return an implementation's speed at the slow quartile, the median and the fast quartile, or None.

    TFLOP/s on a GPU; elsewhere the plain linear's time / its time.
    """
    row, plain, case = group.rows.get(name, {}), group.median(results.PLAIN), group.case
    if "median" not in row or (plain is None and not gpu):
        return None
    work = 2e-12 * PRODUCT_COUNT["both"] * case["m"] * case["n"] * case["k"] if gpu else plain or 0.0
    return work / row["q3"], work / row["median"], work / row["q1"]


def _label_ends(axes: Axes, ends: Mapping[str, tuple[float, str]]) -> None:
    """Write names beside the last panel, at the ends of their lines, without overlap."""
    low, high = axes.get_ylim()
    order = sorted(ends, key=lambda name: ends[name][0])
    places = apart([ends[name][0] for name in order], (high - low) / 11)
    for name, y in zip(order, places, strict=True):
        value, colour = ends[name]
        axes.annotate(
            name,
            xy=(1, value),
            xytext=(1.12, y),
            xycoords=axes.get_yaxis_transform(),
            textcoords=axes.get_yaxis_transform(),
            color=colour,
            fontsize=8,
            va="center",
            fontweight="bold" if name == results.OURS else "normal",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5)},
            annotation_clip=False,
        )


def apart(values: Sequence[float], gap: float) -> list[float]:
    """Return places in the order of the sorted ``values``, at least ``gap`` apart, and as near to them as possible."""
    # less their gaps the places must not decrease: runs that would decrease are pooled at their mean
    pools: list[list[float]] = []
    for i, value in enumerate(values):
        pools.append([value - i * gap])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    return [float(mean) + i * gap for i, mean in enumerate(np.mean(pool) for pool in pools for _ in pool)]


def _colour(group: Group, name: str) -> str:
    if is_ours(name):
        return _OURS
    return _RIVAL if group.rows[name].get("same_function") else _OTHER


def _memory(found: list[Group]) -> Figure:
    case = _memory_case(found)
    held = {
        name: (row["extra_bytes"] / 1e6, row["saved_bytes"] / 1e6, bool(row.get("saved_x")))
        for name in implementations([case])
        if (row := case.rows[name]).get("extra_bytes") is not None and row.get("saved_bytes") is not None
    }
    figure = Figure(figsize=(9.2, 0.3 * len(held) + 1.3), layout="constrained")
    axes = figure.subplots()
    for y, (name, (extra, saved, x)) in enumerate(held.items()):
        axes.barh(y, extra, color=_colour(case, name), alpha=0.45, height=0.7)
        axes.barh(y, min(saved, extra), color=_colour(case, name), height=0.7)
        text = f" {extra:.1f}, {saved:.1f} kept{' and x' if x else ''}"
        axes.text(extra, y, text, va="center", fontsize=8)
    axes.set_yticks(range(len(held)), list(held))
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlim(left=0)
    axes.set_xlabel("peak beyond inputs and outputs, MB (dark: kept for backward)", fontsize=9)
    axes.set_title(f"{case.name}, {case.case['dtype']}, forward + backward", fontsize=9, loc="left")
    figure.supxlabel(_COLOURS, fontsize=8)
    return figure


def _memory_case(found: list[Group]) -> Group:
    """Return the layer with the largest weight, at its largest M."""
    dtype = _dtypes(found)[0]
    return max(largest(g for g in found if g.case["dtype"] == dtype), key=lambda g: g.case["n"] * g.case["k"])


def _steps(found: list[Group]) -> Figure:
    gpu = on_gpu(found[0].chunk)
    heights = [len([row for row in g.rows.values() if "median" in row]) for g in found]
    figure = Figure(figsize=(9.2, 0.28 * sum(heights) + 1.0 * len(found) + 0.4), layout="constrained")
    grid = figure.subplots(len(found), 1, squeeze=False, height_ratios=[height + 1 for height in heights])
    for (axes,), group in zip(grid, found, strict=True):
        names = [name for name in implementations([group]) if group.median(name) is not None]
        unit = 1e-3 if gpu else group.median(results.OURS) or group.median(names[0]) or 1.0
        for y, name in enumerate(names):
            row = group.rows[name]
            time = row["median"] / unit
            axes.barh(y, time, color=_colour(group, name), height=0.7)
            rate = (
                f" {row['images_per_second']:,.0f} images/s" if gpu and row.get("images_per_second") else f" {time:.2f}"
            )
            peak = f", {row['peak_bytes'] / 1e9:.2f} GB" if row.get("peak_bytes") else ""
            axes.text(time, y, rate + peak, va="center", fontsize=8)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set_xlim(left=0)
        against = "this package's" if group.median(results.OURS) else f"{names[0]}'s"
        axes.set_xlabel("ms a step" if gpu else f"time of a step / {against}", fontsize=9)
        axes.set_title(f"{group.name}, {group.case['dtype']}", fontsize=9, loc="left")
    figure.supxlabel(_COLOURS, fontsize=8)
    return figure


def _throughput_alt(found: list[Group]) -> str:
    unit = "TFLOP/s" if on_gpu(found[0].chunk) else "speed over a plain linear's"
    return f"{unit} of forward + backward against M, for {', '.join(_layers(found))}"


def _memory_alt(found: list[Group]) -> str:
    return f"peak memory beyond inputs and outputs at {_memory_case(found).name}"


def _steps_alt(found: list[Group]) -> str:
    return f"time of a step of {', '.join(dict.fromkeys(g.name for g in found))}"


_KINDS: dict[str, tuple[Callable[[list[Group]], Figure], Callable[[list[Group]], str]]] = {
    "throughput": (_throughput, _throughput_alt),
    "memory": (_memory, _memory_alt),
    "step": (_steps, _steps_alt),
}
