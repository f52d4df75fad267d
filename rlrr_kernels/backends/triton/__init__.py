"""Triton kernels: W' exists in registers only, or, of a larger rank, a panel at a time. Each kernel has its own file."""

from rlrr_kernels.backends.reference import grad_shift
from rlrr_kernels.backends.triton.choose import candidates
from rlrr_kernels.backends.triton.launch import forward, grad_input, grad_scales, unsupported
from rlrr_kernels.backends.triton.norm import layer_norm, layer_norm_backward, unsupported_layer_norm

__all__ = [
    "candidates",
    "forward",
    "grad_input",
    "grad_scales",
    "grad_shift",
    "layer_norm",
    "layer_norm_backward",
    "unsupported",
    "unsupported_layer_norm",
]
