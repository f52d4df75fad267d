"""Everything a run depends on, in one record that ``metrics.json`` repeats."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlrr_kernels.finetune.embedded import EMBEDDED_MODEL
from rlrr_kernels.linear import INITS

METHODS = ("rlrr", "linear", "full")
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Settings:
    """One fine-tuning run.

    Attributes:
        model: timm model name. The default ships with the package.
        pretrained: load timm's weights for it (a download, but for the default).
        checkpoint: load these weights instead (safetensors or ``.pth``). The head is always new.
        data: ``digits``, ``fashion-mnist``, a timm dataset name (``torch/cifar100``,
            ``hfds/...``), or a folder with ``train/<class>/*`` and ``val`` or ``test``.
        data_root: where a named dataset lies or is downloaded to.
        method: ``rlrr``; ``linear`` trains the head alone; ``full`` trains everything.
        init: start of u and v, see :class:`rlrr_kernels.FusedRLRRLinear`.
        epochs, warmup_epochs: of the cosine schedule; warm-up is part of the epochs.
        lr, warmup_lr, min_lr: peak, first and last learning rate.
        drop_path: stochastic depth rate.
        flip: mirror training images at random.
        precision: ``fp32``, or ``bf16`` under autocast.
        out: run folder; it must not exist. Default: a new one under ``runs/``.
    """

    model: str = EMBEDDED_MODEL
    pretrained: bool = True
    checkpoint: Path | None = None
    data: str = "digits"
    data_root: Path | None = None
    method: str = "rlrr"
    init: str = "paper"
    epochs: int = 20
    warmup_epochs: int = 2
    batch_size: int = 32
    lr: float = 1e-2
    warmup_lr: float = 1e-7
    min_lr: float = 1e-8
    weight_decay: float = 5e-5
    drop_path: float = 0.0
    flip: bool = False
    precision: str = "fp32"
    device: str = "auto"
    workers: int = 0
    seed: int = 0
    out: Path | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("method", METHODS), ("precision", PRECISIONS), ("init", INITS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name, least in (("epochs", 1), ("batch_size", 1), ("warmup_epochs", 0), ("workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        for name in ("lr", "warmup_lr", "min_lr", "weight_decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a finite number, 0 or more, got {getattr(self, name)}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path: expected 0 or more and less than 1, got {self.drop_path}")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs: expected less than epochs = {self.epochs}, got {self.warmup_epochs}")
        if self.checkpoint is not None and not self.checkpoint.is_file():
            raise FileNotFoundError(f"checkpoint: {self.checkpoint} does not exist")
