"""What training changed, as one safetensors file: written whole or not at all, checked when loaded."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor, nn

FORMAT = "rlrr_kernels.adapter/1"


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor of every parameter that needs gradients, contiguous on the CPU."""
    return {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, meets the old content or the new, nothing between."""
    path = Path(path)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            # temporary files are private; what is left behind has the usual permissions
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(file.name, 0o666 & ~umask)
            os.replace(file.name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file.name)
            raise


def save_adapter(model: nn.Module, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write the trainable parameters of ``model`` to ``path`` (safetensors), atomically.

    Args:
        model: as :func:`~rlrr_kernels.apply_rlrr` leaves it; the head is included if it trains.
        metadata: strings to keep in the file's header, such as the base model's name.

    Raises:
        ValueError: nothing in ``model`` trains.
    """
    state = trained_state(model)
    if not state:
        raise ValueError("model: nothing in it needs gradients, so there is nothing to save")
    write_atomically(path, save(state, metadata={**(metadata or {}), "format": FORMAT}))


def adapter_metadata(path: str | Path) -> dict[str, str]:
    """The header's strings. Raises ``ValueError`` if the file is not one :func:`save_adapter` wrote."""
    with _open(path) as file:
        return dict(file.metadata())


def load_adapter(model: nn.Module, path: str | Path) -> None:
    """Copy a saved adapter into the trainable parameters of ``model``.

    The model must be prepared as it was when saved (same :func:`~rlrr_kernels.apply_rlrr`).
    All names and shapes are checked before anything is copied. Values are cast to
    the parameters' dtypes.

    Raises:
        ValueError: no adapter file, or names or shapes that differ from the model's.
        FileNotFoundError: no such file.
    """
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with _open(path) as file:
        names = set(file.keys())
        problems = [f"missing {name}" for name in sorted(wanted.keys() - names)]
        problems += [f"unexpected {name}" for name in sorted(names - wanted.keys())]
        for name in sorted(wanted.keys() & names):
            shape, expected = file.get_slice(name).get_shape(), list(wanted[name].shape)
            if shape != expected:
                problems.append(f"{name} of shape {shape}, expected {expected}")
        if problems:
            shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
            raise ValueError(f"adapter {path} does not fit the model: {shown}")
        tensors = {name: file.get_tensor(name) for name in names}
    with torch.no_grad():
        for name, tensor in tensors.items():
            wanted[name].copy_(tensor)


@contextlib.contextmanager
def _open(path: str | Path):  # type: ignore[no-untyped-def]  # safetensors ships no types
    if not Path(path).is_file():
        raise FileNotFoundError(f"adapter file {path} does not exist")
    try:
        file = safetensors.safe_open(path, framework="pt")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    with file:
        found = (file.metadata() or {}).get("format")
        if found != FORMAT:
            raise ValueError(f"{path}: expected a file of format {FORMAT!r}, got {found!r}")
        yield file
