"""``rlrr-tune``: find the fastest backend and tile for given layers on this device, and keep them for ``auto``."""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from rlrr_kernels.backends import BACKENDS, choice, tuned
from rlrr_kernels.backends.problem import MAX_RANK, Problem
from rlrr_kernels.backends.tuned import FORMAT, Entry
from rlrr_kernels.check import yardstick
from rlrr_kernels.check.command import device_of, failures
from rlrr_kernels.io import cache
from rlrr_kernels.io.checks import error_line
from rlrr_kernels.tune import shapes
from rlrr_kernels.tune.candidates import Candidate, candidates, copies_of, describe, make_tensors, run
from rlrr_kernels.tune.contest import DeviceLostError, Result, contest, require, rules
from rlrr_kernels.tune.machine import Machine, machine_of

DESCRIPTION = """\
Measure which backend, with which tile, is fastest for given layers on this device, and
keep it. Later runs read the result by themselves; RLRR_TUNED=0 switches it off. Every
backend is first held to float64 (python -m rlrr_kernels check); what is wrong is out.

    rlrr-tune --model vit_base_patch16_224 --batch 64
    rlrr-tune --shape 12608,2304,768,3 --shape 12608,768,768 --dtype float16
    rlrr-tune --show
"""

DTYPES = {str(t).removeprefix("torch."): t for t in (torch.bfloat16, torch.float16, torch.float32, torch.float64)}


class _Stopped(Exception):
    """Measuring ended early; what was measured is kept."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        prog="rlrr-tune", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("--model", action="append", default=[], metavar="NAME", help="timm model; may be repeated")
    add("--batch", type=int, nargs="+", default=[64], metavar="B", help="images in a batch (default: 64)")
    add("--img-size", type=int, metavar="PIXELS", help="of the models, where not their own")
    add(
        "--shape",
        action="append",
        default=[],
        metavar="M,N,K[,groups]",
        help="tokens, output features, input features of a layer; may be repeated",
    )
    add("--dtype", choices=DTYPES, default="bfloat16", help="of x (default: %(default)s)")
    add("--weight-dtype", choices=DTYPES, help="of the frozen weight (default: as x)")
    add("--rank", type=int, default=1, help="rank of u v (default: %(default)s)")
    add("--tf32", action="store_true", help="float32 products in TF32, as where training allows it")
    add("--backend", action="append", default=[], choices=BACKENDS, help="may be repeated (default: all)")
    add("--rules", action="store_true", help="keep instead what measured.json has: backends alone, for any N and K")
    add("--rounds", type=int, default=30, help="timed rounds of a contest (default: %(default)s)")
    add("--limit", type=int, default=24, help="tiles of a backend beside its own choice (default: %(default)s)")
    add("--device", metavar="NAME", help="cpu, cuda or cuda:INDEX (default: the GPU, else the CPU)")
    add("--out", type=Path, metavar="FILE", help="the file (default: the one that is read)")
    add("--dry-run", action="store_true", help="list what would be measured")
    add("--show", action="store_true", help="print what is stored")
    add("--clear", action="store_true", help="delete what is stored")
    return result


def main(argv: list[str] | None = None, machine: Machine | None = None) -> int:
    """Run the command.

    Args:
        argv: The arguments; default: those of the process.
        machine: Where to measure; default: the device that ``--device`` names.

    Returns:
        The exit status: 0 done, 1 something could not be measured, 2 bad arguments, 130 stopped by Ctrl-C.
    """
    options = parser()
    arguments = options.parse_args(argv)
    try:
        return _main(arguments, machine)
    except _Stopped as stop:
        print(f"rlrr-tune: {stop}", file=sys.stderr)
        return stop.status
    except KeyboardInterrupt:
        print("rlrr-tune: interrupted; nothing was measured", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError) as error:
        options.exit(2, f"rlrr-tune: error: {' '.join(str(error).split())}\n")


def _main(arguments: argparse.Namespace, machine: Machine | None) -> int:
    path = arguments.out or tuned.default_file()
    if path is None:
        raise ValueError("there is no home folder for the file; name one by --out or RLRR_TUNED_FILE")
    if arguments.clear:
        print(f"deleted {path}" if cache.clear(path) else f"there is no {path}")
        return 0
    device = machine.device if machine else device_of(arguments.device)
    if arguments.show:
        _show_stored(path, device)
        return 0
    for name, least in (("rounds", 2), ("limit", 0), ("img_size", 1)):
        given = getattr(arguments, name)
        if given is not None and given < least:
            raise ValueError(f"--{name.replace('_', '-')}: expected {least} or more, got {given}")
    if not 1 <= arguments.rank <= MAX_RANK:
        raise ValueError(f"--rank: expected 1 to {MAX_RANK}, got {arguments.rank}")
    wanted = _shapes(arguments)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("rlrr-tune runs in one process; the ranks of a distributed run only read what it found")
    if arguments.tf32:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    machine = machine or machine_of(device)
    if not arguments.dry_run:
        cache.check_writable(path, FORMAT)  # before minutes of measuring
        _check(device)
    layers = {problem: shape.name for shape in wanted for problem in _problems(arguments, shape, device)}
    plan = {problem: candidates(problem, device, arguments.limit, arguments.backend) for problem in layers}
    if arguments.dry_run:
        _show_plan(plan, layers, machine)
        return 0
    return _tune(arguments, path, machine, plan, layers)


def _shapes(arguments: argparse.Namespace) -> list[shapes.Shape]:
    if not arguments.model and not arguments.shape:
        raise ValueError("nothing to tune for: give --model or --shape (or --show, --clear)")
    if min(arguments.batch) < 1:
        raise ValueError(f"--batch: expected 1 or more, got {min(arguments.batch)}")
    found = [shapes.parse(text) for text in arguments.shape]
    for name in arguments.model:
        for batch in arguments.batch:
            found += shapes.of_model(name, batch, arguments.img_size)
    return shapes.unique(found)


def _problems(arguments: argparse.Namespace, shape: shapes.Shape, device: torch.device) -> list[Problem]:
    dtype, weight_dtype = DTYPES[arguments.dtype], DTYPES[arguments.weight_dtype or arguments.dtype]
    tf32 = arguments.tf32 and dtype is torch.float32 and device.type == "cuda"
    sizes = shape.m, shape.n, shape.k, shape.groups
    types = dtype, weight_dtype, tf32, arguments.rank
    return [Problem(kernel, *sizes, *types) for kernel in ("forward", "grad_input", "grad_scales")]


def _check(device: torch.device) -> None:
    """Check the backends that were not yet checked here: what fails is no candidate."""
    print(f"rlrr-tune: checking the backends on {device}", file=sys.stderr)
    wrong, untried = failures(device)
    choice.failed.cache_clear()
    for subject, why in wrong.items():
        print(f"rlrr-tune: {subject} failed its check: {why}", file=sys.stderr)
    for subject, why in untried.items():
        print(f"rlrr-tune: {subject} could not be checked: {why}", file=sys.stderr)


def _tune(
    arguments: argparse.Namespace,
    path: Path,
    machine: Machine,
    plan: Mapping[Problem, Sequence[Candidate]],
    layers: Mapping[Problem, str],
) -> int:
    """Measure each problem and store its result at once, so that an interrupt loses only the current one."""
    date = datetime.date.today().isoformat()
    results: list[Result] = []
    stop: _Stopped | None = None
    unmeasured = stored = 0
    try:
        for problem in (progress := tqdm(plan, unit="pass", disable=None, leave=False)):
            progress.set_description(describe(problem))
            try:
                result = measure(problem, plan[problem], machine, arguments.rounds)
            except DeviceLostError:
                raise
            except RuntimeError as error:  # no memory for the tensors, or a launch that cannot be timed
                unmeasured += 1
                tqdm.write(f"rlrr-tune: {describe(problem)}: {error_line(error)}", file=sys.stderr)
                require(machine.synchronize, error)
                continue
            results.append(result)
            unmeasured += result.best is None
            if result.best is not None and not arguments.rules:
                stored += _store(path, [result.entry(machine.device, date)])
        if arguments.rules:
            stored += _store(path, rules(results, machine.device, date))
    except KeyboardInterrupt:
        stop = _Stopped("interrupted", 130)
    except OSError as error:
        stop = _Stopped(f"stopped in {describe(problem)}: {error}; what was stored before is kept", 1)
    except DeviceLostError as error:
        stop = _Stopped(f"the GPU stopped answering in {describe(problem)}: {error}", 1)
    _show_results(results, layers, f"{machine.name}, {arguments.dtype}")
    print(
        f"{len(results) - sum(r.best is None for r in results)} of {len(plan)} measured, {stored} entries into {path}"
    )
    if stop is not None:
        raise stop
    return 1 if unmeasured else 0


def _store(path: Path, entries: Sequence[Entry]) -> int:
    aside = tuned.add(path, entries) if entries else None
    if aside is not None:
        tqdm.write(f"rlrr-tune: {path} was no table; it is now {aside}", file=sys.stderr)
    return len(entries)


def measure(problem: Problem, found: Sequence[Candidate], machine: Machine, rounds: int) -> Result:
    """Hold the contest of one problem on a machine."""
    copies = copies_of(problem, machine.cache_bytes)
    tensors = make_tensors(problem, copies, machine.device)
    t = tensors[0]
    wanted = yardstick.expected(problem.kernel, t.x, t.weight, t.scale_out, t.scale_in, t.bias, t.shift, t.dy)

    def launch(candidate: Candidate, copy: int) -> tuple[torch.Tensor, ...]:
        return run(problem, tensors[copy], candidate)

    def misfit(got: Sequence[torch.Tensor]) -> str | None:
        return yardstick.judge(got, wanted).reason

    timing = {"copies": copies, "rounds": rounds}
    return contest(problem, found, launch, misfit, machine.timer, **timing, synchronize=machine.synchronize)


def _print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Console:
    """Print a table; a log file has no width, and cut columns say nothing."""
    console = Console() if sys.stdout.isatty() else Console(width=200)
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if column in ("default, us", "best, us", "gain") else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    return console


def _show_plan(plan: Mapping[Problem, Sequence[Candidate]], layers: Mapping[Problem, str], machine: Machine) -> None:
    """Print layers, problem and candidates of each contest to come."""
    rows = []
    for problem, found in plan.items():
        counts = Counter(one.backend for one in found)
        several = ", ".join(f"{n} {name}" for name, n in counts.items())
        rows.append((layers[problem] or "-", describe(problem), several, str(found[0])))
    title = f"Would be measured on {machine.name}, after a check"
    _print_table(title, ("layers", "pass", "candidates", "default"), rows)


def _show_results(results: Sequence[Result], layers: Mapping[Problem, str], title: str) -> None:
    """Print the default against the best, and what was left out and why."""
    rows = []
    for result in results:
        gain = "-" if result.gain is None else f"{result.gain - 1:+.1%}"
        times = (result.spreads.get(one) if one else None for one in (result.default, result.best))
        best = "nothing could be measured" if result.best is None else str(result.best)
        rows.append(
            (
                *(layers.get(result.problem) or "-", describe(result.problem), str(result.default)),
                *("-" if spread is None else f"{spread.median * 1e6:.1f}" for spread in times),
                *(gain, "the default" if result.best == result.default else best),
            )
        )
    out = _print_table(title, ("layers", "pass", "default", "default, us", "best, us", "gain", "best"), rows)
    for result in results:
        for one, why in result.failures.items():
            whose = ", the default" if one == result.default else ""
            out.print(f"left out: {describe(result.problem)}: {one}{whose}: {why}", markup=False, highlight=False)


def _show_stored(path: Path, device: torch.device) -> None:
    """Print the entries of a file, and which of them hold on the device with what is installed."""
    raw_entries = tuned.read(path)
    if not path.exists():
        print(f"there is no {path}; rlrr-tune --model or --shape makes it")
        return
    rows = []
    for index, raw in enumerate(raw_entries):
        try:
            entry = tuned.parse(raw)
        except ValueError as error:
            print(f"entry {index} is not used: {error}", file=sys.stderr)
            continue
        before, after = (entry.measured.get(name) for name in ("default_seconds", "seconds"))
        gain = f"{before / after - 1:+.1%}" if isinstance(before, float) and isinstance(after, float) and after else "-"
        tile = "its own" if entry.tile is None else " ".join(f"{name}={value}" for name, value in entry.tile.items())
        state = "used" if tuned.holds(entry, device) else "not used: of another device, or of other versions"
        rows.append((entry.device, str(entry), entry.backend, tile, gain, state))
    _print_table(str(path), ("device", "what", "backend", "tile", "gain", "state"), rows)


if __name__ == "__main__":
    raise SystemExit(main())
