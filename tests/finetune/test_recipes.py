"""The published recipes: spot checks against the published code, and that settings take all of them."""

import dataclasses
import re

import pytest
import timm

from rlrr_kernels.finetune.recipes import FGVC, PUBLISHED, TASKS, VTAB, VTAB_GROUPS, recipe
from rlrr_kernels.finetune.settings import Settings

PLAIN = {"mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0, "ema": 0.0, "restart_factor": 1, "warmup_lr": 1e-7}
VTAB_SCHEDULE = {"epochs": 100, "cooldown_epochs": 10, "warmup_epochs": 10, "restart_epochs": 0, "min_lr": 1e-8}
FGVC_SCHEDULE = VTAB_SCHEDULE | {"epochs": 50}
RESTARTS = {"epochs": 60, "cooldown_epochs": 0, "warmup_epochs": 0, "restart_epochs": 5, "min_lr": 0.0}
#: Cycles end after 10, 30 and 70 of 110 epochs.
AUGMENTED = {"epochs": 110, "restart_epochs": 10, "restart_factor": 2}
MIXED = {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1, "ema": 0.9998}


@pytest.mark.parametrize(
    ("task", "lr", "drop_path", "weight_decay", "flip", "resize", "schedule"),
    [
        ("vtab/cifar", 3e-3, 0.1, 5e-5, False, "squash", PLAIN | VTAB_SCHEDULE),
        ("vtab/kitti", 3e-3, 0.3, 5e-2, True, "squash", PLAIN | VTAB_SCHEDULE),
        ("vtab/clevr_dist", 1e-2, 0.2, 5e-5, True, "squash", PLAIN | VTAB_SCHEDULE),
        ("fgvc/cub", 3e-3, 0.1, 5e-2, True, "crop", PLAIN | RESTARTS),
        ("fgvc/nabirds", 5e-4, 0.3, 5e-2, True, "crop", PLAIN | FGVC_SCHEDULE),
        ("fgvc-aug/nabirds", 5e-4, 0.3, 5e-2, True, "crop", RESTARTS | AUGMENTED | MIXED),
    ],
)
def test_recipes_are_as_published(task, lr, drop_path, weight_decay, flip, resize, schedule):
    fields = recipe(task)
    expected = {"lr": lr, "drop_path": drop_path, "weight_decay": weight_decay, "flip": flip, "resize": resize}
    expected |= {"model": "vit_base_patch16_224.orig_in21k", "batch_size": 32, **schedule}
    expected |= {"head_init": "zero", "drop_path_kind": "element"}
    assert {name: fields[name] for name in expected} == expected


def test_every_task_has_a_recipe_of_valid_settings():
    assert sorted(name for names in VTAB_GROUPS.values() for name in names) == sorted(VTAB)
    assert [len(names) for names in VTAB_GROUPS.values()] == [7, 4, 8]
    assert len(TASKS) == len(set(TASKS)) == 19 + 5 + 5
    assert [task.classes for task in FGVC.values()] == [200, 555, 102, 196, 120]
    for task in TASKS:
        assert dataclasses.replace(Settings(), **recipe(task)).lr == recipe(task)["lr"]


def test_a_recipe_may_be_changed_without_changing_the_next():
    recipe("vtab/dtd")["lr"] = 0.0
    assert recipe("vtab/dtd")["lr"] == 2e-3


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("vtab/cifra", "did you mean vtab/cifar?"),
        ("cub", "did you mean fgvc/cub?"),
        ("fgvc/flower", "did you mean fgvc/flowers"),
        ("", "known: vtab/caltech101, "),
    ],
)
def test_an_unknown_task_says_which_are_near(given, near):
    with pytest.raises(ValueError, match=re.escape(f"got {given!r}; {near}")):
        recipe(given)


def test_published_means_name_backbones_that_timm_has():
    means = {(row.benchmark, row.method, row.model): row.accuracy for row in PUBLISHED}
    assert len(means) == len(PUBLISHED)
    assert means["vtab", "RLRR", "vit_base_patch16_224.orig_in21k"] == 74.5
    assert all(timm.is_model_pretrained(model) for _, _, model in means)
