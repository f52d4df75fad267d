"""The validation split, and the checks of lists and images."""

import os

import numpy as np
import pytest
from PIL import Image

from rlrr_kernels.finetune.data import parts
from rlrr_kernels.finetune.data.parts import Entry, check_distinct, check_images, equal_arrays, equal_files, set_aside

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
    """The length up to which images are decoded; the lists of these tests have three images."""
    monkeypatch.setattr(parts, "DECODED_UP_TO", request.param)


def rewrite(entry, change):
    with open(entry.path, "rb") as file:
        content = file.read()
    with open(entry.path, "wb") as file:
        file.write(change(content))


@pytest.mark.usefixtures("limit")
@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_a_jpeg_that_is_cut_off_is_found_beforehand(photographs, kept):
    """Its header is complete, and Pillow's verify does not notice."""
    check_images(photographs)
    rewrite(photographs[1], lambda content: content[: int(len(content) * kept)])
    with pytest.raises(OSError, match=r"^my list:2: image .*/1\.jpg cannot be read: .*truncated"):
        check_images(photographs)


@pytest.mark.usefixtures("limit")
@pytest.mark.parametrize(
    ("content", "error"), [(b"", "the file is empty"), (b"no picture", "cannot identify image file")]
)
def test_files_that_are_no_images_are_found_beforehand(photographs, content, error):
    rewrite(photographs[2], lambda _: content)
    with pytest.raises(OSError, match=rf"^my list:3: image .*/2\.jpg cannot be read: {error}"):
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


def test_of_long_lists_a_file_with_header_and_end_is_not_decoded(photographs, monkeypatch):
    """Otherwise the check would take minutes for the 73,728 test images of a VTAB-1k task."""
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


def test_a_fifth_is_set_aside_by_the_seed():
    kept, aside = set_aside([0] * 50, 3)
    assert sorted(kept + aside) == list(range(50))
    assert len(aside) == 10
    assert set_aside([0] * 50, 3) == (kept, aside)
    assert set(set_aside([0] * 50, 4)[1]) != set(aside)
    assert [len(part) for part in set_aside([0, 0], 0)] == [1, 1]


@pytest.mark.parametrize("sizes", [(100, 100, 100), (5, 25, 10), (3, 7, 1, 1, 12, 2), (1,) * 90 + (2,) * 5])
def test_classes_are_set_aside_in_proportion(sizes):
    """Classes of one image are not drawn from, as no image would be left to train on."""
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    aside = [labels[i] for i in set_aside(labels, 0)[1]]
    assert len(aside) == round(sum(size for size in sizes if size > 1) / 5)
    for label, size in enumerate(sizes):
        assert abs(aside.count(label) - size / 5) < 1
        assert size > 1 or label not in aside


@pytest.mark.parametrize("seed", range(6))
def test_each_class_keeps_an_image_to_train_on(seed):
    """A draw that ignores classes takes both images of one or two classes for three of these seeds."""
    labels = [label for label in range(20) for _ in range(2)] + [20]
    kept, aside = set_aside(labels, seed)
    assert {labels[i] for i in kept} == set(range(21))
    assert len(aside) == 8


def test_of_classes_that_give_an_image_or_none_the_seed_decides_which():
    labels = [label for label in range(50) for _ in range(2)]
    assert len({tuple(sorted(labels[i] for i in set_aside(labels, seed)[1])) for seed in range(10)}) == 10


@pytest.mark.parametrize("labels", [[0], [0, 1, 2], []])
def test_without_two_images_of_a_class_there_is_nothing_to_set_aside(labels):
    error = f"at least 2 training images, .* or a validation split; got {len(labels)} images of {len(labels)} classes"
    with pytest.raises(ValueError, match=error):
        set_aside(labels, 0)


def test_two_spellings_of_one_file_are_one_file():
    with pytest.raises(ValueError, match=r"^test:1: image d/\./a.png is listed already, at train:1$"):
        check_distinct([Entry("d/a.png", 0, "train:1")], [Entry("d/./a.png", 0, "test:1")])


@pytest.mark.parametrize("how", ["file", "folder", "hard"])
def test_a_link_is_the_file_that_it_leads_to(tmp_path, how):
    (tmp_path / "a folder").mkdir()
    one, other = tmp_path / "a folder" / "one", tmp_path / "link"
    one.write_bytes(b"1")
    if how == "folder":
        other.symlink_to(one.parent)
        other = other / "one"
    else:
        (os.symlink if how == "file" else os.link)(one, other)
    with pytest.raises(ValueError, match=r"^test:1: image .* is listed already, at train:7, as .*/a folder/one$"):
        check_distinct([Entry(str(one), 0, "train:7")], [Entry(str(other), 0, "test:1")])


def test_files_that_a_disk_numbers_alike_are_two(tmp_path, monkeypatch):
    entries = [Entry(str(tmp_path / name), 0, name) for name in "ab"]
    for entry in entries:
        open(entry.path, "w").close()
    monkeypatch.setattr(parts, "_identity", lambda path: (1, 1))
    check_distinct(entries)


def files(folder, **contents):
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [Entry(str(folder / name), 0, "") for name in contents]


def test_equal_contents_are_counted_and_a_pair_named(tmp_path):
    """Equal size, or equal size and end, are not enough."""
    end = bytes(parts.END)
    train = files(tmp_path, a=b"1234", b=b"one" + end, c=b"xy")
    test = files(tmp_path / "test", d=b"4321", e=b"two" + end, f=b"one" + end, g=b"1234", h=b"1")
    (line,) = equal_files(train, test, ("train", "test"))
    assert line == (f"warning: 2 of 5 test images are the same as some of train: {tmp_path}/test/f and {tmp_path}/b")
    assert equal_files(train, test[:2] + test[4:], ("train", "test")) == []


def test_what_would_be_too_much_to_read_is_said(tmp_path, monkeypatch):
    train, test = files(tmp_path, a=b"1234", b=b"5"), files(tmp_path / "test", c=b"1234", d=b"67")
    monkeypatch.setattr(parts, "COMPARED_BYTES", 7)
    (line,) = equal_files(train, test, ("train", "test"))
    assert line == ("note: train and test were not searched for equal images, as 2 files would have to be read")
    monkeypatch.setattr(parts, "COMPARED_BYTES", 8)
    assert equal_files(train, test, ("train", "test"))[0].startswith("warning: 1 of 2 test images is the same as one")


def test_equal_images_in_memory_are_found():
    train = np.arange(5 * 6, dtype=np.uint8).reshape(5, 2, 3)
    test = np.stack([train[3], train[0] + 100])
    assert equal_arrays(train, test, ("train", "test")) == [
        "warning: 1 of 2 test images is the same as one of train: test image 0 and train image 3"
    ]
    assert equal_arrays(train, test[1:], ("train", "test")) == []
