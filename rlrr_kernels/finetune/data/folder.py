"""Folders of class folders of images."""

from __future__ import annotations

from pathlib import Path

from torch.utils.data import Subset
from torchvision.datasets import ImageFolder

from rlrr_kernels.finetune.data.images import Parts
from rlrr_kernels.finetune.data.listed import Entry, check_images, set_aside


def read_folder(root: Path, seed: int) -> Parts:
    """``root/{train,val,test}/<class>/<image>``; of val and test one may be missing, and then
    validation images are set aside from train and the other folder is the test.

    Raises:
        FileNotFoundError: a split that is missing, or a class folder without images.
        OSError: an image that cannot be read.
        ValueError: splits whose classes differ.
    """
    found = {split: root / split for split in ("train", "val", "test") if (root / split).is_dir()}
    if "train" not in found or len(found) < 2:
        raise FileNotFoundError(
            f"data: expected folders train and test (or val) of class folders in {root}, "
            f"found {', '.join(found) or 'none of them'}"
        )
    sets = {split: _read(path) for split, path in found.items()}
    train = sets["train"]
    for split, images in sets.items():
        if images.classes != train.classes:
            raise ValueError(
                f"data: {found[split]} has classes {images.classes}, but {found['train']} has {train.classes}"
            )
    for split, images in sets.items():
        check_images([Entry(path, label, str(found[split])) for path, label in images.samples])
    if len(sets) == 3:
        return Parts(train, sets["val"], sets["test"], tuple(train.classes))
    kept, aside = set_aside(len(train), seed)
    return Parts(Subset(train, kept), Subset(train, aside), sets.get("test") or sets["val"], tuple(train.classes))


def _read(path: Path) -> ImageFolder:
    try:
        return ImageFolder(str(path))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"data: {path}: {error}") from error
