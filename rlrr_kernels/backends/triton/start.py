"""Start a Triton kernel: the first time by Triton's own binder, then by the compiled kernel it gave.

The binder looks at every argument of every call to find out which compiled kernel is
meant, and takes longer than a small product does on the GPU. What the code
depends on is the key here; a call with the key of an earlier one goes to the same kernel.
Hooks at a launch are called as ever; a kernel with hooks before the binder, and knobs of
Triton changed after a kernel's first launch, are the binder's: the latter reach new keys only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

#: More than any training run meets; a run with ever new sizes starts afresh here.
MOST_HANDLES = 4096

_handles: dict[tuple[Any, ...], CompiledKernel] = {}


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up. Not ``triton.cdiv``, which takes microseconds on the host."""
    return -(-a // b)


def start(
    kernel: Any,
    grid: tuple[int, ...],
    operands: tuple[Any, ...],
    free: tuple[int, ...],
    numbers: tuple[float, ...],
    constants: dict[str, Any],
    options: dict[str, Any],
    device: int | None,
) -> None:
    """Run ``kernel`` on the current stream of GPU ``device``, which is the current one (None: no GPU).

    ``operands`` (tensors, or descriptors of boxes), ``free``, ``numbers`` and ``constants`` are its arguments in its
    own order. ``free`` are those that Triton is told not to specialise, so that other values are no other code;
    ``options`` go to the compiler.

    Raises ``RuntimeError`` if a CUDA graph is being captured and the kernel is not on the GPU yet.
    """
    aligned = 0
    dtypes = []
    for operand in operands:
        if isinstance(operand, Tensor):
            aligned |= operand.data_ptr()
        else:
            operand = operand.base  # whose alignment the copy engine asks for anyway
        dtypes.append(operand.dtype)
    key = None
    # which operand is not aligned matters, and hooks want to be called: both left to the binder
    if aligned % 16 == 0 and max(free) < 2**31 and not getattr(kernel, "pre_run_hooks", None):
        key = (kernel, device, numbers, *dtypes, *constants.values(), *options.values())
        handle = _handles.get(key)
        if handle is not None:
            handle[(*grid, 1, 1)](*operands, *free, *numbers, *constants.values())
            return
    if device is not None and torch.cuda.is_current_stream_capturing():
        # asked to warm up, Triton finds or compiles the kernel, and neither loads nor launches it
        found = kernel.run(*operands, *free, *numbers, grid=grid, warmup=True, **constants, **options)
        if found.module is None:  # a load would spoil the capture
            raise RuntimeError(
                f"rlrr_kernels: {kernel.__name__} is not on the GPU yet for {_shapes(operands)}, and a CUDA graph's "
                "capture cannot load it. Run the layer once with inputs of these shapes and dtypes, forward and "
                "backward, before the capture"
            )
    handle = kernel[grid](*operands, *free, *numbers, **constants, **options)
    if key is not None and isinstance(handle, CompiledKernel):
        # the handle takes its arguments by position alone, and serves other values of the free ones
        names = kernel.arg_names[len(operands) :]
        assert names[len(free) + len(numbers) :] == list(constants), kernel.arg_names
        assert set(names[: len(free)]) <= set(kernel.do_not_specialize), kernel.arg_names
        if len(_handles) >= MOST_HANDLES:
            _handles.clear()
        _handles[key] = handle


def _shapes(operands: tuple[Any, ...]) -> str:
    """``[128, 64] bfloat16`` and so on, of the operands that are no vectors."""
    tensors = [operand if isinstance(operand, Tensor) else operand.base for operand in operands]
    return ", ".join(f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors if t.dim() > 1)
