"""Fused kernels for fine-tuning through a rescaled weight: y = x (W * (1 + u v))^T + b + f."""

from rlrr_kernels._version import __version__
from rlrr_kernels.adapt import (
    apply_rlrr,
    count_parameters,
    merge_model,
    param_groups,
    print_trainable_parameters,
)
from rlrr_kernels.backends.choice import backend_for, use_backend
from rlrr_kernels.checkpoint import load_adapter, save_adapter
from rlrr_kernels.functional import rescaled_linear
from rlrr_kernels.linear import FusedRLRRLinear

__all__ = [
    "FusedRLRRLinear",
    "__version__",
    "apply_rlrr",
    "backend_for",
    "count_parameters",
    "load_adapter",
    "merge_model",
    "param_groups",
    "print_trainable_parameters",
    "rescaled_linear",
    "save_adapter",
    "use_backend",
]
