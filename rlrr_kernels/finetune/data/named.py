"""Datasets by name through timm's factory: torchvision's and Hugging Face's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import create_dataset
from torch.utils.data import Dataset, Subset

from rlrr_kernels.finetune.data.images import Parts
from rlrr_kernels.finetune.data.listed import set_aside

#: Prefixes of timm's dataset factory that can be indexed.
TIMM_PREFIXES = ("torch/", "hfds/")


class Strict(Dataset[tuple[Image.Image, int]]):
    """A timm dataset without its tolerance: where an image cannot be read, timm's own returns the next one."""

    def __init__(self, dataset: Any) -> None:
        self.reader = dataset.reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        file, label, *_ = self.reader[index]
        with file, Image.open(file) as image:
            image.load()
        return image, -1 if label is None else label

    def filename(self, index: int, absolute: bool = False) -> Any:
        """Path of an image, as timm's datasets say it."""
        return self.reader.filename(index, absolute=absolute)


def read_named(name: str, root: Path | None, seed: int) -> Parts:
    """Splits ``train`` and ``test``; a fifth of the former is set aside by the seed.

    Args:
        name: ``torch/cifar100``, ``hfds/<owner>/<name>``, ...
        root: where the dataset lies; torchvision's are downloaded there.
        seed: of the validation split.

    Raises:
        ValueError: no root for a torchvision dataset, or a dataset that does not name its classes.
    """
    if root is None and name.startswith("torch/"):
        raise ValueError(f"data_root: expected a folder to keep {name} in, got none")
    options = {"root": str(root) if root else None, "download": name.startswith("torch/")}
    seen, test = (create_dataset(name, split=split, **options) for split in ("train", "test"))
    names = getattr(seen, "classes", None) or getattr(getattr(seen, "reader", None), "class_to_idx", None)
    if not names:
        raise ValueError(f"data: {name!r} does not say how many classes it has")
    seen, test = (Strict(images) if hasattr(images, "reader") else images for images in (seen, test))
    kept, aside = set_aside(len(seen), seed)
    return Parts(Subset(seen, kept), Subset(seen, aside), test, len(names))
