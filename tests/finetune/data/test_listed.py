"""Checks of lists and images."""

import numpy as np
import pytest
from PIL import Image

from rlrr_kernels.finetune.data import parts
from rlrr_kernels.finetune.data.parts import Entry, check_images

from .folders import write_image


def entries(tmp_path, count):
    found = [Entry(str(tmp_path / f"an image {i}.png"), i, f"my list:{i + 1}") for i in range(count)]
    for entry in found:
        write_image(tmp_path / f"an image {entry.label}.png", entry.label)
    return found


def test_missing_images_are_told_by_place_path_and_number(tmp_path):
    found = entries(tmp_path, 5)
    check_images(found)
    for i in (1, 3, 4):
        (tmp_path / f"an image {i}.png").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"^my list:2: image .*/an image 1.png does not exist \(and 2 more of 5 images fail\)"
    ):
        check_images(found)


@pytest.mark.parametrize(
    ("content", "error"), [(b"", "the file is empty"), (b"no picture", "cannot identify image file")]
)
def test_files_that_are_no_images_are_found_beforehand(tmp_path, content, error):
    found = entries(tmp_path, 3)
    (tmp_path / "an image 2.png").write_bytes(content)
    with pytest.raises(OSError, match=rf"^my list:3: image .*/an image 2.png cannot be read: {error}"):
        check_images(found)


def test_a_png_with_a_wrong_checksum_is_found_beforehand(tmp_path):
    found = entries(tmp_path, 2)
    path = tmp_path / "an image 1.png"
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 8] ^= 255
    path.write_bytes(content)
    with pytest.raises(OSError, match=r"^my list:2: image .*an image 1.png cannot be read"):
        check_images(found)


@pytest.fixture
def photographs(tmp_path):
    """Three JPEGs of noise, listed."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    found = [Entry(str(tmp_path / f"{i}.jpg"), i, f"my list:{i + 1}") for i in range(3)]
    for entry in found:
        Image.fromarray(pixels).save(entry.path)
    return found


@pytest.fixture(params=[10, 1], ids=["short list", "long list"])
def limit(request, monkeypatch):
    """How long a list may be for its images to be decoded; the lists here have three."""
    monkeypatch.setattr(parts, "DECODED_UP_TO", request.param)


def rewrite(entry, change):
    with open(entry.path, "rb") as file:
        content = file.read()
    with open(entry.path, "wb") as file:
        file.write(change(content))


@pytest.mark.usefixtures("limit")
@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_a_jpeg_that_is_cut_off_is_found_beforehand(photographs, kept):
    """Its header is whole, and Pillow's verify says nothing."""
    check_images(photographs)
    rewrite(photographs[1], lambda content: content[: int(len(content) * kept)])
    with pytest.raises(OSError, match=r"^my list:2: image .*/1\.jpg cannot be read: .*truncated"):
        check_images(photographs)


@pytest.mark.usefixtures("limit")
def test_bytes_behind_the_end_of_a_jpeg_do_no_harm(photographs):
    rewrite(photographs[1], lambda content: content + b"\0a camera's own notes")
    check_images(photographs)


@pytest.mark.usefixtures("limit")
@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.webp", "a.tif"])
def test_other_formats_that_are_cut_off_are_found_beforehand(tmp_path, name):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    found = [Entry(str(tmp_path / f"{i} {name}"), i, f"my list:{i + 1}") for i in range(3)]
    for entry in found:
        Image.fromarray(pixels).save(entry.path)
    check_images(found)
    rewrite(found[2], lambda content: content[: len(content) // 2])
    with pytest.raises(OSError, match=r"^my list:3: image .* cannot be read"):
        check_images(found)


@pytest.mark.usefixtures("limit")
@pytest.mark.parametrize(
    ("content", "error"), [(b"", "the file is empty"), (b"no picture", "cannot identify image file")]
)
def test_of_long_lists_too_each_file_must_be_an_image(photographs, content, error):
    rewrite(photographs[2], lambda _: content)
    with pytest.raises(OSError, match=error):
        check_images(photographs)


def test_of_long_lists_a_file_with_header_and_end_is_not_decoded(photographs, monkeypatch):
    """Else the check would take minutes for the 73,728 test images of a VTAB-1k task."""
    monkeypatch.setattr(parts, "DECODED_UP_TO", 2)
    decoded = []
    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.load", lambda self: decoded.append(self.format))
    check_images(photographs)
    assert decoded == []
    check_images(photographs[:2])
    assert decoded == ["JPEG", "JPEG"]


def test_faults_are_told_in_the_order_of_the_list_however_long(tmp_path):
    write_image(tmp_path / "a.png", 0)
    found = [Entry(str(tmp_path / ("no.png" if i in (70, 130) else "a.png")), 0, f"my list:{i}") for i in range(150)]
    with pytest.raises(FileNotFoundError, match=r"^my list:70: .* \(and 1 more of 150 images fail\)"):
        check_images(found)
