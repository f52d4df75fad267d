"""The base model that others were tuned from: the weights of its linears."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn

from rlrr_kernels.io.checks import read_json
from rlrr_kernels.io.reading import read_state_dict

#: Names of classifiers in timm's models, for files that do not name their model.
HEADS = ("head", "head.fc", "head_dist", "fc", "classifier")


def linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """Layer name -> W ``[N, K]`` of each ``nn.Linear`` of a model, not copied; for adapted layers the frozen weight."""
    # state_dict also has the frozen weight of a merged layer
    return {
        name: module.state_dict()["weight"]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name
    }


def base_weights(base: str, checkpoint: str | Path | None = None) -> dict[str, Tensor]:
    """Layer name -> W ``[N, K]`` of all linears except the head.

    Args:
        base: Name of a timm model; or a run folder, for its model and weights; or a file with a state dict. In a file,
            the head is recognised by its name: one of :data:`HEADS`, or the one of the model that the file names
            (``rlrr-finetune merge`` writes that).
        checkpoint: Weights for the model instead of its pretrained ones or the run's: safetensors, ``.pth``, or a
            published ``.npz``.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If the model is unknown, or its weights cannot be read or do not fit.
    """
    path = Path(base)
    if path.is_file():
        if checkpoint is not None:
            raise ValueError(f"checkpoint: expected none with a base that is a file, {path}")
        return _weights_of_file(path)
    name, pretrained = base, True
    if path.is_dir():
        settings = read_json(existing(path / "metrics.json")).get("settings")
        if not isinstance(settings, dict) or not isinstance(settings.get("model"), str):
            raise ValueError(f"{path / 'metrics.json'}: expected the settings of a run, with the name of its model")
        name, pretrained = settings["model"], bool(settings.get("pretrained", True))
        if not pretrained and not (checkpoint or settings.get("checkpoint")):
            raise ValueError(f"{path}: the run started from random weights; name them with --checkpoint")
        checkpoint = checkpoint or settings.get("checkpoint")
    return _weights_of_timm(name, pretrained, None if checkpoint is None else Path(checkpoint))


def existing(path: Path) -> Path:
    """Return ``path`` if it is a file.

    Raises:
        FileNotFoundError: If it does not exist.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    return path


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the floating-point tensors of a state dict, by name.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is refused by :func:`~rlrr_kernels.io.reading.read_state_dict`.
    """
    return {name: tensor for name, tensor in read_state_dict(existing(path)).items() if tensor.is_floating_point()}


def _weights_of_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".npz":
        raise ValueError(f"base: {path}: expected the name of its timm model, and the file as --checkpoint")
    state, heads = read_tensors(path), _heads_of(path)
    found = {n.removesuffix(".weight"): t for n, t in state.items() if n.endswith(".weight") and t.ndim == 2}
    found = {name: weight for name, weight in found.items() if name not in heads}
    if not found:
        raise ValueError(f"{path}: no matrix named <layer>.weight in it, apart from a classifier's")
    return found


def _heads_of(path: Path) -> Collection[str]:
    """Names that the classifiers in a file may have."""
    if path.suffix != ".safetensors":
        return HEADS
    import timm

    with safe_open(path, framework="pt") as file:
        name = (file.metadata() or {}).get("model")
    config = timm.get_pretrained_cfg(name) if name else None
    own = (config.classifier if config else None) or ()
    return {*HEADS, *((own,) if isinstance(own, str) else own)}


def _weights_of_timm(name: str, pretrained: bool, checkpoint: Path | None) -> dict[str, Tensor]:
    import timm

    from rlrr_kernels.finetune.backbone import load_backbone

    if checkpoint is not None and not checkpoint.is_file():
        raise FileNotFoundError(f"checkpoint: {checkpoint} does not exist")
    try:
        # num_classes=0: a head would have random weights
        model = timm.create_model(name, pretrained=pretrained and checkpoint is None, num_classes=0)
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"base: {name!r} is no file or folder, and not to be had from timm: {error}") from error
    if checkpoint is not None:
        load_backbone(model, checkpoint)
    return linear_weights(model)
