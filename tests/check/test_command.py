"""The command ``check``: its table, its file and its exit status; and the function for programs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
import torch

from rlrr_kernels import __main__ as package
from rlrr_kernels.backends import verdicts
from rlrr_kernels.backends.verdicts import Where
from rlrr_kernels.check import command as cli
from rlrr_kernels.check.processes import Outcome, Task
from tests.check.conftest import CPU, findings, forget
from tests.locks import holding, wait_until_free, wait_until_held
from tests.oracle import require


@pytest.fixture
def made_up(file, monkeypatch):
    """Outcomes by pass, in place of processes, and a list of the tasks, seconds and processes that were asked for."""
    outcomes, asked = {}, []

    def run(tasks, seconds, at_once):
        asked.append((tasks, seconds, at_once))
        for task in tasks:
            found = outcomes.get(task.which, {"verdict": "right", "ratio": 0.5, "worst": "float32, M 1"})
            if isinstance(found, BaseException):
                raise found
            yield Outcome(task, where=Where.of(task.subject, torch.device(task.device)), **found)

    monkeypatch.setattr(cli, "run_tasks", run)
    monkeypatch.setattr(cli, "exit_on_signals", lambda: None)
    return outcomes, asked


def test_what_is_right_is_shown_and_kept(made_up, file, capsys):
    assert package.main(["check", "--device", "cpu", "--seconds", "7"]) == 0
    out = capsys.readouterr().out
    assert "cpu          grad_scales    0.50  right      at float32, M 1\n" in out
    assert out.endswith(f"kept in {file}\n")
    assert made_up[1] == [([Task("cpu", which, "cpu") for which in verdicts.PASSES], 7.0, 1)]
    assert verdicts.state("cpu", CPU).startswith("proven, 20")


@pytest.mark.parametrize(
    ("found", "status", "state"),
    [
        ({"verdict": "wrong", "ratio": 3.0, "reason": "y: off"}, 1, "failed: grad_input: y: off"),
        ({"verdict": "not tried", "reason": "no memory"}, 1, "not yet checked"),
        ({"verdict": "not here", "reason": "no nvcc"}, 0, "not yet checked"),
    ],
    ids=lambda value: value["verdict"] if isinstance(value, dict) else "",
)
def test_what_is_not_right_is_the_exit_status(made_up, capsys, found, status, state):
    made_up[0]["grad_input"] = found
    assert package.main(["check", "--device", "cpu"]) == status
    row = next(line for line in capsys.readouterr().out.splitlines() if found["reason"] in line)
    assert found["verdict"] in row
    assert verdicts.state("cpu", CPU) == state


def test_with_nothing_to_check_it_fails_with_one_row(made_up, capsys):
    made_up[0].update({which: {"verdict": "not here", "reason": "not built"} for which in verdicts.PASSES})
    assert package.main(["check", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert (out.count("not built"), "kept in" in out) == (1, False)


@pytest.mark.parametrize(("stop", "status"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143)])
def test_an_interrupt_keeps_what_was_found(made_up, capsys, stop, status):
    made_up[0]["grad_scales"] = stop
    assert package.main(["check", "--device", "cpu"]) == status
    assert "interrupted" in capsys.readouterr().err
    assert set(verdicts.found("cpu", CPU)) == {"forward", "grad_input"}


def test_a_file_that_cannot_be_written_is_reported_before_the_work(made_up, tmp_path, capsys, monkeypatch):
    for place, words in (("folder", "is a folder; expected a file"), ("folder/file/checked.json", "File exists")):
        monkeypatch.setenv("RLRR_CHECKED_FILE", str(tmp_path / place))
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / "file").write_text("")
        made_up[0]["forward"] = AssertionError("it is at work")
        with pytest.raises(AssertionError, match="at work"):
            package.main(["check", "--device", "cpu"])
        said = capsys.readouterr().err
        assert said.startswith("rlrr_kernels check: what is found will not be kept: ")
        assert words in said
        with pytest.warns(UserWarning, match="left out"), pytest.raises(OSError, match=words):
            cli.failures(CPU)
        forget()
        made_up[0].clear()  # the table is shown all the same
        assert package.main(["check", "--device", "cpu"]) == 0
        assert "kept in" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)], ids=lambda number: number.name
)
def test_a_signal_ends_the_workers_with_the_command(file, tmp_path, number):
    lock = tmp_path / "lock"
    hang = holding(lock) + "time.sleep(600)"
    code = (
        f"import signal; signal.signal({int(number)}, signal.SIG_DFL)\n"  # as it is, but where nohup runs the tests
        "import sys; from rlrr_kernels import __main__ as package; from rlrr_kernels.check.processes import Task\n"
        f"Task.command = lambda task: [sys.executable, '-c', {hang!r}]\n"
        "sys.exit(package.main(['check', '--device', 'cpu']))"
    )
    command = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_until_held(lock)
    command.send_signal(number)
    said = command.communicate(timeout=120)[1].decode()
    assert (command.returncode, said) == (128 + number, "rlrr_kernels check: interrupted\n")
    wait_until_free(lock)
    assert not file.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "gpu"], "--device: expected cpu, cuda or cuda:INDEX, got 'gpu'"),
        (["--device", "cuda:x"], "--device: expected cpu, cuda or cuda:INDEX, got 'cuda:x'"),
        (["--device", "cuda:99"], "CUDA devices that torch sees, got 'cuda:99'"),
        (
            ["--device", "cpu", "--backend", "tritn"],
            "--backend: expected one of cpu, gluon, triton, cuda, cuda-hopper, got",
        ),
        (["--device", "cpu", "--backend", "triton"], "--backend: triton does not run on cpu"),
        (["--device", "cpu", "--seconds", "0"], "--seconds: expected more than 0, got 0"),
        (["--device", "cpu", "--seconds", "nan"], "--seconds: expected more than 0, got nan"),
    ],
)
def test_a_bad_argument_is_one_line(made_up, capsys, arguments, words):
    assert package.main(["check", *arguments]) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert (out, err.count("\n"), made_up[1]) == ("", 1, [])


def test_the_gpu_is_checked_where_there_is_one(made_up, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert package.main(["check"]) == 0
    tasks, _, at_once = made_up[1][0]
    assert len(tasks) == 13
    assert {task.device for task in tasks} == {"cuda:0"}
    assert ("triton", "layer_norm") in {(task.subject, task.which) for task in tasks}
    assert 1 <= at_once <= 4
    assert package.main(["check", "--device", "cuda:1", "--backend", "cuda"]) == 0
    assert made_up[1][1][0] == [Task("cuda", which, "cuda:1") for which in verdicts.PASSES]


def test_programs_check_only_what_was_not_yet_checked(made_up, file):
    verdicts.add(file, findings(wrong="forward")[:2])
    forget()
    assert cli.failures(CPU) == ({"cpu": "forward: y: not finite"}, {})
    assert [task.which for task in made_up[1][0][0]] == ["grad_scales"]
    made_up[0]["grad_input"] = {"verdict": "not tried", "reason": "no memory"}
    file.unlink()
    forget()
    assert cli.failures(CPU) == ({}, {"cpu": "grad_input: no memory"})


@pytest.mark.slow
def test_this_cpu_is_right(file):
    require("cpu")
    command = [sys.executable, "-m", "rlrr_kernels", "check", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(json.loads(file.read_text())["entries"]) == 3


@pytest.mark.gpu
@pytest.mark.slow
def test_this_gpu_is_right(gpu, file):
    done = subprocess.run([sys.executable, "-m", "rlrr_kernels", "check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
