"""Draws the result of :func:`~rlrr_kernels.analysis.analyze` as one picture."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from rlrr_kernels.analysis.measures import QUANTILES, SPECTRUM_POINTS

# Okabe and Ito's colours, which colour-blind people can distinguish, and markers
_STYLES = {"RLRR": ("#0072B2", "o"), "SSF": ("#E69F00", "s"), "LoRA": ("#009E73", "^"), "full": ("#CC79A7", "D")}
_SHARES = (
    ("share_out", "output\nscaling"),
    ("share_in", "input\nscaling"),
    ("share_rescaling", "both sides at\nonce, $W \\odot a c^T$"),
    ("share_low_rank", "rank k"),
)
# smaller values are drawn at these, as a logarithmic axis has no zero
_LEAST_ANGLE = 1e-2
_LEAST_UPDATE = 1e-6


def draw(analysis: Mapping[str, Any], title: str = "") -> bytes:
    """Draw a PNG of what :func:`~rlrr_kernels.analysis.analyze` returned.

    There are six panels, or four if no method rescales: rotation of the leading directions, relative size of the update
    by layer, shares of the forms of updates, singular values, u and v by layer.
    """
    methods: Sequence[Mapping[str, Any]] = analysis["methods"]
    rescaled = [m for m in methods if any(view["scales"] for view in m["layers"].values())]
    rows = 3 if rescaled else 2
    figure = Figure(figsize=(11, 3.9 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, 2)
    layers = _layers_in_order(methods)
    _rotation(grid[0][0], methods)
    _sizes(grid[0][1], methods, layers)
    _shares(grid[1][0], methods, analysis["top"])
    _spectra(grid[1][1], methods)
    if rescaled:
        _scales(grid[2][0], rescaled, layers, "u", "u by layer (of SSF: scale less 1)")
        _scales(grid[2][1], rescaled, layers, "v", "v by layer")
    handles = [
        figure.axes[0].plot([], [], color=_style(m)[0], marker=_style(m)[1], ls=_dash(methods, m), label=m["label"])[0]
        for m in methods
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=max(len(handles), 1), frameon=False)
    if title:
        figure.suptitle(title, fontsize=11)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, format="png")
    return buffer.getvalue()


def _style(method: Mapping[str, Any]) -> tuple[str, str]:
    return _STYLES.get(method["method"], ("#000000", "x"))


def _dash(methods: Sequence[Mapping[str, Any]], method: Mapping[str, Any]) -> str:
    """Line style: solid for the first tuned model of a method, and others for the next ones."""
    same = [m["label"] for m in methods if m["method"] == method["method"]]
    return ("-", "--", ":", "-.")[same.index(method["label"]) % 4]


def _values(method: Mapping[str, Any], key: str, least: float = -np.inf) -> np.ndarray:
    found = [view[key] for view in method["layers"].values() if view[key] is not None]
    return np.maximum(np.array(found, dtype=float), least)


def _rotation(axes: Axes, methods: Sequence[Mapping[str, Any]]) -> None:
    furthest = 2.0
    for method in methods:
        colour, marker = _style(method)
        into, out = (_values(method, f"rotation_{side}", _LEAST_ANGLE) for side in ("in", "out"))
        far, balance = np.sqrt((into**2 + out**2) / 2), out / into
        furthest = max(furthest, *balance, *(1 / balance))
        axes.scatter(far, balance, s=20, color=colour, marker=marker, alpha=0.45, linewidths=0)
        middle = [np.median(far)], [np.median(balance)]
        axes.scatter(*middle, s=110, color=colour, marker=marker, edgecolors="black", linewidths=1, zorder=3)
    axes.axhline(1, color="#999999", lw=0.8, ls=":", zorder=0)
    for y, side, align in ((0.98, "output", "top"), (0.02, "input", "bottom")):
        axes.text(0.02, y, f"{side} side turns more", transform=axes.transAxes, va=align, fontsize=8, color="#555555")
    axes.set(xscale="log", yscale="log", ylim=(0.8 / furthest, 1.25 * furthest))
    _plain_ticks(axes.xaxis, "{:g}°")
    _plain_ticks(axes.yaxis, "{:g}")
    axes.set_xlabel("rotation of the leading directions, both sides")
    axes.set_ylabel("output side / input side")
    axes.set_title("Which side turns, how far (a point a layer; large: median)", fontsize=10)


def _sizes(axes: Axes, methods: Sequence[Mapping[str, Any]], layers: Sequence[str]) -> None:
    all_sizes: list[float] = []
    for method in methods:
        colour, marker = _style(method)
        x = [layers.index(name) for name in method["layers"]]
        y = _values(method, "relative_update", _LEAST_UPDATE)
        all_sizes.extend(y)
        axes.plot(x, y, color=colour, marker=marker, ms=3, lw=0.8, ls=_dash(methods, method))
    if max(all_sizes) > 30 * min(all_sizes):
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis, "{:.4g}%", 100)
    else:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylabel(r"$\|W' - W\| \,/\, \|W\|$")
    axes.set_title("Relative size of the update, by layer", fontsize=10)
    _layer_ticks(axes, layers)


def _shares(axes: Axes, methods: Sequence[Mapping[str, Any]], top: int) -> None:
    width = 0.8 / len(methods)
    for i, method in enumerate(methods):
        for position, (key, _) in enumerate(_SHARES):
            values = _values(method, key)
            if not len(values):
                continue
            x, middle = position + (i - (len(methods) - 1) / 2) * width, float(np.median(values))
            low, high = np.quantile(values, (0.05, 0.95))
            axes.bar(
                x, middle, width * 0.9, color=_style(method)[0], hatch="//" if _dash(methods, method) != "-" else ""
            )
            axes.errorbar(x, middle, [[middle - low], [high - middle]], color="black", lw=0.8, capsize=2)
    axes.set_xticks(range(len(_SHARES)), [label.replace("rank k", f"rank {top}") for _, label in _SHARES])
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set(ylim=(0, 1.05), ylabel=r"share of $\|W' - W\|^2$")
    axes.set_title("What updates are made of (median, 5 to 95% of layers)", fontsize=10)


def _spectra(axes: Axes, methods: Sequence[Mapping[str, Any]]) -> None:
    x, shown = np.linspace(0, 1, SPECTRUM_POINTS), [0.5, 1.5]
    for method in methods:
        before, after = (
            np.array([view[key] for view in method["layers"].values()]) for key in ("spectrum", "spectrum_updated")
        )
        # relative to the largest value where W's own is almost zero
        ratio = after / np.maximum(before, 1e-6 * before[:, :1])
        low, middle, high = np.quantile(ratio, (0.05, 0.5, 0.95), axis=0)
        axes.plot(x, middle, color=_style(method)[0], ls=_dash(methods, method), lw=1.5)
        axes.fill_between(x, low, high, color=_style(method)[0], alpha=0.15, lw=0)
        # the last values of W are almost zero, so that their ratios are arbitrary
        shown = [min(shown[0], 0.9 * low[:-2].min()), max(shown[1], 1.1 * high[:-2].max())]
    axes.set_ylim(*shown)
    axes.axhline(1, color="#999999", lw=0.8, ls=":")
    axes.set(xlabel="position in the spectrum, largest first", ylabel="singular value of W' / of W")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title("Singular values (median, 5 to 95% of layers)", fontsize=10)


def _scales(axes: Axes, methods: Sequence[Mapping[str, Any]], layers: Sequence[str], side: str, title: str) -> None:
    at = {q: QUANTILES.index(q) for q in (0.05, 0.25, 0.5, 0.75, 0.95)}
    for method in methods:
        views = {name: view["scales"] for name, view in method["layers"].items() if view["scales"]}
        if side == "v" and method["method"] == "SSF":
            continue  # it has none
        x = [layers.index(name) for name in views]
        bands = np.array([scales[side]["quantiles"] for scales in views.values()])
        colour = _style(method)[0]
        for low, high, alpha in ((0.05, 0.95, 0.15), (0.25, 0.75, 0.3)):
            axes.fill_between(x, bands[:, at[low]], bands[:, at[high]], color=colour, alpha=alpha, lw=0)
        axes.plot(x, bands[:, at[0.5]], color=colour, lw=1.2, ls=_dash(methods, method))
    axes.axhline(0, color="#999999", lw=0.8, ls=":")
    axes.set_ylabel(f"{side} ({'out' if side == 'u' else 'in'}put side)")
    axes.set_title(f"{title}: median, 25 to 75%, 5 to 95%", fontsize=10)
    _layer_ticks(axes, layers)


def _plain_ticks(axis: Axis, form: str, factor: float = 1) -> None:
    """Format the ticks of a logarithmic axis as plain numbers, also if it spans less than a decade."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: form.format(factor * value)))
    axis.set_minor_formatter(NullFormatter())


def _layers_in_order(methods: Sequence[Mapping[str, Any]]) -> list[str]:
    """Layers of all methods, sorted by the numbers in their names, then in the order of the methods."""
    names = list(dict.fromkeys(name for method in methods for name in method["layers"]))
    numbers = {name: [int(number) for number in re.findall(r"\d+(?=\.)", name)] for name in names}
    return sorted(names, key=lambda name: numbers[name])


def _layer_ticks(axes: Axes, layers: Sequence[str]) -> None:
    """Label the first layer of each block with its number, for at most 14 blocks."""
    starts: dict[str, int] = {}
    for position, name in enumerate(layers):
        block = re.match(r"(.*\.\d+)\.", name)
        starts.setdefault(block[1] if block else name, position)
    every = -(-len(starts) // 14)
    shown = list(starts.items())[::every]
    labels = [".".join(re.findall(r"(?:^|\.)(\d+)", block)) or block for block, _ in shown]
    axes.set_xticks([position for _, position in shown], labels)
    axes.set_xlabel("block" if any(label[0].isdigit() for label in labels) else "layer")
