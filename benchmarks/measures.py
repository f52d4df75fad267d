"""What is measured of a call besides its time: its error against the formula, and its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.timing import Call, Rejected

#: Relative error above which a rival's results count as wrong; the roundings of its dtype explain much less.
LIMITS = {torch.float32: 0.01, torch.bfloat16: 0.05, torch.float16: 0.05}


def relative_error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Return the largest relative Frobenius error of any tensor; NaN or infinity if a result is not finite.

    Raises:
        Rejected: If the number of tensors or a shape differs.
    """
    shapes = [[tuple(t.shape) for t in tensors] for tensors in (got, want)]
    if shapes[0] != shapes[1]:
        raise Rejected(f"its results have the shapes {shapes[0]}, the formula's {shapes[1]}")
    errors = [0.0]
    for g, w in zip(got, want, strict=True):
        exact = w.detach().to(torch.promote_types(w.dtype, torch.float32))
        difference, norm = float((g.detach().to(exact.dtype) - exact).norm()), float(exact.norm())
        errors.append(difference / norm if norm else difference and float("inf"))
    return float(torch.tensor(errors, dtype=torch.float64).max())


class Formula:
    """The formula's results for one group of rivals.

    Args:
        compute: Returns the results; it is called once, when they are first needed.
        dtype: The dtype of the group, which sets the limit.
    """

    def __init__(self, compute: Callable[[], tuple[Tensor, ...]], dtype: torch.dtype) -> None:
        self._compute, self.limit = compute, LIMITS[dtype]
        self._want: tuple[Tensor, ...] | None = None
        self._fits = True

    def error(self, got: Sequence[Tensor]) -> float | None:
        """Return a rival's relative error, or None if there is no memory for the formula itself.

        Raises:
            Rejected: If it is above the limit, or not a number.
        """
        if self._want is None and self._fits:
            try:
                self._want = self._compute()
            except torch.OutOfMemoryError:
                self._fits = False
        if self._want is None:
            return None
        error = relative_error(got, self._want)
        if not error <= self.limit:
            raise Rejected(f"its results are {error:.1%} off the formula's, expected {self.limit:.0%} at most")
        return round(error, 9)


def peak_extra_bytes(call: Callable[[], tuple[Tensor, ...]], before: Callable[[], Any] | None = None) -> int:
    """Return the first result of :func:`peak_and_results`."""
    return peak_and_results(Call(call, before))[0]


def peak_and_results(call: Call) -> tuple[int, tuple[Tensor, ...]]:
    """Return the most bytes allocated during a call, without those of its results, and the results.

    On the CPU every allocation and release is recorded and added up; on a GPU PyTorch keeps the peak itself. Memory
    that a BLAS allocates for itself is not seen, and neither is that of ``call.before``.
    """
    before = call.before or (lambda: None)
    before()
    call.run()  # libraries allocate for themselves at first use
    before()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        kept = call.run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - held
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            kept = call.run()
        events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
    return peak - sum(t.untyped_storage().nbytes() for t in kept), kept


def saved_for_backward(forward: Callable[[], Tensor], x: Tensor, others: Iterable[Tensor]) -> tuple[int, bool]:
    """Return how many bytes autograd keeps of a forward pass, and whether it keeps x.

    Args:
        forward: The pass. Each storage counts once.
        x: Its input, which does not count: the layer before may have to keep it as well.
        others: Frozen and trained parameters, which do not count.
    """
    y = forward()
    own = x.untyped_storage().data_ptr()
    kept = kept_storages(y)
    excluded = {own, *(t.untyped_storage().data_ptr() for t in others)}
    return sum(size for at, size in kept.items() if at not in excluded), own in kept


def kept_storages(y: Tensor) -> dict[int, int]:
    """Return {address: bytes} of the storages that the nodes of y's graph keep.

    The graph is read, because hooks on saved tensors would change what this package keeps.
    """
    kept: dict[int, int] = {}
    seen: set[Any] = {None}
    nodes: list[Any] = [y.grad_fn]
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        # those of PyTorch's own operations, and those of autograd.Functions
        names = [name for name in dir(node) if name.startswith("_saved_") or name == "saved_tensors"]
        for value in (getattr(node, name) for name in names):
            for t in value if isinstance(value, tuple) else (value,):
                if isinstance(t, Tensor) and t.dim():  # a number is kept as a tensor without dimensions
                    kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        nodes += [following for following, _ in node.next_functions]
    return kept
