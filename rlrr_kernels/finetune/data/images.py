"""A split of a dataset seen through a transform, its random draws fixed by seed, epoch and index."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from rlrr_kernels.finetune.data.pixels import eight_bits


@dataclass(frozen=True)
class Transform:
    """PIL image to tensor, in three steps: so the costly first one is needed once, and the last on the device.

    Attributes:
        fixed: PIL image of mode L or RGB -> uint8 ``[C, H', W']``, the same in every epoch, and of one shape for all.
        drawn: that -> uint8 ``[C, H, W]``, by draws from torch's CPU generator; None: nothing is drawn.
        finished: uint8 ``[..., C, H, W]`` -> what the model is given, element by element, on any device.
    """

    fixed: Callable[[Image.Image], Tensor]
    drawn: Callable[[Tensor], Tensor] | None = None
    finished: Callable[[Tensor], Tensor] = lambda pixels: pixels

    def __call__(self, image: Image.Image) -> Tensor:
        """All three."""
        pixels = self.fixed(image)
        return self.finished(self.drawn(pixels) if self.drawn else pixels)


#: What Pillow raises, depending on the format, for a file that is no image or is damaged.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def read_image(file: Any) -> Image.Image:
    """The image in a file, by path or open, decoded here, where a truncated one can still be told by its path.

    Raises:
        Any of :data:`UNREADABLE`.
    """
    with Image.open(file) as image:
        image.load()
        return image


class Parts(NamedTuple):
    """What a reader of one kind of dataset returns: indexed datasets of (PIL image, label).

    Attributes:
        class_names: of each label in order; the labels themselves where a source has no names.
        trainval: train and val together, where the dataset has a list of its own for them; None: the two joined.
        notes: what a user should know of what was found, a line each.
        drawn_from: of which images the seed drew those of val; empty where the dataset brings some.
        named: whether the source has names for its classes, and not labels alone.
    """

    train: Any
    val: Any
    test: Any
    class_names: tuple[str, ...]
    trainval: Any = None
    notes: tuple[str, ...] = ()
    drawn_from: str = ""
    named: bool = True

    @property
    def classes(self) -> int:
        """How many there are: labels are 0 to ``classes - 1``."""
        return len(self.class_names)


def numbered(classes: int) -> tuple[str, ...]:
    """Names of classes that have none: their labels."""
    return tuple(map(str, range(classes)))


class ImageSet(Dataset[tuple[Tensor, int]]):
    """A dataset of (PIL image, label) seen through a transform, in 8 bits and RGB or grey, labels checked.

    ``images[index]`` and ``images[epoch, index]`` give a tensor and a label; a plain index is epoch 0.
    What the transform draws from torch's generator depends on (seed, epoch, index) alone: not on worker
    processes, on ranks, or on what ran before. The process's own generator is left as it was.

    Args:
        items: indexed dataset of (PIL image, label).
        transform: what becomes of each image.
        classes: labels are 0 to ``classes - 1``.
        seed: of the transform's draws.

    Attributes:
        kept: what :meth:`fixed` gives of all images, see :func:`~rlrr_kernels.finetune.data.kept.keep`: pixels uint8
            ``[count, C, H', W']`` and labels; None: each is decoded as it is asked for.
    """

    kept: tuple[Tensor, list[int]] | None = None

    def __init__(self, items: Any, transform: Transform, classes: int, seed: int = 0) -> None:
        self.items, self.transform, self.classes, self.seed = items, transform, classes, seed

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, int]:
        """
        Raises:
            OSError: the image cannot be read or decoded; its path is named.
            ValueError: the label is out of range.
        """
        epoch, index = index if isinstance(index, tuple) else (0, index)
        pixels, label = self.fixed(index)
        return self.transform.finished(self.drawn(pixels, epoch, index)), label

    def fixed(self, index: int) -> tuple[Tensor, int]:
        """What is the same in every epoch: uint8 ``[C, H', W']``, and the label. Any thread may ask.

        Raises:
            OSError, ValueError: as :meth:`__getitem__`.
        """
        if self.kept:
            pixels, labels = self.kept
            return pixels[index], labels[index]
        image, label = self.image(index)
        return self.transform.fixed(image), label

    def drawn(self, pixels: Tensor, epoch: int, index: int) -> Tensor:
        """What an epoch makes of the pixels of :meth:`fixed`; for one thread at a time."""
        if not self.transform.drawn:
            return pixels
        with random_draws(self.seed, epoch, index):
            return self.transform.drawn(pixels)

    def image(self, index: int) -> tuple[Image.Image, int]:
        """An image of mode L or RGB, and its label.

        Raises:
            OSError, ValueError: as :meth:`__getitem__`.
        """
        try:
            image, label = self.items[index]
            image = eight_bits(image)
        except UNREADABLE as error:
            raise OSError(f"{self.name(index)} cannot be read: {error}") from error
        if not 0 <= int(label) < self.classes:
            raise ValueError(f"{self.name(index)} has label {label}, expected 0 to {self.classes - 1}")
        return image, int(label)

    def name(self, index: int) -> str:
        """``image <path>``, or ``image <index>`` of a dataset without files."""
        return f"image {path_of(self.items, index) or index}"


@contextmanager
def random_draws(*key: int) -> Iterator[None]:
    """Torch's CPU generator seeded by ``key`` inside, and as it was before outside.

    ``torch.random.fork_rng`` and ``torch.manual_seed`` do the same for all devices, ten times slower.
    """
    generator = torch.default_generator
    state = generator.get_state()
    # the CPU generator takes 32 bits of its seed: SeedSequence, which knows no sign, spreads the key over them
    words = [part % 2**64 for part in key]
    generator.manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))
    try:
        yield
    finally:
        generator.set_state(state)


def path_of(items: Any, index: int) -> str | None:
    """The file of an item, through subsets and concatenations; None where there is none."""
    if isinstance(items, Subset):
        return path_of(items.dataset, items.indices[index])
    if isinstance(items, ConcatDataset):
        for part in items.datasets:
            if index < len(part):  # type: ignore[arg-type]
                return path_of(part, index)
            index -= len(part)  # type: ignore[arg-type]
    if hasattr(items, "filename"):
        path = items.filename(index, absolute=True)
        return str(path) if path else None
    samples = getattr(items, "samples", None)
    return str(samples[index][0]) if isinstance(samples, list) else None
