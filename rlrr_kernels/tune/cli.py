"""``rlrr-tune``: find the fastest tiles for given layers on this GPU, and keep them for the launcher."""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from rlrr_kernels import cachefile, yardstick
from rlrr_kernels.backends.triton import launch
from rlrr_kernels.backends.triton.config import Device
from rlrr_kernels.backends.triton.tuned import Choice, default_file
from rlrr_kernels.backends.triton.tuned_file import FORMAT, Where, parse, read
from rlrr_kernels.tune import report, shapes, store
from rlrr_kernels.tune.gpu import Machine, this_machine
from rlrr_kernels.tune.measure import DeviceLostError, Result, contest, first_line, require
from rlrr_kernels.tune.problem import KERNELS, Task, copies_of, make_tensors, run, task_of

DESCRIPTION = """\
Measure which tiles of the Triton kernels are fastest for given layers on this GPU, and
keep what beats the built-in heuristic by more than the noise. Later runs read the
result by themselves; RLRR_TUNED=0 switches it off. Nothing else ever measures.

    rlrr-tune --model vit_base_patch16_224 --batch 64
    rlrr-tune --shape 12608,2304,768,3 --shape 12608,768,768 --dtype float16
    rlrr-tune --show
"""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

#: What --dry-run is shown for where there is no GPU.
ASSUMED = launch.INTERPRETED_DEVICE


class _Stopped(Exception):
    """Measuring ended early; what was measured is kept."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    result = argparse.ArgumentParser(
        prog="rlrr-tune", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--model", action="append", default=[], metavar="NAME", help="timm model; may be repeated")
    result.add_argument(
        "--batch", type=int, nargs="+", default=[64], metavar="B", help="images in a batch (default: 64)"
    )
    result.add_argument("--img-size", type=int, metavar="PIXELS", help="of the models, where not their own")
    result.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="M,N,K[,groups]",
        help="tokens, output features, input features of a layer; may be repeated",
    )
    result.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of x (default: %(default)s)")
    result.add_argument("--weight-dtype", choices=DTYPES, help="of the frozen weight (default: as x)")
    result.add_argument("--tf32", action="store_true", help="float32 products in TF32, as where training allows it")
    result.add_argument("--rounds", type=int, default=30, help="timed rounds of a contest (default: %(default)s)")
    result.add_argument(
        "--limit", type=int, default=24, help="candidates beside the heuristic's choice (default: %(default)s)"
    )
    result.add_argument("--device", type=int, metavar="INDEX", help="CUDA device (default: the current one)")
    result.add_argument("--out", type=Path, metavar="FILE", help="the table (default: the one that is read)")
    result.add_argument("--dry-run", action="store_true", help="list what would be measured; needs no GPU")
    result.add_argument("--show", action="store_true", help="print the stored table")
    result.add_argument("--clear", action="store_true", help="delete the stored table")
    return result


def main(argv: list[str] | None = None, machine: Machine | None = None) -> int:
    """Exit status: 0 done, 1 something could not be measured, 2 bad arguments or no GPU, 130 stopped by Ctrl-C.

    ``machine``: where to measure; by default the GPU that is here.
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
    path = arguments.out or default_file()
    if path is None:
        raise ValueError("there is no home folder for the table; name a file by --out or RLRR_TUNED_FILE")
    if arguments.clear:
        print(f"deleted {path}" if cachefile.clear(path) else f"there is no {path}")
        return 0
    if arguments.show:
        _show(path)
        return 0
    for name, least in (("rounds", 2), ("limit", 0), ("img_size", 1)):
        given = getattr(arguments, name)
        if given is not None and given < least:
            raise ValueError(f"--{name.replace('_', '-')}: expected {least} or more, got {given}")
    wanted = _shapes(arguments)
    if arguments.dry_run:
        name, device = _device(arguments, machine)
        tasks = _tasks(arguments, wanted, device)
        report.show_plan(tasks, device, arguments.limit, name, report.console())
        return 0
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("rlrr-tune runs in one process; the ranks of a distributed run only read what it found")
    machine = machine or this_machine(arguments.device)
    tasks = _tasks(arguments, wanted, machine.device)
    # what would fail for one of them, or at the end, fails before minutes of measuring
    for task in tasks:
        task.choices(machine.device, arguments.limit)
    cachefile.check_writable(path, FORMAT)
    return _tune(arguments, path, machine, tasks)


def _show(path: Path) -> None:
    rows = read(path)
    if not path.exists():
        print(f"there is no {path}; rlrr-tune --model or --shape makes it")
        return
    entries = []
    for index, raw in enumerate(rows):
        try:
            entries.append(parse(raw))
        except ValueError as error:
            print(f"entry {index} is not used: {error}", file=sys.stderr)
    report.show_stored(entries, str(path), report.console())


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


def _device(arguments: argparse.Namespace, machine: Machine | None) -> tuple[str, Device]:
    """For a plan: the GPU that is here, or a made-up one."""
    if machine is None and not torch.cuda.is_available():
        major, minor = ASSUMED.capability
        return f"no GPU here; as for sm_{major}{minor} with {ASSUMED.multiprocessors} multiprocessors", ASSUMED
    machine = machine or this_machine(arguments.device)
    return machine.name, machine.device


def _tasks(arguments: argparse.Namespace, wanted: Sequence[shapes.Shape], device: Device) -> list[Task]:
    if arguments.tf32:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    dtype = DTYPES[arguments.dtype]
    weight_dtype = DTYPES[arguments.weight_dtype or arguments.dtype]
    return [task_of(kernel, shape, dtype, weight_dtype, device) for shape in wanted for kernel in KERNELS]


def _tune(arguments: argparse.Namespace, path: Path, machine: Machine, tasks: Sequence[Task]) -> int:
    """Measure each task and store its outcome at once, so that stopping loses only the one at hand."""
    where = Where.on(machine.name, machine.device.capability)
    date = datetime.date.today().isoformat()
    results: list[Result] = []
    stop: _Stopped | None = None
    unmeasured = stored = 0
    try:
        for task in (progress := tqdm(tasks, unit="kernel", disable=None, leave=False)):
            progress.set_description(str(task))
            try:
                result = measure(task, machine, arguments.limit, arguments.rounds)
            except DeviceLostError:
                raise
            except RuntimeError as error:  # no memory for the tensors, or a launch that cannot be timed
                unmeasured += 1
                tqdm.write(f"rlrr-tune: {task}: {first_line(error)}", file=sys.stderr)
                require(machine.synchronize, error)
                continue
            results.append(result)
            if result.best is None:
                unmeasured += 1
                continue
            aside = store.add(path, [result.entry(where, date)])
            stored += 1
            if aside is not None:
                tqdm.write(f"rlrr-tune: {path} was no table; it is now {aside}", file=sys.stderr)
    except KeyboardInterrupt:
        stop = _Stopped("interrupted", 130)
    except OSError as error:
        # what was measured is shown all the same
        stop = _Stopped(f"stopped in {task}: {error}; what was stored before is kept", 1)
    except DeviceLostError as error:
        stop = _Stopped(f"the GPU stopped answering in {task}: {error}", 1)
    report.show_results(results, f"{machine.name}, {arguments.dtype}", report.console())
    print(f"{stored} of {len(tasks)} kernels are in {path}")
    if stop is not None:
        raise stop
    return 1 if unmeasured else 0


def measure(task: Task, machine: Machine, limit: int, rounds: int) -> Result:
    """The contest of one task on a machine."""
    copies = copies_of(task, machine.l2_bytes)
    tensors = make_tensors(task, copies, machine.torch_device)
    t = tensors[0]
    wanted = yardstick.expected(task.layer.kernel, t.x, t.weight, t.scale_out, t.scale_in, t.bias, t.shift, t.dy)

    def launch_one(choice: Choice, copy: int) -> tuple[torch.Tensor, ...]:
        return run(task, tensors[copy], choice)

    return contest(
        task,
        task.choices(machine.device, limit),
        launch_one,
        lambda got: yardstick.judge(got, wanted).reason,
        machine.timer,
        copies=copies,
        rounds=rounds,
        synchronize=machine.synchronize,
    )


if __name__ == "__main__":
    raise SystemExit(main())
