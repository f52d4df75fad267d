"""Folders of class folders."""

import pytest
from PIL import Image

from rlrr_kernels.finetune.data import describe

from .folders import load, red, write_classes, write_image


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
    """Labels numbered for each split would shift silently."""
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
    (tmp_path / "test" / "b" / "x.heic").touch()
    with pytest.raises(FileNotFoundError, match=r"data: .*/test: no images for the classes b; skipped, .* 1 \.heic \("):
        load(data=str(tmp_path))


def test_an_unreadable_image_is_found_before_training(tmp_path):
    write_classes(tmp_path / "train", {"a": 2, "b": 1})
    write_classes(tmp_path / "test", {"a": 1, "b": 1})
    (tmp_path / "test" / "b" / "image 0.png").write_bytes(b"no picture")
    with pytest.raises(OSError, match=r"/test: image .*/test/b/image 0\.png cannot be read"):
        load(data=str(tmp_path))


@pytest.mark.parametrize(("val", "test"), [("valid", "test"), ("Validation", "Testing"), ("dev", "TEST")])
def test_the_usual_names_of_splits_are_known(tmp_path, val, test):
    """If the folder were ignored, a fifth of the training images would replace the validation images."""
    for name, counts in (("training", (3, 2)), (val, (1, 1)), (test, (2, 2))):
        write_classes(tmp_path / name, dict(zip("ab", counts, strict=True)))
    splits = load(data=str(tmp_path))
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [5, 2, 4]
    assert splits.drawn_from == ""


def test_two_names_of_one_split_are_refused(tmp_path):
    for name in ("train", "val", "valid", "test"):
        write_classes(tmp_path / name, {"a": 2})
    with pytest.raises(ValueError, match=r"data: .*/val and .*/valid are both the val split, expected one of them"):
        load(data=str(tmp_path))


def test_a_folder_that_is_no_split_is_refused(tmp_path):
    for name in ("train", "test", "extra", ".cache", "__MACOSX"):
        write_classes(tmp_path / name, {"a": 2})
    (tmp_path / "README.txt").touch()
    with pytest.raises(ValueError, match=r"data: .*/extra is none of the splits, .* val: val, valid, validation, dev;"):
        load(data=str(tmp_path))
    (tmp_path / "extra").rename(tmp_path / "valid")
    assert len(load(data=str(tmp_path)).val) == 2


def test_every_format_is_taken_and_what_is_none_is_said(tmp_path):
    """All image endings in any case; hidden files and files of operating systems are ignored."""
    for split in ("train", "val", "test"):
        write_classes(tmp_path / split, {"cat": 1, "hen": 1})
    train = tmp_path / "train"
    for i, end in enumerate(("gif", "jfif", "JPG", "tif", "bmp", "ppm", "webp", "jp2")):
        kind = {"jfif": "jpeg"}.get(end)
        Image.new("L", (4, 4), 10 * i).save(train / "cat" / f"{i}.{end}", format=kind)
    for name in ("Thumbs.db", ".DS_Store", "._0.png", "notes.txt", "more.TXT", "drawing.svg", "image without"):
        (train / "cat" / name).write_text("no image")
    write_image(train / "hen" / "chicks" / "young" / "deeper.png", 1)
    write_image(train / "cover.png", 1)
    (train / "list.csv").touch()
    (train / ".ipynb_checkpoints").mkdir()
    splits = load(data=str(tmp_path))
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [11, 2, 2]
    assert [splits.train[i][1] for i in range(11)] == [0] * 9 + [1] * 2
    assert describe(splits)[:2] == ["images: train 11, val 2, test 2", "2 classes: cat, hen"]
    assert splits.notes[:3] == (
        f"skipped, no images by their names: 1 without an ending ({train}/cat/image without), "
        f"1 .csv ({train}/list.csv), 1 .svg ({train}/cat/drawing.svg), 2 .txt ({train}/cat/more.TXT, ...)",
        f"skipped, in no class folder: 1 image ({train}/cover.png)",
        f"note: in folders of class folders, taken as of the class: 1 image ({train}/hen/chicks/young/deeper.png)",
    )
    # the images of this test are all equal
    assert [line[:48] for line in splits.notes[3:]] == [
        "warning: 2 of 2 val images are the same as some ",
        "warning: 2 of 2 test images are the same as some",
        "warning: 2 of 2 test images are the same as some",
    ]


def test_names_of_files_do_nothing_to_a_terminal(tmp_path):
    for split in ("train", "val", "test"):
        write_classes(tmp_path / split, {"\x1b[2J": 1})
        (tmp_path / split / "\x1b[2J" / "\udcff.txt").touch()
    lines = describe(load(data=str(tmp_path)))
    assert r"1 class: \x1b[2J" in lines[1]
    assert r"\udcff.txt" in lines[2]
    assert "\n".join(lines).encode().isascii()


@pytest.mark.parametrize("what", ["split", "class", "file"])
def test_a_link_from_test_into_train_is_refused(tmp_path, what):
    write_classes(tmp_path / "train", {"a": 2, "b": 2})
    test = tmp_path / "test"
    if what != "split":
        write_classes(test, {"a": 1, "b": 1}, grey=50)
    link = {"split": test, "class": test / "b", "file": test / "b" / "image 0.png"}[what]
    if what == "class":
        (link / "image 0.png").unlink()
        link.rmdir()
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path / "train" / link.relative_to(test))
    match = r"/test: image .*/test/./image 0\.png is listed already, at .*/train, as .*/train/./image 0\.png"
    with pytest.raises(ValueError, match=match):
        load(data=str(tmp_path))


@pytest.mark.parametrize("name", ["val", "train/c"])
def test_a_link_to_nothing_is_named(tmp_path, name):
    """If it were ignored, a split or a class would be missing silently."""
    for split in ("train", "test"):
        write_classes(tmp_path / split, {"a": 2})
    (tmp_path / name).symlink_to("../not/mounted")
    with pytest.raises(ValueError, match=rf"data: .*/{name} is a link to \.\./not/mounted, which does not exist"):
        load(data=str(tmp_path))


def test_a_link_to_a_folder_above_is_named(tmp_path):
    for split in ("train", "test"):
        write_classes(tmp_path / split, {"a": 2})
    (tmp_path / "train" / "a" / "again").symlink_to(tmp_path / "train" / "a")
    with pytest.raises(ValueError, match=r"data: .*/train/a/again is a link to .*/train/a, which it lies in"):
        load(data=str(tmp_path))


def test_the_fingerprint_is_of_names_labels_and_order_wherever_they_lie(tmp_path):
    for split in ("train", "test"):
        write_classes(tmp_path / "old" / split, {"a": 5, "b": 5})
    (tmp_path / "old" / "a file beside").touch()
    first = load(data=str(tmp_path / "old")).fingerprint
    assert load(data=str(tmp_path / "old"), seed=1).fingerprint != first
    (tmp_path / "old").rename(tmp_path / "new place")
    assert load(data=str(tmp_path / "new place")).fingerprint == first
    (tmp_path / "new place" / "train" / "a" / "image 4.png").rename(tmp_path / "new place" / "train" / "b" / "x.png")
    assert load(data=str(tmp_path / "new place")).fingerprint != first
