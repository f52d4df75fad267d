"""Curves are not drawn, which would take most of the time of many tests."""

import pytest

from rlrr_kernels.finetune import run_folder


@pytest.fixture(autouse=True)
def _no_curves(request, monkeypatch):
    """Except in tests that use the fixture ``curves``."""
    if "curves" not in request.fixturenames:
        monkeypatch.setattr(run_folder, "draw_curves", lambda metrics: b"a picture")


@pytest.fixture
def curves():
    """Draw the curves in this test."""
