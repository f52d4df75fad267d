"""Caches survive fork, spawn and threads: a child computes, threads that race agree with one alone, bit for bit."""

import json
import os
import subprocess
import sys
import threading

import pytest

from rlrr_kernels import use_backend
from rlrr_kernels.backends import choice
from tests.once import once
from tests.reliability.fork_probe import PROBLEMS, at_once, same, step


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    def probe(folder):
        environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "RLRR_BACKEND")}
        command = [sys.executable, "-m", "tests.reliability.fork_probe"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr[-3000:]
        (folder / "found").write_text(done.stdout.splitlines()[-1])

    return json.loads((once(tmp_path_factory, "fork probe", probe) / "found").read_text())


@pytest.mark.slow
def test_first_calls_of_sixteen_threads_agree_with_one_alone(found):
    assert found["threads"] == [True] * 16
    assert found["plans"] == len({problem[4:] for problem in PROBLEMS})


@pytest.mark.slow
@pytest.mark.parametrize("case", ["child", "child of two threads"])
def test_a_forked_child_computes(found, case):
    assert found[case] == "right"


@pytest.mark.slow
@pytest.mark.parametrize("case", ["forked workers", "spawned workers"])
def test_a_data_loaders_workers_compute(found, case):
    assert found[case]


@pytest.mark.slow
def test_a_lock_that_another_thread_held_at_the_fork_does_not_hang_the_child(found):
    assert found["lock"] == "right"


@pytest.mark.slow
def test_handles_of_kernels_serve_threads_and_children(found):
    assert found["launches of threads"] == 12
    assert found["threads launch as one does"]
    assert found["handles in a child"] == "right"


def test_a_race_to_choose_and_to_import_is_harmless(monkeypatch):
    serial = [step(problem) for problem in PROBLEMS]
    for _ in range(2):
        monkeypatch.setattr(choice, "_plans", {})
        monkeypatch.setattr(choice, "_loaded", {})
        for results in at_once([lambda: [step(problem) for problem in PROBLEMS]] * 16):
            assert same(results, serial)


def test_use_backend_holds_in_all_threads(monkeypatch):
    monkeypatch.delenv("RLRR_BACKEND", raising=False)
    asked = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: asked.append(choice.requested()))
        thread.start()
        thread.join()
    assert asked == ["reference"]
    assert choice.requested() is None
