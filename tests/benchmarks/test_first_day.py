"""The first day's stages go on past what fails and hangs, and end in time; rehearsed on a pretended GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.first_day import __main__ as command
from benchmarks.first_day import day as module
from benchmarks.first_day import probes, pytest_outcomes
from benchmarks.first_day.__main__ import STAGES
from benchmarks.first_day.day import PRETENDED_GPU, Day, Done, Piece
from benchmarks.results import CUDA, CUDA_HOPPER, GRAPH, TRITON

ROOT = Path(__file__).parents[2]


def _python(name: str, code: str, seconds: float = 600) -> Piece:
    return Piece(name, seconds, [sys.executable, "-c", code])


def test_a_day_goes_on_past_what_fails_hangs_and_dies(tmp_path):
    """Pieces run in parallel; each has a row and a log, also of output before a kill."""
    day = Day(tmp_path / "out", 600, 2, rehearse=False)
    done = day.run(
        _python("right", "print('fine')"),
        _python("wrong", "import sys; print('no'); sys.exit(3)"),
        _python("hangs", "print('begun'); import time; time.sleep(600)", 1),
        _python("dies", "print('begun'); import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
    )
    assert [one.status for one in done] == [0, 3, 124, -11]
    day.row_if_ok(done[0], done[0].last)
    rows = (tmp_path / "out" / "table.txt").read_text().splitlines()
    words = {row.split()[0]: row.partition(" ")[2].strip() for row in rows}
    assert words["right"] == "fine"
    assert words["wrong"].startswith("FAILED with status 3 after ")
    assert words["wrong"].endswith("s: no")
    assert words["hangs"] == "TIME OUT after 1 s: begun"
    assert words["dies"].startswith("DIED of signal 11 after ")
    assert day.failed
    assert {path.name for path in (tmp_path / "out").glob("*.log")} == {f"{name}.log" for name in words}


def test_a_piece_is_not_started_without_time_left_and_ended_in_time(tmp_path, monkeypatch):
    day = Day(tmp_path, 20, 1, rehearse=False)  # less than what is kept back and the least of a piece
    (done,) = day.run(_python("late", "print('began')"))
    assert (done.status, done.lines) == (None, [])
    assert "late                       not started: no time left\n" in day.table()
    monkeypatch.setattr(module, "LEAST", 0.1)
    day = Day(tmp_path, module.RESERVE + 0.5, 1, rehearse=False)
    began = time.monotonic()
    (done,) = day.run(_python("long", "import time; time.sleep(600)"))
    assert done.status == 124
    assert time.monotonic() - began < 60


def test_stages_run_one_after_another_also_after_one_has_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "exit_on_signals", lambda: None)
    ran = []

    def broken(day: Day) -> None:
        ran.append("env")
        raise OSError("no such thing")

    monkeypatch.setitem(STAGES, "env", broken)
    monkeypatch.setitem(STAGES, "build", lambda day: ran.append("build"))
    assert command.main(["env", "build", "--out", str(tmp_path)]) == 1
    assert ran == ["env", "build"]
    *_, said = capsys.readouterr().out.partition("====")
    assert [line.split()[:3] for line in said.splitlines()[1:]] == [
        ["env", "OSError:", "no"],
        ["---", "env", "0"],
        ["---", "build", "0"],
    ]
    assert command.main(["build", "--out", str(tmp_path)]) == 0
    with pytest.raises(SystemExit, match="2"):
        command.main(["nothing", "--out", str(tmp_path)])
    assert "stage: expected one of env, build, correct, " in capsys.readouterr().err


def test_the_environment_of_pieces(tmp_path, monkeypatch):
    for name, value in {"RLRR_BACKEND": "reference", "TRITON_INTERPRET": "1", "PYTHONPATH": "/theirs"}.items():
        monkeypatch.setenv(name, value)
    environment = Day(tmp_path, 600, 1, rehearse=True).environment
    assert not {"RLRR_BACKEND", "TRITON_INTERPRET"} & environment.keys()
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(PRETENDED_GPU), str(ROOT), "/theirs"]
    assert environment["RLRR_TUNED"] == "0"


def _reports(tmp_path: Path, test: str) -> list[str]:
    (tmp_path / "test_it.py").write_text(test)
    out = tmp_path / "reports.jsonl"
    options = ["-p", "no:cacheprovider", "-p", "benchmarks.first_day.pytest_outcomes", "--outcomes", str(out)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(ROOT)
    session = [sys.executable, "-m", "pytest", "-q", *options, "test_it.py"]
    subprocess.run(session, cwd=tmp_path, env=environment, capture_output=True, check=False)
    return out.read_text().splitlines()


def test_each_test_is_reported_as_it_ends(tmp_path):
    """The last test ends the process: the results of those before it are there."""
    lines = _reports(
        tmp_path,
        """
import os, pytest
def test_right(): pass
@pytest.fixture
def broken(): raise OSError("gone")
def test_error(broken): pass
def test_wrong(): assert 1 == 2, "one"
@pytest.mark.skip("why not")
def test_skipped(): pass
def test_dies(): os._exit(1)
""",
    )
    found = {test["test"].partition("::")[2]: test["outcome"] for test in map(json.loads, lines)}
    assert found == {"test_right": "passed", "test_error": "error", "test_wrong": "failed", "test_skipped": "skipped"}
    counts, by_file, *failed = pytest_outcomes.summary(lines)
    assert sorted(counts.split(", ")) == ["1 error", "1 failed", "1 passed", "1 skipped"]
    assert by_file == f"test_it.py: {counts}"
    assert failed[0] == "test_it.py::test_error: OSError: gone"
    assert failed[1].startswith("test_it.py::test_wrong: AssertionError: one")
    assert pytest_outcomes.summary(lines, 1)[-1] == "and 1 more"
    assert pytest_outcomes.summary([]) == ["no test ran"]


def test_the_table_of_passes_divides_blas_by_ours():
    row = {"layer": "fc1", "m": 1000, "n": 500, "k": 1000, "pass": "forward", "clock": GRAPH}
    seconds = {probes.BLAS: [1e-6, 2e-6, 9e-6], TRITON: [4e-6], CUDA: [1e-6]}
    row |= {"seconds": seconds, "errors": {CUDA_HOPPER: "Rejected: it is wrong"}}
    (line,) = probes.table_of_passes([row])
    assert " ".join(line.split()) == (
        "fc1 M = 1,000 forward BLAS 2 us, 500 TFLOP/s; BLAS / ours: "
        "triton 0.50 cuda 2.00 cuda-hopper failed: Rejected: it is wrong"
    )
    row |= {"seconds": {TRITON: [4e-6]}, "errors": {probes.BLAS: "no memory"}, "clock": "events"}
    assert probes.table_of_passes([row])[0].endswith("BLAS failed: no memory [events]")


@pytest.mark.parametrize(
    ("status", "lines", "said"),
    [
        (0, ["values wrong: 0", "========= ERROR SUMMARY: 0 errors"], "clean"),
        (0, ["values wrong: 0", "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"], "clean"),
        (9, ["values wrong: 0", "========= ERROR SUMMARY: 2 errors"], "values wrong: 0, ERROR SUMMARY: 2 errors"),
        (1, ["values wrong: 1", "========= ERROR SUMMARY: 0 errors"], "values wrong: 1, ERROR SUMMARY: 0 errors"),
        (
            0,
            ["not here: no library", "========= ERROR SUMMARY: 0 errors"],
            "not here: no library, ERROR SUMMARY: 0 errors",
        ),
        (124, ["begun"], "TIME OUT after 3 s: begun"),
    ],
)
def test_a_sanitizers_log_is_clean_only_with_right_values_and_no_errors(tmp_path, status, lines, said):
    log = tmp_path / "log"
    log.write_text("\n".join(lines))
    assert command.sanitizer_outcome(Done("memcheck", status, 3.0, log)) == said


def _rehearse(out: Path, *names: str, **environment: str) -> tuple[int, str]:
    """Return exit status and table."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_INTERPRET"))
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.first_day", "--rehearse", "--jobs", "1", "--out", str(out), *names],
        cwd=ROOT,
        env=inherited | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.endswith((out / "table.txt").read_text()), done.stderr
    return done.returncode, (out / "table.txt").read_text()


@pytest.mark.slow
def test_the_cheapest_stages_run_on_a_pretended_gpu(tmp_path):
    status, table = _rehearse(tmp_path, "env", "build")
    assert status == 0, table
    rows = table.splitlines()
    assert rows[0].split(maxsplit=1) == ["rehearsal", "on a pretended GPU: no number means anything"]
    assert any("pretended GPU, 132 multiprocessors" in row for row in rows)
    assert any(row.split(maxsplit=1) == ["build", "CUDA library: serves; pretended"] for row in rows)


@pytest.mark.slow
def test_the_other_stages_run_on_a_pretended_gpu(tmp_path):
    # what "correct" rehearses is the CPU's check, which has tests of its own; "sanitize" is rehearsed below
    rest = [name for name in STAGES if name not in ("env", "build", "correct", "sanitize")]
    status, table = _rehearse(tmp_path, *rest, "--limit", "3000")
    assert status == 0, table
    rows = [row for row in table.splitlines() if not row.startswith(" ")]
    assert [row.split()[1] for row in rows if row.startswith("---")] == rest
    said = {row[:26].strip(): row[26:].strip() for row in rows}
    assert said["tests"].endswith("passed")
    for suite in ("core", "launch", "step", "norm"):
        assert "passed" in said[suite]
        assert list((tmp_path / "results" / suite).glob("*.json"))
    measured = [json.loads(line)["seconds"] for line in (tmp_path / "passes.jsonl").read_text().splitlines()]
    assert [seconds.keys() for seconds in measured] == [{probes.BLAS, *probes.BACKENDS.values()}] * len(probes.PRODUCTS)
    assert table.count("forward M=64 N=64 K=64") == 2


@pytest.mark.slow
def test_a_wrong_pass_and_a_lost_gpu_are_in_the_table(tmp_path):
    faults = "cuda.forward=wrong,triton.grad_input=lost"
    status, table = _rehearse(tmp_path, "sanitize", PRETENDED_FAULT=faults, PRETENDED_TOKENS="33")
    assert status == 1
    said = {row[:26].strip(): row[26:].strip() for row in table.splitlines()}
    assert said["racecheck cuda"].startswith("forward: values wrong: ")
    assert said["racecheck triton"].startswith("forward: clean; grad_input: FAILED with status 1")
    assert said["racecheck hopper"] == "forward: clean; grad_input: clean; grad_scales: clean"
