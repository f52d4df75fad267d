"""A process that hangs, dies or lies is an outcome of its own pass, and of no other."""

from __future__ import annotations

import json
import re
import signal
import sys
import time

import pytest
import torch

from rlrr_kernels.backends.verdicts import Where
from rlrr_kernels.check import cases, worker
from rlrr_kernels.check.processes import Task, exit_on_signals, run, understood
from tests.locks import holding, wait_until_free, wait_until_held
from tests.oracle import require

WHERE = Where("device", "driver", "torch", "triton", "version", "cpu", "build")
FORWARD = Task("cpu", "forward", "cpu")


def says(*answers):
    return "".join(f"print({worker.MARK + json.dumps(answer)!r}, flush=True)\n" for answer in answers)


RIGHT = {"verdict": "right", "ratio": 0.5, "worst": "float32, M 1", "reason": ""}
BEGUN = says(WHERE._asdict())
LAUNCHED = says(WHERE._asdict(), {"launched": "float32, M 1"}, {"launched": "float32, M 2"})
#: name of a pass -> what its process does, its verdict, what is said of it
SCRIPTS = {
    "fine": (says(WHERE._asdict(), RIGHT), "right", ""),
    "wrong": (says(WHERE._asdict(), {"verdict": "wrong", "reason": "y: off"}), "wrong", "y: off"),
    "absent": (says(WHERE._asdict(), {"verdict": "not here", "reason": "no nvcc"}), "not here", "no nvcc"),
    "segv": (
        BEGUN + "import os, signal, sys; print('CUDA error', file=sys.stderr, flush=True)\nos.kill(os.getpid(), 11)",
        "wrong",
        "ended by SIGSEGV: CUDA error",
    ),
    "killed": (BEGUN + "import os\nos.kill(os.getpid(), 9)", "not tried", "ended by SIGKILL: it said nothing"),
    "exit": (BEGUN + "raise SystemExit('lost')", "wrong", "exit status 1: lost"),
    "never began": ("import os; os.abort()", "not tried", "ended by SIGABRT: it said nothing"),
    "right, then dead": (says(WHERE._asdict(), RIGHT) + "import os; os.abort()", "wrong", "ended by SIGABRT: it said"),
    "right at last": (LAUNCHED + says(RIGHT), "right", ""),
    "dead in between": (LAUNCHED + "raise SystemExit('lost')", "wrong", "exit status 1: lost"),
    "half a line": (f"print({worker.MARK + '{'!r})", "not tried", "exit status 0: it said nothing"),
}


@pytest.fixture
def scripts(monkeypatch):
    """Tasks' passes name entries of SCRIPTS, or of what is added to the dict."""
    codes = {name: code for name, (code, _, _) in SCRIPTS.items()}
    monkeypatch.setattr(Task, "command", lambda task: [sys.executable, "-c", codes[task.which]])
    return codes


def test_each_end_of_a_process_is_understood(scripts):
    found = {o.task.which: o for o in run([FORWARD._replace(which=name) for name in SCRIPTS], 60, 2)}
    for name, (_, verdict, words) in SCRIPTS.items():
        assert found[name].verdict == verdict, name
        assert found[name].reason.startswith(words), name
        assert (found[name].where is None) == (name in ("never began", "half a line")), name
    assert (found["fine"].ratio, found["fine"].worst, found["fine"].where) == (0.5, "float32, M 1", WHERE)


def test_one_that_hangs_is_ended_with_all_that_it_started_and_the_others_go_on(scripts, tmp_path):
    """The child of the child too: as long as it lives it holds a lock."""
    lock = tmp_path / "lock"
    child = holding(lock) + "print(1, flush=True)\ntime.sleep(600)"
    scripts["hang"] = LAUNCHED + (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline(), time.sleep(600)"
    )
    began = time.monotonic()
    on_gpu = FORWARD._replace(device="cuda:0")
    found = {o.task.which: o for o in run([on_gpu._replace(which=name) for name in ("hang", "fine")], 2.5, 1)}
    words = "no answer within 2.5 s from float32, M 2"
    assert (found["hang"].verdict, found["hang"].reason) == ("wrong", words)
    assert found["hang"].where == WHERE
    assert found["fine"].verdict == "right"
    assert time.monotonic() - began < 300
    wait_until_free(lock)


@pytest.mark.parametrize(
    ("device", "told", "seen"),
    [
        ("cuda:0", [], "none of its cases"),
        ("cuda:0", [WHERE._asdict()], "none of its cases"),
        ("cuda:0", [WHERE._asdict(), {"launched": "M 1"}, {"done": "M 1"}], "M 1"),
        ("cpu", [WHERE._asdict(), {"done": "M 1"}, {"launched": "M 2"}], "M 2"),
    ],
)
def test_one_that_may_still_compile_or_is_slow_when_its_time_is_up_has_not_failed(device, told, seen):
    out = "".join(f"{worker.MARK}{json.dumps(line)}\n" for line in told)
    outcome = understood(FORWARD._replace(device=device), None, out, "", 180)
    assert (outcome.verdict, outcome.reason) == ("not tried", f"its 180 s were up, last seen at {seen}")


def test_an_interrupt_ends_what_runs(scripts, tmp_path):
    lock = tmp_path / "lock"
    scripts["hang"] = holding(lock) + "time.sleep(600)"
    outcomes = run([FORWARD._replace(which=name) for name in ("hang", "fine")], 600, 2)
    assert next(outcomes).task.which == "fine"
    wait_until_held(lock)
    outcomes.close()
    wait_until_free(lock)


def test_a_hangup_that_is_ignored_stays_so():
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


def test_a_worker_says_where_it_is_and_what_came_of_it(capsys, monkeypatch):
    require("cpu")
    few = list(cases.cases("forward", "cpu"))[:2]
    monkeypatch.setattr(cases, "cases", lambda which, kind: few)
    assert worker.main(FORWARD) == 0
    out = capsys.readouterr().out
    assert re.findall(r'{"launched": "(.*)"}', out) == list(map(str, few))
    outcome = understood(FORWARD, 0, out, "", 1)
    assert outcome.verdict == "right"
    assert outcome.where == Where.of("cpu", torch.device("cpu"))
    assert 0 < outcome.ratio <= 1
    assert outcome.worst in map(str, few)


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ({"tried": 1, "ratio": 2.5, "reason": "y: off\x1b[2J\nmore"}, ("wrong", 2.5, "y: off [2J")),
        ({"tried": 1, "ratio": float("inf"), "reason": "y: not finite"}, ("wrong", None, "y: not finite")),
        ({"refusal": "device cuda:0: no"}, ("not here", None, "device cuda:0: no")),
        (torch.OutOfMemoryError("CUDA out of memory"), ("not tried", None, "CUDA out of memory")),
    ],
)
def test_a_worker_s_answers(report, expected, capsys, monkeypatch):
    require("cpu")

    def made_up(*arguments):
        if isinstance(report, Exception):
            raise report
        return cases.Report(**report)

    monkeypatch.setattr(cases, "run", made_up)
    worker.main(FORWARD)
    outcome = understood(FORWARD, 0, capsys.readouterr().out, "", 1)
    assert (outcome.verdict, outcome.ratio, outcome.reason) == expected


def test_a_worker_says_what_is_not_here(capsys, monkeypatch):
    monkeypatch.setattr(cases, "module_of", lambda subject, device: "it cannot be imported: not built")
    worker.main(FORWARD)
    outcome = understood(FORWARD, 0, capsys.readouterr().out, "", 1)
    assert (outcome.verdict, outcome.reason) == ("not here", "it cannot be imported: not built")
