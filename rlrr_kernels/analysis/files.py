"""Files that hold models and adapters. Pickles are read with ``weights_only``: code in them is not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from rlrr_kernels.io import reading

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
    return reading.read_json(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Floating-point tensors by name.

    Raises:
        FileNotFoundError, ValueError: no such file, or it holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    return {name: tensor for name, tensor in reading.read_state_dict(path).items() if tensor.is_floating_point()}
