"""Timing by graphs, on a made-up GPU whose clock stands still but for what it runs."""

from __future__ import annotations

import contextlib
import time

import pytest
import torch

from rlrr_kernels.tune.gpu import _LAUNCHES, this_machine, time_graphs


class MadeUpGPU:
    """Stands in for ``torch.cuda``: a replay takes the sum of what was captured; ``log`` is the order of replays."""

    def __init__(self):
        self.now, self.capturing, self.log, self.events = 0.0, None, [], []

    def launch(self, seconds):
        assert self.capturing is not None, "launched outside of a capture"
        self.capturing.append(seconds)

    def install(self, monkeypatch):
        gpu = self

        class Graph:
            def __init__(self):
                self.launches = []

            def replay(self):
                gpu.now += sum(self.launches)
                gpu.log.append(self.launches)

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing

            def record(self):
                self.at = gpu.now
                gpu.log.append("event")

            def elapsed_time(self, other):
                return (other.at - self.at) * 1e3

        @contextlib.contextmanager
        def capture(graph, pool):
            assert pool == "pool"
            gpu.capturing = graph.launches
            yield
            gpu.capturing = None

        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "graph", capture)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: gpu.log.append("wait"))


@pytest.fixture
def gpu(monkeypatch):
    made_up = MadeUpGPU()
    made_up.install(monkeypatch)
    wall = iter(range(1000))
    monkeypatch.setattr(time, "monotonic", lambda: next(wall))
    return made_up


@pytest.mark.parametrize("copies", [2, 5, 40])
def test_seconds_of_one_launch_of_each(gpu, copies):
    used = []

    def run(seconds, copy):
        used.append(copy)
        gpu.launch(seconds)

    times = time_graphs([lambda copy: run(1e-5, copy), lambda copy: run(3e-5, copy)], copies, 4)
    assert times == [pytest.approx([1e-5] * 4), pytest.approx([3e-5] * 4)]
    launches = len(used) // 2
    assert launches >= _LAUNCHES
    assert launches % copies == 0  # every set equally often
    assert used[:launches] == [i % copies for i in range(launches)]


def test_runs_take_turns_and_another_begins_each_round(gpu):
    time_graphs([lambda copy, i=i: gpu.launch(i) for i in range(3)], 2, 3)
    log = ["event" if one == "event" else "wait" if one == "wait" else one[0] for one in gpu.log]
    rounds, now = [], []
    for one in log:
        if one == "wait":
            rounds.append(now)
            now = []
        else:
            now.append(one)
    timed = [round for round in rounds if "event" in round]
    e = "event"
    assert timed == [
        [2, e, 0, e, e, 1, e, e, 2, e],
        [0, e, 1, e, e, 2, e, e, 0, e],
        [1, e, 2, e, e, 0, e, e, 1, e],
    ]


def test_a_device_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="--device: expected 0 to 1, got 2"):
        this_machine(2)
