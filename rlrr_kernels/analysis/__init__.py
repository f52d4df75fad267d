"""Singular-value analysis: compares weights tuned by RLRR, SSF, LoRA or full fine-tuning with their base weights."""

from rlrr_kernels.analysis.base import base_weights, linear_weights
from rlrr_kernels.analysis.comparison import analyze
from rlrr_kernels.analysis.measures import (
    Distribution,
    LayerView,
    ScalesView,
    decompose,
    layer_view,
    principal_angles,
    scales_view,
)
from rlrr_kernels.analysis.sources import (
    Tuned,
    full_checkpoint,
    lora_adapter,
    rlrr_adapter,
    rlrr_of_model,
    ssf_checkpoint,
)

__all__ = [
    "Distribution",
    "LayerView",
    "ScalesView",
    "Tuned",
    "analyze",
    "base_weights",
    "decompose",
    "full_checkpoint",
    "layer_view",
    "linear_weights",
    "lora_adapter",
    "principal_angles",
    "rlrr_adapter",
    "rlrr_of_model",
    "scales_view",
    "ssf_checkpoint",
]
