"""A place for the user's part."""

import pytest

from rlrr_kernels.backends import choice


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Where the user's part is looked for; nothing is there, and nothing has been read."""
    monkeypatch.setenv("RLRR_TUNED_FILE", str(tmp_path / "tuned.json"))
    monkeypatch.delenv("RLRR_TUNED", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    choice.reload()
    yield tmp_path / "tuned.json"
    choice.reload()
