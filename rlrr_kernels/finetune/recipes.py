"""Published training settings and results: VTAB-1k, and FGVC with and without mixup.

The values are those of the paper's code (arXiv 2403.19067), whose ViT starts from a zero head and uses dropout of
single elements as drop path. Its learning rate stays at ``warmup_lr`` for the first two epochs; that bug is not
reproduced.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import NamedTuple

#: The backbone of the published tables, pretrained on ImageNet-21k: mean and std 0.5, bicubic.
BACKBONE = "vit_base_patch16_224.orig_in21k"


class VTABTask(NamedTuple):
    """Settings that differ between the tasks of VTAB-1k."""

    classes: int
    lr: float
    drop_path: float
    weight_decay: float
    flip: bool


class FGVCTask(NamedTuple):
    """Settings that differ between the tasks of FGVC; ``restart_epochs`` is 0 for a single cosine."""

    classes: int
    lr: float
    drop_path: float
    restart_epochs: int


# fmt: off
VTAB: Mapping[str, VTABTask] = {
    #                        classes    lr drop decay  flip
    "caltech101":           VTABTask(102, 1e-3, 0.1, 5e-5, False),
    "cifar":                VTABTask(100, 3e-3, 0.1, 5e-5, False),
    "dtd":                  VTABTask( 47, 2e-3, 0.1, 5e-5, True),
    "oxford_flowers102":    VTABTask(102, 3e-3, 0.3, 5e-2, False),
    "oxford_iiit_pet":      VTABTask( 37, 1e-3, 0.1, 5e-5, True),
    "svhn":                 VTABTask( 10, 5e-3, 0.3, 5e-5, False),
    "sun397":               VTABTask(397, 1e-3, 0.1, 5e-5, False),
    "patch_camelyon":       VTABTask(  2, 3e-3, 0.3, 5e-2, True),
    "eurosat":              VTABTask( 10, 1e-3, 0.1, 5e-5, True),
    "resisc45":             VTABTask( 45, 3e-3, 0.0, 5e-5, False),
    "diabetic_retinopathy": VTABTask(  5, 5e-3, 0.1, 5e-5, True),
    "clevr_count":          VTABTask(  8, 5e-3, 0.5, 5e-5, True),
    "clevr_dist":           VTABTask(  6, 1e-2, 0.2, 5e-5, True),
    "dmlab":                VTABTask(  6, 5e-3, 0.3, 5e-5, True),
    "kitti":                VTABTask(  4, 3e-3, 0.3, 5e-2, True),
    "dsprites_loc":         VTABTask( 16, 1e-2, 0.1, 5e-5, False),
    "dsprites_ori":         VTABTask( 16, 5e-3, 0.1, 5e-5, False),
    "smallnorb_azi":        VTABTask( 18, 5e-3, 0.3, 5e-2, False),
    "smallnorb_ele":        VTABTask(  9, 1e-3, 0.3, 5e-5, True),
}

FGVC: Mapping[str, FGVCTask] = {
    #            classes   lr  drop  restart
    "cub":     FGVCTask(200, 3e-3, 0.1, 5),
    "nabirds": FGVCTask(555, 5e-4, 0.3, 0),
    "flowers": FGVCTask(102, 3e-3, 0.2, 0),
    "cars":    FGVCTask(196, 3e-3, 0.2, 0),
    "dogs":    FGVCTask(120, 1e-4, 0.0, 5),
}
# fmt: on

#: The groups of VTAB-1k, in the order of the published tables.
VTAB_GROUPS: Mapping[str, tuple[str, ...]] = {
    "natural": ("caltech101", "cifar", "dtd", "oxford_flowers102", "oxford_iiit_pet", "svhn", "sun397"),
    "specialized": ("patch_camelyon", "eurosat", "resisc45", "diabetic_retinopathy"),
    "structured": (
        "clevr_count", "clevr_dist", "dmlab", "kitti", "dsprites_loc", "dsprites_ori", "smallnorb_azi", "smallnorb_ele",
    ),
}  # fmt: skip

#: All tasks by full name. ``fgvc-aug`` is ``fgvc`` trained longer, with mixup and a moving average of the weights.
TASKS: tuple[str, ...] = (
    *(f"vtab/{name}" for name in VTAB),
    *(f"fgvc/{name}" for name in FGVC),
    *(f"fgvc-aug/{name}" for name in FGVC),
)

_COMMON: Mapping[str, object] = {
    "model": BACKBONE,
    "batch_size": 32,
    "cooldown_epochs": 10,
    "warmup_epochs": 10,
    "restart_epochs": 0,
    "restart_factor": 1,
    "warmup_lr": 1e-7,
    "min_lr": 1e-8,
    "mixup": 0.0,
    "cutmix": 0.0,
    "label_smoothing": 0.0,
    "ema": 0.0,
}

#: Additional settings of the published scripts, which train ViTs. Only the model was published for the Swin: its head
#: is initialised at random, and its drop path is stochastic depth.
_VIT: Mapping[str, object] = {"head_init": "zero", "drop_path_kind": "element"}

# With restarts the published code replaces the whole schedule: no warm-up, a minimum of zero, and two more cycles in
# place of a cool-down.
_RESTARTS: Mapping[str, object] = {"epochs": 60, "cooldown_epochs": 0, "warmup_epochs": 0, "min_lr": 0.0}

# Restarts after 10, 30 and 70 epochs: each cycle is twice as long as the one before, and the last is cut at 110.
_AUGMENTED: Mapping[str, object] = {
    **_RESTARTS,
    "epochs": 110,
    "restart_epochs": 10,
    "restart_factor": 2,
    "mixup": 0.8,
    "cutmix": 1.0,
    "label_smoothing": 0.1,
    "ema": 0.9998,
}


def split_task(task: str) -> tuple[str, str]:
    """Split ``"vtab/cifar"`` into ``("vtab", "cifar")``.

    Raises:
        ValueError: If the task is unknown. The message lists the nearest names.
    """
    if task not in TASKS:
        names = {name.split("/")[1]: name for name in reversed(TASKS)}
        near = difflib.get_close_matches(task, TASKS, n=3, cutoff=0.7)
        near += [names[name] for name in difflib.get_close_matches(task.split("/")[-1], names, n=3, cutoff=0.7)]
        hint = f"did you mean {' or '.join(dict.fromkeys(near))}?" if near else f"known: {', '.join(TASKS)}"
        raise ValueError(f"task: expected vtab/<name>, fgvc/<name> or fgvc-aug/<name>, got {task!r}; {hint}")
    suite, name = task.split("/")
    return suite, name


def recipe(task: str, model: str = BACKBONE) -> dict[str, object]:
    """Return the published recipe of a task, as fields of :class:`~rlrr_kernels.finetune.settings.Settings`.

    VTAB-1k: 100 epochs and 10 of cool-down, whole images resized. FGVC: 50 and 10, random crops and flips;
    CUB and Dogs restart the cosine every 5 epochs. ``fgvc-aug``: 110, with restarts, mixup, cutmix, label smoothing
    and a moving average of the weights. All use AdamW. All models but Swins start from a zero head and drop single
    elements of their branches.

    Args:
        task: One of :data:`TASKS`.
        model: timm name of the model to train.

    Raises:
        ValueError: If the task is unknown. The message lists the nearest names.
    """
    suite, name = split_task(task)
    common = {**_COMMON, **({} if model.startswith("swin") else _VIT)}
    if suite == "vtab":
        vtab = VTAB[name]
        fields = {**common, "epochs": 100, "resize": "squash", "flip": vtab.flip}
        return {**fields, "lr": vtab.lr, "drop_path": vtab.drop_path, "weight_decay": vtab.weight_decay}
    fgvc = FGVC[name]
    fields = {**common, "epochs": 50, "resize": "crop", "flip": True}
    fields |= {"lr": fgvc.lr, "drop_path": fgvc.drop_path, "weight_decay": 5e-2}
    if suite == "fgvc-aug":
        return {**fields, **_AUGMENTED}
    if fgvc.restart_epochs:
        return {**fields, **_RESTARTS, "restart_epochs": fgvc.restart_epochs}
    return fields


class PublishedMean(NamedTuple):
    """A published mean test accuracy in percent, over the 19 tasks of ``vtab`` or the 5 of ``fgvc``.

    ``model`` is timm's name of the backbone. For RLRR the epoch was chosen on test images (protocol ``best-on-test``).
    """

    benchmark: str
    method: str
    model: str
    accuracy: float


_AUGREG = "vit_base_patch16_224.augreg_in21k"

PUBLISHED: tuple[PublishedMean, ...] = (
    PublishedMean("vtab", "RLRR", BACKBONE, 74.5),
    PublishedMean("vtab", "RLRR", _AUGREG, 75.1),
    PublishedMean("vtab", "RLRR", "vit_large_patch16_224.orig_in21k", 75.2),
    PublishedMean("vtab", "RLRR", "vit_huge_patch14_224.orig_in21k", 72.0),
    PublishedMean("vtab", "RLRR", "swin_base_patch4_window7_224.ms_in22k", 73.0),
    PublishedMean("vtab", "full", BACKBONE, 65.6),
    PublishedMean("vtab", "linear", BACKBONE, 52.9),
    PublishedMean("vtab", "VPT-deep", BACKBONE, 69.4),
    PublishedMean("vtab", "LoRA", BACKBONE, 72.3),
    PublishedMean("vtab", "FacT-TK", BACKBONE, 73.2),
    PublishedMean("vtab", "ARC", BACKBONE, 73.4),
    PublishedMean("vtab", "SSF", _AUGREG, 73.1),
    PublishedMean("fgvc", "RLRR", BACKBONE, 90.4),
    PublishedMean("fgvc", "RLRR", _AUGREG, 91.0),
)
