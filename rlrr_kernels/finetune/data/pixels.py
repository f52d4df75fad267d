"""Every image as 8 bits a channel, whatever its file has; what has no range to scale by is refused."""

from __future__ import annotations

import numpy as np
from PIL import Image

#: Pillow's modes of 8 bits or less, all of which it converts to RGB.
EIGHT_BITS = frozenset({"1", "L", "P", "PA", "LA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"})

#: Formats whose 16-bit grey Pillow gives in full range, and the modes that it has had for it; None: made in memory.
SIXTEEN_BITS = {
    "PNG": ("I", "I;16", "I;16B"),
    "PPM": ("I", "I;16", "I;16B"),
    "JPEG2000": ("I;16",),
    "TIFF": ("I;16", "I;16B", "I;16L"),
    None: ("I;16", "I;16B", "I;16L"),
}

#: TIFF's tags: bits of a sample, and what a 0 means (0: white).
BITS, PHOTOMETRIC = 258, 262


def check_range(image: Image.Image) -> None:
    """``ValueError`` for an image whose values have no defined range, such as floats. Looks at its header alone."""
    if image.mode not in EIGHT_BITS and image.mode not in SIXTEEN_BITS.get(image.format, ()):
        kind = {"F": "floating-point", "I": "32-bit or signed"}.get(image.mode, f"{image.mode!r}")
        raise ValueError(
            f"its {kind} values have no defined range (expected at most 8 bits a channel, or unsigned 16-bit grey)"
        )


def eight_bits(image: Image.Image) -> Image.Image:
    """``L`` as it is, everything else as ``RGB``, as torchvision's ImageFolder has it: alpha and palettes'
    transparency are dropped, and nothing is rotated by EXIF. 16-bit grey is scaled from its full range to ``L``.

    Raises:
        ValueError: see :func:`check_range`.
    """
    if image.mode in ("L", "RGB"):
        return image
    check_range(image)
    if image.mode in EIGHT_BITS:
        # Pillow would warn of each palette with several transparent colours
        image.info.pop("transparency", None)
        return image.convert("RGB")
    tags = getattr(image, "tag_v2", {})
    largest = 2 ** tags.get(BITS, (16,))[0] - 1
    values = scaled(np.asarray(image), largest)
    # Pillow inverts 8 bits with a white 0, and not 16
    return Image.fromarray(255 - values if tags.get(PHOTOMETRIC) == 0 else values)


def scaled(values: np.ndarray, largest: int = 2**16 - 1) -> np.ndarray:
    """Whole numbers 0 to ``largest``, at most 2^16 - 1, as uint8, rounded to nearest."""
    return ((values.astype(np.uint32) * 510 + largest) // (2 * largest)).astype(np.uint8)
