"""PIL image to normalised tensor, in the two ways of the published recipes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torchvision.transforms import v2

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
    """PIL image -> normalised float32 ``[C, H, W]``.

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
        crop = [v2.RandomCrop(size) if train else v2.CenterCrop(size)]
    else:
        raise ValueError(f"resize: expected squash or crop, got {resize!r}")
    return v2.Compose(
        [
            v2.Grayscale(1) if channels == 1 else v2.RGB(),
            v2.Resize(whole, interpolation=v2.InterpolationMode(interpolation), antialias=True),
            *crop,
            *([v2.RandomHorizontalFlip()] if flip and train else []),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(mean), list(std)),
        ]
    )
