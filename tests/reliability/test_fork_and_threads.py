"""Caches survive fork, spawn and threads: children and racing threads compute the bits of one thread.

What must fork before another test has started threads, and must not have imported Triton's kernels for the interpreter,
runs in a process of its own: ``python -m tests.reliability.test_fork_and_threads`` prints what it found as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from triton.runtime.jit import JITFunction

from rlrr_kernels import rescaled_linear, use_backend
from rlrr_kernels.backends import choice, tuned
from rlrr_kernels.backends.problem import Problem
from rlrr_kernels.backends.triton import launch
from rlrr_kernels.backends.triton.choose import Choice, Device
from rlrr_kernels.backends.triton.start import start
from tests.backends.triton.driver import log as driver_log
from tests.backends.triton.driver.stand_in import Machine
from tests.once import once
from tests.oracle import make_problem

#: Problems of several sizes, dtypes and groups: (M, N, K, groups, dtype of x, dtype of W).
PROBLEMS = [
    (m, 24 * groups, 40, groups, dtype, weight)
    for m in (3, 200)
    for groups in (1, 3)
    for dtype, weight in (
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float64),
        (torch.float16, torch.float16),
    )
]


def step(problem: tuple[Any, ...]) -> list[torch.Tensor]:
    """y and all gradients."""
    p = make_problem(*problem)
    leaves = [t.requires_grad_() for t in p.forward_args if t is not None]
    y = rescaled_linear(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, p.dy)]


def same(results: list[list[torch.Tensor]], expected: list[list[torch.Tensor]]) -> bool:
    """Bit for bit."""
    pairs = [(a, b) for one, other in zip(results, expected, strict=True) for a, b in zip(one, other, strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)


def at_once(jobs: list[Callable[[], Any]]) -> list[Any]:
    """Results of jobs that start together, each in its own thread."""
    barrier, results = threading.Barrier(len(jobs)), [None] * len(jobs)

    def run(index: int) -> None:
        barrier.wait()
        results[index] = jobs[index]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def in_child(body: Callable[[], bool], seconds: int = 300) -> str:
    """What became of ``body`` in a forked child: "right", "wrong", or the signal that ended it."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)
        os._exit(0 if body() else 1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}"
    return "right" if os.WEXITSTATUS(status) == 0 else "wrong"


class Layers(Dataset[list[torch.Tensor]]):
    """Each item is computed by the layer in a worker."""

    def __len__(self) -> int:
        return len(PROBLEMS)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        return step(PROBLEMS[index])


def loaded(method: str, workers: int) -> list[list[torch.Tensor]]:
    """All items, from the workers of a DataLoader."""
    return list(DataLoader(Layers(), batch_size=None, num_workers=workers, multiprocessing_context=method))


@contextlib.contextmanager
def lock_held_by_a_thread() -> Any:
    """Another thread holds the lock of the measured entries, as it does while it reads the file."""
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with tuned._loading:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        yield
    finally:
        done.set()
        thread.join()


def kernel_calls() -> list[Callable[[], None]]:
    """Launches at two sizes and dtypes, of which the first call compiles."""
    tile = Choice(64, 64, 64, num_warps=4, num_stages=2)
    calls = []
    for m, dtype in ((128, torch.bfloat16), (130, torch.float16)):
        x, w = torch.zeros(m, 128, dtype=dtype), torch.zeros(256, 128, dtype=dtype)
        u, v, f = torch.zeros(256, 1), torch.zeros(2, 1, 128), torch.zeros(256)
        calls.append(lambda x=x, w=w, u=u, v=v, f=f: launch.forward(x, w, u, v, None, f, choice=tile))
    return calls


def handles(found: dict[str, Any]) -> None:
    """Compiled kernels on a mocked GPU: threads race to the first launch, and a child inherits the handles."""
    asked, run = [0], JITFunction.run

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked[0] += 1
        return run(self, *args, **kwargs)

    device = Device((9, 0), 132, 232_448)
    machine = Machine([device])

    def launches(act: Callable[[], Any]) -> list[str]:
        machine.log()
        act()
        return sorted(map(repr, driver_log.launches(machine.log())))

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", counting))
        stack.enter_context(machine)
        stack.enter_context(torch._C.DisableTorchFunction())  # so that threads see the tensors of the machine
        machine.all_memory()
        for name, value in (("device_of", device), ("guard", contextlib.nullcontext())):
            stack.enter_context(mock.patch.object(launch, name, lambda *_, value=value: value))
        stack.enter_context(mock.patch.object(launch, "start", lambda *a: start(*a[:-1], None)))
        calls = kernel_calls()
        raced = launches(lambda: at_once(calls * 6))
        found["launches of threads"], asked[0] = len(raced), 0
        serial = launches(lambda: [call() for call in calls * 6])
        found["threads launch as one does"] = raced == serial and asked[0] == 0

        def child() -> bool:
            return launches(lambda: [call() for call in calls * 6]) == serial and asked[0] == 0

        found["handles in a child"] = in_child(child)


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    # the first calls of the process, so that loading and choosing race as well
    raced = at_once([lambda: [step(p) for p in PROBLEMS]] * 16)
    serial = [step(p) for p in PROBLEMS]
    found["first calls of sixteen threads"] = [same(results, serial) for results in raced]
    found["plans"] = len(choice._plans)
    found["child"] = in_child(lambda: same([step(p) for p in PROBLEMS], serial))
    torch.set_num_threads(2)
    step(PROBLEMS[-1])

    def alone() -> bool:
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        return same([step(p) for p in PROBLEMS], serial)

    found["child of two threads"] = in_child(alone)
    found["forked workers"] = same(loaded("fork", 2), serial)
    found["spawned workers"] = same(loaded("spawn", 1), serial)
    with lock_held_by_a_thread():
        problem = Problem("forward", 1, 1, 1, 1, torch.float32, torch.float32)
        # of a device for which nothing was looked up before
        found["child of a process that holds the lock"] = in_child(
            lambda: tuned.find(problem, torch.device("meta")) is None
        )
    handles(found)
    print(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    def run(folder):
        environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "RLRR_BACKEND")}
        command = [sys.executable, "-m", "tests.reliability.test_fork_and_threads"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr[-3000:]
        (folder / "found").write_text(done.stdout.splitlines()[-1])

    return json.loads((once(tmp_path_factory, "forks and threads", run) / "found").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "expected"),
    {
        "first calls of sixteen threads": [True] * 16,
        "plans": len({problem[4:] for problem in PROBLEMS}),
        "child": "right",
        "child of two threads": "right",
        "forked workers": True,
        "spawned workers": True,
        "child of a process that holds the lock": "right",
        "launches of threads": 12,
        "threads launch as one does": True,
        "handles in a child": "right",
    }.items(),
)
def test_children_and_threads_compute_as_one_thread(found, case, expected):
    assert found[case] == expected


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


if __name__ == "__main__":
    main()
