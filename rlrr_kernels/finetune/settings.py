"""The settings of a run: their defaults, ranges and help texts, and how a task's recipe fills them in."""

# ruff: noqa: RUF009  setting() returns a dataclass field, which is no shared default

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlrr_kernels.backends.problem import MAX_RANK
from rlrr_kernels.finetune.embedded import EMBEDDED_MODEL
from rlrr_kernels.finetune.recipes import BACKBONE, recipe
from rlrr_kernels.io.checks import expect
from rlrr_kernels.layers.options import INITS

METHODS = ("rlrr", "ssf", "lora", "linear", "full")
PROTOCOLS = ("choose-epoch", "final", "best-on-test")
PRECISIONS = ("fp32", "bf16", "fp16")

#: Settings that hold a path or None.
PATHS = ("checkpoint", "data_root", "resume", "out")


def setting(
    default: Any,
    help: str,
    choices: tuple[str, ...] | None = None,
    *,
    least: float | None = None,
    below: float = math.inf,
) -> Any:
    """Declare a field of :class:`Settings`.

    Args:
        default: Default value.
        help: Help text of the command-line option.
        choices: Allowed values, or None.
        least: Smallest allowed value, or None for no range.
        below: Exclusive upper bound.
    """
    return field(default=default, metadata={"help": help, "choices": choices, "least": least, "below": below})


@dataclass(frozen=True)
class Settings:
    """Everything that one fine-tuning run depends on. ``metadata["help"]`` documents each field.

    Raises:
        ValueError: If a value is out of range, or two values exclude each other. The message starts with the field.
        FileNotFoundError: If ``checkpoint`` or ``resume`` does not exist.
    """

    model: str = setting(EMBEDDED_MODEL, "timm model name; the default ships with the package")
    pretrained: bool = setting(True, "load timm's weights for the model")
    checkpoint: Path | None = setting(
        None, "load the model's weights from this file instead (.safetensors, .pth, or a published .npz)"
    )
    img_size: int = setting(0, "side of the input images in pixels; 0: the model's own", least=0)
    task: str = setting("", "a benchmark task such as vtab/cifar or fgvc/cub, under --data-root")
    data: str = setting(
        "digits",
        "digits, fashion-mnist, a timm dataset name such as torch/cifar100 (with --data-root), a folder with "
        "train/<class>/* and val or test, or an .npz file; unused with --task",
    )
    data_root: Path | None = setting(None, "where tasks and named datasets lie, or are downloaded to")
    method: str = setting(
        "rlrr",
        "what trains: rescaling, affines and head (rlrr); the head alone (linear); everything (full); or, to "
        "compare, SSF's affines or PEFT's LoRA, and the head",
        METHODS,
    )
    lora_rank: int = setting(
        0, "rank of lora; 0: the smallest that trains no fewer parameters than rlrr of rank 1 would", least=0
    )
    rank: int = setting(1, "rank of u v of rlrr; 1: as published", least=1, below=MAX_RANK + 1)
    init: str = setting("paper", "start of u and v: as published, or the plain model's function", INITS)
    norm_affine: bool = setting(True, "train a scale and a shift after each LayerNorm, as published")
    patch_affine: bool = setting(True, "train a scale and a shift after the patch embedding, as published")
    head_init: str = setting(
        "random", "start of the head: drawn as timm does, or zeros, as published", ("random", "zero")
    )
    frozen_dtype: str = setting(
        "", "keep frozen weights in this precision; empty: as they were loaded", ("", *PRECISIONS)
    )
    protocol: str = setting(
        "",
        "choose-epoch: train on train, choose the epoch on val, test once; final: train on train and val, test "
        "once after the last epoch; best-on-test: train on both, test each epoch and report the best, as published "
        "figures were made; empty: choose-epoch, or final with --task",
        ("", *PROTOCOLS),
    )
    epochs: int = setting(20, "epochs of the cosine schedule, warm-up included", least=1)
    cooldown_epochs: int = setting(0, "epochs at the last learning rate after those", least=0)
    warmup_epochs: int = setting(2, "epochs of linear warm-up", least=0)
    restart_epochs: int = setting(
        0, "restart the cosine after so many epochs, a divisor where a cool-down follows; 0: never", least=0
    )
    restart_factor: int = setting(
        1, "each cosine is so many times as long as the one before; the end of the epochs may cut the last", least=1
    )
    batch_size: int = setting(32, "images a step in each process", least=1)
    grad_accumulation: int = setting(1, "batches whose gradients make one step", least=1)
    lr: float = setting(1e-2, "peak learning rate", least=0)
    warmup_lr: float = setting(1e-7, "first learning rate", least=0)
    min_lr: float = setting(1e-8, "last learning rate", least=0)
    weight_decay: float = setting(5e-5, "on u, v, the patch affine and the head's weight", least=0)
    drop_path: float = setting(
        0.0, "rate of what is dropped of the last block's branches, 0 at the first block", least=0, below=1
    )
    drop_path_kind: str = setting(
        "image",
        "what a drop path drops: the branch of an image (stochastic depth), or single elements of it, as the "
        "published ViT does",
        ("image", "element"),
    )
    label_smoothing: float = setting(0.0, "share of each label that is spread over all classes", least=0, below=1)
    mixup: float = setting(0.0, "alpha of mixup; 0: none", least=0)
    cutmix: float = setting(0.0, "alpha of cutmix; 0: none. With mixup, each batch takes one of the two", least=0)
    ema: float = setting(
        0.0,
        "decay of a moving average of what trains, evaluated and saved in its place; 0: none",
        least=0,
        below=1,
    )
    resize: str = setting(
        "squash",
        "squash: the whole image to the input size; crop: random crops to train, the centre to test",
        ("squash", "crop"),
    )
    flip: bool = setting(False, "mirror training images at random")
    precision: str = setting("fp32", "fp32, or autocast to bf16 or fp16 (the latter with a scaled loss)", PRECISIONS)
    compile: str = setting(
        "",
        "train through torch.compile: default, or reduce-overhead (CUDA graphs, on an NVIDIA GPU); empty: eager",
        ("", "default", "reduce-overhead"),
    )
    early_stop: int = setting(0, "stop after so many epochs without a better validation result; 0: never", least=0)
    parallel: str = setting("ddp", "under torchrun: whole copies of the model, or sharded parameters", ("ddp", "fsdp"))
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...")
    workers: int = setting(
        0, "threads that decode images, for each training process; 0: as many as its share of the cores", least=0
    )
    cache: float = setting(
        8.0,
        "GiB for decoded images, in a file in the folder for temporary files; others are decoded anew",
        least=0,
    )
    seed: int = setting(0, "of initial values, order, augmentation and validation split", least=0)
    tensorboard: bool = setting(True, "write TensorBoard event files, where it is installed")
    resume: Path | None = setting(None, "continue the unfinished run in this folder")
    out: Path | None = setting(None, "run folder, which must not exist (default: a new one under runs/)")

    @property
    def resolved_protocol(self) -> str:
        """The protocol in force: ``protocol``, or its default if that is empty."""
        return self.protocol or ("final" if self.task else "choose-epoch")

    @property
    def variant(self) -> str:
        """The method's name in folder names, with a rank above 1."""
        return self.method if self.rank == 1 else f"{self.method}-r{self.rank}"

    @property
    def total_epochs(self) -> int:
        """Epochs of the schedule and of the cool-down after it."""
        return self.epochs + self.cooldown_epochs

    @property
    def dataset(self) -> str:
        """The dataset's name in titles and folder names: the task, or the data; only the last part of a full path."""
        return self.task or (os.path.basename(os.path.normpath(self.data)) if os.path.isabs(self.data) else self.data)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values, paths as strings."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """Build settings from the values of :meth:`to_dict`. A missing field gets its default.

        Raises:
            ValueError: If a name is not a field or a value has the wrong type, and as the constructor does.
        """
        for name in values:
            if name not in FIELDS:
                raise ValueError(f"settings: {name!r:.80} is no field of {cls.__name__}")
        check_types(values)
        paths = {name: Path(values[name]) for name in PATHS if values.get(name) is not None}
        return cls(**{**values, **paths})

    def __post_init__(self) -> None:
        for name, each in FIELDS.items():
            value, choices, least, below = (getattr(self, name), *map(each.metadata.get, ("choices", "least", "below")))
            if choices is not None and value not in choices:
                names = ", ".join(choice or "nothing" for choice in choices)
                raise ValueError(f"{name}: expected one of {names}, got {value!r}")
            if least is not None and not least <= value < below:
                expected = f"at least {least}" if below is None or below == math.inf else f"{least} to {below - 1}"
                if type(each.default) is float:
                    expected = "a finite number, 0 or more" if below == math.inf else "0 or more and less than 1"
                raise ValueError(f"{name}: expected {expected}, got {value}")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs: expected less than epochs={self.epochs}, got {self.warmup_epochs}")
        if self.restart_factor > 1 and (not self.restart_epochs or self.cooldown_epochs):
            raise ValueError(
                f"restart_factor: expected 1 with restart_epochs={self.restart_epochs} and "
                f"cooldown_epochs={self.cooldown_epochs}: growing cycles need restarts and no cool-down, "
                f"got {self.restart_factor}"
            )
        if self.restart_epochs and self.cooldown_epochs and self.epochs % self.restart_epochs:
            raise ValueError(
                f"restart_epochs: expected a divisor of epochs={self.epochs}, after which come "
                f"cooldown_epochs={self.cooldown_epochs}, got {self.restart_epochs}"
            )
        if self.early_stop and self.resolved_protocol != "choose-epoch":
            raise ValueError(
                f"early_stop: expected 0 with protocol={self.resolved_protocol!r}, which uses no validation "
                f"images as protocol='choose-epoch' does, got {self.early_stop}"
            )
        if self.compile == "reduce-overhead" and self.grad_accumulation > 1:
            raise ValueError(
                f"compile: expected default or nothing with grad_accumulation={self.grad_accumulation}, because a CUDA "
                f"graph overwrites the gradients of the batch before, got {self.compile!r}"
            )
        if self.rank > 1 and self.method != "rlrr":
            raise ValueError(f"rank: expected 1 with method={self.method!r}, got {self.rank}")
        if self.frozen_dtype and self.method != "rlrr":
            raise ValueError(f"frozen_dtype: expected none with method={self.method!r}, got {self.frozen_dtype!r}")
        if self.checkpoint is not None and not os.path.isfile(self.checkpoint):
            raise FileNotFoundError(f"checkpoint: {self.checkpoint} does not exist")
        if self.resume is not None and not os.path.isdir(self.resume):
            raise FileNotFoundError(f"resume: {self.resume} is no folder")
        if self.resume is not None and self.out is not None:
            raise ValueError(f"out: expected none with resume={str(self.resume)!r}, where it continues, got {self.out}")


FIELDS = {each.name: each for each in dataclasses.fields(Settings)}
DEFAULTS: Mapping[str, Any] = {name: each.default for name, each in FIELDS.items()}


def check_types(values: Mapping[str, Any]) -> None:
    """Check the types of settings that were read from a file. Names that are not settings are ignored.

    Raises:
        ValueError: If a value has the wrong type. The message starts with the field.
    """
    for name, default in DEFAULTS.items():
        if name in values and name not in PATHS:
            expect(values, name, type(default))
        elif name in values and not isinstance(values[name], Path):
            expect(values, name, str, type(None))


def settings_from(options: Mapping[str, Any]) -> Settings:
    """Build settings from the user's options, then the task's recipe, then the defaults.

    Raises:
        ValueError: If the task is unknown or has no ``data_root``, or a setting is invalid.
    """
    published = _recipe(options)
    if published and options.get("data_root") is None:
        raise ValueError(f"data_root: expected the folder that holds the images of {options['task']}, got none")
    return Settings(**{**published, **_shortened_warmup(options), **options})


def _recipe(options: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of the task for the model to be trained; empty without a task."""
    task = options.get("task", "")
    return recipe(task, options.get("model", BACKBONE)) if task else {}


def _shortened_warmup(options: Mapping[str, Any]) -> dict[str, int]:
    """Scale the default warm-up with ``epochs`` if the user gave no warm-up and fewer epochs than it takes."""
    usual = {name: DEFAULTS[name] for name in ("epochs", "warmup_epochs")} | _recipe(options)
    epochs, warmup = options.get("epochs", usual["epochs"]), usual["warmup_epochs"]
    if "warmup_epochs" in options or not 1 <= epochs <= warmup:
        return {}
    return {"warmup_epochs": warmup * epochs // usual["epochs"]}


def describe_settings(options: Mapping[str, Any], skip: Collection[str] = ()) -> list[str]:
    """Describe what :func:`settings_from` adds to the user's options, a line for each kind.

    The lines name the recipe's values that are not defaults, the options that replace values of the recipe,
    and a shortened warm-up.

    Args:
        options: The user's options.
        skip: Fields to leave out.
    """
    shortened = _shortened_warmup(options)
    whole_recipe = _recipe(options)
    published = {name: value for name, value in whole_recipe.items() if name not in {*skip, *shortened}}
    kept, changed = [], []
    for name, value in published.items():
        given = options.get(name, value)
        if given != value:
            changed.append(f"{name} {format_value(given)} (recipe: {format_value(value)})")
        elif value != DEFAULTS[name]:
            kept.append(f"{name} {format_value(value)}")
    lines = [f"recipe of {options['task']}: {', '.join(kept)}"] if published else []
    if changed:
        lines.append(f"given instead: {', '.join(changed)}")
    for name, epochs in shortened.items():
        usual = whole_recipe.get(name, DEFAULTS[name])
        lines.append(f"warm-up: {epochs} epochs, not the usual {usual}, as the run has {options['epochs']}")
    return lines


def format_value(value: object) -> str:
    """Format a setting's value for messages and tables."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)
