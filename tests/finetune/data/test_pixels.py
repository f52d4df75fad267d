"""Images of other than 8 bits a channel, and of other modes than RGB."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from rlrr_kernels.finetune.data import ImageSet, Transform, parts
from rlrr_kernels.finetune.data.images import eight_bits
from rlrr_kernels.finetune.data.parts import Entry, Listed, check_images

from .folders import load, write_classes

#: Of 16 bits, and what they are of 8.
DEEP, SHALLOW = [0, 128, 129, 257, 1000, 32768, 40000, 65535], [0, 0, 1, 1, 4, 128, 156, 255]


def deep(values=DEEP):
    return Image.fromarray(np.array([values], np.uint16))


def through(image, name, **options):
    file = io.BytesIO()
    image.save(file, name, **options)
    return Image.open(file)


def values(image):
    return np.asarray(image).reshape(-1).tolist()


@pytest.mark.parametrize("name", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bits_are_scaled_to_their_full_range(name):
    image = eight_bits(through(deep(), name))
    assert (image.mode, values(image)) == ("L", SHALLOW)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_16_bits_in_memory_are_scaled_whatever_their_order(mode):
    data = np.array([DEEP], ">u2" if mode == "I;16B" else "<u2").tobytes()
    assert values(eight_bits(Image.frombytes(mode, (len(DEEP), 1), data))) == SHALLOW


def test_older_pillows_have_a_png_of_16_bits_in_mode_i():
    image = Image.fromarray(np.array([DEEP], np.int32))
    image.format = "PNG"
    assert values(eight_bits(image)) == SHALLOW


def tiff(row, tag, value):
    """One row of 16-bit grey, and in its header a tag with another value than Pillow writes."""
    file = io.BytesIO()
    Image.fromarray(np.frombuffer(row, "<u2")[None]).save(file, "TIFF")
    entry = struct.pack("<HHI", tag, 3, 1)
    found = file.getvalue().index(entry) + len(entry)
    return Image.open(io.BytesIO(file.getvalue()[:found] + struct.pack("<H", value) + file.getvalue()[found + 2 :]))


def test_a_tiff_says_how_many_bits_and_what_is_white():
    packed = bytes.fromhex("000fff800009") + b"\0\0"
    assert values(eight_bits(tiff(packed, 258, 12))) == [0, 255, 128, 1]
    white = tiff(np.array(DEEP, "<u2").tobytes(), 262, 0)
    assert values(eight_bits(white)) == [255 - value for value in SHALLOW]


def test_16_bit_colours_keep_their_high_byte():
    """Which is how Pillow reads them."""

    def chunk(name, data):
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    row = b"\0" + np.array([0x1234, 0xFFFF, 0x0080], ">u2").tobytes()
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes([0, 0, 0, 1, 0, 0, 0, 1, 16, 2, 0, 0, 0]))
    image = eight_bits(Image.open(io.BytesIO(png + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b""))))
    assert (image.mode, values(image)) == ("RGB", [0x12, 255, 0])


REFUSED = {
    "a float.tif": Image.new("F", (2, 2), 0.5),
    "a 32-bit.tif": Image.new("I", (2, 2), 7),
    "a lab.tif": Image.new("LAB", (2, 2)),
    "a float.pfm": Image.new("F", (2, 2), 0.5),
}


@pytest.mark.parametrize("limit", [10, 1], ids=["short list", "long list"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_range_is_refused_with_its_path_beforehand(tmp_path, monkeypatch, name, limit):
    monkeypatch.setattr(parts, "DECODED_UP_TO", limit)
    paths = [tmp_path / "a good.png", tmp_path / name]
    deep().save(paths[0])
    REFUSED[name].save(paths[1], **({"format": "PPM"} if name.endswith("pfm") else {}))
    entries = [Entry(str(path), 0, "my list") for path in paths]
    check_images(entries[:1] * 2)
    error = rf"^(my list: )?image .*/{name} cannot be read: its .* values have no defined range"
    with pytest.raises(OSError, match=error):
        check_images(entries)
    with pytest.raises(OSError, match=error):
        ImageSet(Listed(entries), Transform(pil_to_tensor), 1)[1]


def test_what_is_seen_is_what_torchvision_s_folders_show(tmp_path):
    """Alpha and transparency dropped, nothing rotated by EXIF."""
    from torchvision.datasets.folder import pil_loader

    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (4, 6, 4), dtype=np.uint8), "RGBA")
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = colour.convert("RGB").quantize(8)
    kinds = {
        "alpha.png": (colour, {}),
        "grey and alpha.png": (colour.convert("LA"), {}),
        "palette.png": (palette, {"transparency": bytes(range(8))}),
        "palette.gif": (palette, {"transparency": 3}),
        "one bit.png": (colour.convert("1"), {}),
        "four inks.jpg": (colour.convert("CMYK"), {}),
        "turned.jpg": (colour.convert("RGB"), {"exif": exif}),
        "grey.png": (colour.convert("L"), {}),
    }
    for name, (image, options) in kinds.items():
        image.save(tmp_path / name, **options)
    seen = ImageSet(
        Listed([Entry(str(tmp_path / name), 0, "") for name in kinds]),
        Transform(lambda image: torch.from_numpy(np.array(image.convert("RGB")))),
        1,
    )
    for index, name in enumerate(kinds):
        pixels = seen[index][0].numpy()
        with pytest.warns() if name == "palette.png" else contextlib.nullcontext():
            expected = np.asarray(pil_loader(str(tmp_path / name)))
        assert np.array_equal(pixels, expected), name
        assert pixels.shape == (4, 6, 3)


def test_a_folder_of_16_bit_images_is_trained_on_as_they_look(tmp_path):
    write_classes(tmp_path / "test", {"a": 1, "b": 1})
    for name, value in (("a", 10_000), ("b", 40_000)):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(2):
            deep([value + i] * 4).save(tmp_path / "train" / name / f"{i}.png")
    splits = load(data=str(tmp_path))
    found = {label: round(image.mean().item() * 127.5 + 127.5) for image, label in splits.trainval}
    assert found == {0: 39, 1: 156}
