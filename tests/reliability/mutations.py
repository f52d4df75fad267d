"""Damaged and hostile files out of whole ones: seeded, so that a number names the file again."""

from __future__ import annotations

import gzip
import io
import json
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

#: JSON as text, where a parsed value could not say it.
HOSTILE_JSON = (
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, str(2**64), str(-(2**63)), "1e308", "5e-324", "-1",
    "0", "-0.0", "1.5", "true", "false", "null", '""', '"\\u0000"', '"../../../etc/passwd"', '"/etc/passwd"',
    '"a\\nb"', '"\\ud800"', '"' + "x" * 3000 + '"', "[]", "{}", "[[]]", '{"a": 1, "a": 2}', "[" * 2000 + "]" * 2000,
    "[" * 100_000, '{"a":' * 2000 + "1" + "}" * 2000, '"local-dir:/tmp"', '"hf-hub:a/b"', "[1, 2]", '["F32"]',
)  # fmt: skip

#: Numbers at which readers of binary headers stumble.
EXTREMES = (0, 1, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)

Mutation = Callable[[random.Random, bytes, bytes], bytes]


class _Raw:
    """JSON text that stands in a tree of parsed values."""

    def __init__(self, text: str) -> None:
        self.text = text


def _dump(value: Any) -> str:
    if isinstance(value, _Raw):
        return value.text
    if isinstance(value, _Pairs):
        return "{" + ", ".join(f"{json.dumps(key)}: {_dump(each)}" for key, each in value.items) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_dump, value)) + "]"
    return json.dumps(value)


class _Pairs:
    """A JSON object that may have a key twice."""

    def __init__(self, items: list[tuple[str, Any]]) -> None:
        self.items = items


def _nodes(tree: Any) -> Iterator[tuple[Any, int]]:
    """(container, index) of every value below."""
    if isinstance(tree, (_Pairs, list)):
        items = tree.items if isinstance(tree, _Pairs) else tree
        for index in range(len(items)):
            yield tree, index
            yield from _nodes(items[index][1] if isinstance(tree, _Pairs) else items[index])


def _set(container: Any, index: int, value: Any) -> None:
    if isinstance(container, _Pairs):
        container.items[index] = container.items[index][0], value
    else:
        container[index] = value


def _get(container: Any, index: int) -> Any:
    return container.items[index][1] if isinstance(container, _Pairs) else container[index]


def json_values(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """A value replaced, a key twice, renamed, added or gone, two values swapped; byte-order marks, other encodings."""
    try:
        tree = json.loads(data, object_pairs_hook=_Pairs)
    except ValueError:
        return raw_bytes(rng, data, other)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = list(_nodes(tree))
        if not places:
            return _Raw(rng.choice(HOSTILE_JSON)).text.encode()
        container, index = rng.choice(places)
        kind = rng.randrange(8)
        if kind <= 2:
            _set(container, index, _Raw(rng.choice(HOSTILE_JSON)))
        elif kind == 3:
            del (container.items if isinstance(container, _Pairs) else container)[index]
        elif kind == 4 and isinstance(container, _Pairs):
            container.items.append((container.items[index][0], _Raw(rng.choice(HOSTILE_JSON))))
        elif kind == 5 and isinstance(container, _Pairs):
            key = rng.choice(("", "../x", "/etc/passwd", "a\x00b", "a\nb", "__class__", "x" * 300, "format", "\ud800"))
            container.items[index] = key, container.items[index][1]
        elif kind == 6 and isinstance(container, _Pairs):
            container.items.insert(index, (f"extra{rng.random()}", _Raw(rng.choice(HOSTILE_JSON))))
        else:
            there, place = rng.choice(places)
            one, two = _get(container, index), _get(there, place)
            if not any(inner is there or inner is container for node in (one, two) for inner in _containers(node)):
                _set(container, index, two)
                _set(there, place, one)
    text = _dump(tree)
    encoding = rng.choice(("utf-8",) * 12 + ("utf-8-sig", "utf-16", "latin-1", "crlf"))
    if encoding == "crlf":
        return text.replace("\n", "\r\n").encode("utf-8", "surrogatepass") + b"\r\n"
    return text.encode(encoding, "replace" if encoding == "latin-1" else "surrogatepass")


def _containers(tree: Any) -> Iterator[Any]:
    if isinstance(tree, (_Pairs, list)):
        yield tree
        for container, index in list(_nodes(tree)):
            yield container
            yield _get(container, index)


def raw_bytes(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Bits flipped, bytes put in, taken out, moved or overwritten by extreme numbers; cut off; joined to ``other``."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        size = len(out)
        if not size:
            break
        at, length = rng.randrange(size), min(rng.choice((1, 2, 4, 8, 16, 64, 512)), size)
        kind = rng.randrange(10)
        if kind <= 2:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 3:
            out[at:at] = rng.randbytes(length)
        elif kind == 4:
            del out[at : at + length]
        elif kind == 5:
            del out[at:]
        elif kind == 6:
            there = rng.randrange(size)
            block = out[at : at + length]
            del out[at : at + length]
            out[there:there] = block
        elif kind == 7:
            width = rng.choice((1, 2, 4, 8))
            out[at : at + width] = (rng.choice(EXTREMES) % 256**width).to_bytes(width, "little")
        elif kind == 8:
            start = rng.randrange(len(other)) if other else 0
            out[at:] = other[start:]
        else:
            out += rng.randbytes(length) if rng.random() < 0.5 else out[at : at + length]
    return bytes(out)


def safetensors_header(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """The JSON header changed as such, its length right, too large, too small or absurd."""
    (size,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + size], data[8 + size :]
    kind = rng.randrange(10)
    if kind == 0:
        length = rng.choice((*EXTREMES, size + 1, size - 1, len(data), len(data) - 8, 10**12))
        return struct.pack("<Q", length) + header + body
    if kind == 1:
        return raw_bytes(rng, data, other)
    tree = json.loads(header)
    names = [name for name in tree if name != "__metadata__"]
    name = rng.choice(names)
    if kind == 2:
        tree[name]["dtype"] = rng.choice(
            ("F64", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "C64")
        )
    elif kind == 3:
        shape = tree[name]["shape"]
        tree[name]["shape"] = rng.choice(([*shape, 1], shape[::-1], shape[:-1], [0], [2**40, 2**40], [2**63], [-1]))
    elif kind == 4:
        start, end = tree[name]["data_offsets"]
        tree[name]["data_offsets"] = rng.choice(
            ([end, start], [start, end + 2**40], [start + 4, end + 4], [start, 2**64 - 1], [0, 0], [start, start])
        )
    elif kind == 5:
        there = rng.choice(names)
        tree[name], tree[there] = tree[there], tree[name]
    elif kind == 6:
        new = rng.choice(
            ("../../evil", "/etc/passwd", "a\x00b", "a\nb\x1b[31m", "", "x" * 5000, name + ".", "__proto__")
        )
        tree[new] = tree.pop(name) if rng.random() < 0.5 else tree[name]
    elif kind == 7:
        text = json.dumps(tree)
        entry = json.dumps({name: {**tree[name], "shape": tree[name]["shape"]}})[1:-1]
        return _assembled(f"{{{entry}, {text[1:]}".encode(), body)
    else:
        return _assembled(json_values(rng, header, other), body)
    return _assembled(json.dumps(tree).encode(), body)


def _assembled(header: bytes, body: bytes) -> bytes:
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + body


def zip_entries(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Entries of an archive damaged with right checksums; renamed, twice, gone, compressed, exchanged."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, EOFError, RuntimeError):
        return raw_bytes(rng, data, other)
    method = zipfile.ZIP_STORED
    for _ in range(rng.choice((1, 1, 2))):
        if not entries:
            break
        at, kind = rng.randrange(len(entries)), rng.randrange(8)
        name, content = entries[at]
        if kind <= 2 and content:
            # headers lie at the beginning
            head = rng.choice((128, len(content)))
            entries[at] = name, raw_bytes(rng, content[:head], other[:4096]) + content[head:]
        elif kind == 3:
            new = rng.choice(("../../evil", "/tmp/evil", "a/../../b", "C:\\evil", "a\nb", "x" * 300, name + "x", "a/"))
            entries[at] = new, content
        elif kind == 4:
            entries.append((name, rng.choice((content, b"", raw_bytes(rng, content, other[:4096])))))
        elif kind == 5:
            del entries[at]
        elif kind == 6:
            there = rng.randrange(len(entries))
            entries[at], entries[there] = (name, entries[there][1]), (entries[there][0], content)
        else:
            method = zipfile.ZIP_DEFLATED
            entries[at] = name, content + bytes(rng.choice((100, 10_000, 1_000_000)))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in entries:
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            archive.writestr(info, content)
    return buffer.getvalue()


def record_inside(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """The JSON that a state keeps as a string inside of the header's JSON, changed as such."""
    (size,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    record = json_values(rng, header["__metadata__"]["record"].encode(), other)
    header["__metadata__"]["record"] = record.decode("utf-8", "replace")
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def lines(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Lines of a list with other endings, encodings, paths and labels."""
    rows = data.decode().split("\n")
    at = rng.randrange(len(rows))
    path, label = rng.choice(("a.jpg", "../../etc/passwd", "/etc/passwd", "a/../../b", "a\0b", "ü.jpg", "a b")), "1"
    rows[at] = f"{path} {rng.choice(('-1', '5', '1_0', '9' * 5000, 'x', '1.0', '', '٣', label))}"
    return rng.choice(("\n", "\r\n", "\r", "\n\n")).join(rows).encode(rng.choice(("utf-8", "utf-8-sig", "utf-16")))


def unpacked(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """What is packed, changed and packed again."""
    return gzip.compress(raw_bytes(rng, gzip.decompress(data), other), 1)


def mutated(number: int, data: bytes, other: bytes, *mutations: Mutation) -> bytes:
    """File ``number`` of those that are made of ``data``: by one of ``mutations``, spliced with ``other``."""
    rng = random.Random(number)
    return rng.choice(mutations)(rng, data, other)
