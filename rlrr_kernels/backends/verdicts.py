"""What the check found, kept for the next processes: ``auto`` leaves out what failed, ``info`` says what is proven.

The file is read once a process, when a backend is first chosen. A finding counts only for the device, driver,
torch, Triton, package and build of the backend that it was made with. A file that is damaged, in whole or in part,
costs one warning and nothing else.

``RLRR_CHECKED=0`` switches it off; ``RLRR_CHECKED_FILE`` names another file than ``rlrr_kernels/checked.json`` in
the user's cache folder. Both are read with the file.
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
from rlrr_kernels.io.cache import text

#: The version of the file's layout.
FORMAT = 1

#: The passes of the linear layer.
PRODUCTS = ("forward", "grad_input", "grad_scales")

#: What is checked -> the type of its device, and its passes.
SUBJECTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "cpu": ("cpu", PRODUCTS),
    "gluon": ("cuda", PRODUCTS),
    "triton": ("cuda", (*PRODUCTS, "layer_norm")),
    "cuda": ("cuda", PRODUCTS),
    "cuda-hopper": ("cuda", PRODUCTS),
}


class Where(NamedTuple):
    """What a finding holds for.

    Attributes:
        device: a GPU's name, or a CPU's architecture and the instructions that torch uses.
        driver: a GPU's; ``none`` for a CPU.
        torch_version, triton_version: that of Triton is ``none`` for backends that do without it.
        version: of this package.
        subject: one of :data:`SUBJECTS`, or another backend.
        build: changes when the library is rebuilt, or the kernels' sources change.
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
        """This process, for a subject. Loads no backend."""
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
    """A GPU's name, or a CPU's architecture and the instructions that torch uses."""
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
    """The version of NVIDIA's driver, or of the CUDA that it serves where the system does not tell."""
    try:
        found = re.search(r"\s(\d+\.[\d.]*\d)\s", Path("/proc/driver/nvidia/version").read_text())
        if found is not None:
            return found[1]
    except OSError:
        pass  # as under WSL
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return "unknown"
    return f"CUDA {version.value}"


@functools.cache
def build_of(subject: str) -> str:
    """A digest of what computes, and of what else decides which of it runs."""
    if subject in ("triton", "gluon"):
        paths = sorted((Path(__file__).parent.parent / "backends" / "triton").rglob("*.py"))
        switches = os.environ.get("TRITON_PTXAS_PATH", "")
    else:
        paths = [library.FOLDER / f"librlrr_{subject.partition('-')[0]}.so"]
        switches = f"{os.environ.get('RLRR_CPU_CAPABILITY', '')} {_cpu_flags()}" if subject == "cpu" else ""
    digest = hashlib.sha256(switches.encode())
    for path in paths:
        digest.update(b"\0" + path.name.encode() + b"\0" + (path.read_bytes() if path.exists() else b"missing"))
    return digest.hexdigest()[:16]


def _cpu_flags() -> str:
    """The instructions that the CPU has, as Linux lists them: torch's word for them leaves AMX out."""
    try:
        with open("/proc/cpuinfo") as lines:  # a block for each core: not read to its end
            return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        return ""


@dataclass(frozen=True)
class Finding:
    """What became of one pass. ``reason``: of a failure, one line; ``ratio``: the largest error by what it may be."""

    where: Where
    which: str
    right: bool
    ratio: float | None = None
    reason: str = ""
    date: str = ""

    def to_json(self) -> dict[str, Any]:
        """One object of the file."""
        return {
            **self.where._asdict(),
            "pass": self.which,
            "right": self.right,
            "ratio": self.ratio,
            "reason": self.reason,
            "date": self.date,
        }


def parse(raw: Any) -> Finding:
    """One entry, every field checked.

    Raises:
        ValueError: the first field that is not as expected.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"expected an object, got {raw!r:.40}")
    where = Where(*(text(raw, name) for name in Where._fields))
    if where.subject not in SUBJECTS:
        raise ValueError(f"subject: expected one of {', '.join(SUBJECTS)}, got {where.subject!r:.40}")
    passes = SUBJECTS[where.subject][1]
    which = text(raw, "pass")
    if which not in passes:
        raise ValueError(f"pass: expected one of {', '.join(passes)}, got {which!r:.40}")
    right, ratio = raw.get("right"), raw.get("ratio")
    if not isinstance(right, bool):
        raise ValueError(f"right: expected true or false, got {right!r:.40}")
    if ratio is not None and (isinstance(ratio, bool) or not isinstance(ratio, int | float)):
        raise ValueError(f"ratio: expected a number or null, got {ratio!r:.40}")
    return Finding(where, which, right, ratio, _words(raw, "reason"), _words(raw, "date"))


def _words(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    # it is shown in terminals, which obey some characters
    if not isinstance(value, str) or not value.isprintable() or len(value) > 500:
        raise ValueError(f"{name}: expected one line of text, got {value!r:.40}")
    return value


def default_file() -> Path | None:
    """Where findings are kept: ``RLRR_CHECKED_FILE``, else in the user's cache folder; None where there is no home."""
    return cache.default_file("RLRR_CHECKED_FILE", "checked.json")


def add(path: Path, findings: Iterable[Finding]) -> Path | None:
    """Keep findings, in place of earlier ones for the same; as :func:`rlrr_kernels.io.cache.add`."""
    return cache.add(path, FORMAT, {(f.where, f.which): f.to_json() for f in findings}, _key_of)


def _key_of(raw: Any) -> object:
    try:
        finding = parse(raw)
    except ValueError:
        return None
    return finding.where, finding.which


@functools.cache
def kept() -> tuple[Finding, ...]:
    """All findings of the file in use; none where it is switched off or missing. Read once a process."""
    path = default_file()
    if path is None or os.environ.get("RLRR_CHECKED") == "0":
        return ()
    read = functools.partial(cache.read, layout=FORMAT)
    return tuple(cache.load(path, read, parse, "left out: `python -m rlrr_kernels check` checks anew"))


def found(subject: str, device: torch.device) -> dict[str, Finding]:
    """What holds here for one of :data:`SUBJECTS`, by pass."""
    if not any(finding.where.subject == subject for finding in kept()):
        return {}  # asking the device and the library for their versions takes milliseconds
    where = Where.of(subject, device)
    return {finding.which: finding for finding in kept() if finding.where == where}


def failure(subject: str, device: torch.device, passes: Iterable[str] = PRODUCTS) -> str | None:
    """Which of these passes failed here, and how; None where none has."""
    findings = found(subject, device)
    failed = [findings[which] for which in passes if which in findings and not findings[which].right]
    return "; ".join(f"{finding.which}: {finding.reason}" for finding in failed) or None


def state(subject: str, device: torch.device) -> str:
    """``proven``, ``failed`` and how, or ``not yet checked``."""
    passes = SUBJECTS[subject][1]
    failed = failure(subject, device, passes)
    if failed is not None:
        return f"failed: {failed}"
    findings = found(subject, device)
    if any(which not in findings for which in passes):
        return "not yet checked"
    return f"proven, {max(finding.date for finding in findings.values())}"
