"""A record of the test's own, and a process that has read none."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlrr_kernels.backends import choice, verdicts


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where the record is, or will be; nothing is there, and nothing has been read or chosen."""
    monkeypatch.setenv("RLRR_CHECKED_FILE", str(tmp_path / "checked.json"))
    monkeypatch.delenv("RLRR_CHECKED", raising=False)
    monkeypatch.setattr(choice, "_plans", {})
    monkeypatch.setattr(choice, "_warned", set())
    forget()
    yield tmp_path / "checked.json"
    forget()


def forget() -> None:
    """As in a new process."""
    verdicts.kept.cache_clear()
    verdicts.build_of.cache_clear()
    choice.failed.cache_clear()
    choice._plans.clear()
