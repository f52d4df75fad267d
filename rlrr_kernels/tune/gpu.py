"""The GPU: what a choice depends on, and how launches are timed on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rlrr_kernels.backends.triton import config as configs
from rlrr_kernels.backends.triton import launch
from rlrr_kernels.backends.triton.config import Device
from rlrr_kernels.tune.measure import Timer

#: Launches in one timed graph: what the CPU needs to start the next graph is then hidden behind them.
_LAUNCHES = 16

#: Seconds of work before the first round, for the clocks to rise.
_WARM_UP = 0.2


@dataclass(frozen=True)
class Machine:
    """Where candidates are measured. ``l2_bytes``: size of its second cache."""

    name: str
    device: Device
    torch_device: torch.device
    l2_bytes: int
    timer: Timer
    synchronize: Callable[[], object]


def this_machine(index: int | None = None) -> Machine:
    """A CUDA device, by default the current one.

    Raises:
        ValueError: there is none, not this one, or the Triton kernels do not run on it, and why.
    """
    if not torch.cuda.is_available():
        raise ValueError("no CUDA GPU is available here; expected one to measure on")
    if index is not None and not 0 <= index < torch.cuda.device_count():
        raise ValueError(f"--device: expected 0 to {torch.cuda.device_count() - 1}, got {index}")
    if index is not None:
        torch.cuda.set_device(index)
    device = torch.device("cuda", torch.cuda.current_device())
    probe = torch.empty(1, 1, device=device)
    why = launch.unsupported(probe, probe)
    if why is not None:
        raise ValueError(f"the Triton kernels do not run here: {why}")
    properties = torch.cuda.get_device_properties(device)
    return Machine(
        name=properties.name,
        device=configs.cuda_device(device.index),
        torch_device=device,
        l2_bytes=properties.L2_cache_size,
        timer=time_graphs,
        synchronize=torch.cuda.synchronize,
    )


def time_graphs(runs: Sequence[Callable[[int], object]], copies: int, rounds: int) -> list[list[float]]:
    """A :data:`~rlrr_kernels.tune.measure.Timer` on the current GPU.

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
