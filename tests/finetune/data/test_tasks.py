"""VTAB-1k's and FGVC's layouts: what is read, and the faults that a copy can have."""

import json

import pytest
import torch
from torchvision.transforms.functional import pil_to_tensor

from rlrr_kernels.finetune.data import Transform, make_transform
from rlrr_kernels.finetune.data import tasks as module
from rlrr_kernels.finetune.recipes import FGVC

from .folders import load, red, write_fgvc, write_image, write_vtab


@pytest.fixture
def root(tmp_path):
    return tmp_path / "my tasks"


def vtab(root, task="cifar", **options):
    return load(task=f"vtab/{task}", data_root=root, **options)


def edit(file, line, text):
    lines = file.read_text().split("\n")
    lines[line - 1] = text
    file.write_text("\n".join(lines))


@pytest.mark.parametrize("shared", [False, True], ids=["own copies", "shared paths"])
def test_the_four_lists_are_read(root, shared):
    """The joint list names copies of the images, as in the public copies, or the images themselves."""
    folder = write_vtab(root, shared=shared)
    splits = vtab(root)
    assert splits.classes == 100
    assert [red(splits.train, i) for i in range(6)] == [splits.train[i][1] for i in range(6)] == [0, 1, 2, 3, 4, 5]
    assert [red(splits.val, i) for i in range(3)] == [splits.val[i][1] for i in range(3)] == [6, 7, 8]
    assert [red(splits.test, i) for i in range(4)] == [splits.test[i][1] for i in range(4)] == [9, 10, 11, 12]
    assert [red(splits.trainval, i) for i in range(9)] == [splits.trainval[i][1] for i in range(9)] == list(range(9))
    assert len(splits.trainval) == 9
    own = "images/train800/a picture 0.png" if shared else "images/train800val200/000000.jpg"
    assert splits.trainval.name(0) == f"image {folder / own}"


def test_train_and_trainval_see_the_training_transform_and_the_others_do_not(root):
    write_vtab(root)
    train = make_transform((1, 4, 6), (0.5,), (0.5,), "bicubic", train=True, flip=True)
    splits = vtab(root, train=train)
    shapes = {name: tuple(getattr(splits, name)[0][0].shape) for name in ("train", "trainval", "val", "test")}
    assert shapes == {"train": (1, 4, 6), "trainval": (1, 4, 6), "val": (1, 4, 4), "test": (1, 4, 4)}


def test_the_seed_of_the_run_decides_what_transforms_draw(root):
    write_vtab(root)

    def draw(seed):
        return vtab(root, train=Transform(pil_to_tensor, lambda pixels: torch.rand(1)), seed=seed).trainval[3, 7][0]

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize(("ending", "label"), [("  6", 6), ("\t7 ", 7), (" 8\r", 8)])
def test_any_blank_separates_and_blanks_at_the_end_do_not_count(root, ending, label):
    folder = write_vtab(root)
    for file in ("train800", "train800val200"):
        edit(folder / f"{file}.txt", 2, f"images/{file}/000001.jpg{ending}")
    assert vtab(root).train[1][1] == label


def test_a_missing_folder_or_list_is_named(root):
    with pytest.raises(FileNotFoundError, match=r"vtab/cifar: folder .*my tasks/cifar does not exist"):
        vtab(root)
    folder = write_vtab(root)
    for name in ("train800", "val200", "train800val200", "test"):
        content = (folder / f"{name}.txt").read_text()
        (folder / f"{name}.txt").unlink()
        with pytest.raises(FileNotFoundError, match=rf"vtab/cifar: .*cifar/{name}\.txt does not exist"):
            vtab(root)
        (folder / f"{name}.txt").write_text(content)
    vtab(root)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("images/test/000002.jpg", "expected '<path> <label>', got 'images/test/000002.jpg'"),
        ("7", "expected '<path> <label>', got '7'"),
        ("images/test/000002.jpg 1.5", "expected '<path> <label>', got .*1.5'"),
        ("images/test/000002.jpg 100", "label 100 is out of range, expected 0 to 99"),
        ("images/test/000002.jpg -1", "label -1 is out of range, expected 0 to 99"),
        ("images/test/no picture.jpg 1", "image .*/images/test/no picture.jpg does not exist$"),
        ("images/val200/000000.jpg 6", r"image .* is listed already, at .*val200\.txt:1$"),
        ("images/train800/000004.jpg 4", r"image .* is listed already, at .*train800\.txt:5$"),
        ("images/test/../test/000000.jpg 9", r"image .* is listed already, at .*test\.txt:1$"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(root, line, error):
    folder = write_vtab(root)
    edit(folder / "test.txt", 3, line)
    with pytest.raises((ValueError, OSError), match=rf"cifar/test\.txt:3: {error}"):
        vtab(root)


def test_labels_are_checked_against_the_tasks_classes(root):
    write_vtab(root, "kitti")
    assert vtab(root, "kitti").classes == 4
    folder = write_vtab(root, "patch_camelyon", train=2, val=1, test=1)
    edit(folder / "val200.txt", 1, "images/val200/000000.jpg 2")
    with pytest.raises(ValueError, match=r"val200\.txt:1: label 2 is out of range, expected 0 to 1"):
        vtab(root, "patch_camelyon")


@pytest.mark.parametrize(
    ("number", "line", "error"),
    [
        (9, "", r"val200\.txt:3: image .* is not in .*train800val200\.txt, which must list it too"),
        (9, "images/val200/a picture 2.png 1", r"val200\.txt:3: image .* has label 8 here, but 1 at .*val200\.txt:9"),
        (10, "images/test/a picture 2.png 1", r"train800val200\.txt:10: image .* in neither the training nor"),
        (10, "images/val200/a picture 2.png 8", r"train800val200\.txt:10: image .* is listed already, at .*:9"),
    ],
)
def test_a_joint_list_that_names_the_same_files_names_all_of_them_and_no_other(root, number, line, error):
    folder = write_vtab(root, shared=True)
    edit(folder / "train800val200.txt", number, line)
    with pytest.raises(ValueError, match=error):
        vtab(root)


@pytest.mark.parametrize(
    ("number", "line", "error"),
    [
        (9, "", r"train800val200\.txt: expected 9 images, as the training and validation lists have together, got 8"),
        (9, "images/train800val200/000008.jpg 1", r"val200\.txt: expected 1 images of label 1, .* together, got 2"),
        (9, "images/train800val200/000007.jpg 8", r"val200\.txt:9: image .* is listed already, at .*val200\.txt:8"),
        (9, "images/test/000002.jpg 8", r"test\.txt:3: image .* is listed already, at .*train800val200\.txt:9"),
        (9, "images/val200/000002.jpg 8", r"train800\.txt:1: image .* is not in .*train800val200\.txt"),
        (9, "images/train800val200/no.jpg 8", r"train800val200\.txt:9: image .*/no\.jpg does not exist"),
    ],
)
def test_a_joint_list_of_copies_has_as_many_of_each_label_and_no_test_image(root, number, line, error):
    folder = write_vtab(root)
    edit(folder / "train800val200.txt", number, line)
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        vtab(root)


def test_an_empty_list_or_one_that_is_no_text_is_an_error(root):
    folder = write_vtab(root)
    (folder / "test.txt").write_text("\n\n")
    with pytest.raises(ValueError, match=r"test\.txt: the list is empty"):
        vtab(root)
    (folder / "test.txt").write_bytes(b"caf\xe9.png 1\n")
    with pytest.raises(ValueError, match=r"test\.txt: expected UTF-8 text"):
        vtab(root)


@pytest.mark.parametrize("split", ["train800", "val200", "train800val200", "test"])
def test_an_unreadable_image_of_any_list_is_found_before_training(root, split):
    folder = write_vtab(root)
    (folder / f"images/{split}/000001.jpg").write_bytes(b"no picture")
    with pytest.raises(OSError, match=rf"{split}\.txt:2: image .*{split}/000001\.jpg cannot be read"):
        vtab(root)


def fgvc(root, task="flowers", suite="fgvc", **options):
    return load(task=f"{suite}/{task}", data_root=root, **options)


def edit_json(folder, split, change):
    items = json.loads((folder / f"{split}.json").read_text())
    (folder / f"{split}.json").write_text(json.dumps(change(items)))


def test_class_ids_are_counted_once_over_all_lists(root):
    """Numbered for each list, as in the published code, the labels of val would be 0 to 50."""
    write_fgvc(root)
    for splits in (fgvc(root), fgvc(root, suite="fgvc-aug")):
        assert splits.classes == 102
        assert [splits.train[i][1] for i in range(102)] == list(range(102))
        assert [splits.val[i][1] for i in range(51)] == list(range(0, 102, 2))
        assert [splits.test[i][1] for i in range(51)] == list(range(1, 102, 2))
        assert red(splits.val, 0) == 102
        assert len(splits.trainval) == 153
        assert splits.trainval[102 + 3][1] == 6


@pytest.mark.parametrize(
    ("task", "name", "images"),
    [
        ("cub", "CUB_200_2011", "images"),
        ("nabirds", "NABirds", "images"),
        ("cars", "StanfordCars", "."),
        ("dogs", "StanfordDogs", "."),
    ],
)
def test_each_task_has_its_folder_and_place_of_images(root, task, name, images, monkeypatch):
    monkeypatch.setattr(module, "FGVC", {task: FGVC[task]._replace(classes=4)})
    monkeypatch.setattr("tests.finetune.data.folders.FGVC", module.FGVC)
    write_fgvc(root, task, name, images)
    assert [fgvc(root, task).test[i][1] for i in range(2)] == [1, 3]


def test_class_ids_may_be_strings(root):
    folder = write_fgvc(root)
    for split in ("train", "val", "test", "trainval"):
        edit_json(folder, split, lambda items: {path: f"{key:05}" for path, key in items.items()})
    assert fgvc(root).test[50][1] == 101
    edit_json(folder, "test", lambda items: {path: int(key) for path, key in items.items()})
    with pytest.raises(ValueError, match="class ids are numbers in some lists and strings in others"):
        fgvc(root)


def test_without_val_part_of_train_is_set_aside_by_the_seed(root):
    folder = write_fgvc(root)
    (folder / "val.json").unlink()
    (folder / "trainval.json").unlink()
    # a second image of each class
    edit_json(folder, "train", lambda items: items | {f"{path[:-4]} too.png": key for path, key in items.items()})
    for i, path in enumerate(list(json.loads((folder / "train.json").read_text()))[102:]):
        write_image(folder / path, 102 + i)
    splits = fgvc(root)
    assert [len(s) for s in (splits.train, splits.val, splits.test, splits.trainval)] == [163, 41, 51, 204]
    assert {splits.train[i][1] for i in range(163)} == set(range(102))

    def aside(seed):
        val = fgvc(root, seed=seed).val
        return [red(val, i) for i in range(41)]

    assert sorted(red(splits.trainval, i) for i in range(204)) == list(range(204))
    assert aside(0) == aside(0) != aside(1)


def test_without_trainval_train_and_val_are_joined(root):
    folder = write_fgvc(root)
    (folder / "trainval.json").unlink()
    assert len(fgvc(root).trainval) == 153


def test_a_missing_folder_list_or_image_is_named(root):
    with pytest.raises(FileNotFoundError, match=r"fgvc/flowers: folder .*OxfordFlowers does not exist"):
        fgvc(root)
    folder = write_fgvc(root)
    (folder / "class 13" / "test picture.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"test\.json: image .*/class 13/test picture\.png does not exist$"):
        fgvc(root)
    (folder / "test.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"fgvc/flowers: .*OxfordFlowers/test\.json does not exist"):
        fgvc(root)


def put(path, key):
    return lambda items: items | {path: key}


@pytest.mark.parametrize(
    ("split", "change", "error"),
    [
        ("test", put("class 3/train picture.png", 3), r"test\.json: .* listed already, at .*train\.json"),
        ("val", put("class 13/test picture.png", 13), r"test\.json: .* listed already, at .*val\.json"),
        ("trainval", lambda items: dict(list(items.items())[1:]), r"train\.json: .* is not in .*trainval\.json"),
        ("trainval", put("class 3/train picture.png", 13), r"has label 0 here, but 1 at .*trainval"),
        ("trainval", put("class 3/more.png", 3), r"trainval\.json: .* in neither the training nor"),
        ("test", put("class 13/test picture.png", 14), r"expected 102 classes in .* got 103"),
        (
            "test",
            lambda items: dict.fromkeys(items, 1.5),
            r"test\.json: expected whole numbers, .* got 1.5 for 'class 13/",
        ),
        ("test", put("class 33/test picture.png", "33"), r"test\.json: expected whole .* got '33' for"),
        ("test", lambda items: {}, r"test\.json: expected an object .* at least one image"),
        ("test", lambda items: list(items), r"test\.json: expected a JSON object"),
    ],
)
def test_lists_that_contradict_or_are_none_are_refused(root, split, change, error):
    edit_json(write_fgvc(root), split, change)
    with pytest.raises(ValueError, match=error):
        fgvc(root)


def test_classes_that_no_list_has_are_an_error(root):
    folder = write_fgvc(root)
    for split in ("train", "trainval", "test"):
        edit_json(folder, split, lambda items: {path: key for path, key in items.items() if key != 13})
    with pytest.raises(ValueError, match=r"OxfordFlowers: expected 102 classes in train\.json, .* together, got 101"):
        fgvc(root)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"a": 1,\n"b" 2}', r"test\.json is not JSON: .*line 2"),
        ('{"a": 1, "b": 2, "a": 1}', r"test\.json is not JSON: 'a' is there twice"),
    ],
)
def test_json_that_is_broken_is_named_by_file(root, text, error):
    (write_fgvc(root) / "test.json").write_text(text)
    with pytest.raises(ValueError, match=error):
        fgvc(root)
