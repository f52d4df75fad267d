"""Fused kernels for fine-tuning through a rescaled weight: y = x (W * (1 + u v))^T + b + f."""

from rlrr_kernels._version import __version__
from rlrr_kernels.backends.choice import backend_for, use_backend
from rlrr_kernels.checkpoint import (
    adapter_metadata,
    convert_official,
    load_adapter,
    load_npz_backbone,
    load_official_adapter,
    save_adapter,
)
from rlrr_kernels.layers.linear import FusedRLRRLinear
from rlrr_kernels.layers.norm import SSFAffine, SSFLayerNorm
from rlrr_kernels.models import tuners as tuners  # for what it sets up
from rlrr_kernels.models.adapt import apply_rlrr
from rlrr_kernels.models.config import RLRRConfig
from rlrr_kernels.models.disable import disable_adapter
from rlrr_kernels.models.merge import merge, merge_and_unload, unmerge
from rlrr_kernels.models.parameters import count_parameters, param_groups, print_trainable_parameters
from rlrr_kernels.ops.export import decomposition_table
from rlrr_kernels.ops.linear import rescaled_linear

__all__ = [
    "FusedRLRRLinear",
    "RLRRConfig",
    "SSFAffine",
    "SSFLayerNorm",
    "__version__",
    "adapter_metadata",
    "apply_rlrr",
    "backend_for",
    "convert_official",
    "count_parameters",
    "decomposition_table",
    "disable_adapter",
    "load_adapter",
    "load_npz_backbone",
    "load_official_adapter",
    "merge",
    "merge_and_unload",
    "param_groups",
    "print_trainable_parameters",
    "rescaled_linear",
    "save_adapter",
    "unmerge",
    "use_backend",
]
