"""How much memory something takes at its peak, as the kernel counts it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Growth:
    """``growth``: bytes of the process at their peak inside of the block, less those at its start."""

    growth: int = 0


@contextmanager
def peak_growth() -> Iterator[Growth]:
    """Resident memory over a block. Pages that are asked for and never touched do not count."""
    # 5: forget the peak so far
    Path("/proc/self/clear_refs").write_text("5")
    result, start = Growth(), _status("VmRSS")
    yield result
    result.growth = _status("VmHWM") - start


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
