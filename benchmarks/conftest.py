"""Options of the suites, one recorder for a session, and the table at its end."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest

from benchmarks import results, tables
from benchmarks.chunks import DTYPES
from benchmarks.groups import groups
from benchmarks.suite import SLICE_MINUTES, Recorder, planned, recorder_of

_RECORDER = pytest.StashKey[Recorder]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--results`` and the options that narrow the cases."""
    group = parser.getgroup("rlrr_kernels benchmarks")
    group.addoption(
        "--results",
        nargs="?",
        type=Path,
        const=results.results_folder(),
        help="write raw results, to benchmarks/results/<device>/ or the folder given",
    )
    group.addoption("--results-command", help="what to write down as the command, instead of pytest's own")
    group.addoption("--chunk", help="of the whole suite those chunks whose names start so; else a slice")
    group.addoption(
        "--minutes",
        type=float,
        help="leave out groups that would end later, and rivals of a training step that are not compiled by then; "
        f"default: {SLICE_MINUTES:g}, none where everything is measured",
    )
    group.addoption(
        "--everything",
        action="store_true",
        help="all rivals, not only the strongest, without limit of time; as with --results and --chunk",
    )
    group.addoption("--images", type=int, nargs="+", help="batch sizes of the suites layer, norm and step")
    group.addoption("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES), help="of the suites layer and norm")
    group.addoption("--rounds", type=int, help="rounds of every group, in place of as many as fit the time")


@pytest.fixture(scope="session")
def recorder(pytestconfig: pytest.Config) -> Recorder:
    """The recorder that measures each group of this session once, and writes it."""
    pytestconfig.stash[_RECORDER] = recorder_of(pytestconfig)
    return pytestconfig.stash[_RECORDER]


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Hide pytest-benchmark's table without ``-v``: ratios within a group are what counts."""
    if config.option.verbose <= 0:
        config.option.benchmark_quiet = True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort the groups by their place; tests of one group stay together.

    Raises:
        pytest.UsageError: If the options leave no test: the session would look like one without failures.
    """
    chunk = config.getoption("--chunk")
    if chunk is not None and not planned(config):
        raise pytest.UsageError(
            f"--chunk: expected the start of a chunk's name (python -m benchmarks.chunks --list) in these files, with "
            f"the dtypes {', '.join(config.getoption('--dtype'))}, got {chunk!r}"
        )
    calls = {item: getattr(item, "callspec", None) for item in items}
    items.sort(key=lambda item: getattr(call.params.get("group"), "place", 0) if (call := calls[item]) else 0)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> Generator[None, None, None]:
    """Print the table of ratios last."""
    yield
    recorder = config.stash.get(_RECORDER, None)
    if recorder is not None and (found := groups(recorder.chunks())):
        terminalreporter.section("times of others / ours: above 1 where ours is faster")
        terminalreporter.write_line(tables.ratios(found))
        if recorder.left_out:
            count = f"{len(recorder.left_out)} of {len(recorder.left_out) + len(found)} groups"
            terminalreporter.write_line(
                f"{count} left out, as {recorder.minutes:g} minutes are up: see --minutes, --everything"
            )
