"""Checkpoints: adapters as folders, the published code's files, and Google's ``.npz`` backbones."""

from rlrr_kernels.checkpoint.adapter import CARD, CONFIG, WEIGHTS, adapter_metadata, load_adapter, save_adapter
from rlrr_kernels.checkpoint.npz import load_npz_backbone
from rlrr_kernels.checkpoint.official import convert_official, load_official_adapter

__all__ = [
    "CARD",
    "CONFIG",
    "WEIGHTS",
    "adapter_metadata",
    "convert_official",
    "load_adapter",
    "load_npz_backbone",
    "load_official_adapter",
    "save_adapter",
]
