"""Images and labels of a run: by benchmark task, by name, by folder or file, split and checked before training.

| file | what it owns |
| --- | --- |
| `images.py` | `ImageSet`: a split seen through a transform, with random draws of its own |
| `loading.py` | batches on the device; decoded images kept for the run |
| `pixels.py` | any image as 8 bits a channel |
| `listed.py` | images named by list files: reading, and the checks of files and lists |
| `duplicates.py`, `aside.py` | the same image twice; images set aside to validate on |
| `vtab.py`, `fgvc.py` | the two benchmarks' folder layouts |
| `folder.py`, `arrays.py`, `named.py` | class folders; arrays and IDX files; timm's dataset factory |
| `transforms.py` | PIL image to normalised tensor |
| `splits.py` | `load_splits`: which of these a run means |
"""

from rlrr_kernels.finetune.data.arrays import FASHION_MNIST_FOLDER, Arrays, read_fashion_mnist
from rlrr_kernels.finetune.data.aside import VALIDATION_SHARE
from rlrr_kernels.finetune.data.images import ImageSet, Transform
from rlrr_kernels.finetune.data.named import TIMM_PREFIXES
from rlrr_kernels.finetune.data.splits import DataSettings, Splits, describe, is_path, load_splits
from rlrr_kernels.finetune.data.transforms import make_transform

__all__ = [
    "FASHION_MNIST_FOLDER",
    "TIMM_PREFIXES",
    "VALIDATION_SHARE",
    "Arrays",
    "DataSettings",
    "ImageSet",
    "Splits",
    "Transform",
    "describe",
    "is_path",
    "load_splits",
    "make_transform",
    "read_fashion_mnist",
]
