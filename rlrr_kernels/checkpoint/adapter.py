"""Saving and loading adapters. An adapter is a folder with these files::

adapter_config.json        what it was trained on and how: manifest.py
adapter_model.safetensors  all tensors that are trained, under their names in the model, with the head and the
                           running statistics of batch norms: trained.py
README.md                  a card for people and model hubs: card.py
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
from rlrr_kernels.layers.linear import FusedRLRRLinear
from rlrr_kernels.layers.ownership import reshard
from rlrr_kernels.models.adapt import apply_rlrr
from rlrr_kernels.models.config import RLRRConfig
from rlrr_kernels.models.modules import adapters, head, plain_name, unwrapped
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
    """Save the trained tensors of ``model`` as an adapter folder.

    A new folder is written in one step. If the folder holds an adapter of the same configuration (of an earlier epoch),
    its tensors and then its card are replaced, each in one step.

    Args:
        model: A model after :func:`~rlrr_kernels.apply_rlrr`, merged or not; or any model with parameters that need
            gradients. May be compiled or wrapped for data-parallel training. If its parameters are sharded (FSDP),
            call this on every process; the first one writes.
        folder: Created with its parents if necessary.
        metadata: Strings to store with the tensors, such as the data set's name and the accuracy.
        overwrite: Replace a folder that holds an adapter of another configuration.
        class_names: Names of the classes in the order of the logits, for the configuration and the card.

    Raises:
        ValueError: If no parameter needs gradients, a tensor has no data (meta device), adapters are switched off, the
            scaling of a layer is no finite number above 0, or the number of ``class_names`` is not the model's
            ``num_classes``.
        TypeError: If ``metadata`` or ``class_names`` contains anything but strings.
        FileExistsError: If the folder holds an adapter of another configuration and ``overwrite`` is False, or holds
            files that are not an adapter's and would be deleted.
        RuntimeError: If the frozen weights were deleted, as by ``merge(keep=False)``.
    """
    model = unwrapped(model)
    strings = dict(metadata or {})
    if not all(isinstance(text, str) for item in strings.items() for text in item):
        raise TypeError(f"metadata: expected strings only, got {strings!r:.200}")
    if "format" in strings:
        raise ValueError("metadata: 'format' is reserved")
    _check_class_names(model, class_names)
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


def _check_class_names(model: nn.Module, class_names: Sequence[str] | None) -> None:
    if class_names is None:
        return
    if isinstance(class_names, str) or not all(isinstance(name, str) for name in class_names):
        raise TypeError(f"class_names: expected a sequence of strings, got {class_names!r:.200}")
    classes = getattr(model, "num_classes", None)
    if isinstance(classes, int) and classes != len(class_names):
        raise ValueError(f"class_names: expected {classes}, one a class of the model, got {len(class_names)}")


def _write(folder: Path, files: Mapping[str, bytes], manifest: Manifest, overwrite: bool) -> None:
    """Write the files of an adapter. ``folder`` contains no symbolic links, so that renaming renames the folder."""
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
    if _agrees(folder, manifest):
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


def _agrees(folder: Path, manifest: Manifest) -> bool:
    """Whether the configuration in a folder is the one of ``manifest``, so that only the tensors change."""
    if not (folder / CONFIG).is_file():
        return False
    try:
        return Manifest.read(folder).agrees_with(manifest)
    except ValueError:
        return False


def load_adapter(
    model: nn.Module, folder: str | Path, *, check_base: bool = True, device: torch.device | str | None = None
) -> nn.Module:
    """Load a saved adapter into ``model``, in place.

    Args:
        model: A plain model, to which :func:`~rlrr_kernels.apply_rlrr` is applied with the adapter's configuration; or
            one that is prepared already. Tensors are cast to the dtypes of its parameters. May be compiled or wrapped
            for data-parallel training. If its parameters are sharded (FSDP), call this on every process.
        folder: A folder that :func:`save_adapter` wrote.
        check_base: Check that the architecture and the frozen weights are those that the adapter was trained on.
        device: Device of trained parameters that are on the meta device (default: CPU). Frozen ones stay on meta.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: If the folder does not exist.
        NotADirectoryError: If it is a file.
        ValueError: If it is no adapter, is damaged, has another format version or base model, or names, shapes or
            dtypes do not fit the model. The model is then unchanged.
        TypeError: If the model is plain and wrapped by DDP or FSDP.

    Warns:
        UserWarning: If the model trains norms with running statistics and the adapter has none, as older ones.
    """
    target = unwrapped(model)
    reshard(target)
    folder = _check_folder(folder)
    manifest = Manifest.read(folder)
    tensors = _read(folder / WEIGHTS).tensors
    count = sum(tensor.numel() for tensor in tensors.values())
    if count != manifest.parameters:
        raise ValueError(f"{folder / WEIGHTS}: expected {manifest.parameters} numbers as {CONFIG} says, got {count}")
    if check_base:
        with _folder_in_errors(folder):
            manifest.check_architecture(target)
    config = _config_of(tensors, manifest.rlrr, target)
    prepare = check_fit(target, config, tensors, f"adapter {folder}", scalings=manifest.scalings)
    if check_base:
        with _folder_in_errors(folder):
            manifest.check_weights(target)
    if prepare:
        apply_rlrr(model, config)
        scalings = manifest.scalings or {}
        for name, layer in adapters(target):
            if isinstance(layer, FusedRLRRLinear):
                scaling = scalings.get(plain_name(name), layer.scaling)
                layer.scaling = 1 if scaling == 1 else scaling
    copy_into(target, tensors, device)
    lacking = sorted(trained_statistics(target).keys() - tensors.keys()) if manifest.rlrr is not None else []
    if lacking:
        warnings.warn(
            f"adapter {folder} is of a version that did not save running statistics: {lacking[0]}, one of "
            f"{len(lacking)}, keeps its value in the model, which may differ from the one after training",
            stacklevel=2,
        )
    return model


def _config_of(tensors: Mapping[str, Tensor], config: RLRRConfig | None, model: nn.Module) -> RLRRConfig | None:
    """The config with which ``apply_rlrr`` gives a plain model these ``tensors``.

    It is the stored one, except for two kinds of older adapters, which are recognised by their tensors: patterns used
    to match layers of the head, and heads of models outside timm used to stay frozen.
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


def adapter_metadata(folder: str | Path) -> dict[str, str]:
    """The ``metadata`` of a saved adapter. Raises the errors of :func:`load_adapter` for other folders."""
    folder = _check_folder(folder)
    Manifest.read(folder)
    return {name: text for name, text in _read(folder / WEIGHTS, values=False).metadata.items() if name != "format"}


def _check_folder(folder: str | Path) -> Path:
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
def _folder_in_errors(folder: Path) -> Iterator[None]:
    """Put the folder's name into errors."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"adapter {folder}: {error}") from error
