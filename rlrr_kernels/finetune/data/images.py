"""From an image file to the model's input: decoding, 8 bits, the transforms, and a split seen through them.

The random draws of an image depend on seed, epoch and index alone.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

#: What Pillow raises, depending on the format, for a file that is no image or is damaged.
UNREADABLE = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip

#: Pillow's modes of 8 bits or less. It converts all of them to RGB.
EIGHT_BITS = frozenset({"1", "L", "P", "PA", "LA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"})

#: Pillow's modes for 16-bit grey in full range, by format. None: an image made in memory.
SIXTEEN_BITS = {
    "PNG": ("I", "I;16", "I;16B"),
    "PPM": ("I", "I;16", "I;16B"),
    "JPEG2000": ("I;16",),
    "TIFF": ("I;16", "I;16B", "I;16L"),
    None: ("I;16", "I;16B", "I;16L"),
}

#: TIFF tags: bits per sample, and the photometric interpretation (0: white is 0).
BITS, PHOTOMETRIC = 258, 262

#: Ratio of the resized image to its crop: 256 to 224 pixels.
CROP_MARGIN = 256 / 224


def read_image(file: Any) -> Image.Image:
    """Open and decode an image.

    Args:
        file: A path or an open file.

    Raises:
        Any of :data:`UNREADABLE`.
    """
    with Image.open(file) as image:
        image.load()
        return image


def check_range(image: Image.Image) -> None:
    """Refuse an image whose values have no defined range, such as floats. Reads only the header.

    Raises:
        ValueError: If it has such values.
    """
    if image.mode not in EIGHT_BITS and image.mode not in SIXTEEN_BITS.get(image.format, ()):
        kind = {"F": "floating-point", "I": "32-bit or signed"}.get(image.mode, f"{image.mode!r}")
        raise ValueError(
            f"its {kind} values have no defined range (expected at most 8 bits a channel, or unsigned 16-bit grey)"
        )


def eight_bits(image: Image.Image) -> Image.Image:
    """Convert an image to mode ``L`` or ``RGB``.

    As in torchvision's ImageFolder, transparency and EXIF's rotation are ignored. 16-bit grey is scaled to ``L``.

    Raises:
        ValueError: As :func:`check_range`.
    """
    if image.mode in ("L", "RGB"):
        return image
    check_range(image)
    if image.mode in EIGHT_BITS:
        # Pillow would warn about each palette with several transparent colours
        image.info.pop("transparency", None)
        return image.convert("RGB")
    tags = getattr(image, "tag_v2", {})
    largest = 2 ** tags.get(BITS, (16,))[0] - 1
    values = scaled(np.asarray(image), largest)
    # Pillow inverts 8-bit images where white is 0, but not 16-bit ones
    return Image.fromarray(255 - values if tags.get(PHOTOMETRIC) == 0 else values)


def scaled(values: np.ndarray, largest: int = 2**16 - 1) -> np.ndarray:
    """Scale whole numbers from 0 to ``largest`` (at most 2^16 - 1) to uint8, rounding to nearest."""
    return ((values.astype(np.uint32) * 510 + largest) // (2 * largest)).astype(np.uint8)


@dataclass(frozen=True)
class Transform:
    """PIL image to tensor in three steps, so that the costly first runs once and the last runs on the device.

    Attributes:
        fixed: PIL image of mode L or RGB to uint8 ``[C, H', W']``; deterministic, with one shape for all images.
        drawn: That to uint8 ``[C, H, W]`` by draws from torch's CPU generator; None if nothing is random.
        finished: uint8 ``[..., C, H, W]`` to the model's input, element by element, on any device.
    """

    fixed: Callable[[Image.Image], Tensor]
    drawn: Callable[[Tensor], Tensor] | None = None
    finished: Callable[[Tensor], Tensor] = lambda pixels: pixels

    def __call__(self, image: Image.Image) -> Tensor:
        """Apply all three steps."""
        pixels = self.fixed(image)
        return self.finished(self.drawn(pixels) if self.drawn else pixels)


def make_transform(
    input_size: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str,
    *,
    train: bool,
    resize: str = "squash",
    flip: bool = False,
) -> Transform:
    """Build the transform from a PIL image to normalised float32 ``[C, H, W]``.

    Args:
        input_size: C, H, W. With C = 1 images are converted to grey, else to RGB.
        mean: A number for each channel, for pixels in [0, 1].
        std: A number for each channel.
        interpolation: ``bicubic``, ``bilinear``, ...
        train: Whether to use random draws, for training images.
        resize: ``squash`` resizes the whole image to H x W, as VTAB-1k does. ``crop`` does as FGVC: it resizes the
            whole image to 256/224 of H x W and takes a random crop in training, else the centre. Neither keeps the
            aspect ratio, as in the published code.
        flip: Whether to mirror training images at random.

    Raises:
        ValueError: If ``resize`` or ``interpolation`` is unknown.
    """
    channels, *size = input_size
    if interpolation not in {mode.value for mode in v2.InterpolationMode}:
        raise ValueError(f"interpolation: expected bicubic, bilinear, nearest or so, got {interpolation!r}")
    if resize == "squash":
        whole, crop = size, []
    elif resize == "crop":
        whole = [round(side * CROP_MARGIN) for side in size]
        crop = [] if train else [v2.CenterCrop(size)]
    else:
        raise ValueError(f"resize: expected squash or crop, got {resize!r}")
    steps = [
        v2.Grayscale(1) if channels == 1 else v2.RGB(),
        v2.Resize(whole, interpolation=v2.InterpolationMode(interpolation), antialias=True),
        *crop,
    ]
    draws = train and (flip or whole != size)
    return Transform(Fixed(steps), RandomCropFlip(tuple(size), flip) if draws else None, Normalise(mean, std))


class Fixed:
    """Apply deterministic transforms to a PIL image; returns contiguous uint8 ``[C, H, W]``."""

    def __init__(self, steps: Sequence[Any]) -> None:
        self.steps = steps

    def __call__(self, image: Image.Image) -> Tensor:
        for step in self.steps:
            image = step(image)
        return pil_to_tensor(image).contiguous()


class RandomCropFlip:
    """Random crop and mirroring of pixels ``[C, H', W']``.

    Draws as torchvision's RandomCrop and RandomHorizontalFlip do, but several times faster.

    Args:
        size: H, W of the crop.
        flip: Whether to mirror half of the images.
    """

    def __init__(self, size: tuple[int, ...], flip: bool) -> None:
        self.size, self.flip = size, flip

    def __call__(self, pixels: Tensor) -> Tensor:
        for dim, side in zip((-2, -1), self.size, strict=True):
            if (margin := pixels.shape[dim] - side) > 0:
                pixels = pixels.narrow(dim, int(torch.randint(margin + 1, ())), side)
        return pixels.flip(-1) if self.flip and torch.rand(1) < 0.5 else pixels


class Normalise:
    """Map uint8 ``[..., C, H, W]`` to float32: scaled to [0, 1], minus the mean, divided by the std of each channel.

    Uses separate operations with tensors that all devices round alike: some would multiply by a scalar's reciprocal.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = (torch.tensor(each, dtype=torch.float32).view(-1, 1, 1) for each in (mean, std))

    def __call__(self, pixels: Tensor) -> Tensor:
        self.mean, self.std = self.mean.to(pixels.device), self.std.to(pixels.device)
        return pixels.to(torch.float32).mul_(1 / 255).sub_(self.mean).div_(self.std)


class ImageSet(Dataset[tuple[Tensor, int]]):
    """A dataset of (PIL image, label) seen through a transform, with checked labels.

    ``images[index]`` and ``images[epoch, index]`` return a tensor and a label; a plain index means epoch 0.
    Random draws depend on (seed, epoch, index) alone, and the process's own generator is left unchanged.

    Args:
        items: Indexed dataset of (PIL image, label).
        transform: Applied to each image.
        classes: Labels are 0 to ``classes - 1``.
        seed: Seed of the transform's draws.

    Attributes:
        kept: The results of :meth:`fixed` for all images, see :func:`~rlrr_kernels.finetune.data.loading.keep`: uint8
            pixels ``[count, C, H', W']`` and labels. None: images are decoded when needed.
    """

    kept: tuple[Tensor, list[int]] | None = None

    def __init__(self, items: Any, transform: Transform, classes: int, seed: int = 0) -> None:
        self.items, self.transform, self.classes, self.seed = items, transform, classes, seed

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, int]:
        """Return the model's input ``[C, H, W]`` and the label.

        Raises:
            OSError: If the image cannot be read or decoded. The message has its path.
            ValueError: If the label is out of range.
        """
        epoch, index = index if isinstance(index, tuple) else (0, index)
        pixels, label = self.fixed(index)
        return self.transform.finished(self.drawn(pixels, epoch, index)), label

    def fixed(self, index: int) -> tuple[Tensor, int]:
        """Return the pixels that are the same in every epoch, uint8 ``[C, H', W']``, and the label. Thread-safe.

        Raises:
            OSError, ValueError: As :meth:`__getitem__`.
        """
        if self.kept:
            pixels, labels = self.kept
            return pixels[index], labels[index]
        image, label = self.image(index)
        return self.transform.fixed(image), label

    def drawn(self, pixels: Tensor, epoch: int, index: int) -> Tensor:
        """Apply the random step of an epoch to the pixels of :meth:`fixed`. Not thread-safe."""
        if not self.transform.drawn:
            return pixels
        with random_draws(self.seed, epoch, index):
            return self.transform.drawn(pixels)

    def image(self, index: int) -> tuple[Image.Image, int]:
        """Return an image of mode L or RGB, and its label.

        Raises:
            OSError, ValueError: As :meth:`__getitem__`.
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
        """``image <path>``, or ``image <index>`` for a dataset without files."""
        return f"image {path_of(self.items, index) or index}"


@contextmanager
def random_draws(*key: int) -> Iterator[None]:
    """Seed torch's CPU generator by ``key`` inside the context, and restore it afterwards.

    ``torch.random.fork_rng`` and ``torch.manual_seed`` do the same for all devices, ten times slower.
    """
    generator = torch.default_generator
    state = generator.get_state()
    # the CPU generator uses 32 bits of its seed, over which SeedSequence spreads the key
    generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
    try:
        yield
    finally:
        generator.set_state(state)


def path_of(items: Any, index: int) -> str | None:
    """The file of an item, through subsets and concatenations; None if there is none."""
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
