"""Options of the suites, and one recorder for a session."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import implementations, results
from benchmarks.cases import DTYPES
from benchmarks.suite import Recorder, recorder_of, rounds_of


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--results`` and what narrows the cases."""
    group = parser.getgroup("rlrr_kernels benchmarks")
    group.addoption(
        "--results",
        nargs="?",
        type=Path,
        const=results.results_folder(),
        help="write raw results, to benchmarks/results/<device>/ or the folder given",
    )
    group.addoption("--results-command", help="what to write down as the command, instead of pytest's own")
    group.addoption("--chunk", help="of the whole suite those chunks whose names start so; else a slice for a CPU")
    group.addoption("--images", type=int, nargs="+", help="batch sizes of the suites layer, norm and step")
    group.addoption("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES), help="of the suites layer and norm")
    group.addoption(
        "--failed-preflight", type=json.loads, default={}, help="JSON: implementation -> why it must not be run"
    )
    group.addoption("--rounds", type=int, help="rounds of every group, in place of as many as fit the time")


@pytest.fixture(scope="session")
def recorder(pytestconfig: pytest.Config) -> Recorder:
    """Where groups of this session are measured once and written."""
    implementations.FAILED_PREFLIGHT.update(pytestconfig.getoption("--failed-preflight"))
    return recorder_of(pytestconfig)


@pytest.fixture(scope="session")
def rounds(pytestconfig: pytest.Config) -> tuple[int, int] | None:
    """(least, most) rounds that the command line asks for."""
    return rounds_of(pytestconfig)
