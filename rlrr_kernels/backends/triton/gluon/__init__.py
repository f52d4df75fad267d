"""Hopper's kernels, in Gluon: Triton's language one level down, where warps have roles and copies have barriers."""

from rlrr_kernels.backends.triton.gluon.launch import candidates, forward, grad_input, grad_scales, unsupported
from rlrr_kernels.reference import grad_shift

__all__ = ["candidates", "forward", "grad_input", "grad_scales", "grad_shift", "unsupported"]
