"""Fine-tune an image classifier: data, training loop, run folder and command line."""

from rlrr_kernels.finetune.loop import prepare, train
from rlrr_kernels.finetune.settings import Settings

__all__ = ["Settings", "prepare", "train"]
