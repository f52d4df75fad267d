"""Reading the machine code of compiled kernels: what ``nvdisasm -c`` prints."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest


def disassembler() -> str | None:
    """nvdisasm of the toolkit, or that of Triton."""
    if found := shutil.which("nvdisasm"):
        return found
    triton = pytest.importorskip("triton")
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return str(path) if path.exists() else None


def parsed(text: str) -> dict[str, list[str]]:
    """Kernel -> its instructions and labels (``.L_x_3``, or ``$name`` of a function that it calls), in order."""
    kernels: dict[str, list[str]] = {}
    for line in text.splitlines():
        if start := re.match(r"\.text\.(\S+):", line):
            lines = kernels.setdefault(start[1], [])
        elif label := re.match(r"(\.L_x_\d+|\$\S+):", line):
            lines.append(label[1])
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            lines.append(instruction[1])
    return kernels


def disassembled(cubin: Path, tool: str) -> dict[str, list[str]]:
    """Kernel -> its instructions and labels, in order."""
    return parsed(subprocess.run([tool, "-c", str(cubin)], check=True, capture_output=True, text=True).stdout)
