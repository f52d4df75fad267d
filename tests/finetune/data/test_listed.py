"""Checks of lists and images, and the images set aside."""

import pytest

from rlrr_kernels.finetune.data import listed
from rlrr_kernels.finetune.data.listed import Entry, check_distinct, check_images, set_aside, set_aside_stratified

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


def test_of_long_lists_existence_and_size_are_checked_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(listed, "HEADERS_UP_TO", 2)
    found = entries(tmp_path, 3)
    (tmp_path / "an image 2.png").write_bytes(b"no picture")
    check_images(found)
    with pytest.raises(OSError, match="cannot identify"):
        check_images(found[1:])
    (tmp_path / "an image 2.png").write_bytes(b"")
    with pytest.raises(OSError, match="the file is empty"):
        check_images(found)


def test_two_spellings_of_one_file_are_one_file():
    with pytest.raises(ValueError, match=r"^test:1: image d/\./a.png is listed already, at train:1"):
        check_distinct([Entry("d/a.png", 0, "train:1")], [Entry("d/./a.png", 0, "test:1")])


@pytest.mark.parametrize("split", [set_aside, lambda n, seed: set_aside_stratified([0] * n, seed)])
def test_a_fifth_is_set_aside_by_the_seed(split):
    kept, aside = split(50, 3)
    assert sorted(kept + aside) == list(range(50))
    assert len(aside) == 10
    assert split(50, 3) == (kept, aside)
    assert set(split(50, 4)[1]) != set(aside)
    assert [len(part) for part in split(2, 0)] == [1, 1]
    with pytest.raises(ValueError, match=r"at least 2 training images.* got 1"):
        split(1, 0)


@pytest.mark.parametrize("sizes", [(100, 100, 100), (5, 25, 10), (3, 7, 1, 1, 12, 2)])
def test_classes_are_set_aside_in_proportion(sizes):
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    aside = [labels[i] for i in set_aside_stratified(labels, 0)[1]]
    assert len(aside) == round(len(labels) / 5)
    for label, size in enumerate(sizes):
        assert abs(aside.count(label) - size / 5) < 1


def test_of_classes_with_one_image_each_the_seed_decides_which_lose_it():
    assert len({tuple(set_aside_stratified(range(50), seed)[1]) for seed in range(10)}) == 10
