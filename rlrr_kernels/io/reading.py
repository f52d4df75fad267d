"""Readers of the binary formats of others: safetensors, ``torch.save`` and ``.npz``, in files that nobody vouches for.

Each reader raises only ``ValueError``, with the file's name. It runs no code that a file brings, and needs memory in
proportion to the file's size: sizes in a header are checked before anything is allocated.
"""

from __future__ import annotations

import contextlib
import math
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import torch
from torch import Tensor, nn

from rlrr_kernels.io.checks import parse_json

#: Largest header of a safetensors file in bytes: enough for a hundred thousand tensors.
LARGEST_HEADER = 16 * 2**20

#: An archive may unpack to this many times its own size, plus this many bytes.
UNPACKED = (100, 256 * 2**20)

_NO_NPZ = "is damaged or no .npz archive"


class _RefusedError(ValueError):
    """A reason of this module, which may be shown where the library's own message may not."""


@contextlib.contextmanager
def _reading(path: Path, fault: str, *, show: type[Exception] = Exception) -> Iterator[None]:
    """Turn every error inside into ``ValueError`` of ``fault`` and the error's message, in one line of bounded length.

    A file without permission to read is not called damaged. Only errors of type ``show`` have their message included.
    """
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    try:
        yield
    # the libraries raise all kinds: errors of their own, of unknown dtypes, MemoryError
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{path} {fault}" + (f": {reason}" if isinstance(error, show) else "")) from error


class Tensors(NamedTuple):
    """A safetensors file: the strings in its header, and its tensors on the CPU."""

    metadata: dict[str, str]
    tensors: dict[str, Tensor]


def read_safetensors(path: Path, *, values: bool = True) -> Tensors:
    """Read a safetensors file; ``values=False`` reads the strings in its header only.

    Raises:
        ValueError: If it is no such file, is damaged, has a header beyond :data:`LARGEST_HEADER`, or a name twice.
    """
    with _reading(path, "is not a safetensors file"):
        # the library takes headers of 100 MB, and of two tensors of one name the last
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > LARGEST_HEADER:
                raise ValueError(f"expected a header of up to {LARGEST_HEADER} bytes, got {size}")
            parse_json(file.read(size), "its header")
        with safetensors.safe_open(path, framework="pt") as tensors:
            names = tensors.keys() if values else ()
            # copies: the library's tensors lie in the file, which may be written over, or become unreadable
            return Tensors(tensors.metadata() or {}, {name: tensors.get_tensor(name).clone() for name in names})


def read_pickled(path: Path) -> Any:
    """Read what ``torch.save`` wrote: tensors, containers and plain values only; no code in it is run.

    Raises:
        ValueError: If it cannot be read, is damaged, holds code, or claims tensors larger than itself.
    """
    return _load(path, lambda: torch.load(path, map_location="cpu", weights_only=True))


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict: safetensors by the file's ending, else what ``torch.save`` wrote, as timm finds it in there.

    Raises:
        ValueError: As :func:`read_safetensors` and :func:`read_pickled`, or if there is no mapping of names to tensors.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path).tensors
    from timm.models import load_state_dict

    state = _load(path, lambda: load_state_dict(str(path), device="cpu", weights_only=True))
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: expected a mapping of names to tensors, got {type(state).__name__}")
    return {name: tensor for name, tensor in state.items() if isinstance(name, str) and isinstance(tensor, Tensor)}


def _load(path: Path, load: Callable[[], Any]) -> Any:
    # torch's own message would advise to load the file with its code
    with _reading(path, "is damaged or holds more than tensors; nothing in it was run", show=_RefusedError):
        _check_archive(path)
        state = load()
        _check_sizes(state, path.stat().st_size)
        return state


def _check_archive(path: Path) -> None:
    """Refuse what torch would read but ``torch.save`` of tensors never writes, as it may need any amount of memory."""
    # a pickle of 30 bytes can ask for a bytearray of any size, and torch allows that
    if _contains(path, b"bytearray\n"):
        raise _RefusedError("it holds a bytearray")
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if len({entry.filename for entry in entries}) < len(entries):
        raise _RefusedError("it has an entry twice")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise _RefusedError("it is compressed, as no checkpoint is")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise _RefusedError("its entries overlap")


def _contains(path: Path, word: bytes) -> bool:
    before = b""
    with open(path, "rb") as file:
        while part := file.read(2**20):
            if word in before + part:
                return True
            before = part[-len(word) :]
    return False


def _check_sizes(state: Any, size: int) -> None:
    """Refuse tensors that are not plain, or larger than the file of ``size`` bytes, as with strides of 0."""
    for name, tensor in state.items() if isinstance(state, Mapping) else ():
        if not isinstance(tensor, Tensor):
            continue
        plain = (
            type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and tensor.device.type == "cpu"
        )
        if not plain or tensor.is_quantized:
            raise _RefusedError(f"{name!r:.80} is no plain tensor")
        if max(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()) > size:
            raise _RefusedError(
                f"{name!r:.80} of shape {list(tensor.shape)} claims more than the {size} bytes of the file"
            )


class Header(NamedTuple):
    """The header of an array in a ``.npz``."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def npz_headers(path: Path) -> dict[str, Header]:
    """Read the headers of the arrays in a ``.npz``, by name, without unpacking the arrays.

    Raises:
        ValueError: If it is no such archive, has an array twice, an array of Python objects or of another size than the
            archive says, or would unpack to more than :data:`UNPACKED` allows.
    """
    with _reading(path, _NO_NPZ), zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if len({entry.filename for entry in entries}) < len(entries):
            raise ValueError("it has an array twice")
        claimed, allowed = sum(entry.file_size for entry in entries), path.stat().st_size * UNPACKED[0] + UNPACKED[1]
        if claimed > allowed:
            raise ValueError(f"it would unpack to {claimed} bytes, expected at most {allowed}")
        arrays = [entry for entry in entries if entry.filename.endswith(".npy")]
        return {entry.filename.removesuffix(".npy"): _header(archive, entry) for entry in arrays}


def _header(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Header:
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)  # type: ignore[arg-type]
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"{entry.filename}: expected an array of format 1.0 or 2.0, got {version}")
        shape, _, dtype = readers[version](file)  # type: ignore[arg-type]
        if dtype.hasobject:
            raise ValueError(f"{entry.filename} holds Python objects (allow_pickle=False)")
        # math.prod has Python's integers: NumPy's would overflow
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != entry.file_size - file.tell():
            raise ValueError(f"{entry.filename}: shape {list(shape)} of {dtype} is not what follows its header")
    return Header(tuple(shape), dtype)


def npz_arrays(path: Path, names: Collection[str]) -> dict[str, np.ndarray[Any, Any]]:
    """Read arrays of a ``.npz`` that :func:`npz_headers` accepted; their checksums are verified.

    Raises:
        ValueError: If an array cannot be unpacked.
    """
    with _reading(path, _NO_NPZ), np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in names}
