"""Files that hold models and adapters. Pickles are read with ``weights_only``: code in them is not run."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

# PEFT and this package call them alike
ADAPTER_TENSORS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


def adapter_folder(path: str | Path) -> Path:
    """An adapter folder: the one given, or that in a run folder.

    Raises:
        FileNotFoundError: no such folder.
    """
    path = Path(path)
    folder = path / "adapter" if (path / "adapter").is_dir() else path
    if not folder.is_dir():
        raise FileNotFoundError(f"{path}: expected an adapter folder or a run folder")
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FileNotFoundError, ValueError: no such file, or it holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(found).__name__}")
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Floating-point tensors by name.

    Raises:
        FileNotFoundError, ValueError: no such file, or it holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        if path.suffix == ".safetensors":
            state = load_file(str(path))
        else:
            from timm.models import load_state_dict

            state = load_state_dict(str(path), device="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error
    return {n: t for n, t in state.items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
