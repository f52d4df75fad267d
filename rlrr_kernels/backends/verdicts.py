"""Results of ``python -m rlrr_kernels check``, kept for later processes: ``auto`` skips backends that failed.

The file is read once per process, when a backend is first chosen. A finding is valid only for the device, driver,
versions of torch, Triton and this package, and build of the backend that it was made with. A damaged file or entry
causes one warning and is ignored.

``RLRR_CHECKED=0`` ignores the file; ``RLRR_CHECKED_FILE`` names another file than ``rlrr_kernels/checked.json`` in the
user's cache folder. Both variables are read together with the file.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlrr_kernels._version import __version__
from rlrr_kernels.backends import library
from rlrr_kernels.io import cache
from rlrr_kernels.io.checks import expect, expect_one_of, expect_text

#: The format of the file.
FORMAT = 1

#: The passes of the linear layer.
PASSES = ("forward", "grad_input", "grad_scales")

#: What is checked -> the type of its device, and its passes.
SUBJECTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "cpu": ("cpu", PASSES),
    "gluon": ("cuda", PASSES),
    "triton": ("cuda", (*PASSES, "layer_norm")),
    "cuda": ("cuda", PASSES),
    "cuda-hopper": ("cuda", PASSES),
}


class Where(NamedTuple):
    """What a finding or a measurement is valid for.

    Attributes:
        device: Name of the GPU, or architecture of the CPU and the instructions that torch uses.
        driver: Version of the GPU's driver; ``none`` for a CPU.
        torch_version, triton_version: ``none`` for backends that do not use Triton.
        version: Version of this package.
        subject: One of :data:`SUBJECTS`, or another backend.
        build: Digest that changes when the library is rebuilt, or the kernels' sources change.
    """

    device: str
    driver: str
    torch_version: str
    triton_version: str
    version: str
    subject: str
    build: str

    @classmethod
    def of(cls, subject: str, device: torch.device) -> Where:
        """Describe this process for a subject, without loading a backend."""
        on_gpu = device.type == "cuda"
        return cls(
            device_name(device),
            _driver() if on_gpu else "none",
            torch.__version__,
            _triton_version() if subject in ("triton", "gluon") else "none",
            __version__,
            subject,
            build_of(subject),
        )


def device_name(device: torch.device) -> str:
    """Name of a GPU, or architecture of the CPU and the instructions that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__


@functools.cache
def _driver() -> str:
    """Version of NVIDIA's driver, or of the CUDA that it supports if the system does not say (WSL)."""
    try:
        found = re.search(r"\s(\d+\.[\d.]*\d)\s", Path("/proc/driver/nvidia/version").read_text())
        if found is not None:
            return found[1]
    except OSError:
        pass
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return "unknown"
    return f"CUDA {version.value}"


@functools.cache
def build_of(subject: str) -> str:
    """Digest of the kernels of a subject and of the settings that select among them."""
    if subject in ("triton", "gluon"):
        paths = sorted((Path(__file__).parent / "triton").rglob("*.py"))
        switches = os.environ.get("TRITON_PTXAS_PATH", "")
    else:
        paths = [library.FOLDER / f"librlrr_{subject.partition('-')[0]}.so"]
        switches = f"{os.environ.get('RLRR_CPU_CAPABILITY', '')} {_cpu_flags()}" if subject == "cpu" else ""
    digest = hashlib.sha256(switches.encode())
    for path in paths:
        digest.update(b"\0" + path.name.encode() + b"\0" + (path.read_bytes() if path.exists() else b"missing"))
    return digest.hexdigest()[:16]


def _cpu_flags() -> str:
    """The CPU's instructions as Linux lists them; torch's name for them does not tell AMX."""
    try:
        with open("/proc/cpuinfo") as lines:  # the first core's line is enough
            return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        return ""


@dataclass(frozen=True)
class Finding:
    """The result of the check of one pass.

    Attributes:
        which: The pass.
        ratio: Largest error, relative to the allowed error.
        reason: Why it failed, in one line; empty if it passed.
    """

    where: Where
    which: str
    right: bool
    ratio: float | None = None
    reason: str = ""
    date: str = ""

    @property
    def key(self) -> object:
        """A new finding replaces the one with the same key."""
        return self.where, self.which

    def to_json(self) -> dict[str, Any]:
        """The finding as an object of the file."""
        return {
            **self.where._asdict(),
            "pass": self.which,
            "right": self.right,
            "ratio": self.ratio,
            "reason": self.reason,
            "date": self.date,
        }


def parse(raw: Any) -> Finding:
    """Check every field of one object of the file.

    Raises:
        ValueError: If a field is not as expected; names the first.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"expected an object, got {raw!r:.40}")
    where = Where(*(expect_text(raw, name) for name in Where._fields))
    _, passes = SUBJECTS[expect_one_of(raw, "subject", SUBJECTS)]
    return Finding(
        where,
        expect_one_of(raw, "pass", passes),
        expect(raw, "right", bool),
        expect(raw, "ratio", float, type(None)),
        expect_text(raw, "reason", empty=True),
        expect_text(raw, "date", empty=True),
    )


def default_file() -> Path | None:
    """Path of the file: ``RLRR_CHECKED_FILE``, else in the user's cache folder; None if there is no home folder."""
    return cache.default_file("RLRR_CHECKED_FILE", "checked.json")


def add(path: Path, findings: Iterable[Finding]) -> Path | None:
    """As :func:`rlrr_kernels.io.cache.add`."""
    return cache.add(path, FORMAT, findings, parse)


@functools.cache
def kept() -> tuple[Finding, ...]:
    """The file's findings, as :func:`rlrr_kernels.io.cache.load`; none if it is switched off or missing. Cached."""
    path = default_file()
    if path is None or os.environ.get("RLRR_CHECKED") == "0":
        return ()
    return tuple(cache.load(path, FORMAT, parse, "left out: `python -m rlrr_kernels check` checks anew"))


def found(subject: str, device: torch.device) -> dict[str, Finding]:
    """The findings that are valid here for one of :data:`SUBJECTS`, by pass."""
    if not any(finding.where.subject == subject for finding in kept()):
        return {}  # Where.of would take milliseconds
    where = Where.of(subject, device)
    return {finding.which: finding for finding in kept() if finding.where == where}


def failure(subject: str, device: torch.device, passes: Iterable[str] = PASSES) -> str | None:
    """Which of these passes failed here, and why; None if none did."""
    findings = found(subject, device)
    failed = [findings[which] for which in passes if which in findings and not findings[which].right]
    return "; ".join(f"{finding.which}: {finding.reason}" for finding in failed) or None


def state(subject: str, device: torch.device) -> str:
    """``proven`` with the date, ``failed`` with the reason, or ``not yet checked``."""
    passes = SUBJECTS[subject][1]
    failed = failure(subject, device, passes)
    if failed is not None:
        return f"failed: {failed}"
    findings = found(subject, device)
    if any(which not in findings for which in passes):
        return "not yet checked"
    return f"proven, {max(finding.date for finding in findings.values())}"
