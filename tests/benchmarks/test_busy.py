"""Busy processes run and are ended whatever happens, and ratios are of the right times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from benchmarks import busy, results


def _stat(pid: int) -> list[str]:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()


def _cpu_seconds(pid: int) -> float:
    return sum(map(int, _stat(pid)[11:13])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
def test_busy_processes_work_and_are_ended_on_errors_too():
    def work() -> None:
        with busy.busy((2,)) as processes:
            found.extend(processes)
            deadline = time.monotonic() + 60
            start = _cpu_seconds(processes[0].pid)
            while _cpu_seconds(processes[0].pid) < start + 0.1:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            raise KeyError("of the measurement")

    found: list[subprocess.Popen[str]] = []
    with pytest.raises(KeyError, match="of the measurement"):
        work()
    assert [process.returncode for process in found] == [-9]


def test_a_busy_process_that_ends_is_an_error(monkeypatch):
    monkeypatch.setattr(busy, "_WORK", "print('busy')")
    with pytest.raises(RuntimeError, match="ended while"), busy.busy((1,)) as (process,):
        process.wait()
    monkeypatch.setattr(busy, "_WORK", "print('no')")
    with pytest.raises(RuntimeError, match="did not start"), busy.busy((1,)):
        pytest.fail("entered")


@pytest.mark.slow
def test_a_busy_process_ends_with_its_parent():
    code = "import os; from benchmarks import busy\nwith busy.busy((1,)) as (p,): print(p.pid, flush=True); os._exit(0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=results.ROOT)
    deadline = time.monotonic() + 60
    while os.path.exists(f"/proc/{int(done.stdout)}") and _stat(int(done.stdout))[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ratios_are_ours_over_others_of_means_and_of_medians():
    def row(neighbours: str, name: str, mean: float, median: float) -> dict[str, object]:
        case = {"neighbours": neighbours, "layer": "demo qkv", "threads": 2, "implementation": name}
        return case | {"mean": mean, "median": median, "seconds": [median, median, 3 * mean - 2 * median]}

    rows = [
        row("none", results.OURS, 0.002, 0.001),
        row("none", results.FORMULA, 0.004, 0.003),
        row("none", results.PLAIN, 0.001, 0.001),
        row("4 of 1 thread", results.OURS, 0.064, 0.0072),
        row("4 of 1 thread", results.FORMULA, 0.01, 0.0036),
        row("4 of 1 thread", results.PLAIN, 0.004, 0.0018),
    ]
    *_, quiet, loud = busy.table(rows).splitlines()
    assert [cell.strip() for cell in quiet.strip("|").split("|")] == [
        *("none", "demo qkv", "2", "3", "2.00 (1.00)", "4.00 (3.00)", "1.00 (1.00)", "0.50 (0.33)", "2.00 (1.00)"),
    ]
    assert loud.endswith("| 6.40 (2.00) | 16.00 (4.00) |")
    assert busy.worst(rows) == pytest.approx(6.4)


def test_cases_are_measured_and_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(busy, "SHAPES", {"tiny": (3, 8, 4, 1)})
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(busy, "LIMIT", 1e9)
    given = ["--neighbours", "none", "--layer", "tiny", "--rounds", "3", "--write"]
    assert busy.main(given) == 0
    assert "ours / formula" in capsys.readouterr().out
    found = json.loads((tmp_path / "cpu" / "busy.json").read_text())
    assert found["command"] == f"python -m benchmarks.busy {' '.join(given)}"
    assert {row["implementation"] for row in found["results"]} == set(busy.NAMES)
    assert all(len(row["seconds"]) == 3 for row in found["results"])
    assert results.load(tmp_path / "cpu") == []  # it has no suite, so other programs ignore it
    monkeypatch.setattr(busy, "LIMIT", 0.0)
    assert busy.main(given[:-1]) == 1
