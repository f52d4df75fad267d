"""Adapters on disk: a folder with what training changed, written whole and checked before it is loaded.

::

    adapter_config.json        what it was trained on and how, see manifest.py
    adapter_model.safetensors  every tensor that trains, the head and batch norms' running statistics included,
                               under its name in the model
    README.md                  a card for people and model hubs
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from rlrr_kernels.checkpoint import manifest as manifests
from rlrr_kernels.checkpoint.card import model_card
from rlrr_kernels.checkpoint.manifest import Manifest
from rlrr_kernels.checkpoint.trained import (
    check_enabled,
    check_fit,
    copy_into,
    trained_parameters,
    trained_statistics,
)
from rlrr_kernels.io.files import is_temporary, replace_folder, write_atomically, write_folder
from rlrr_kernels.io.reading import Tensors, read_safetensors
from rlrr_kernels.layers.ownership import reshard
from rlrr_kernels.models.adapt import apply_rlrr
from rlrr_kernels.models.config import RLRRConfig
from rlrr_kernels.models.modules import head, plain_name, unwrapped
from rlrr_kernels.ops.route import whole

CONFIG, WEIGHTS, CARD = manifests.FILE_NAME, "adapter_model.safetensors", "README.md"


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    *,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write what trains in ``model`` as an adapter folder.

    A new folder appears with all its files at once. In a folder that holds an adapter of the
    same configuration (as of an earlier epoch) the tensors are replaced, and then the card, each in one step.

    Args:
        model: as :func:`~rlrr_kernels.apply_rlrr` leaves it, merged or not; or any model of which
            only a part, or all, needs gradients. May be compiled or wrapped for data-parallel training. If
            its parameters are sharded (FSDP), call this on every process: the first one writes.
        folder: is made, with its parents, if it is not there.
        metadata: strings to keep with the tensors, such as the data set's name and the accuracy.
        overwrite: replace a folder that holds an adapter of another configuration.
        class_names: of the classes in the order of the logits, for the configuration and the card.

    Raises:
        ValueError: nothing in ``model`` trains, a tensor has no data (meta device), adapters are switched off, or
            there are more or fewer ``class_names`` than the model's ``num_classes``.
        TypeError: ``metadata`` or ``class_names`` is not strings only.
        FileExistsError: the folder holds an adapter of another configuration, and not ``overwrite``; or
            it holds other files in place of an adapter, or beside one that would be replaced as a whole.
        RuntimeError: the frozen weights are not there, as after ``merge(keep=False)``.
    """
    model = unwrapped(model)
    strings = dict(metadata or {})
    if not all(isinstance(text, str) for item in strings.items() for text in item):
        raise TypeError(f"metadata: expected strings only, got {strings!r:.200}")
    if "format" in strings:
        raise ValueError("metadata: 'format' is reserved")
    _check_names(model, class_names)
    check_enabled(model)
    reshard(model)
    parameters = trained_parameters(model)
    if not parameters:
        raise ValueError("model: nothing in it needs gradients, so there is nothing to save")
    tensors = {**parameters, **trained_statistics(model)}
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"model: {name} is on the meta device and has no data to save")
    sharded = any(hasattr(tensor, "full_tensor") for tensor in tensors.values())
    state = {name: whole(tensor).detach().cpu().contiguous() for name, tensor in tensors.items()}
    manifest = Manifest.of(model, sum(tensor.numel() for tensor in state.values()), class_names)
    if sharded and torch.distributed.get_rank() != 0:
        return
    files = {
        CONFIG: manifest.to_json(),
        WEIGHTS: save(state, metadata={**strings, "format": "pt"}),
        CARD: model_card(model, manifest, strings),
    }
    _write(Path(os.path.realpath(folder)), files, manifest, overwrite)


def _check_names(model: nn.Module, class_names: Sequence[str] | None) -> None:
    if class_names is None:
        return
    if isinstance(class_names, str) or not all(isinstance(name, str) for name in class_names):
        raise TypeError(f"class_names: expected a sequence of strings, got {class_names!r:.200}")
    classes = getattr(model, "num_classes", None)
    if isinstance(classes, int) and classes != len(class_names):
        raise ValueError(f"class_names: expected {classes}, one a class of the model, got {len(class_names)}")


def _write(folder: Path, files: Mapping[str, bytes], manifest: Manifest, overwrite: bool) -> None:
    """``folder`` is free of symbolic links, so that what is renamed is the folder itself."""
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_folder(folder, files)
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; an adapter is a folder")
    entries = sorted(folder.iterdir())
    if folder / CONFIG not in entries:
        raise FileExistsError(f"{folder} exists and is no adapter folder: it holds {entries[0].name!r}")
    ours = {e for e in entries if e.name in files or any(is_temporary(e.name, of) for of in files)}
    foreign = [entry.name for entry in entries if entry not in ours or entry.is_dir()]
    if _holds(folder, manifest):
        for name in (WEIGHTS, CARD):
            write_atomically(folder / name, files[name])
    elif not overwrite:
        raise FileExistsError(f"{folder} holds an adapter of another configuration; pass overwrite=True to replace it")
    elif foreign:
        raise FileExistsError(
            f"{folder} holds {foreign[0]!r} beside an adapter of another configuration; move it first"
        )
    else:
        replace_folder(folder, files)


def _holds(folder: Path, manifest: Manifest) -> bool:
    """Whether new tensors may stand beside the configuration that a folder holds."""
    if not (folder / CONFIG).is_file():
        return False
    try:
        return Manifest.read(folder).agrees_with(manifest)
    except ValueError:
        return False  # not readable: another configuration, which needs overwrite


def adapter_metadata(folder: str | Path) -> dict[str, str]:
    """The strings that :func:`save_adapter` was given. Raises as :func:`load_adapter` for other folders."""
    folder = _existing(folder)
    Manifest.read(folder)
    return {name: text for name, text in _read(folder / WEIGHTS, values=False).metadata.items() if name != "format"}


def load_adapter(
    model: nn.Module, folder: str | Path, *, check_base: bool = True, device: torch.device | str | None = None
) -> nn.Module:
    """Put a saved adapter into ``model``, in place.

    Args:
        model: a plain model, which :func:`~rlrr_kernels.apply_rlrr` then prepares as the adapter's
            was; or one that is prepared already. Tensors are cast to the dtypes of its parameters.
            May be compiled or wrapped for data-parallel training; sharded (FSDP): call on every process.
        folder: as :func:`save_adapter` wrote it.
        check_base: see that architecture and frozen weights are those that the adapter was trained on.
        device: where trained parameters that are on the meta device come to be (default: CPU).
            The frozen ones stay there.

    Returns:
        The same model.

    Raises:
        FileNotFoundError, NotADirectoryError: no such folder.
        ValueError: no adapter, a damaged one, one of another format version or base model, or names,
            shapes or dtypes that do not fit the model. The model is then exactly as it was.
        TypeError: a plain model that DDP or FSDP has taken over.

    Warns:
        UserWarning: an adapter of before running statistics were saved, of a model that trains some.
    """
    target = unwrapped(model)
    reshard(target)
    folder = _existing(folder)
    manifest = Manifest.read(folder)
    tensors = _read(folder / WEIGHTS).tensors
    count = sum(tensor.numel() for tensor in tensors.values())
    if count != manifest.parameters:
        raise ValueError(f"{folder / WEIGHTS}: expected {manifest.parameters} numbers as {CONFIG} says, got {count}")
    if check_base:
        with _naming(folder):
            manifest.check_architecture(target)
    config = _config_of(tensors, manifest.rlrr, target)
    prepare = check_fit(target, config, tensors, f"adapter {folder}")
    if check_base:
        with _naming(folder):
            manifest.check_weights(target)
    if prepare:
        apply_rlrr(model, config)
    copy_into(target, tensors, device)
    lacking = sorted(trained_statistics(target).keys() - tensors.keys()) if manifest.rlrr is not None else []
    if lacking:
        warnings.warn(
            f"adapter {folder} is of a version that did not save running statistics: {lacking[0]}, one of "
            f"{len(lacking)}, stays as it is in the model, which may not be what it was tuned to",
            stacklevel=2,
        )
    return model


def _config_of(tensors: Mapping[str, Tensor], config: RLRRConfig | None, model: nn.Module) -> RLRRConfig | None:
    """The config by which a plain model comes to have ``tensors``.

    It is the stored one, but for adapters written when patterns reached into the head and when heads outside of timm
    stayed frozen: those tell by their tensors.
    """
    if config is None or config.head_names:
        return config
    inside = {id(module) for module in head(model, ()).modules()}
    modules = [(plain_name(name), module) for name, module in model.named_modules() if id(module) in inside]
    adapted = [name for name, _ in modules if f"{name}.scale_out" in tensors]
    own = [f"{name}.{leaf}" for name, module in modules for leaf, _ in module.named_parameters(recurse=False)]
    if config.target_modules is not None:
        named = [name for name in adapted if name not in config.target_modules]
        config = dataclasses.replace(config, target_modules=[*config.target_modules, *named])
    if own and not adapted and not any(name in tensors for name in own):
        config = dataclasses.replace(config, train_head=False)
    return config


def _existing(folder: str | Path) -> Path:
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"adapter folder {folder} does not exist")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; an adapter is a folder with {CONFIG} and {WEIGHTS}")
    return folder


def _read(path: Path, *, values: bool = True) -> Tensors:
    if not path.is_file():
        raise ValueError(f"{path.parent} is not an adapter folder: it has no {path.name}")
    return read_safetensors(path, values=values)


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """What does not fit is told with the name of the folder that it came from."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"adapter {folder}: {error}") from error
