"""A pytest plugin that writes a line of JSON for each test as it ends, so that a killed session leaves what it had.

``-p benchmarks.first_day.pytest_outcomes --outcomes FILE`` writes ``{"test", "outcome", "seconds", "why"}``; the
outcome is "passed", "failed", "skipped", or "error" for what failed outside of the test itself.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--outcomes``."""
    parser.addoption("--outcomes", type=Path, help="a line of JSON for each test, as it ends")


class _Writer:
    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write one test; under pytest-xdist the controller gets the reports of all workers."""
        if report.when != "call" and report.outcome == "passed":
            return
        outcome = "error" if report.when != "call" and report.outcome == "failed" else report.outcome
        crash = getattr(report.longrepr, "reprcrash", None)
        why = crash.message if crash is not None else str(report.longrepr or "") if outcome != "passed" else ""
        line = {"test": report.nodeid, "outcome": outcome, "seconds": round(report.duration, 3), "why": why[:2000]}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    """Start to write, but not in a worker of pytest-xdist."""
    path = config.getoption("--outcomes")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Writer(path))


def summary(lines: Iterable[str], most: int = 12) -> list[str]:
    """Return the counts of all tests, those of each file in which one failed, then the first failures."""
    tests: dict[str, dict[str, Any]] = {(test := json.loads(line))["test"]: test for line in lines}
    by_file: dict[str, Counter[str]] = {}
    for name, test in tests.items():
        by_file.setdefault(name.partition("::")[0], Counter())[test["outcome"]] += 1
    failed = [test for test in tests.values() if test["outcome"] in ("failed", "error")]
    found = [_counts(sum(by_file.values(), Counter()))]
    found += [f"{name}: {_counts(c)}" for name, c in sorted(by_file.items()) if c["failed"] + c["error"]]
    found += [f"{test['test']}: {(test['why'].splitlines() or [''])[0]}" for test in failed[:most]]
    return found + ([f"and {len(failed) - most} more"] if len(failed) > most else [])


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in counter.most_common()) or "no test ran"
