"""Timing by graphs and by turns, on made-up devices with clocks of their own."""

from __future__ import annotations

import contextlib
import time

import pytest
import torch

from rlrr_kernels.tune import machine
from rlrr_kernels.tune.machine import _LAUNCHES, _TURN, time_graphs, time_turns


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


def test_on_a_cpu_each_run_fills_its_turn_and_another_begins_each_round(monkeypatch):
    now, log = [0.0], []
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0])

    def run(which, seconds, copy):
        log.append((which, copy))
        now[0] += seconds

    long, short = 3 * _TURN, _TURN / 4
    times = time_turns([lambda copy: run("long", long, copy), lambda copy: run("short", short, copy)], 3, 2)
    assert times == [pytest.approx([long] * 2), pytest.approx([short] * 2)]
    turn = [("short", 0), ("short", 1), ("short", 2), ("short", 0)]
    assert log == [("long", 0), ("short", 0), ("long", 0), *turn, *turn, ("long", 0)]
