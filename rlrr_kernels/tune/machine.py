"""The device, and how launches are timed on it, in turns: by CUDA graphs on a GPU, by the clock on a CPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rlrr_kernels.backends.verdicts import device_name
from rlrr_kernels.tune.contest import Timer

#: Launches in one timed graph: they hide the time that the CPU takes to start the next graph.
_LAUNCHES = 16

#: Seconds of work on a GPU before the first round, for the clocks to rise; seconds of one timed turn on a CPU.
_WARM_UP = 0.2
_TURN = 0.01


@dataclass(frozen=True)
class Machine:
    """Where candidates are measured. ``cache_bytes`` is the size of a GPU's L2 cache."""

    name: str
    device: torch.device
    cache_bytes: int
    timer: Timer
    synchronize: Callable[[], object]


def machine_of(device: torch.device) -> Machine:
    """Return the machine of a CPU, or of a CUDA device, which becomes the current one."""
    if device.type == "cpu":
        return Machine(device_name(device), device, 0, time_turns, lambda: None)
    torch.cuda.set_device(device)
    properties = torch.cuda.get_device_properties(device)
    return Machine(properties.name, device, properties.L2_cache_size, time_graphs, torch.cuda.synchronize)


def time_turns(runs: Sequence[Callable[[int], object]], copies: int, rounds: int) -> list[list[float]]:
    """Time runs by the clock (a :data:`~rlrr_kernels.tune.contest.Timer`): each repeats until its turn is full."""

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
    """Time runs on the current GPU (a :data:`~rlrr_kernels.tune.contest.Timer`).

    Each run is one CUDA graph of launches that use the sets of tensors in turn. The graphs take turns, and each round
    begins with another. Every run must have been launched before, so that nothing is compiled during a capture.
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
        # one untimed replay puts the CPU ahead of the GPU before the first timed one
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
