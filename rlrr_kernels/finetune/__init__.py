"""Fine-tuning of timm image classifiers on image datasets, from Python and by the command ``rlrr-finetune``."""

from rlrr_kernels.finetune.loop import prepare, train
from rlrr_kernels.finetune.settings import Settings

__all__ = ["Settings", "prepare", "train"]
