"""Peak memory that a call takes beyond what stays: its temporaries, as PyTorch's allocator sees them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def peak_extra_bytes(call: Callable[[], tuple[Tensor, ...]]) -> int:
    """Bytes allocated at the worst moment of ``call``, less those of the tensors that it returns.

    On the CPU every allocation and release is recorded and added up; on a GPU
    PyTorch keeps the peak itself. What a BLAS takes for itself is not seen.
    """
    call()  # libraries allocate for themselves at first use
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            kept = call()
        events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
    return peak - sum(t.untyped_storage().nbytes() for t in kept)
