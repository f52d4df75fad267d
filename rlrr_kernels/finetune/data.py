"""Images and labels by name or folder, split into train, validation and test."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_dataset
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")

#: Prefixes of timm's dataset factory that can be indexed: torchvision's and Hugging Face's datasets.
TIMM_PREFIXES = ("torch/", "hfds/")

#: Share of the training images set aside where a dataset brings no validation split.
VALIDATION_SHARE = 0.2

Transform = Callable[[Image.Image], Tensor]


class ImageSet(Dataset[tuple[Tensor, int]]):
    """A dataset of (PIL image, label) seen through a transform, labels checked."""

    def __init__(self, items: Any, transform: Transform, classes: int) -> None:
        self.items, self.transform, self.classes = items, transform, classes

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            image, label = self.items[index]
        except (OSError, UnidentifiedImageError) as error:
            raise OSError(f"image {index} cannot be read: {error}") from error
        if not 0 <= int(label) < self.classes:
            raise ValueError(f"image {index} has label {label}, expected 0 to {self.classes - 1}")
        return self.transform(image), int(label)


class Arrays(Dataset[tuple[Image.Image, int]]):
    """Grey images held in memory: uint8 ``[count, H, W]`` and labels ``[count]``."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])


@dataclass(frozen=True)
class Splits:
    """The three parts of a dataset and how many classes it has."""

    train: ImageSet
    val: ImageSet
    test: ImageSet
    classes: int


def make_transform(
    input_size: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str,
    flip: bool = False,
) -> Transform:
    """PIL image -> normalised float32 ``[C, H, W]``: whole image resized, as VTAB does, no cropping."""
    channels, *size = input_size
    return v2.Compose(
        [
            v2.Grayscale(1) if channels == 1 else v2.RGB(),
            v2.Resize(size, interpolation=v2.InterpolationMode(interpolation), antialias=True),
            *([v2.RandomHorizontalFlip()] if flip else []),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(mean), list(std)),
        ]
    )


def load_splits(
    data: str, root: Path | None, seed: int, train_transform: Transform, test_transform: Transform
) -> Splits:
    """Load a dataset by name or folder (see ``Settings.data``).

    Args:
        data, root, seed: as in :class:`~rlrr_kernels.finetune.settings.Settings`; the
            seed decides which images are set aside for validation.
        train_transform, test_transform: for the training images, and for the others.

    Raises:
        FileNotFoundError: a folder, file or split that is not there, with its path.
        ValueError: an unknown name.
    """
    if data == "digits":
        parts, classes = _digits(seed), 10
    elif data == "fashion-mnist":
        parts, classes = _fashion_mnist(root or FASHION_MNIST_FOLDER, seed), 10
    elif data.startswith(TIMM_PREFIXES):
        parts, classes = _timm(data, root, seed)
    elif Path(data).is_dir():
        parts, classes = _folder(Path(data), seed)
    else:
        raise ValueError(
            f"data: expected digits, fashion-mnist, a name starting with {', '.join(TIMM_PREFIXES)}, "
            f"or an existing folder, got {data!r}"
        )
    train, val, test = parts
    return Splits(
        ImageSet(train, train_transform, classes),
        ImageSet(val, test_transform, classes),
        ImageSet(test, test_transform, classes),
        classes,
    )


def _digits(seed: int) -> tuple[Any, Any, Any]:
    """scikit-learn's 1,797 real handwritten digits, 8x8: 800 to train, 200 to validate, 797 to test.

    Stratified, as VTAB-1k sizes its tasks.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    index = np.arange(len(labels))
    seen, test = train_test_split(index, train_size=1000, stratify=labels, random_state=seed)
    train, val = train_test_split(seen, train_size=800, stratify=labels[seen], random_state=seed)
    return tuple(Arrays(images[part], labels[part]) for part in (train, val, test))  # type: ignore[return-value]


def read_fashion_mnist(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Read one split (``train`` or ``t10k``) of the original IDX files.

    Returns uint8 images ``[count, 1, 28, 28]`` and int64 labels ``[count]``.
    """

    def read(name: str, header: int) -> np.ndarray:
        path = folder / f"{split}-{name}-ubyte.gz"
        if not path.is_file():
            raise FileNotFoundError(
                f"Fashion-MNIST file {path} is missing (Debian package dataset-fashion-mnist, or --data-root)"
            )
        return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)

    images = read("images-idx3", 16).reshape(-1, 1, 28, 28)
    labels = read("labels-idx1", 8).astype(np.int64)
    if len(images) != len(labels):
        raise ValueError(f"Fashion-MNIST in {folder}: {len(images)} images but {len(labels)} labels")
    return torch.from_numpy(images.copy()), torch.from_numpy(labels)


def _fashion_mnist(folder: Path, seed: int) -> tuple[Any, Any, Any]:
    seen, test = (
        Arrays(images[:, 0].numpy(), labels.numpy())
        for images, labels in (read_fashion_mnist(folder, split) for split in ("train", "t10k"))
    )
    return *_set_aside(seen, seed), test


def _timm(name: str, root: Path | None, seed: int) -> tuple[tuple[Any, Any, Any], int]:
    if root is None and name.startswith("torch/"):
        raise ValueError(f"data_root: expected a folder to keep {name} in, got none")
    options = {"root": str(root) if root else None, "download": name.startswith("torch/")}
    seen = create_dataset(name, split="train", **options)
    test = create_dataset(name, split="test", **options)
    names = getattr(seen, "classes", None) or getattr(getattr(seen, "reader", None), "class_to_idx", None)
    if not names:
        raise ValueError(f"data: {name!r} does not say how many classes it has")
    return (*_set_aside(seen, seed), test), len(names)


def _folder(root: Path, seed: int) -> tuple[tuple[Any, Any, Any], int]:
    """``root/{train,val,test}/<class>/<image>``; of val and test one may be missing, and then
    validation images are set aside from train and the other folder is the test."""
    found = {split: root / split for split in ("train", "val", "test") if (root / split).is_dir()}
    if "train" not in found or len(found) < 2:
        raise FileNotFoundError(
            f"data: expected folders train and test (or val) of class folders in {root}, "
            f"found {', '.join(found) or 'none of them'}"
        )
    sets = {split: ImageFolder(str(path)) for split, path in found.items()}
    train = sets["train"]
    for split, images in sets.items():
        if images.classes != train.classes:
            raise ValueError(
                f"data: {found[split]} has classes {images.classes}, but {found['train']} has {train.classes}"
            )
    if len(sets) == 3:
        return (train, sets["val"], sets["test"]), len(train.classes)
    return (*_set_aside(train, seed), sets.get("test") or sets["val"]), len(train.classes)


def _set_aside(seen: Any, seed: int) -> tuple[Subset[Any], Subset[Any]]:
    """Part of the training images for validation, drawn by the seed."""
    order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(seed)).tolist()
    count = max(1, round(len(seen) * VALIDATION_SHARE))
    return Subset(seen, order[count:]), Subset(seen, order[:count])
