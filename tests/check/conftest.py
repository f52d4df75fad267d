"""A file of verdicts for each test, and made-up findings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlrr_kernels.backends import choice, verdicts
from rlrr_kernels.backends.verdicts import SUBJECTS, Finding, Where

CPU = torch.device("cpu")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The path of the verdicts; there is no such file yet, and the process has read and chosen nothing."""
    monkeypatch.setenv("RLRR_CHECKED_FILE", str(tmp_path / "checked.json"))
    monkeypatch.delenv("RLRR_CHECKED", raising=False)
    monkeypatch.setattr(choice, "_plans", {})
    monkeypatch.setattr(choice, "_warned", set())
    forget()
    yield tmp_path / "checked.json"
    forget()


def forget() -> None:
    """Clear what the process has read, as in a new process."""
    verdicts.kept.cache_clear()
    verdicts.build_of.cache_clear()
    choice.failed.cache_clear()
    choice._plans.clear()


def findings(subject: str = "cpu", wrong: str | None = None, device: torch.device = CPU) -> list[Finding]:
    """Return a finding for each pass of a subject; ``wrong`` is the pass that failed."""
    where = Where.of(subject, device)
    return [
        Finding(where, which, which != wrong, 0.5, "y: not finite" if which == wrong else "", "2026-01-02")
        for which in SUBJECTS[subject][1]
    ]


def keep(file: Path, found: list[Finding]) -> None:
    """Write findings as another process would."""
    assert verdicts.add(file, found) is None
    forget()
