"""A pytest plugin (``-p benchmarks.first_day.reports --reports FILE``): a line of JSON for each test as it ends.

A session that is killed leaves what it had: ``{"test", "outcome", "seconds", "why"}``, the outcome "passed", "failed",
"skipped" or "error" (outside of the test itself).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reports", type=Path, help="a line of JSON for each test, as it ends")


class _Writer:
    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of a process of its own or of pytest-xdist's controller, which hears of all tests."""
        if report.when != "call" and report.outcome == "passed":
            return
        outcome = "error" if report.when != "call" and report.outcome == "failed" else report.outcome
        crash = getattr(report.longrepr, "reprcrash", None)
        why = crash.message if crash is not None else str(report.longrepr or "") if outcome != "passed" else ""
        line = {"test": report.nodeid, "outcome": outcome, "seconds": round(report.duration, 3), "why": why[:2000]}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--reports")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Writer(path))


def summary(lines: Iterable[str], most: int = 12) -> list[str]:
    """Of the lines of such a file: counts in all, then by file where something failed, then the first failures."""
    tests: dict[str, dict[str, Any]] = {}
    for line in lines:
        test = json.loads(line)
        tests[test["test"]] = test
    by_file: dict[str, Counter[str]] = {}
    for name, test in tests.items():
        by_file.setdefault(name.partition("::")[0], Counter())[test["outcome"]] += 1
    failed = [test for test in tests.values() if test["outcome"] in ("failed", "error")]
    said = [_counts(sum(by_file.values(), Counter()))]
    said += [f"{name}: {_counts(c)}" for name, c in sorted(by_file.items()) if c["failed"] + c["error"]]
    said += [f"{test['test']}: {(test['why'].splitlines() or [''])[0]}" for test in failed[:most]]
    return said + ([f"and {len(failed) - most} more"] if len(failed) > most else [])


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in counter.most_common()) or "no test ran"
