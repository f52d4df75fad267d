"""Hopper's kernels, in Gluon: Triton's language one level down, where warps have roles and copies have barriers."""

from rlrr_kernels.backends.reference import grad_shift
from rlrr_kernels.backends.triton.gluon.launch import candidates, forward, grad_input, grad_scales, unsupported

__all__ = ["candidates", "forward", "grad_input", "grad_scales", "grad_shift", "unsupported"]
