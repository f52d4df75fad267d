"""Tables for people: what will be measured, what was found, what is stored."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from rlrr_kernels.backends.triton.config import Device
from rlrr_kernels.backends.triton.tuned import Choice
from rlrr_kernels.backends.triton.tuned_file import Entry, Layer, Where
from rlrr_kernels.tune.measure import Result, Spread
from rlrr_kernels.tune.problem import Task


def console() -> Console:
    """The terminal; a log file has no width, and cut columns say nothing."""
    return Console() if sys.stdout.isatty() else Console(width=200)


def describe(choice: Choice) -> str:
    """``m128 n64 k64, 4 warps, 3 stages``, with splits where there are any."""
    config, split_tokens = choice if isinstance(choice, tuple) else (choice, None)
    text = f"m{config.block_m} n{config.block_n} k{config.block_k}, {config.num_warps} warps, "
    text += f"{config.num_stages} stages"
    if split_tokens is not None:
        return f"{text}, {split_tokens} tokens a split"
    return f"{text}, {config.splits} splits" if config.splits > 1 else text


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if column in _NUMBERS else "left")
    return table


_NUMBERS = {"M", "N", "K", "groups", "candidates", "predicted, us", "heuristic, us", "best, us", "gain"}
_SIZES = ("kernel", "M", "N", "K", "groups", "path")


def _sizes(layer: Layer, m: int) -> tuple[str, ...]:
    return layer.kernel, str(m), str(layer.n), str(layer.k), str(layer.groups), layer.path


def show_plan(tasks: Iterable[Task], device: Device, limit: int, name: str, out: Console) -> None:
    """What would be measured, and what the heuristic's model predicts for its own choice."""
    title = f"Would be measured ({name}); times are predictions"
    table = _table(title, "layers", *_SIZES, "candidates", "predicted, us", "bound by", "heuristic")
    for task in tasks:
        choices = task.choices(device, limit)
        predicted = task.predict(choices[0], device)
        time = f"{predicted.seconds * 1e6:.1f}"
        sizes = _sizes(task.layer, task.m)
        table.add_row(task.name or "-", *sizes, str(len(choices)), time, predicted.bound, describe(choices[0]))
    out.print(table)


def show_results(results: Iterable[Result], title: str, out: Console) -> None:
    """Heuristic against best, and what was left out and why."""
    results = list(results)
    table = _table(title, "layers", *_SIZES, "heuristic, us", "best, us", "gain", "best")
    for result in results:
        if result.best is None:
            best = "nothing could be measured"
        else:
            best = "the heuristic's" if result.best == result.heuristic else describe(result.best)
        gain = "-" if result.gain is None else f"{result.gain - 1:+.1%}"
        times = [_microseconds(result.spreads.get(choice)) for choice in (result.heuristic, result.best) if choice]
        table.add_row(
            result.task.name or "-",
            *_sizes(result.task.layer, result.task.m),
            *times,
            *["-"] * (2 - len(times)),
            gain,
            best,
        )
    out.print(table)
    for result in results:
        for choice, why in result.failures.items():
            whose = ", the heuristic's" if choice == result.heuristic else ""
            out.print(f"left out: {result.task}: {describe(choice)}{whose}: {why}", markup=False, highlight=False)


def _microseconds(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.median * 1e6:.1f}"


def show_stored(entries: Iterable[Entry], title: str, out: Console) -> None:
    """The entries of a file; those that no launch uses any more are marked."""
    table = _table(title, "GPU", *_SIZES, "arithmetic", "choice", "gain", "state")
    for entry in entries:
        layer = entry.layer
        arithmetic = f"{layer.kind}, {layer.x_size} and {layer.weight_size} bytes"
        sizes, state = _sizes(layer, entry.m), _state(entry.where)
        table.add_row(entry.where.gpu, *sizes, arithmetic, _stored_choice(entry), _stored_gain(entry), state)
    out.print(table)


def _stored_choice(entry: Entry) -> str:
    if entry.config is None:
        return "the heuristic's"
    return describe(entry.config if entry.split_tokens is None else (entry.config, entry.split_tokens))


def _stored_gain(entry: Entry) -> str:
    before, after = (entry.measured.get(f"{name}_seconds") for name in ("heuristic", "best"))
    if not isinstance(before, int | float) or not isinstance(after, int | float) or after <= 0:
        return "-"
    return f"{before / after - 1:+.1%}"


def _state(where: Where) -> str:
    now = Where.on(where.gpu, where.capability)
    if where.triton != now.triton:
        return f"not used: of Triton {where.triton}, here is {now.triton}"
    return "used on this GPU" if where == now else "not used: the kernels have changed"
