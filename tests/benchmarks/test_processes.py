"""A process that runs too long, or whose parent is told to end, ends with all that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import processes
from tests.locks import holding, wait_until_free, wait_until_held

ROOT = Path(__file__).parents[2]


def _holds(lock: Path, own_group: bool = False) -> list[str]:
    """A command whose child holds a lock as long as it lives, in a process group of its own if asked for."""
    child = holding(lock) + "time.sleep(600)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], start_new_session={own_group})"
    return [sys.executable, "-c", code]


@pytest.mark.parametrize("own_group", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_hangs_is_ended_with_all_that_it_started(tmp_path, own_group):
    lock = tmp_path / "lock"
    assert processes.run(_holds(lock, own_group), 1.5) == processes.TIME_OUT
    wait_until_free(lock)
    assert processes.run([sys.executable, "-c", "import sys; sys.exit(3)"], 600) == 3


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)], ids=lambda number: number.name
)
def test_a_parent_that_is_told_to_end_takes_them_with_it(tmp_path, number):
    lock = tmp_path / "lock"
    code = (
        f"import signal; signal.signal({int(number)}, signal.SIG_DFL)\n"  # as it is, but where nohup runs the tests
        f"from benchmarks import processes; processes.exit_on_signals(); processes.run({_holds(lock)!r}, 600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    wait_until_held(lock)
    parent.send_signal(number)
    assert parent.wait(120) == 128 + number
    wait_until_free(lock)


def test_output_goes_to_the_log_and_what_a_process_leaves_behind_ends_with_it(tmp_path):
    lock, log = tmp_path / "lock", tmp_path / "log"
    code = f"""
import os, subprocess, sys, time
subprocess.Popen({_holds(lock)!r})
while not os.path.exists({str(lock)!r}):
    time.sleep(0.05)
print("out")
print("err", file=sys.stderr)
"""
    running = processes.Running([sys.executable, "-c", code], 600, log, os.environ | {"PYTHONUNBUFFERED": "1"})
    with processes.ended({"": running}):
        running.start()
        assert running.wait() == 0
    assert log.read_text().split() == ["out", "err"]
    wait_until_free(lock)
