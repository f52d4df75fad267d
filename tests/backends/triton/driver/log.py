"""Reads the log that :meth:`stand_in.Machine.log` returns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def launches(log: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What of a log was launched."""
    return [line for line in log if line["call"] == "cuLaunchKernelEx"]


def misaligned(launch: dict[str, Any]) -> bool:
    """Whether an operand does not begin at a multiple of 16 bytes of its memory, which is at one of 64."""
    names = [p for p in launch["parameters"] if isinstance(p, str)]
    return any(int(name.partition("+")[2] or 0) % 16 for name in names)
