"""Reading files that may be damaged, or made to do harm.

Every reader here raises ``ValueError`` that names the file and nothing else, runs no code that a file brings, and takes
memory in proportion to the file: what a header claims is checked before it is believed.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import torch
from torch import Tensor, nn

#: A real one has some kilobytes, a run of a thousand epochs some hundred.
LARGEST_JSON = 16 * 2**20

#: Of a list of images: a million of them.
LARGEST_LIST = 128 * 2**20

#: Of a safetensors file, in bytes: a hundred thousand tensors fit.
LARGEST_HEADER = 16 * 2**20

#: How much an archive may unpack to: so many times its own size, and so many bytes in any case.
UNPACKED = (100, 256 * 2**20)


def read_json(path: Path, largest: int = LARGEST_JSON) -> dict[str, Any]:
    """A JSON object in UTF-8, UTF-16 or UTF-32, as its first bytes say.

    Raises:
        ValueError: it cannot be read, has more than ``largest`` bytes, is no JSON object, is nested too deeply, has
            a number of thousands of digits, or an object in it a key twice.
    """
    return parse_json(read_bytes(path, largest), str(path))


def read_bytes(path: Path, largest: int) -> bytes:
    """All of a file that has no more than ``largest`` bytes; ``ValueError`` if it has, or cannot be read."""
    try:
        with open(path, "rb") as file:
            data = file.read(largest + 1)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if len(data) > largest:
        raise ValueError(f"{path} has more than {largest} bytes, which is more than such a file can have")
    return data


def parse_json(data: bytes | str, source: str) -> dict[str, Any]:
    """As :func:`read_json`; ``source`` is what the error calls it."""
    try:
        values = json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{source}: expected a JSON object, got {type(values).__name__}")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"{key!r:.80} is there twice")
        values[key] = value
    return values


class Tensors(NamedTuple):
    """A safetensors file: the strings in its header, and its tensors on the CPU."""

    metadata: dict[str, str]
    tensors: dict[str, Tensor]


def read_safetensors(path: Path, *, values: bool = True) -> Tensors:
    """Read a safetensors file; ``values=False`` for its strings alone.

    Raises:
        ValueError: it is no such file, is damaged, has a header beyond :data:`LARGEST_HEADER`, or a name twice.
    """
    _check_readable(path)
    try:
        _check_header(path)
        with safetensors.safe_open(path, framework="pt") as file:
            names = file.keys() if values else ()
            # copies: what the library returns lies in the file, which may be written over, or become unreadable
            return Tensors(file.metadata() or {}, {name: file.get_tensor(name).clone() for name in names})
    # whatever the library makes of damage: its own error, those of dtypes it does not know, no memory
    except Exception as error:
        raise ValueError(f"{path} is not a safetensors file: {_in_line(error)}") from error


def _check_header(path: Path) -> None:
    """The library takes the last of two tensors of one name, and 100 MB of header."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > LARGEST_HEADER:
            raise ValueError(f"expected a header of up to {LARGEST_HEADER} bytes, got {size}")
        parse_json(file.read(size), "its header")


def read_pickled(path: Path) -> Any:
    """What ``torch.save`` wrote, of tensors, containers and plain values only; nothing in it is run.

    Raises:
        ValueError: it cannot be read, is damaged, holds code, or claims tensors larger than itself.
    """
    return _loaded(path, lambda: torch.load(path, map_location="cpu", weights_only=True))


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """A state dict: safetensors by the file's ending, else what ``torch.save`` wrote, as timm finds it in there.

    Raises:
        ValueError: as :func:`read_safetensors` and :func:`read_pickled`, or there is no mapping of names to tensors.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path).tensors
    from timm.models import load_state_dict

    state = _loaded(path, lambda: load_state_dict(str(path), device="cpu", weights_only=True))
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: expected a mapping of names to tensors, got {type(state).__name__}")
    return {name: tensor for name, tensor in state.items() if isinstance(name, str) and isinstance(tensor, Tensor)}


def _check_readable(path: Path) -> None:
    """Tells a file that may not be read from one that is damaged."""
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


class _Refused(ValueError):
    """Our own reason, which may be told as it is."""


def _loaded(path: Path, load: Callable[[], Any]) -> Any:
    _check_readable(path)
    try:
        _check_stored(path)
        return _checked(load(), path)
    except Exception as error:
        # torch's own message would advise to load it with code
        said = f": {error}" if isinstance(error, _Refused) else ""
        raise ValueError(f"{path} is damaged or holds more than tensors; nothing in it was run{said}") from error


def _check_stored(path: Path) -> None:
    """Refuses what torch would read, and no ``torch.save`` of tensors wrote: it may need more memory than there is."""
    # 30 bytes of a pickle can ask for a bytearray of any size, and torch allows that
    if _contains(path, b"bytearray\n"):
        raise _Refused("it holds a bytearray")
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if len(set(names)) < len(names):
        raise _Refused("it has an entry twice")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise _Refused("it is compressed, as no checkpoint is")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise _Refused("its entries overlap")


def _contains(path: Path, word: bytes) -> bool:
    before = b""
    with open(path, "rb") as file:
        while part := file.read(2**20):
            if word in before + part:
                return True
            before = part[-len(word) :]
    return False


def _checked(state: Any, path: Path) -> Any:
    """The tensors of a state dict are plain, and no larger than the file: strides of 0 make any size out of a byte."""
    size = path.stat().st_size
    for name, tensor in state.items() if isinstance(state, Mapping) else ():
        if not isinstance(tensor, Tensor):
            continue
        plain = (
            type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and tensor.device.type == "cpu"
        )
        if not plain or tensor.is_quantized:
            raise _Refused(f"{name!r:.80} is no plain tensor")
        if max(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()) > size:
            raise _Refused(f"{name!r:.80} of shape {list(tensor.shape)} claims more than the {size} bytes of the file")
    return state


class Header(NamedTuple):
    """What the header of an array in a ``.npz`` says."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def npz_headers(path: Path) -> dict[str, Header]:
    """Name -> header of the arrays in a ``.npz``. Nothing else is unpacked.

    Raises:
        ValueError: it is no such archive, has an array twice, one of Python objects, one that claims another size
            than the archive says, or it would unpack to more than :data:`UNPACKED` allows.
    """
    _check_readable(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename.endswith(".npy")]
            names = [entry.filename for entry in archive.infolist()]
            if len(set(names)) < len(names):
                raise ValueError("it has an array twice")
            claimed, allowed = sum(entry.file_size for entry in archive.infolist()), path.stat().st_size * UNPACKED[0]
            if claimed > allowed + UNPACKED[1]:
                raise ValueError(f"it would unpack to {claimed} bytes, expected at most {allowed + UNPACKED[1]}")
            return {entry.filename.removesuffix(".npy"): _header(archive, entry) for entry in entries}
    except Exception as error:
        raise ValueError(f"{path} is damaged or no .npz archive: {_in_line(error)}") from error


def _header(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Header:
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)  # type: ignore[arg-type]
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"{entry.filename}: expected an array of format 1.0 or 2.0, got {version}")
        shape, _, dtype = readers[version](file)  # type: ignore[arg-type]
        if dtype.hasobject:
            raise ValueError(f"{entry.filename} holds Python objects (allow_pickle=False)")
        count = 1
        for side in shape:  # Python's integers: NumPy's would wrap around
            count *= side
        if min(shape, default=0) < 0 or count * dtype.itemsize != entry.file_size - file.tell():
            raise ValueError(f"{entry.filename}: shape {list(shape)} of {dtype} is not what follows its header")
    return Header(tuple(shape), dtype)


def npz_arrays(path: Path, names: Collection[str]) -> dict[str, np.ndarray[Any, Any]]:
    """Arrays of a ``.npz`` whose :func:`npz_headers` were found good; their checksums are verified.

    Raises:
        ValueError: one cannot be unpacked.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}
    except Exception as error:
        raise ValueError(f"{path} is damaged or no .npz archive: {_in_line(error)}") from error


def _in_line(error: Exception) -> str:
    """An error's words in one line, of bounded length."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def inside(name: str) -> bool:
    """Whether a path that a file gives stays below the folder that it is relative to. Symbolic links are not followed:
    folders of images and of adapters are often made of them."""
    return not os.path.isabs(name) and os.path.normpath(name).split(os.sep)[0] != ".." and "\0" not in name


def expect(values: Mapping[str, Any], name: str, *kinds: type, least: float | None = None) -> Any:
    """``values[name]``, if it is of one of these types. A whole number counts as a float too, a truth value as neither.

    Raises:
        ValueError: it is missing, of another type, less than ``least``, or no finite number.
    """
    value: Any = values.get(name)
    fits = type(value) in kinds or (type(value) is int and float in kinds)
    if type(value) is int and not -(2**63) <= value < 2**63:
        fits = False  # no int64, and perhaps no float
    if not fits or (least is not None and not least <= value < float("inf")):
        wanted = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in kinds)
        bound = "" if least is None else f" of {least} or more"
        raise ValueError(f"{name}: expected {wanted}{bound}, got {value!r:.80}")
    return value


def expect_names(values: Mapping[str, Any], name: str, count: int | None) -> tuple[str, ...] | None:
    """``values[name]``, if it is a list of ``count`` strings (None: of any number); None if it is null or not there.

    Raises:
        ValueError: it is anything else.
    """
    names = expect(values, name, list, type(None))
    if names is None:
        return None
    if count is not None and len(names) != count:
        raise ValueError(f"{name}: expected {count}, one a class, got {len(names)}")
    for each in names:
        if type(each) is not str:
            raise ValueError(f"{name}: expected strings, got {each!r:.80}")
    return tuple(names)
