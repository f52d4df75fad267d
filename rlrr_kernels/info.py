"""``python -m rlrr_kernels.info``: versions, what is built, which backend serves what here and why, what is proven."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator

import torch

from rlrr_kernels._version import __version__
from rlrr_kernels.backends import choice
from rlrr_kernels.check import cases, record

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


def lines() -> Iterator[str]:
    """The report, line by line."""
    yield f"rlrr_kernels {__version__}"
    yield f"Python {platform.python_version()}, torch {torch.__version__} (CUDA {torch.version.cuda or 'none'})"
    system = " ".join((platform.system(), *platform.libc_ver()))
    yield f"Triton {_installed('triton')}, timm {_installed('timm')}, {system}"
    yield ""
    yield "Backends"
    for name in choice.BACKENDS:
        module = choice.load(name)
        if isinstance(module, str):
            yield f"  {name:<10} not available: {module}"
        else:
            yield f"  {name:<10} available" + (f": {module.build()}" if hasattr(module, "build") else "")
    yield ""
    yield "Which backend serves what (W of x's dtype)"
    for device in _devices():
        yield f"  {device}: {_describe(device)}"
        for dtype in _DTYPES:
            x = torch.empty(1, 1, dtype=dtype, device=device)
            try:
                backend, why = choice.explain(x, x)
            except RuntimeError as error:
                backend, why = "none", str(error)
            yield f"    {str(dtype).removeprefix('torch.'):<10} {backend:<10} {why}"
    if not torch.cuda.is_available():
        yield "  no CUDA device"
    yield ""
    yield "Proof on this machine, by `python -m rlrr_kernels check`"
    for place in map(torch.device, _devices()):
        yield f"  {place}"
        for subject, (kind, _) in record.SUBJECTS.items():
            if kind == place.type and not isinstance(cases.module_of(subject, place), str):
                yield f"    {subject:<12} {record.state(subject, place)}"


def main() -> None:
    """Print the report."""
    for line in lines():
        print(line)


if __name__ == "__main__":
    main()
