"""Starts Triton kernels: the first time through Triton's own binder, then by the compiled kernel that it returned.

The binder examines every argument of every call to find the compiled kernel, which takes longer than a small product
takes on the GPU. Here a key holds all that the compiled code depends on, and a call with the key of an earlier call
starts the same compiled kernel. Launch hooks are called as usual. A kernel with pre-run hooks always goes through the
binder. Knobs of Triton that are changed after a kernel's first launch affect new keys only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

#: Number of compiled kernels to keep: more than a training run needs. If there are more, all are dropped.
MOST_HANDLES = 4096

_handles: dict[tuple[Any, ...], CompiledKernel] = {}


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
    """Run a kernel on the current stream of the current GPU.

    Args:
        kernel: The kernel. It takes ``operands``, ``free``, ``numbers`` and ``constants``, in this order.
        grid: Number of programs in each dimension.
        operands: Tensors, or tensor descriptors for the copy engine.
        free: Integers that are in the kernel's ``do_not_specialize``: the compiled code does not depend on them.
        numbers: Other numbers.
        constants: Compile-time constants by name.
        options: Options of the compiler.
        device: Index of the current GPU; None in the interpreter.

    Raises:
        RuntimeError: If a CUDA graph is being captured and the kernel is not on the GPU yet.
    """
    aligned = 0
    dtypes = []
    for operand in operands:
        if isinstance(operand, Tensor):
            aligned |= operand.data_ptr()
        else:
            operand = operand.base  # the copy engine requires its alignment anyway
        dtypes.append(operand.dtype)
    key = None
    # the code depends on which operands are aligned, and hooks must be called: these calls go through the binder
    if aligned % 16 == 0 and max(free) < 2**31 and not getattr(kernel, "pre_run_hooks", None):
        key = (kernel, device, numbers, *dtypes, *constants.values(), *options.values())
        handle = _handles.get(key)
        if handle is not None:
            handle[(*grid, 1, 1)](*operands, *free, *numbers, *constants.values())
            return
    if device is not None and torch.cuda.is_current_stream_capturing():
        # with warmup=True Triton finds or compiles the kernel, but neither loads nor launches it
        found = kernel.run(*operands, *free, *numbers, grid=grid, warmup=True, **constants, **options)
        if found.module is None:  # loading it would invalidate the capture
            raise RuntimeError(
                f"rlrr_kernels: {kernel.__name__} is not on the GPU yet for {_shapes(operands)}, and a CUDA graph's "
                "capture cannot load it. Run the layer once with inputs of these shapes and dtypes, forward and "
                "backward, before the capture"
            )
    handle = kernel[grid](*operands, *free, *numbers, **constants, **options)
    if key is not None and isinstance(handle, CompiledKernel):
        # the handle takes its arguments by position only, and serves any values of the free ones
        names = kernel.arg_names[len(operands) :]
        assert names[len(free) + len(numbers) :] == list(constants), kernel.arg_names
        assert set(names[: len(free)]) <= set(kernel.do_not_specialize), kernel.arg_names
        if len(_handles) >= MOST_HANDLES:
            _handles.clear()
        _handles[key] = handle


def _shapes(operands: tuple[Any, ...]) -> str:
    """Describe the operands that are matrices, as in ``[128, 64] bfloat16``."""
    tensors = [operand if isinstance(operand, Tensor) else operand.base for operand in operands]
    return ", ".join(f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors if t.dim() > 1)
