"""The FGVC layout: class ids over all lists, lists that may be missing, and broken copies."""

import json

import pytest

from rlrr_kernels.finetune.data import tasks as module
from rlrr_kernels.finetune.recipes import FGVC

from .folders import load, red, write_fgvc, write_image


@pytest.fixture
def root(tmp_path):
    return tmp_path / "fine grained"


def fgvc(root, task="flowers", suite="fgvc", **options):
    return load(task=f"{suite}/{task}", data_root=root, **options)


def edit(folder, split, change):
    items = json.loads((folder / f"{split}.json").read_text())
    (folder / f"{split}.json").write_text(json.dumps(change(items)))


def test_class_ids_are_counted_once_over_all_lists(root):
    """Counted in each list, as the published code does, val's labels would be 0 to 50."""
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
        edit(folder, split, lambda items: {path: f"{key:05}" for path, key in items.items()})
    assert fgvc(root).test[50][1] == 101
    edit(folder, "test", lambda items: {path: int(key) for path, key in items.items()})
    with pytest.raises(ValueError, match="class ids are numbers in some lists and strings in others"):
        fgvc(root)


def test_without_val_part_of_train_is_set_aside_by_the_seed(root):
    folder = write_fgvc(root)
    (folder / "val.json").unlink()
    (folder / "trainval.json").unlink()
    # a second image of each class
    edit(folder, "train", lambda items: items | {f"{path[:-4]} too.png": key for path, key in items.items()})
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


@pytest.mark.parametrize(
    ("split", "change", "error"),
    [
        (
            "test",
            lambda items: items | {"class 3/train picture.png": 3},
            r"test\.json: .* listed already, at .*train\.json",
        ),
        (
            "val",
            lambda items: items | {"class 13/test picture.png": 13},
            r"test\.json: .* listed already, at .*val\.json",
        ),
        ("trainval", lambda items: dict(list(items.items())[1:]), r"train\.json: .* is not in .*trainval\.json"),
        ("trainval", lambda items: items | {"class 3/train picture.png": 13}, r"has label 0 here, but 1 at .*trainval"),
        ("trainval", lambda items: items | {"class 3/more.png": 3}, r"trainval\.json: .* in neither the training nor"),
        ("test", lambda items: items | {"class 13/test picture.png": 14}, r"expected 102 classes in .* got 103"),
        (
            "test",
            lambda items: dict.fromkeys(items, 1.5),
            r"test\.json: expected whole numbers, .* got 1.5 for 'class 13/",
        ),
        (
            "test",
            lambda items: items | {"class 33/test picture.png": "33"},
            r"test\.json: expected whole .* got '33' for",
        ),
        ("test", lambda items: {}, r"test\.json: expected a(n| JSON) object .* at least one image"),
        ("test", lambda items: list(items), r"test\.json: expected a(n| JSON) object"),
    ],
)
def test_lists_that_contradict_or_are_none_are_refused(root, split, change, error):
    edit(write_fgvc(root), split, change)
    with pytest.raises(ValueError, match=error):
        fgvc(root)


def test_classes_that_no_list_has_are_an_error(root):
    folder = write_fgvc(root)
    for split in ("train", "trainval", "test"):
        edit(folder, split, lambda items: {path: key for path, key in items.items() if key != 13})
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
