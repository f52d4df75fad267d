"""Kernels for Hopper in Gluon, Triton's lower-level language, where warps have roles and copies have barriers."""

from rlrr_kernels.backends.reference import grad_shift
from rlrr_kernels.backends.triton.gluon.launch import candidates, forward, grad_input, grad_scales, unsupported

__all__ = ["candidates", "forward", "grad_input", "grad_scales", "grad_shift", "unsupported"]
