"""What the tests of the benchmarks share."""

import pytest

from benchmarks import timing


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch):
    """A garbage collection takes half a second in a process that has imported torch and timm."""
    monkeypatch.setattr(timing.gc, "collect", lambda *generation: 0)
