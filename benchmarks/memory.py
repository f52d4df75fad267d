"""Memory of a call: its peak beyond what stays, as PyTorch's allocator sees it, and what is kept for backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def peak_extra_bytes(call: Callable[[], tuple[Tensor, ...]], before: Callable[[], Any] | None = None) -> int:
    """The first of what :func:`peak_and_results` gives."""
    return peak_and_results(call, before)[0]


def peak_and_results(
    call: Callable[[], tuple[Tensor, ...]], before: Callable[[], Any] | None = None
) -> tuple[int, tuple[Tensor, ...]]:
    """Bytes allocated at the worst moment of ``call``, less those of the tensors that it returns; and these.

    On the CPU every allocation and release is recorded and added up; on a GPU
    PyTorch keeps the peak itself. What a BLAS takes for itself is not seen.

    Args:
        call: what is measured; it returns what stays.
        before: is called before each call and not counted, such as the forward of a backward.
    """
    if before is not None:
        before()
    call()  # libraries allocate for themselves at first use
    if before is not None:
        before()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - held
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            kept = call()
        events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
    return peak - sum(t.untyped_storage().nbytes() for t in kept), kept


def saved_for_backward(forward: Callable[[], Tensor], x: Tensor, others: Iterable[Tensor]) -> tuple[int, bool]:
    """What autograd keeps of a forward pass: (bytes, whether x is kept too).

    Args:
        forward: the pass. Of what it keeps, each storage counts once, and those that are there
            anyway do not: x, which whatever comes before may have to keep too, and ``others``.
        x: its input. others: frozen and trained parameters.
    """
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        # holding the tensor keeps its address from being used again
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward()
    anyway = {t.untyped_storage().data_ptr() for t in others}
    own = x.untyped_storage().data_ptr()
    total = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at != own and at not in anyway)
    del y
    return total, own in kept
