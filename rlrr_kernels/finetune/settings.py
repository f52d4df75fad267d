"""Everything a run depends on, in one record that ``metrics.json`` repeats and the command line reads."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlrr_kernels.finetune.embedded import EMBEDDED_MODEL
from rlrr_kernels.io.reading import expect
from rlrr_kernels.layers.linear import INITS

METHODS = ("rlrr", "ssf", "lora", "linear", "full")
PROTOCOLS = ("choose-epoch", "final", "best-on-test")
PRECISIONS = ("fp32", "bf16", "fp16")
FROZEN_DTYPES = ("", "fp32", "bf16", "fp16")
RESIZES = ("squash", "crop")
HEAD_INITS = ("random", "zero")
DROP_PATH_KINDS = ("image", "element")
PARALLELS = ("ddp", "fsdp")


def about(help: str, choices: tuple[str, ...] | None = None) -> dict[str, Any]:
    """A field's metadata: what the command line says of it, and the only values it takes."""
    return {"help": help, "choices": choices}


@dataclass(frozen=True)
class Settings:
    """One fine-tuning run. Each field's meaning is its ``metadata["help"]``.

    Raises:
        ValueError: a value out of its range, or two that exclude each other; the field is named.
        FileNotFoundError: ``checkpoint`` or ``resume`` does not exist.
    """

    model: str = field(default=EMBEDDED_MODEL, metadata=about("timm model name; the default ships with the package"))
    pretrained: bool = field(default=True, metadata=about("load timm's weights for the model"))
    checkpoint: Path | None = field(
        default=None,
        metadata=about("load the model's weights from this file instead (.safetensors, .pth, or a published .npz)"),
    )
    img_size: int = field(default=0, metadata=about("side of the input images in pixels; 0: the model's own"))
    task: str = field(default="", metadata=about("a benchmark task such as vtab/cifar or fgvc/cub, under --data-root"))
    data: str = field(
        default="digits",
        metadata=about(
            "digits, fashion-mnist, a timm dataset name such as torch/cifar100 (with --data-root), a folder with "
            "train/<class>/* and val or test, or an .npz file; unused with --task"
        ),
    )
    data_root: Path | None = field(
        default=None, metadata=about("where tasks and named datasets lie, or are downloaded to")
    )
    method: str = field(
        default="rlrr",
        metadata=about(
            "what trains: rescaling, affines and head (rlrr); the head alone (linear); everything (full); or, to "
            "compare, SSF's affines or PEFT's LoRA, and the head",
            METHODS,
        ),
    )
    lora_rank: int = field(
        default=0, metadata=about("rank of lora; 0: the smallest that trains no fewer parameters than rlrr would")
    )
    init: str = field(
        default="paper", metadata=about("start of u and v: as published, or the plain model's function", INITS)
    )
    norm_affine: bool = field(
        default=True, metadata=about("train a scale and a shift after each LayerNorm, as published")
    )
    patch_affine: bool = field(
        default=True, metadata=about("train a scale and a shift after the patch embedding, as published")
    )
    head_init: str = field(
        default="random", metadata=about("start of the head: drawn as timm does, or zeros, as published", HEAD_INITS)
    )
    frozen_dtype: str = field(
        default="", metadata=about("keep frozen weights in this precision; empty: as they were loaded", FROZEN_DTYPES)
    )
    protocol: str = field(
        default="",
        metadata=about(
            "choose-epoch: train on train, choose the epoch on val, test once; final: train on train and val, test "
            "once after the last epoch; best-on-test: train on both, test each epoch and report the best, as published "
            "figures were made; empty: choose-epoch, or final with --task",
            ("", *PROTOCOLS),
        ),
    )
    epochs: int = field(default=20, metadata=about("epochs of the cosine schedule, warm-up included"))
    cooldown_epochs: int = field(default=0, metadata=about("epochs at the last learning rate after those"))
    warmup_epochs: int = field(default=2, metadata=about("epochs of linear warm-up"))
    restart_epochs: int = field(
        default=0,
        metadata=about("restart the cosine after so many epochs, a divisor where a cool-down follows; 0: never"),
    )
    restart_factor: int = field(
        default=1,
        metadata=about(
            "each cosine is so many times as long as the one before; the end of the epochs may cut the last"
        ),
    )
    batch_size: int = field(default=32, metadata=about("images a step in each process"))
    grad_accumulation: int = field(default=1, metadata=about("batches whose gradients make one step"))
    lr: float = field(default=1e-2, metadata=about("peak learning rate"))
    warmup_lr: float = field(default=1e-7, metadata=about("first learning rate"))
    min_lr: float = field(default=1e-8, metadata=about("last learning rate"))
    weight_decay: float = field(default=5e-5, metadata=about("on u, v, the patch affine and the head's weight"))
    drop_path: float = field(
        default=0.0, metadata=about("rate of what is dropped of the last block's branches, 0 at the first block")
    )
    drop_path_kind: str = field(
        default="image",
        metadata=about(
            "what a drop path drops: the branch of an image (stochastic depth), or single elements of it, as the "
            "published ViT does",
            DROP_PATH_KINDS,
        ),
    )
    label_smoothing: float = field(default=0.0, metadata=about("share of each label that is spread over all classes"))
    mixup: float = field(default=0.0, metadata=about("alpha of mixup; 0: none"))
    cutmix: float = field(
        default=0.0, metadata=about("alpha of cutmix; 0: none. With mixup, each batch takes one of the two")
    )
    ema: float = field(
        default=0.0,
        metadata=about("decay of a moving average of what trains, evaluated and saved in its place; 0: none"),
    )
    resize: str = field(
        default="squash",
        metadata=about(
            "squash: the whole image to the input size; crop: random crops to train, the centre to test", RESIZES
        ),
    )
    flip: bool = field(default=False, metadata=about("mirror training images at random"))
    precision: str = field(
        default="fp32", metadata=about("fp32, or autocast to bf16 or fp16 (the latter with a scaled loss)", PRECISIONS)
    )
    early_stop: int = field(
        default=0, metadata=about("stop after so many epochs without a better validation result; 0: never")
    )
    parallel: str = field(
        default="ddp", metadata=about("under torchrun: whole copies of the model, or sharded parameters", PARALLELS)
    )
    device: str = field(default="auto", metadata=about("auto, cpu, cuda, cuda:1, ..."))
    workers: int = field(
        default=0,
        metadata=about("threads that decode images, for each training process; 0: as many as its share of the cores"),
    )
    cache: float = field(
        default=8.0,
        metadata=about("GiB for decoded images, in a file in the folder for temporary files; others are decoded anew"),
    )
    seed: int = field(default=0, metadata=about("of initial values, order, augmentation and validation split"))
    tensorboard: bool = field(default=True, metadata=about("write TensorBoard event files, where it is installed"))
    resume: Path | None = field(default=None, metadata=about("continue the unfinished run in this folder"))
    out: Path | None = field(
        default=None, metadata=about("run folder, which must not exist (default: a new one under runs/)")
    )

    @property
    def resolved_protocol(self) -> str:
        """The protocol in force: ``protocol``, or what an empty one stands for."""
        return self.protocol or ("final" if self.task else "choose-epoch")

    @property
    def total_epochs(self) -> int:
        """Epochs of the schedule and of the cool-down after it."""
        return self.epochs + self.cooldown_epochs

    @property
    def dataset(self) -> str:
        """What the images are called in titles and folder names: of a path that is absolute its last part."""
        return self.task or (os.path.basename(os.path.normpath(self.data)) if os.path.isabs(self.data) else self.data)

    def to_dict(self) -> dict[str, Any]:
        """Every field, ready for JSON: paths as strings."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """The settings that :meth:`to_dict` gave; a field that is absent has its default.

        Raises:
            ValueError: a name that is no field, or a value of another type. Also what the constructor raises.
        """
        fields = {each.name for each in dataclasses.fields(cls)}
        for name in values:
            if name not in fields:
                raise ValueError(f"settings: {name!r:.80} is no field of {cls.__name__}")
        check_types(values)
        paths = {name: Path(values[name]) for name in PATHS if values.get(name) is not None}
        return cls(**{**values, **paths})

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            allowed, given = each.metadata["choices"], getattr(self, each.name)
            if allowed is not None and given not in allowed:
                named = ", ".join(name or "nothing" for name in allowed)
                raise ValueError(f"{each.name}: expected one of {named}, got {given!r}")
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        for name in ("lr", "warmup_lr", "min_lr", "weight_decay", "mixup", "cutmix", "cache"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a finite number, 0 or more, got {getattr(self, name)}")
        for name in ("drop_path", "label_smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 0 or more and less than 1, got {getattr(self, name)}")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs: expected less than epochs={self.epochs}, got {self.warmup_epochs}")
        if self.restart_factor > 1 and (not self.restart_epochs or self.cooldown_epochs):
            raise ValueError(
                f"restart_factor: expected 1 with restart_epochs={self.restart_epochs} and "
                f"cooldown_epochs={self.cooldown_epochs}: cycles that grow restart, and have no cool-down after them, "
                f"got {self.restart_factor}"
            )
        if self.restart_epochs and self.cooldown_epochs and self.epochs % self.restart_epochs:
            raise ValueError(
                f"restart_epochs: expected a divisor of epochs={self.epochs}, after which come "
                f"cooldown_epochs={self.cooldown_epochs}, got {self.restart_epochs}"
            )
        if self.early_stop and self.resolved_protocol != "choose-epoch":
            raise ValueError(
                f"early_stop: expected 0 with protocol={self.resolved_protocol!r}, which looks at no validation "
                f"images as protocol='choose-epoch' does, got {self.early_stop}"
            )
        if self.frozen_dtype and self.method != "rlrr":
            raise ValueError(f"frozen_dtype: expected none with method={self.method!r}, got {self.frozen_dtype!r}")
        if self.checkpoint is not None and not os.path.isfile(self.checkpoint):
            raise FileNotFoundError(f"checkpoint: {self.checkpoint} does not exist")
        if self.resume is not None and not os.path.isdir(self.resume):
            raise FileNotFoundError(f"resume: {self.resume} is no folder")
        if self.resume is not None and self.out is not None:
            raise ValueError(f"out: expected none with resume={str(self.resume)!r}, where it continues, got {self.out}")


def check_types(values: Mapping[str, Any]) -> None:
    """``ValueError`` naming the first field that a file gives another type than it has; other names are let be."""
    for each in dataclasses.fields(Settings):
        if each.name not in values:
            continue
        if each.name not in PATHS:
            expect(values, each.name, type(each.default))
        elif not isinstance(values[each.name], Path):
            expect(values, each.name, str, type(None))


#: Fields that hold a path or None.
PATHS = ("checkpoint", "data_root", "resume", "out")

#: The least value of each integer field.
LEAST = {
    "img_size": 0,
    "lora_rank": 0,
    "epochs": 1,
    "cooldown_epochs": 0,
    "warmup_epochs": 0,
    "restart_epochs": 0,
    "restart_factor": 1,
    "batch_size": 1,
    "grad_accumulation": 1,
    "early_stop": 0,
    "workers": 0,
    "seed": 0,
}
