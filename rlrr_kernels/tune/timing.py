"""The device, and how launches are timed on it: by CUDA graphs on a GPU, by the clock on a CPU, in turns on both."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rlrr_kernels.backends.verdicts import device_name
from rlrr_kernels.tune.contest import Timer

#: Launches in one timed graph: what the CPU needs to start the next graph is then hidden behind them.
_LAUNCHES = 16

#: Seconds of work on a GPU before the first round, for the clocks to rise; seconds of one timed turn on a CPU.
_WARM_UP = 0.2
_TURN = 0.01


@dataclass(frozen=True)
class Machine:
    """Where candidates are measured. ``cache_bytes``: size of a GPU's second cache."""

    name: str
    device: torch.device
    cache_bytes: int
    timer: Timer
    synchronize: Callable[[], object]


def machine_of(device: torch.device) -> Machine:
    """A CPU, or a CUDA device, which becomes the current one."""
    if device.type == "cpu":
        return Machine(device_name(device), device, 0, time_turns, lambda: None)
    torch.cuda.set_device(device)
    properties = torch.cuda.get_device_properties(device)
    return Machine(properties.name, device, properties.L2_cache_size, time_graphs, torch.cuda.synchronize)


def time_turns(runs: Sequence[Callable[[int], object]], copies: int, rounds: int) -> list[list[float]]:
    """A :data:`~rlrr_kernels.tune.contest.Timer` by the clock: each run as often as fills a turn."""

    def spent(run: Callable[[int], object], count: int) -> float:
        began = time.perf_counter()
        for i in range(count):
            run(i % copies)
        return (time.perf_counter() - began) / count

    counts = [max(1, min(1000, math.ceil(_TURN / max(spent(run, 1), 1e-9)))) for run in runs]
    seconds: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds):
        for i in range(len(runs)):
            which = (turn + i) % len(runs)
            seconds[which].append(spent(runs[which], counts[which]))
    return seconds


def time_graphs(runs: Sequence[Callable[[int], object]], copies: int, rounds: int) -> list[list[float]]:
    """A :data:`~rlrr_kernels.tune.contest.Timer` on the current GPU.

    Each run is one CUDA graph of launches that go round the sets of tensors; the graphs take turns, and another
    begins in each round. Every run must have been launched before, so that nothing is compiled in a capture.
    """
    launches = -(-_LAUNCHES // copies) * copies
    pool = torch.cuda.graph_pool_handle()
    graphs = []
    for run in runs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            for i in range(launches):
                run(i % copies)
        graphs.append(graph)
    began = time.monotonic()
    while time.monotonic() - began < _WARM_UP:
        graphs[0].replay()
        torch.cuda.synchronize()

    def event() -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)

    seconds: list[list[float]] = [[] for _ in graphs]
    for turn in range(rounds):
        spans = []
        # untimed: the CPU is then ahead of the GPU from the first timed one on
        graphs[(turn - 1) % len(graphs)].replay()
        for i in range(len(graphs)):
            which = (turn + i) % len(graphs)
            start, end = event(), event()
            start.record()
            graphs[which].replay()
            end.record()
            spans.append((which, start, end))
        torch.cuda.synchronize()
        for which, start, end in spans:
            seconds[which].append(start.elapsed_time(end) / 1e3 / launches)
    return seconds
