"""The datasets of a run: found by task, name, folder or file, checked before training, and loaded in batches."""

from rlrr_kernels.finetune.data.arrays import FASHION_MNIST_FOLDER, read_fashion_mnist
from rlrr_kernels.finetune.data.images import ImageSet, Transform, make_transform
from rlrr_kernels.finetune.data.splits import Splits, describe, is_path, load_splits

__all__ = [
    "FASHION_MNIST_FOLDER",
    "ImageSet",
    "Splits",
    "Transform",
    "describe",
    "is_path",
    "load_splits",
    "make_transform",
    "read_fashion_mnist",
]
