"""Triton kernels: the rescaled weight lives in registers only. One file a kernel."""

from rlrr_kernels.backends.reference import grad_shift
from rlrr_kernels.backends.triton.choose import candidates
from rlrr_kernels.backends.triton.launch import forward, grad_input, grad_scales, unsupported

__all__ = ["candidates", "forward", "grad_input", "grad_scales", "grad_shift", "unsupported"]
