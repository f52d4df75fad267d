"""Faults that tests plant in the kernels' text, one at a time."""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cuda_host.machine import SOURCES

#: Pass -> which results it gives.
RESULTS = {"forward": ("y",), "grad_input": ("dx",), "grad_scales": ("du", "dv", "df")}


@dataclass(frozen=True)
class Fault:
    """``old``, which stands once in ``file`` of ``csrc/cuda``, becomes ``new`` and shows in the results of one pass."""

    name: str
    seen_in: str
    file: str
    old: str
    new: str = ""

    def plant(self, folder: Path) -> Path:
        """A copy of ``csrc/cuda`` with the fault in it."""
        shutil.copytree(SOURCES, folder)
        file = folder / self.file
        text = file.read_text()
        assert text.count(self.old) == 1, f"{self.file} holds the text to change {text.count(self.old)} times"
        file.write_text(text.replace(self.old, self.new))
        return folder


def parameters(faults: Iterable[Fault], *quick: str) -> list[Any]:
    """To parametrise a test with: a test of every fault is slow, but for those of one ``quick`` fault of each class."""
    titles = {f"{fault.seen_in}: {fault.name}": fault for fault in faults}
    assert titles.keys() >= set(quick)
    return [
        pytest.param(fault, id=title, marks=() if title in quick else pytest.mark.slow)
        for title, fault in titles.items()
    ]
