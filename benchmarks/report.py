"""Tables and plots of what was measured, in docs/benchmarks.md: ``python -m benchmarks.report``.

Reads the raw results under ``benchmarks/results/<device>/`` and rewrites the text between the markers of the page, and
the plots beside it; text outside of the markers is kept. ``--check`` writes nothing and exits with 1 if the page or a
plot differs from what the raw results give.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import plots, results, tables, targets
from benchmarks.groups import Group, groups, on_gpu

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- begin: generated -->", "<!-- end: generated -->"
NO_GPU = (
    "**No NVIDIA GPU has been measured yet**, so this page holds no GPU figure. On one, `make bench-gpu` writes the "
    "raw results, in parts that `CHUNK=` selects, and `python -m benchmarks.report` puts them here."
)
NO_CPU = (
    "**No CPU has been measured yet** with these suites: `make bench` writes the raw results and "
    "`python -m benchmarks.report` puts them here."
)
Chunk = Mapping[str, Any]


def devices(folder: Path) -> list[list[dict[str, Any]]]:
    """Return the chunks of each device, GPUs first.

    Raises:
        FileNotFoundError, ValueError: As :func:`benchmarks.results.load`, or if a folder has several devices.
    """
    found = []
    for path in sorted(p for p in folder.iterdir() if p.is_dir()):
        chunks = results.load(path)
        names = sorted({chunk["device"] for chunk in chunks})
        if len(names) > 1:
            raise ValueError(f"{path}: expected results of one device, got {', '.join(names)}")
        if chunks:
            found.append(chunks)
    return sorted(found, key=lambda chunks: (not on_gpu(chunks[0]), chunks[0]["device"]))


def generate(measured: Sequence[Sequence[Chunk]], images: str = "benchmarks") -> tuple[str, dict[str, plots.Plot]]:
    """Return the text between the markers, and the plots that it shows, by file name.

    Args:
        measured: Chunks of each device, as :func:`devices` returns them.
        images: Folder of the plots, relative to the page.
    """
    parts = [_targets(measured)]
    drawn: dict[str, plots.Plot] = {}
    parts += [text for gpu, text in ((True, NO_GPU), (False, NO_CPU)) if not any(on_gpu(c[0]) == gpu for c in measured)]
    for chunks in measured:
        own = plots.plots(chunks)
        drawn |= own
        parts.append(_device(chunks, own, images))
    return "\n\n".join(parts), drawn


def _targets(measured: Sequence[Sequence[Chunk]]) -> str:
    gpus = [(chunks[0]["device"], chunks) for chunks in measured if on_gpu(chunks[0])] or [("no GPU yet", [])]
    rows = [
        [row.target, row.wanted, device, row.got, _count(row), f"**{row.verdict}**" if row.cases else row.verdict]
        for device, chunks in gpus
        for row in targets.rows(chunks)
    ]
    heads = ["target (bfloat16, NVIDIA GPU)", "wanted", "device", "measured (at the worst case)", "cases", "verdict"]
    runs = tables.caption([group for _, chunks in gpus for group in groups(chunks)])
    return f"## Targets\n\n{tables.markdown(heads, rows, left=4)}\n\n{runs}".rstrip()


def _count(row: targets.Row) -> str:
    return f"{row.cases} of {row.planned}"


def _device(chunks: Sequence[Chunk], drawn: Mapping[str, plots.Plot], images: str) -> str:
    found = groups(chunks)
    suites = {suite: [g for g in found if g.suite == suite] for suite in ("layer", "step", "launch", "norm")}
    shown = {
        kind: "\n\n".join(f"![{p.alt}]({images}/{name})" for name, p in drawn.items() if p.kind == kind)
        for kind in ("throughput", "memory", "step")
    }
    parts = [f"## {chunks[0]['device'] if on_gpu(chunks[0]) else 'CPU'}", tables.caveats(chunks)]
    if layers := [g for g in suites["layer"] if g.case["rank"] == 1]:
        parts += ["### Layers", shown["throughput"], *_summaries(layers), *_every_case(layers)]
        parts += ["### Memory of a layer", shown["memory"], *_memory(layers)]
    parts += _ranks(suites["layer"])
    if suites["step"]:
        parts += ["### Training steps", shown["step"]]
        for group in suites["step"]:
            case = group.case
            parts.append(f"{group.name}, {case['image_size']} px, {case['dtype']}:\n\n{tables.step(group)}")
        parts += _summaries(suites["step"])
    if suites["launch"]:
        parts.append("### CPU time of a call")
        for _, own in _split(suites["launch"], "dtype", "rank"):
            case = own[0].case
            parts.append(f"{case['dtype']}, r = {case['rank']}:\n\n{tables.launch(own)}")
        parts += _summaries(suites["launch"])
    if suites["norm"]:
        parts += ["### LayerNorm with SSF's affine", *_summaries(suites["norm"])]
    return "\n\n".join(part for part in parts if part)


def _split(found: Iterable[Group], *fields: str) -> list[tuple[str, list[Group]]]:
    """Return the groups by the values of these fields, in order of appearance."""
    parts: dict[str, list[Group]] = {}
    for group in found:
        parts.setdefault(", ".join(str(group.case[name]) for name in fields), []).append(group)
    return list(parts.items())


def _summaries(found: Sequence[Group]) -> list[str]:
    """Return for each dtype how often ours wins; then the losses and failures of all of them."""
    parts = []
    for dtype, own in _split(found, "dtype"):
        parts.append(f"{dtype}: time of others / ours, geometric mean (least to most).\n\n{tables.summary(own)}")
    return parts + _closing(found)


def _ranks(found: Sequence[Group]) -> list[str]:
    """Return a table, for each model and dtype, of the cases that were measured at a rank above 1."""

    def case(group: Group) -> list[Any]:
        return [value for name, value in group.case.items() if name != "rank"]

    larger = [case(group) for group in found if group.case["rank"] > 1]
    shown = [group for group in found if case(group) in larger]
    parts = [
        f"{title}, {tables.column(own[0])}: time of others / ours.\n\n{tables.ranks(own)}"
        for title, own in _split(shown, "model", "dtype")
    ]
    return ["### Ranks above 1", *parts, *_closing(shown)] if shown else []


def _closing(found: Sequence[Group]) -> list[str]:
    """Return what these groups were measured with, and their losses and failures."""
    parts = [tables.caption(found)]
    contests = [g for g in found if g.rivals and g.median(g.ours) is not None]
    lost = [g for g in contests if (g.speed_up(g.best_rival or "") or 1) < 1]
    if contests:
        fastest = len(contests) - len(lost)
        parts.append(f"Ours is the fastest way to the same function in {fastest} of {len(contests)} cases.")
    if lost:
        parts.append(tables.details("Every case in which another way is faster", tables.losses(found)))
    parts.append(tables.failures(found))
    return parts


def _every_case(found: Sequence[Group]) -> list[str]:
    parts = []
    for direction in ("both", "forward"):
        for title, own in _split((g for g in found if g.case["direction"] == direction), "model", "dtype"):
            table = f"{tables.every_case(own)}\n\n{tables.caption(own)}"
            parts.append(tables.details(f"{title}, {tables.column(own[0])}: every layer and M", table))
    return parts


def _memory(found: Sequence[Group]) -> list[str]:
    parts: list[str] = []
    for title, own in _split((g for g in found if g.case["direction"] == "both"), "model", "dtype"):
        if table := tables.memory(own):
            parts.append(
                tables.details(
                    f"{title}: peak beyond inputs and outputs (kept for backward), MB",
                    f"{table}\n\n{tables.caption(own)}",
                )
            )
    return parts


def replaced(page: str, text: str) -> str:
    """Return the page with new text between its markers.

    Raises:
        ValueError: If the markers are not there once each, in order.
    """
    begin, end = page.find(BEGIN), page.find(END)
    if page.count(BEGIN) != 1 or page.count(END) != 1 or end < begin:
        raise ValueError(f"page: expected {BEGIN} and after it {END}, once each")
    return f"{page[: begin + len(BEGIN)]}\n\n{text}\n\n{page[end:]}"


def stale(page: Path, text: str, drawn: Mapping[str, plots.Plot]) -> list[str]:
    """Return the lines of the page and the plots, by name, that differ from what the raw results give."""
    old = page.read_text()
    new = replaced(old, text)
    found = list(difflib.unified_diff(old.splitlines(), new.splitlines(), str(page), "the raw results", lineterm=""))
    folder = page.with_suffix("")
    found += [
        f"{name}: not drawn from these results" for name, p in drawn.items() if plots.digest(folder / name) != p.digest
    ]
    return found + [f"{path.name}: no results behind it" for path in _leftovers(folder, drawn)]


def _leftovers(folder: Path, drawn: Iterable[str]) -> list[Path]:
    """Return plots of this program that the results do not give any more."""
    return [p for p in sorted(folder.glob("*.png")) if p.name not in set(drawn) and plots.digest(p) is not None]


def write(page: Path, text: str, drawn: Mapping[str, plots.Plot]) -> None:
    """Write page and plots; a plot with the same data stays as it is."""
    folder = page.with_suffix("")
    new = replaced(page.read_text(), text)
    for name, plot in drawn.items():
        if plots.digest(folder / name) != plot.digest:
            folder.mkdir(exist_ok=True)
            (folder / name).write_bytes(plot.draw())
    for path in _leftovers(folder, drawn):
        path.unlink()
    page.write_text(new)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, or check it, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder of the devices' folders")
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/benchmarks.md; plots go beside it")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if page or plots are out of date")
    args = parser.parse_args(arguments)
    try:
        text, drawn = generate(devices(args.results), args.page.stem)
        if args.check:
            out_of_date = stale(args.page, text, drawn)
        else:
            write(args.page, text, drawn)
    except (OSError, ValueError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    if not args.check:
        print(f"written to {args.page}, with {len(drawn)} plots")
        return 0
    for line in out_of_date[:40]:
        print(line)
    if out_of_date:
        print("out of date: run python -m benchmarks.report")
    return 1 if out_of_date else 0


if __name__ == "__main__":
    sys.exit(main())
