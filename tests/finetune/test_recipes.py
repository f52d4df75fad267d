"""The published recipes, against the table as it is published."""

import dataclasses
import re

import pytest
import timm

from rlrr_kernels.finetune.recipes import FGVC, PUBLISHED, TASKS, VTAB, VTAB_GROUPS, recipe, split_task
from rlrr_kernels.finetune.settings import Settings

PUBLISHED_VTAB = """
caltech101            102  1e-3  0.1  5e-5  no
cifar                 100  3e-3  0.1  5e-5  no
clevr_count             8  5e-3  0.5  5e-5  yes
clevr_dist              6  1e-2  0.2  5e-5  yes
diabetic_retinopathy    5  5e-3  0.1  5e-5  yes
dmlab                   6  5e-3  0.3  5e-5  yes
dsprites_loc           16  1e-2  0.1  5e-5  no
dsprites_ori           16  5e-3  0.1  5e-5  no
dtd                    47  2e-3  0.1  5e-5  yes
eurosat                10  1e-3  0.1  5e-5  yes
kitti                   4  3e-3  0.3  5e-2  yes
oxford_flowers102     102  3e-3  0.3  5e-2  no
oxford_iiit_pet        37  1e-3  0.1  5e-5  yes
patch_camelyon          2  3e-3  0.3  5e-2  yes
resisc45               45  3e-3  0.0  5e-5  no
smallnorb_azi          18  5e-3  0.3  5e-2  no
smallnorb_ele           9  1e-3  0.3  5e-5  yes
sun397                397  1e-3  0.1  5e-5  no
svhn                   10  5e-3  0.3  5e-5  no
"""


def test_the_19_tasks_of_vtab_are_those_of_the_published_table():
    rows = [line.split() for line in PUBLISHED_VTAB.strip().splitlines()]
    assert sorted(VTAB) == [row[0] for row in rows]
    for name, classes, lr, drop_path, weight_decay, flip in rows:
        fields = recipe(f"vtab/{name}")
        got = VTAB[name].classes, *(fields[key] for key in ("lr", "drop_path", "weight_decay", "flip"))
        assert got == (int(classes), float(lr), float(drop_path), float(weight_decay), flip == "yes"), name


def test_vtab_trains_100_epochs_and_10_more_on_whole_images():
    expected = {
        "model": "vit_base_patch16_224.orig_in21k",
        "batch_size": 32,
        "epochs": 100,
        "cooldown_epochs": 10,
        "warmup_epochs": 10,
        "restart_epochs": 0,
        "restart_factor": 1,
        "warmup_lr": 1e-7,
        "min_lr": 1e-8,
        "resize": "squash",
        "mixup": 0.0,
        "cutmix": 0.0,
        "label_smoothing": 0.0,
        "ema": 0.0,
        "head_init": "zero",
        "drop_path_kind": "element",
    }
    for name in VTAB:
        fields = recipe(f"vtab/{name}")
        assert {key: fields[key] for key in expected} == expected
        assert fields.keys() == expected.keys() | {"lr", "drop_path", "weight_decay", "flip"}


@pytest.mark.parametrize(
    ("name", "classes", "lr", "drop_path"),
    [
        ("cub", 200, 3e-3, 0.1),
        ("nabirds", 555, 5e-4, 0.3),
        ("flowers", 102, 3e-3, 0.2),
        ("cars", 196, 3e-3, 0.2),
        ("dogs", 120, 1e-4, 0.0),
    ],
)
def test_fgvc_crops_flips_and_trains_60_or_110_epochs(name, classes, lr, drop_path):
    plain, augmented = recipe(f"fgvc/{name}"), recipe(f"fgvc-aug/{name}")
    assert FGVC[name].classes == classes
    for fields in (plain, augmented):
        assert (fields["lr"], fields["drop_path"], fields["weight_decay"]) == (lr, drop_path, 5e-2)
        assert (fields["resize"], fields["flip"], fields["batch_size"]) == ("crop", True, 32)
    assert plain["epochs"] + plain["cooldown_epochs"] == 60
    assert augmented["epochs"] + augmented["cooldown_epochs"] == 110
    mixing = ("mixup", "cutmix", "label_smoothing", "ema")
    assert [augmented[key] for key in mixing] == [0.8, 1.0, 0.1, 0.9998]
    assert [plain[key] for key in mixing] == [0.0] * 4


def test_augmented_recipes_restart_after_10_30_and_70_of_110_epochs():
    for name in FGVC:
        fields = recipe(f"fgvc-aug/{name}")
        keys = ("epochs", "cooldown_epochs", "warmup_epochs", "restart_epochs", "restart_factor", "min_lr")
        assert [fields[key] for key in keys] == [110, 0, 0, 10, 2, 0.0]


def test_cub_and_dogs_restart_every_five_epochs_without_warm_up():
    for name in FGVC:
        fields = recipe(f"fgvc/{name}")
        schedule = [fields[key] for key in ("epochs", "cooldown_epochs", "warmup_epochs", "restart_epochs", "min_lr")]
        assert schedule == ([60, 0, 0, 5, 0.0] if name in ("cub", "dogs") else [50, 10, 10, 0, 1e-8])


def test_groups_part_the_tasks_of_vtab():
    grouped = [name for names in VTAB_GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(VTAB)
    assert {group: len(names) for group, names in VTAB_GROUPS.items()} == {
        "natural": 7,
        "specialized": 4,
        "structured": 8,
    }
    assert VTAB_GROUPS["specialized"] == ("patch_camelyon", "eurosat", "resisc45", "diabetic_retinopathy")


def test_every_recipe_is_made_of_valid_settings():
    assert len(TASKS) == len(set(TASKS)) == 19 + 5 + 5
    for task in TASKS:
        settings = dataclasses.replace(Settings(), **recipe(task))
        assert settings.lr == recipe(task)["lr"]


def test_a_recipe_may_be_changed_without_changing_the_next():
    recipe("vtab/dtd")["lr"] = 0.0
    assert recipe("vtab/dtd")["lr"] == 2e-3


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("vtab/cifra", "did you mean vtab/cifar?"),
        ("cub", "did you mean fgvc/cub?"),
        ("fgvc/flower", "did you mean fgvc/flowers"),
        ("pets", "known: vtab/caltech101, "),
        ("", "known: vtab/caltech101, "),
    ],
)
def test_an_unknown_task_says_which_are_near(given, near):
    with pytest.raises(ValueError, match=re.escape(f"got {given!r}; {near}")):
        recipe(given)


def test_a_task_is_a_suite_and_a_name():
    assert split_task("fgvc-aug/cars") == ("fgvc-aug", "cars")


def test_published_means_name_backbones_that_timm_has():
    means = {(row.benchmark, row.method, row.model): row.accuracy for row in PUBLISHED}
    assert len(means) == len(PUBLISHED)
    base, augreg = "vit_base_patch16_224.orig_in21k", "vit_base_patch16_224.augreg_in21k"
    assert means["vtab", "RLRR", base] == 74.5
    assert means["vtab", "RLRR", augreg] == 75.1
    assert means["fgvc", "RLRR", base] == 90.4
    assert means["vtab", "full", base] == 65.6
    assert {timm.is_model_pretrained(model) for _, _, model in means} == {True}
