"""PIL image to normalised tensor, in the two ways of the published recipes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

from rlrr_kernels.finetune.data.images import Transform

#: How much larger than its crop an image is made before cropping: 256 to 224 pixels.
CROP_MARGIN = 256 / 224


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
    """PIL image -> normalised float32 ``[C, H, W]``. Resized (and cut to the centre) once, the rest in each epoch.

    Args:
        input_size: C, H, W. With C = 1 images are made grey, else RGB.
        mean, std: a number for each channel, for pixels in [0, 1].
        interpolation: ``bicubic``, ``bilinear``, ...
        train: for training images; the others are seen without random draws.
        resize: ``squash``: the whole image to H x W, as VTAB-1k does. ``crop``: as FGVC does, the whole image
            to 256/224 of H x W, and of that a random H x W crop to train, the centre otherwise. Neither keeps
            the aspect ratio: the published code does not.
        flip: mirror training images at random.

    Raises:
        ValueError: another ``resize``, or an interpolation that torchvision does not know.
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
    return Transform(Fixed(steps), Drawn(tuple(size), flip) if draws else None, Normalised(mean, std))


class Fixed:
    """The steps, which draw nothing, from PIL image to uint8 ``[C, H, W]``, contiguous."""

    def __init__(self, steps: Sequence[Any]) -> None:
        self.steps = steps

    def __call__(self, image: Image.Image) -> Tensor:
        for step in self.steps:
            image = step(image)
        return pil_to_tensor(image).contiguous()


class Drawn:
    """A random crop of pixels ``[C, H', W']``, mirrored at random: by the draws of torchvision's RandomCrop and
    RandomHorizontalFlip, which take several times as long.

    Args:
        size: H, W of the crop.
        flip: mirror half of them.
    """

    def __init__(self, size: tuple[int, ...], flip: bool) -> None:
        self.size, self.flip = size, flip

    def __call__(self, pixels: Tensor) -> Tensor:
        for dim, side in zip((-2, -1), self.size, strict=True):
            if (margin := pixels.shape[dim] - side) > 0:
                pixels = pixels.narrow(dim, int(torch.randint(margin + 1, ())), side)
        return pixels.flip(-1) if self.flip and torch.rand(1) < 0.5 else pixels


class Normalised:
    """uint8 ``[..., C, H, W]`` -> float32: in [0, 1], less the mean, over the std, a number for each channel.

    By single operations that every device rounds alike: a number that divides would be made a product by some.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = (torch.tensor(each, dtype=torch.float32).view(-1, 1, 1) for each in (mean, std))

    def __call__(self, pixels: Tensor) -> Tensor:
        self.mean, self.std = self.mean.to(pixels.device), self.std.to(pixels.device)
        return pixels.to(torch.float32).mul_(1 / 255).sub_(self.mean).div_(self.std)
