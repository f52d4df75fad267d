"""Tables of measured results.

Ratios are another implementation's median / ours from the same run: above 1 where ours is faster. For a CPU only ratios
of times are shown; for a GPU also microseconds and TFLOP/s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks import results
from benchmarks.groups import DIRECTIONS, Group, geometric_mean, is_ours, on_gpu

#: Products of 2 M N K flops that a direction needs.
PRODUCT_COUNT = {"forward": 1, "forward_no_grad": 1, "backward": 2, "both": 3, "grad_scales": 1}
BEST = "**best other way to the same function**"
CALLS = {"no_grad": "forward, no graph", "forward": "forward", "both": "forward + backward"}
_NAMES = {"torch": "PyTorch", "triton": "Triton", "cuda": "CUDA", "peft": "PEFT", "python": "Python"}
#: What shows the scale of a session's ratios: another function, or a part of ours.
_SCALE = {
    "layer": (results.PLAIN, results.PRODUCTS, results.BARE_GRAD, results.HIRAS[8], results.HIRAS[32]),
    "norm": (results.LAYER_NORM,),
    "launch": (results.PLAIN,),
    "step": (results.PROBE,),
}
_ORDERS: dict[str, tuple[str, ...]] = {
    "layer": results.LAYER_IMPLEMENTATIONS,
    "norm": results.NORM_IMPLEMENTATIONS,
    "launch": results.LAYER_IMPLEMENTATIONS,
    "step": results.STEP_IMPLEMENTATIONS,
}


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a table; columns from ``left`` on are aligned to the right."""
    lines = [heads, ["---"] * left + ["---:"] * (len(heads) - left), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def details(title: str, text: str) -> str:
    """Return text that is hidden until a reader opens it."""
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def caption(found: Sequence[Group]) -> str:
    """Return device, versions, date and commands of the runs behind a table, a line for each set of versions."""
    runs: dict[str, list[str]] = {}
    for group in found:
        chunk = group.chunk
        versions = ", ".join(f"{_NAMES.get(n, n)} {v}" for n, v in chunk["versions"].items() if v)
        device = chunk["processor"] if not on_gpu(chunk) else f"{chunk['device']} ({chunk['processor']})"
        commands = runs.setdefault(f"{device}; {versions}; {chunk['date']}", [])
        if chunk["command"] not in commands:
            commands.append(chunk["command"])
    return "  \n".join(f"*{run}; {_commands(commands)}*" for run, commands in runs.items())


def caveats(chunks: Iterable[Mapping[str, Any]]) -> str:
    """Return which chunks are incomplete, or nothing."""
    unfinished = [f"`{chunk['chunk']}`" for chunk in chunks if chunk.get("complete") is not True]
    return f"- **Incomplete**, of which only a part was measured: {', '.join(unfinished)}." if unfinished else ""


def _commands(commands: Sequence[str]) -> str:
    """Return all commands, or of more than three the first and the last."""
    if len(commands) <= 3:
        return ", ".join(f"`{command}`" for command in commands)
    return f"{len(commands)} commands, `{commands[0]}` to `{commands[-1]}`"


def implementations(found: Iterable[Group]) -> list[str]:
    """Return the implementations in these groups of one suite, in the suite's order."""
    found = list(found)
    names = dict.fromkeys(name for group in found for name in group.rows)
    order = _ORDERS[found[0].suite] if found else ()
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def computes(name: str, found: Iterable[Group]) -> str:
    """Return what an implementation computes, for the column beside its name."""
    if is_ours(name):
        return "this package, a part of it" if name in results.OTHER_FUNCTIONS else "this package"
    flags = {
        group.rows[name].get("same_function", name not in results.OTHER_FUNCTIONS)
        for group in found
        if name in group.rows
    }
    return "the same" if flags == {True} else "another function"


def ratio(group: Group, other: str) -> str:
    """Return the other's time / ours, bold if another way to the same function is faster."""
    value = group.speed_up(other)
    if value is None:
        return "failed" if "error" in group.rows.get(other, {}) else ""
    lost = value < 1 and group.rows[other].get("same_function")
    return f"**{value:.2f}**" if lost else f"{value:.2f}"


def column(group: Group) -> str:
    """Return a group's column of the summary."""
    if group.suite == "launch":
        return CALLS.get(group.case["call"], group.case["call"])
    return "training step" if group.suite == "step" else DIRECTIONS[group.case["direction"]]


def summary(found: Sequence[Group]) -> str:
    """Return the ratios to each implementation: their mean, their extremes, and how often ours is faster."""
    columns = list(dict.fromkeys(column(group) for group in found))
    rows = []
    if any(group.rivals for group in found):
        best = [(g, g.speed_up(g.best_rival)) for g in found if g.best_rival is not None]
        rows.append([BEST, "the same", *(_spread([r for g, r in best if column(g) == c], True) for c in columns)])
    for name in implementations(found):
        if name in (group.ours for group in found if name in group.rows):
            continue
        kind = computes(name, found)
        cells = [_spread([g.speed_up(name) for g in found if column(g) == c], kind == "the same") for c in columns]
        if any(cells):
            rows.append([name, kind, *cells])
    return markdown(["compared with", "computes", *columns], rows, left=2)


def _spread(ratios: Iterable[float | None], rival: bool) -> str:
    values = [value for value in ratios if value is not None]
    if not values:
        return ""
    faster = sum(value > 1 for value in values)
    if len(values) == 1:
        return f"**{values[0]:.2f}**" if rival and not faster else f"{values[0]:.2f}"
    count = f"{faster} of {len(values)}"
    if rival and faster < len(values):
        count = f"**{count}**"
    return f"{geometric_mean(values):.2f} ({min(values):.2f} to {max(values):.2f}), faster in {count}"


def losses(found: Sequence[Group]) -> str:
    """Return every case in which another way to the same function is faster, the worst first, or nothing."""
    lost = [(g.speed_up(name) or 1, g, name) for g in found for name in g.rivals if (g.speed_up(name) or 1) < 1]
    rows = [
        [g.name, g.case["dtype"], column(g), name, f"{value:.2f}"]
        for value, g, name in sorted(lost, key=lambda loss: loss[0])
    ]
    return markdown(["case", "dtype", "direction", "faster than ours", "its time / ours"], rows, left=4) if rows else ""


def failures(found: Sequence[Group]) -> str:
    """Return what did not run, and why, or nothing."""
    counts: dict[tuple[str, str], list[str]] = {}
    for group in found:
        for name, row in group.rows.items():
            if "error" in row:
                counts.setdefault((name, row["error"]), []).append(group.name)
    rows = [[name, str(len(where)), where[0], error.replace("|", "\\|")] for (name, error), where in counts.items()]
    return markdown(["failed", "cases", "first at", "error"], rows, left=4) if rows else ""


def every_case(found: Sequence[Group]) -> str:
    """Return a row for each layer and M of one direction and dtype."""
    gpu = on_gpu(found[0].chunk)
    names = [name for name in implementations(found) if name != results.OURS]
    absolute = ["ours, µs", "ours, TFLOP/s"] if gpu else []
    rows = []
    for g in found:
        seconds = g.median(results.OURS)
        own = ["failed" if results.OURS in g.rows else ""] * 2 if seconds is None else _absolute(g, seconds)
        backend = g.rows.get(results.OURS, {}).get("backend") or ""
        rows.append(
            [g.case["layer"], f"{g.case['m']:,}", backend, *(own if gpu else []), *(ratio(g, name) for name in names)]
        )
    return markdown(["layer", "M", "backend", *absolute, *names], rows)


def _absolute(group: Group, seconds: float) -> list[str]:
    case = group.case
    flops = 2 * PRODUCT_COUNT[case["direction"]] * case["m"] * case["n"] * case["k"]
    return [f"{seconds * 1e6:,.1f}", f"{flops / seconds / 1e12:,.1f}"]


def ranks(found: Sequence[Group]) -> str:
    """Return a row for each layer, M and rank of one direction and dtype, and the geometric means of each rank."""
    cases = list(dict.fromkeys((g.case["layer"], g.case["m"]) for g in found))
    shown = sorted(found, key=lambda g: (cases.index((g.case["layer"], g.case["m"])), g.case["rank"]))
    rows = []
    for g in shown:
        best, hira = g.best_rival, results.HIRAS[g.case["rank"]]
        fastest = "" if best is None else f"{ratio(g, best)} ({best})"
        memory = (_memory_ratio(g, name) for name in (results.FORMULA, hira))
        times = (ratio(g, results.FORMULA), fastest, ratio(g, hira), ratio(g, results.PLAIN))
        shares = ("" if value is None else f"{value:.1%}" for value in memory)
        rows.append([g.case["layer"], f"{g.case['m']:,}", str(g.case["rank"]), *times, *shares])
    for rank in sorted({g.case["rank"] for g in shown}):
        own, hira = [g for g in shown if g.case["rank"] == rank], results.HIRAS[rank]
        best_times = _mean(g.speed_up(g.best_rival or "") for g in own)
        formula, *others = (_mean(g.speed_up(n) for g in own) for n in (results.FORMULA, hira, results.PLAIN))
        shares = (_mean((_memory_ratio(g, name) for g in own), ".1%") for name in (results.FORMULA, hira))
        rows.append(["geometric mean", "", str(rank), formula, best_times, *others, *shares])
    heads = [
        "layer",
        "M",
        "r",
        "formula",
        "best other way to the same function",
        "HiRA of this r (PEFT)",
        results.PLAIN,
    ]
    return markdown([*heads, "extra memory, ours / formula's", "extra memory, ours / HiRA's"], rows)


def _memory_ratio(group: Group, other: str) -> float | None:
    """Return our peak beyond inputs and outputs / the other's."""
    ours, theirs = (group.rows.get(name, {}).get("extra_bytes") for name in (group.ours, other))
    return ours / theirs if ours and theirs else None


def _mean(values: Iterable[float | None], form: str = ".2f") -> str:
    there = [value for value in values if value is not None]
    return format(geometric_mean(there), form) if there else ""


def largest(found: Iterable[Group]) -> list[Group]:
    """Return the groups of forward + backward at the largest M of each layer."""
    best: dict[str, Group] = {}
    for group in found:
        kept = best.get(group.case["layer"])
        if group.case["direction"] == "both" and (kept is None or group.case["m"] > kept.case["m"]):
            best[group.case["layer"]] = group
    return list(best.values())


def memory(found: Sequence[Group]) -> str:
    """Return the peak beyond inputs and outputs, and the part kept for backward, in MB, at each layer's largest M."""
    shown = largest(found)
    heads = [f"{g.case['layer']}, M = {g.case['m']:,}" for g in shown]
    rows = []
    for name in implementations(shown):
        cells = [_bytes(g.rows.get(name, {})) for g in shown]
        if any(cells):
            x = {g.rows[name].get("saved_x") for g in shown if name in g.rows} - {None}
            rows.append([name, computes(name, shown), "yes" if x == {True} else "no" if x == {False} else "", *cells])
    return markdown(["implementation", "computes", "keeps x", *heads], rows, left=3) if rows else ""


def _bytes(row: Mapping[str, Any]) -> str:
    extra, saved = row.get("extra_bytes"), row.get("saved_bytes")
    return "" if extra is None or saved is None else f"{extra / 1e6:.1f} ({saved / 1e6:.1f} kept)"


def step(group: Group) -> str:
    """Return the table of one training step: speed and peak memory of every method."""
    gpu = on_gpu(group.chunk)
    rows = []
    for name in implementations([group]):
        row = group.rows[name]
        line = [name, computes(name, [group])]
        if gpu:
            rate, seconds = row.get("images_per_second"), row.get("median")
            line += ["" if rate is None else f"{rate:,.0f}", "" if seconds is None else f"{seconds * 1e3:,.1f}"]
        peak, own = row.get("peak_bytes"), group.rows.get(results.OURS, {}).get("peak_bytes")
        line += [ratio(group, name), "" if peak is None else f"{peak / 1e9:.2f}"]
        rows.append([*line, f"{own / peak:.2f}" if own and peak else ""])
    absolute = ["images/s", "ms"] if gpu else []
    heads = ["method", "computes", *absolute, "its time / ours", "peak memory, GB", "our peak / its"]
    return markdown(heads, rows, left=2)


def launch(found: Sequence[Group]) -> str:
    """Return the CPU time of a call of one dtype: relative to F.linear's, and on a GPU in microseconds."""
    heads = [column(g) for g in found]
    rows = [[name, computes(name, found), *(_call(g, name) for g in found)] for name in implementations(found)]
    return markdown(["implementation", "computes", *heads], rows, left=2)


def _call(group: Group, name: str) -> str:
    seconds, plain = group.median(name), group.median(results.PLAIN)
    if seconds is None:
        return "failed" if name in group.rows else ""
    times = "" if plain is None else f"{seconds / plain:.1f} x"
    return f"{seconds * 1e6:.1f} µs, {times}".rstrip(", ") if on_gpu(group.chunk) else times


def ratios(found: Iterable[Group]) -> str:
    """Return the table that ends a session, for a terminal: a line for each group, with others' times / ours.

    A cell is empty if something was not measured. Memory is the peak beyond inputs and outputs; of a training step it
    is the whole peak.
    """
    rows = [("", "dtype", "", "formula", "best other way to the same", "for scale", "our memory / formula's")]
    for group in found:
        formula = results.OFFICIAL if group.suite == "step" else results.FORMULA
        best = group.best_rival
        shown = (name for name in _SCALE[group.suite] if name in group.rows)
        scale = (f"{name} {value}" for name in shown if (value := _time_ratio(group, name)))
        field = "peak_bytes" if group.suite == "step" else "extra_bytes"
        ours, theirs = (group.rows.get(name, {}).get(field) for name in (group.ours, formula))
        rows.append(
            (
                *(group.name, group.case["dtype"], column(group), _time_ratio(group, formula)),
                "" if best is None or group.median(group.ours) is None else f"{_time_ratio(group, best)} {best}",
                ", ".join(scale),
                f"{ours / theirs:.2f}" if ours is not None and theirs else "",
            )
        )
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _time_ratio(group: Group, other: str) -> str:
    value = group.speed_up(other)
    if value is not None:
        return f"{value:.2f}"
    return "failed" if any("error" in group.rows[name] for name in {group.ours, other} & group.rows.keys()) else ""
