"""Folders of class folders."""

import pytest

from .folders import load, red, write_classes


def test_three_splits_with_blanks_in_their_names(tmp_path):
    root = tmp_path / "my images"
    for split, counts in (("train", (3, 2)), ("val", (1, 1)), ("test", (2, 1))):
        write_classes(root / split, dict(zip(("a cat", "the dog"), counts, strict=True)))
    splits = load(data=str(root))
    assert [len(s) for s in (splits.train, splits.val, splits.test, splits.trainval)] == [5, 2, 3, 7]
    assert [splits.train[i][1] for i in range(5)] == [0, 0, 0, 1, 1]
    assert [red(splits.train, i) for i in range(5)] == [100, 100, 100, 101, 101]


@pytest.mark.parametrize("last", ["test", "val"])
def test_without_a_validation_folder_part_of_train_is_set_aside(tmp_path, last):
    write_classes(tmp_path / "train", {"a": 10, "b": 10})
    write_classes(tmp_path / last, {"a": 1, "b": 2})
    splits = load(data=str(tmp_path))
    assert [len(s) for s in (splits.train, splits.val, splits.test, splits.trainval)] == [16, 4, 3, 20]
    assert not set(splits.train.items.indices) & set(splits.val.items.indices)


def test_classes_that_differ_between_splits_are_refused(tmp_path):
    """Labels counted per split would silently shift."""
    write_classes(tmp_path / "train", {"a": 1, "b": 1, "c": 1})
    write_classes(tmp_path / "test", {"a": 1, "c": 1})
    with pytest.raises(ValueError, match=r"test has classes \['a', 'c'\].*train has \['a', 'b', 'c'\]"):
        load(data=str(tmp_path))


def test_a_folder_without_splits_names_what_it_expected(tmp_path):
    write_classes(tmp_path / "train", {"a": 1})
    with pytest.raises(FileNotFoundError, match=r"expected folders train and test .*found train"):
        load(data=str(tmp_path))


def test_a_class_without_images_is_named_with_its_split(tmp_path):
    write_classes(tmp_path / "train", {"a": 2, "b": 1})
    write_classes(tmp_path / "test", {"a": 2})
    (tmp_path / "test" / "b").mkdir()
    with pytest.raises(FileNotFoundError, match=r"data: .*/test: .* b\b"):
        load(data=str(tmp_path))


def test_an_unreadable_image_is_found_before_training(tmp_path):
    write_classes(tmp_path / "train", {"a": 2, "b": 1})
    write_classes(tmp_path / "test", {"a": 1, "b": 1})
    (tmp_path / "test" / "b" / "image 0.png").write_bytes(b"no picture")
    with pytest.raises(OSError, match=r"/test: image .*/test/b/image 0\.png cannot be read"):
        load(data=str(tmp_path))
