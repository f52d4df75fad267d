"""A process that hangs, dies or reports nonsense affects its own pass only, and ends with all that it started."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys

import pytest
import torch

from rlrr_kernels.backends.verdicts import Where
from rlrr_kernels.check import cases, worker
from rlrr_kernels.check.processes import (
    TIME_OUT,
    Process,
    Task,
    end,
    exit_on_signals,
    outcome_of,
    run_command,
    run_tasks,
)
from tests.locks import holding, wait_until_free, wait_until_held
from tests.oracle import require

WHERE = Where("device", "driver", "torch", "triton", "version", "cpu", "build")
FORWARD = Task("cpu", "forward", "cpu")


def messages(*answers):
    return "".join(f"{worker.MARK}{json.dumps(answer)}\n" for answer in answers)


def prints(*answers):
    return f"print({messages(*answers)!r}, end='', flush=True)\n"


RIGHT = {"verdict": "right", "ratio": 0.5, "worst": "float32, M 1", "reason": ""}
LAUNCHED = WHERE._asdict(), {"launched": "float32, M 1"}, {"launched": "float32, M 2"}


@pytest.mark.parametrize(
    ("status", "answers", "err", "verdict", "reason"),
    [
        (0, (WHERE._asdict(), RIGHT), "", "right", ""),
        (0, (WHERE._asdict(), {"verdict": "wrong", "reason": "y: off"}), "", "wrong", "y: off"),
        (0, (WHERE._asdict(), {"verdict": "not here", "reason": "no nvcc"}), "", "not here", "no nvcc"),
        (-11, (WHERE._asdict(),), "CUDA error\n", "wrong", "ended by SIGSEGV: CUDA error"),
        (-9, (WHERE._asdict(),), "", "not tried", "ended by SIGKILL: it said nothing"),
        (1, (WHERE._asdict(),), "lost", "wrong", "exit status 1: lost"),
        (-6, (), "", "not tried", "ended by SIGABRT: it said nothing"),
        (-6, (WHERE._asdict(), RIGHT), "", "wrong", "ended by SIGABRT: it said nothing"),
        (0, (*LAUNCHED, RIGHT), "", "right", ""),
        (1, LAUNCHED, "lost", "wrong", "exit status 1: lost"),
    ],
)
def test_the_end_of_a_process_is_a_verdict(status, answers, err, verdict, reason):
    outcome = outcome_of(FORWARD, status, "noise\n" + messages(*answers), err, 180)
    assert (outcome.verdict, outcome.reason, outcome.where) == (verdict, reason, WHERE if answers else None)
    if verdict == "right":
        assert (outcome.ratio, outcome.worst) == (0.5, "float32, M 1")


def test_a_message_that_is_cut_off_is_no_answer():
    outcome = outcome_of(FORWARD, 0, worker.MARK + "{", "", 180)
    assert (outcome.verdict, outcome.reason) == ("not tried", "exit status 0: it said nothing")


@pytest.mark.parametrize(
    ("device", "answers", "seen"),
    [
        ("cuda:0", [], "none of its cases"),
        ("cuda:0", [WHERE._asdict()], "none of its cases"),
        ("cuda:0", [WHERE._asdict(), {"launched": "M 1"}, {"done": "M 1"}], "M 1"),
        ("cpu", [WHERE._asdict(), {"done": "M 1"}, {"launched": "M 2"}], "M 2"),
    ],
)
def test_a_process_that_may_still_compile_or_is_slow_at_its_time_limit_has_not_failed(device, answers, seen):
    outcome = outcome_of(FORWARD._replace(device=device), TIME_OUT, messages(*answers), "", 180)
    assert (outcome.verdict, outcome.reason) == ("not tried", f"its 180 s were up, last seen at {seen}")


@pytest.fixture
def scripts(monkeypatch):
    """Code of the process of each pass."""
    codes = {"fine": prints(WHERE._asdict(), RIGHT)}
    monkeypatch.setattr(Task, "command", lambda task: [sys.executable, "-c", codes[task.which]])
    return codes


def test_a_process_that_hangs_is_ended_with_its_children_and_the_others_go_on(scripts, tmp_path):
    lock = tmp_path / "lock"
    child = holding(lock) + "print(1, flush=True)\ntime.sleep(600)"
    scripts["hang"] = prints(*LAUNCHED) + (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline(), time.sleep(600)"
    )
    on_gpu = FORWARD._replace(device="cuda:0")
    found = {o.task.which: o for o in run_tasks([on_gpu._replace(which=name) for name in ("hang", "fine")], 1, 1)}
    assert (found["hang"].verdict, found["hang"].where) == ("wrong", WHERE)
    assert found["hang"].reason == "no answer within 1 s from float32, M 2"
    assert found["fine"].verdict == "right"
    wait_until_free(lock)


def test_closing_the_generator_ends_what_runs(scripts, tmp_path):
    lock = tmp_path / "lock"
    scripts["hang"] = holding(lock) + "time.sleep(600)"
    outcomes = run_tasks([FORWARD._replace(which=name) for name in ("hang", "fine")], 600, 2)
    assert next(outcomes).task.which == "fine"
    wait_until_held(lock)
    outcomes.close()
    wait_until_free(lock)


def _holds(lock, own_group=False):
    """Return a command whose child holds a lock while it lives, in a process group of its own if asked for."""
    child = holding(lock) + "time.sleep(600)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], start_new_session={own_group})"
    return [sys.executable, "-c", code]


@pytest.mark.slow
def test_a_child_in_a_process_group_of_its_own_is_ended_too(tmp_path):
    lock = tmp_path / "lock"
    assert run_command(_holds(lock, own_group=True), 1.5) == TIME_OUT
    wait_until_free(lock)


def test_output_goes_to_the_log_and_children_that_are_left_behind_are_ended(tmp_path):
    lock, log = tmp_path / "lock", tmp_path / "log"
    code = f"""
import os, subprocess, sys, time
subprocess.Popen({_holds(lock)!r})
while not os.path.exists({str(lock)!r}):
    time.sleep(0.02)
print("out", flush=True)
print("err", file=sys.stderr)
sys.exit(3)
"""
    with log.open("ab") as out:
        process = Process([sys.executable, "-c", code], 600, None, out, subprocess.STDOUT)
    try:
        assert process.wait() == 3
    finally:
        end([process])
    assert log.read_text().split() == ["out", "err"]
    wait_until_free(lock)


def test_a_hangup_that_is_ignored_stays_ignored():
    """As under nohup."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        exit_on_signals()
        signal.raise_signal(signal.SIGHUP)
        with pytest.raises(SystemExit, match="143"):
            signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_the_cuda_kernels_of_each_kind_have_processes_of_their_own(monkeypatch):
    monkeypatch.setenv("RLRR_CUDA_HOPPER", "1")
    for subject, hopper in (("cuda", "0"), ("cuda-hopper", "1"), ("triton", "0")):
        task = Task(subject, "forward", "cuda:1")
        assert task.environment()["RLRR_CUDA_HOPPER"] == hopper
        assert task.command()[1:] == ["-m", "rlrr_kernels.check.worker", subject, "forward", "cuda:1"]


def test_a_worker_reports_each_case_and_its_result(capsys, monkeypatch):
    require("cpu")
    few = list(cases.cases("forward", "cpu"))[:2]
    monkeypatch.setattr(cases, "cases", lambda which, kind: few)
    assert worker.main(FORWARD) == 0
    out = capsys.readouterr().out
    assert re.findall(r'{"launched": "(.*)"}', out) == list(map(str, few))
    outcome = outcome_of(FORWARD, 0, out, "", 1)
    assert (outcome.verdict, outcome.where) == ("right", Where.of("cpu", torch.device("cpu")))
    assert 0 < outcome.ratio <= 1
    assert outcome.worst in map(str, few)


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ({"tried": 1, "ratio": 2.5, "reason": "y: off\x1b[2J\nmore"}, ("wrong", 2.5, "y: off [2J")),
        ({"tried": 1, "ratio": float("inf"), "reason": "y: not finite"}, ("wrong", None, "y: not finite")),
        ({"refusal": "device cuda:0: no"}, ("not here", None, "device cuda:0: no")),
        (torch.OutOfMemoryError("CUDA out of memory"), ("not tried", None, "CUDA out of memory")),
        ("it cannot be imported: not built", ("not here", None, "it cannot be imported: not built")),
    ],
)
def test_the_result_of_a_worker(report, expected, capsys, monkeypatch):
    def made_up(*arguments):
        if isinstance(report, Exception):
            raise report
        return cases.Report(**report)

    monkeypatch.setattr(cases, "run", made_up)
    monkeypatch.setattr(cases, "module_of", lambda subject, device: report if isinstance(report, str) else None)
    worker.main(FORWARD)
    outcome = outcome_of(FORWARD, 0, capsys.readouterr().out, "", 1)
    assert (outcome.verdict, outcome.ratio, outcome.reason) == expected
