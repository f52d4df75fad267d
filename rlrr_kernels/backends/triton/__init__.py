"""Triton kernels: the rescaled weight lives in registers only. One file a kernel."""

from rlrr_kernels.backends.triton.choose import candidates
from rlrr_kernels.backends.triton.launch import forward, grad_input, grad_scales, unsupported
from rlrr_kernels.reference import grad_shift

__all__ = ["candidates", "forward", "grad_input", "grad_scales", "grad_shift", "unsupported"]
