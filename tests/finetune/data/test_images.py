"""A split seen through a transform: decoding, 8 bits, resizing, random draws, and errors that name the image."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Subset
from torchvision.transforms.functional import pil_to_tensor

from rlrr_kernels.finetune.data import ImageSet, Transform, make_transform, parts
from rlrr_kernels.finetune.data.images import eight_bits
from rlrr_kernels.finetune.data.parts import Entry, Listed, check_images

from .folders import load, write_classes, write_image


class Numbers:
    """Item i is a blank image of label i modulo 3."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return Image.new("L", (2, 2)), index % 3


def blank(image):
    return torch.zeros(1, 2, 2, dtype=torch.uint8)


noise = Transform(blank, lambda pixels: torch.rand(4))


def draws(images, keys):
    return torch.stack([images[key][0] for key in keys])


def test_draws_depend_on_seed_epoch_and_index_and_on_nothing_else():
    images = ImageSet(Numbers(), noise, 3, seed=7)
    keys = [(epoch, index) for epoch in range(3) for index in range(24)]
    first = draws(images, keys)
    torch.manual_seed(123)
    again = draws(images, keys[::-1]).flip(0)
    assert torch.equal(first, again)
    assert len({tuple(row.tolist()) for row in first}) == len(keys)
    other = draws(ImageSet(Numbers(), noise, 3, seed=8), keys)
    assert not (first == other).all(dim=1).any()
    # seed 7, epoch 1, index 2 is another key than seed 7, epoch 2, index 1
    assert not torch.equal(images[1, 2][0], images[2, 1][0])


def test_a_plain_index_is_epoch_0():
    images = ImageSet(Numbers(), noise, 3)
    assert torch.equal(images[5][0], images[0, 5][0])


def test_the_process_draws_on_as_if_no_image_had_been_loaded():
    images = ImageSet(Numbers(), noise, 3)
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    got = [torch.rand(1)]
    images[0]
    got.append(torch.rand(1))
    assert torch.equal(torch.cat(got), expected)

    def fail(pixels):
        torch.rand(1)
        raise RuntimeError("no")

    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="no"):
        ImageSet(Numbers(), Transform(blank, fail), 3)[0]
    assert torch.equal(torch.rand(2), expected)


def test_labels_out_of_range_are_an_error():
    images = ImageSet(Numbers(), noise, 2)
    assert images[1][1] == 1
    with pytest.raises(ValueError, match="image 2 has label 2, expected 0 to 1"):
        images[2]


def test_a_truncated_image_is_named_by_its_path_through_subsets_and_joins(tmp_path):
    entries = [Entry(str(tmp_path / f"a photo {i}.jpg"), 0, "list") for i in range(3)]
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for entry in entries:
        Image.fromarray(pixels).save(entry.path)
    whole = (tmp_path / "a photo 1.jpg").read_bytes()
    (tmp_path / "a photo 1.jpg").write_bytes(whole[: len(whole) // 2])
    images = ImageSet(ConcatDataset([Listed(entries[:1]), Subset(Listed(entries), [0, 2, 1])]), noise, 1)
    assert [images[i][1] for i in range(3)] == [0, 0, 0]
    with pytest.raises(OSError, match=r"image .*/a photo 1\.jpg cannot be read: .*truncated"):
        images[3]


@pytest.mark.parametrize(
    "damage", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0", b"BM" + b"\0" * 60, b"II*\0\xff"]
)
def test_whatever_pillow_raises_the_path_is_named(tmp_path, damage):
    path = tmp_path / "b.png"
    path.write_bytes(damage)
    with pytest.raises(OSError, match=r"b\.png cannot be read"):
        ImageSet(Listed([Entry(str(path), 0, "list")]), noise, 1)[0]


def test_iteration_ends_at_the_last_image(tmp_path):
    write_image(tmp_path / "a.png", 9)
    images = ImageSet(Listed([Entry(str(tmp_path / "a.png"), 0, "list")]), noise, 1)
    assert len(list(images)) == 1


HALF = ((0.5,) * 3, (0.5,) * 3)


def ramp(width, height):
    """Red grows to the right, green downwards, over the whole range."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


def span(channel):
    """The share of the original range that is visible, from 0 to 1."""
    return (channel.max() - channel.min()).item() / 2


def test_squash_shows_the_whole_image_normalised():
    grey = make_transform((1, 28, 28), (0.5,), (0.25,), "bilinear", train=True)
    out = grey(Image.new("RGB", (8, 8), (255, 255, 255)))
    assert out.dtype is torch.float32
    assert torch.equal(out, torch.full((1, 28, 28), 2.0))
    rgb = make_transform((3, 16, 24), *HALF, "bicubic", train=False)
    assert torch.equal(rgb(Image.new("L", (8, 8), 0)), torch.full((3, 16, 24), -1.0))
    out = rgb(ramp(300, 150))
    assert out.shape == (3, 16, 24)
    assert span(out[0]) > 0.93
    assert span(out[1]) > 0.9


def test_bicubic_is_pillows():
    image = ramp(50, 40)
    image.putpixel((20, 20), (255, 255, 255))
    out = make_transform((3, 16, 24), (0.0,) * 3, (1.0,) * 3, "bicubic", train=False)(image)
    expected = np.asarray(image.resize((24, 16), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal((out * 255).round().numpy(), expected)


@pytest.mark.gpu
def test_a_gpu_normalises_to_the_same_bits(gpu):
    finished = make_transform((3, 8, 8), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", train=False).finished
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3, 1).view(1, 3, 16, 16)
    assert torch.equal(finished(pixels.to(gpu)).cpu(), finished(pixels))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"resize": "crops"}, "resize: expected squash or crop, got 'crops'"),
        ({"interpolation": "cubic"}, "interpolation: expected bicubic, .* got 'cubic'"),
    ],
)
def test_unknown_words_are_refused(change, error):
    options = {"interpolation": "bicubic", "resize": "squash", "train": True} | change
    with pytest.raises(ValueError, match=error):
        make_transform((3, 8, 8), *HALF, **options)


#: 16-bit values, and the 8-bit values that they become.
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
    """A TIFF of one row of 16-bit grey, with another value of a tag than Pillow writes."""
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
    """Pillow reads them so."""

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
    """Alpha and transparency are dropped, and nothing is rotated by EXIF."""
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
