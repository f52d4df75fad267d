"""``python -m rlrr_kernels``: ``info`` says what is installed and what serves; ``check`` tests each backend here."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
from collections.abc import Iterator, Sequence

import torch

from rlrr_kernels._version import __version__
from rlrr_kernels.backends import BACKENDS, choice, tuned, verdicts
from rlrr_kernels.check import cases
from rlrr_kernels.check import command as check

#: Measured entries that are listed for a device.
_MOST = 12
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]


def _describe(device: str) -> str:
    if device == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        return f"{platform.machine()}, {torch.get_num_threads()} threads, torch uses {capability}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"


def _backend(name: str) -> str:
    # the record first: what failed may not even survive being loaded
    why = next(filter(None, (choice.failed(name, torch.device(device)) for device in _devices())), None)
    if why is not None:
        return f"not loaded: it {why}"
    module = choice.load(name)
    if isinstance(module, str):
        return f"not available: {module}"
    return "available" + (f": {module.build()}" if hasattr(module, "build") else "")


def _state(subject: str, device: torch.device) -> str | None:
    """Of a backend on a device of its kind; None where it is not here, or its library is not to be loaded."""
    if verdicts.failure(subject, device, verdicts.SUBJECTS[subject][1]) is None and (
        choice.failed("cuda" if subject == "cuda-hopper" else subject, device) is not None
        or isinstance(cases.module_of(subject, device), str)
    ):
        return None
    return verdicts.state(subject, device)


def info() -> Iterator[str]:
    """The lines of the report."""
    yield f"rlrr_kernels {__version__}"
    yield f"Python {platform.python_version()}, torch {torch.__version__} (CUDA {torch.version.cuda or 'none'})"
    system = " ".join((platform.system(), *platform.libc_ver()))
    yield f"Triton {_installed('triton')}, timm {_installed('timm')}, {system}"
    yield ""
    yield "Backends"
    for name in BACKENDS:
        yield f"  {name:<10} {_backend(name)}"
    yield ""
    yield "Which backend serves what (W of x's dtype), and where another was measured fastest"
    for device in _devices():
        yield f"  {device}: {_describe(device)}"
        for dtype in _DTYPES:
            x = torch.empty(1, 1, dtype=dtype, device=device)
            try:
                backend, why = choice.explain(x, x)
            except RuntimeError as error:
                backend, why = "none", str(error)
            yield f"    {str(dtype).removeprefix('torch.'):<10} {backend:<10} {why}"
        measured = tuned.entries(torch.device(device))
        for entry in measured[:_MOST]:
            yield f"    measured   {entry.backend:<10} {entry}"
        if len(measured) > _MOST:
            yield f"    and {len(measured) - _MOST} more that were measured: rlrr-tune --show"
    if not torch.cuda.is_available():
        yield "  no CUDA device"
    yield ""
    yield "Proof on this machine, by `python -m rlrr_kernels check`"
    for place in map(torch.device, _devices()):
        yield f"  {place}"
        for subject, (kind, _) in verdicts.SUBJECTS.items():
            state = _state(subject, place) if kind == place.type else None
            if state is not None:
                yield f"    {subject:<12} {state}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of the subcommand."""
    parser = argparse.ArgumentParser(
        prog="python -m rlrr_kernels", description="Fused kernels: what is here, and is it right?"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    check.add_options(
        commands.add_parser("check", help="is each backend right on this machine?", description=check.DESCRIPTION)
    )
    commands.add_parser("info", help="versions, what is built, and which backend serves what")
    given = parser.parse_args(arguments)
    if given.command == "check":
        return check.main(given)
    for line in info():
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
