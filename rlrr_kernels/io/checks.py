"""JSON files, and checks of the values in them.

All errors are ``ValueError`` with a message of the form "name: expected X, got Y".
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

#: Largest JSON file in bytes. Real ones have some kilobytes; that of a run of a thousand epochs some hundred.
LARGEST_JSON = 16 * 2**20

#: Largest list of images in bytes: about a million images.
LARGEST_LIST = 128 * 2**20


def read_json(path: Path, largest: int = LARGEST_JSON) -> dict[str, Any]:
    """Read a JSON object in UTF-8, UTF-16 or UTF-32, as its first bytes indicate.

    Raises:
        ValueError: If the file cannot be read, has more than ``largest`` bytes, or is refused by :func:`parse_json`.
    """
    return parse_json(read_bytes(path, largest), str(path))


def read_bytes(path: Path, largest: int) -> bytes:
    """Read a whole file.

    Raises:
        ValueError: If the file cannot be read, or has more than ``largest`` bytes.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(largest + 1)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if len(data) > largest:
        raise ValueError(f"{path} has more than {largest} bytes, which is more than such a file can have")
    return data


def parse_json(data: bytes | str, source: str, *, finite: bool = False) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        data: The JSON text.
        source: What the error message calls it.
        finite: Refuse infinite numbers and NaN.

    Raises:
        ValueError: If ``data`` is no JSON object, is nested too deeply, has a number of thousands of digits, or has an
            object with a key twice.
    """
    number = _finite if finite else float
    try:
        values = json.loads(data, object_pairs_hook=_unique, parse_float=number, parse_constant=number)
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


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, got {digits:.40}")
    return number


def expect(values: Mapping[str, Any], name: str, *kinds: type, least: float | None = None) -> Any:
    """Return ``values[name]`` if its type is one of ``kinds``. An int is also a float; a bool is neither.

    Raises:
        ValueError: If it is missing, of another type, an int of more than 64 bits, less than ``least``, or (with
            ``least``) not finite.
    """
    value: Any = values.get(name)
    fits = type(value) in kinds or (type(value) is int and float in kinds)
    if type(value) is int and not -(2**63) <= value < 2**63:
        fits = False
    if not fits or (least is not None and not least <= value < float("inf")):
        wanted = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in kinds)
        bound = "" if least is None else f" of {least} or more"
        raise ValueError(f"{name}: expected {wanted}{bound}, got {value!r:.80}")
    return value


def expect_one_of(values: Mapping[str, Any], name: str, choices: Collection[str]) -> str:
    """Return ``values[name]`` if it is one of these strings.

    Raises:
        ValueError: If it is not.
    """
    value = values.get(name)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r:.40}")
    return value


def expect_text(values: Mapping[str, Any], name: str, *, empty: bool = False) -> str:
    """Return ``values[name]`` if it is one printable line of at most 500 characters, as it may be sent to a terminal.

    Raises:
        ValueError: If it is not, or is empty where ``empty`` is False.
    """
    value = values.get(name)
    if not isinstance(value, str) or not value.isprintable() or len(value) > 500 or not (value or empty):
        raise ValueError(f"{name}: expected one line of text, got {value!r:.40}")
    return value


def expect_dict(values: Mapping[str, Any], name: str, *kinds: type) -> dict[str, Any]:
    """Return ``values[name]`` if it is an object whose values are all of one of these types.

    Raises:
        ValueError: If it is not.
    """
    found: dict[str, Any] = expect(values, name, dict)
    for key, value in found.items():
        if not isinstance(value, kinds):
            raise ValueError(f"{name}: {key!r:.80} has a bad value: {value!r:.80}")
    return found


def expect_names(values: Mapping[str, Any], name: str, count: int | None) -> tuple[str, ...] | None:
    """``values[name]`` if it is a list of ``count`` strings (None: any number), None if it is null or missing.

    Raises:
        ValueError: If it is anything else.
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


def inside(path: str) -> bool:
    """Whether a relative path from a file stays below the folder that it is relative to.

    Symbolic links are not followed, as folders of images and of adapters are often made of them.
    """
    return not os.path.isabs(path) and os.path.normpath(path).split(os.sep)[0] != ".." and "\0" not in path


def sanitize(name: str) -> str:
    """Return a name from a file as it can be printed: one line, no control characters, at most 200 characters."""
    return (name if name.isprintable() else repr(name))[:200]


def error_line(error: BaseException) -> str:
    """Return an error as ``Type: first line of its message``, at most 300 characters: compilers write pages."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:300]


def summarize(problems: Sequence[str], most: int = 8) -> str:
    """Join the first ``most`` problems in one line, and say how many more there are."""
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more
