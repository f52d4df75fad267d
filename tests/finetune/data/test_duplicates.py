"""One file under two names, and two files of the same contents."""

import os

import numpy as np
import pytest

from rlrr_kernels.finetune.data import parts
from rlrr_kernels.finetune.data.parts import Entry, check_distinct, equal_arrays, equal_files


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
    """Not of equal size alone, nor of equal size and end."""
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
