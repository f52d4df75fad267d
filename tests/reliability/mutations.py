"""Damaged and hostile files out of whole ones: seeded, so that a number names the file again."""

from __future__ import annotations

import gzip
import io
import json
import random
import re
import struct
import zipfile
from collections.abc import Callable

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


#: Names that keys are replaced by.
HOSTILE_KEYS = (
    '""',
    '"../x"',
    '"/etc/passwd"',
    '"a\\u0000b"',
    '"a\\nb"',
    '"__class__"',
    f'"{300 * "x"}"',
    '"format"',
    '"\\ud800"',
)

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}:,]|[^\s\[\]{}:,"]+')


def _span(tokens: list[str], start: int) -> int:
    """The end of the JSON value that starts at a token."""
    depth = 0
    for end in range(start, len(tokens)):
        depth += (tokens[end] in ("[", "{")) - (tokens[end] in ("]", "}"))
        if depth <= 0:
            return end + 1
    return len(tokens)


def json_values(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """A value or key replaced, gone, doubled, or put in another's place; byte-order marks, other encodings."""
    tokens = _TOKEN.findall(data.decode("utf-8", "replace"))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        starts = [i for i, token in enumerate(tokens) if token not in ("]", "}", ":", ",")]
        if not starts:
            break
        start, kind = rng.choice(starts), rng.randrange(7)
        end = _span(tokens, start)
        key = tokens[end : end + 1] == [":"]
        if kind <= 2:
            tokens[start:end] = [rng.choice(HOSTILE_KEYS if key else HOSTILE_JSON)]
        elif kind == 3:
            there = rng.choice(starts)
            tokens[start:end] = tokens[there : _span(tokens, there)]
        else:
            end = _span(tokens, end + 1) if key else end
            if kind == 4:
                del tokens[start : end + (tokens[end : end + 1] == [","])]
            else:
                added = (
                    [*tokens[start:end]] if kind == 5 else [f'"extra{rng.random()}": ' * key + rng.choice(HOSTILE_JSON)]
                )
                tokens[start:start] = [*added, ","]
    encoding = rng.choice(("utf-8",) * 12 + ("utf-8-sig", "utf-16", "latin-1", "crlf"))
    if encoding == "crlf":
        return "\r\n".join(tokens).encode() + b"\r\n"
    return " ".join(tokens).encode(encoding, "replace")


def raw_bytes(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Bits flipped, bytes put in, taken out, moved or overwritten by extreme numbers; cut off; joined to ``other``."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        size = len(out)
        if not size:
            break
        at, length = rng.randrange(size), min(rng.choice((1, 2, 4, 8, 16, 64, 512)), size)
        block, there, width = out[at : at + length], rng.randrange(size), rng.choice((1, 2, 4, 8))
        kind = rng.randrange(10)
        if kind <= 2:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 3:
            out[at:at] = rng.choice((rng.randbytes(length), block))
        elif kind == 4:
            del out[at : at + length]
        elif kind == 5:
            del out[at:]
        elif kind == 6:
            out[there:there] = block
        elif kind == 7:
            out[at : at + width] = (rng.choice(EXTREMES) % 256**width).to_bytes(width, "little")
        elif kind == 8:
            out[at:] = other[rng.randrange(len(other)) if other else 0 :]
        else:
            out += rng.choice((rng.randbytes(length), block))
    return bytes(out)


def header_and_body(data: bytes) -> tuple[bytes, bytes]:
    """The JSON header of a safetensors file, and what follows it."""
    (size,) = struct.unpack("<Q", data[:8])
    return data[8 : 8 + size], data[8 + size :]


def _assembled(header: bytes, body: bytes) -> bytes:
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + body


def safetensors_header(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """The JSON header changed as such, its length right, too large, too small or absurd."""
    header, body = header_and_body(data)
    kind = rng.randrange(8)
    if kind == 0:
        size = len(header)
        length = rng.choice((*EXTREMES, size + 1, size - 1, len(data), len(data) - 8, 10**12))
        return struct.pack("<Q", length) + header + body
    if kind == 1:
        return raw_bytes(rng, data, other)
    if kind >= 6:
        return _assembled(json_values(rng, header, other), body)
    tree = json.loads(header)
    name = rng.choice([name for name in tree if name != "__metadata__"])
    tensor = tree[name]
    if kind == 2:
        types = ("F64", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "C64")
        tensor["dtype"] = rng.choice(types)
    elif kind == 3:
        shape = tensor["shape"]
        tensor["shape"] = rng.choice(([*shape, 1], shape[::-1], shape[:-1], [0], [2**40, 2**40], [2**63], [-1]))
    elif kind == 4:
        start, end = tensor["data_offsets"]
        places = [end, start], [start, end + 2**40], [start + 4, end + 4], [start, 2**64 - 1], [0, 0], [start, start]
        tensor["data_offsets"] = rng.choice(places)
    else:
        names = ("../../evil", "/etc/passwd", "a\x00b", "a\nb\x1b[31m", "", "x" * 5000, name + ".", "__proto__")
        tree[rng.choice(names)] = tree.pop(name) if rng.random() < 0.5 else tensor
    return _assembled(json.dumps(tree).encode(), body)


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
    text, body = header_and_body(data)
    header = json.loads(text)
    record = json_values(rng, header["__metadata__"]["record"].encode(), other)
    header["__metadata__"]["record"] = record.decode("utf-8", "replace")
    return _assembled(json.dumps(header).encode(), body)


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
