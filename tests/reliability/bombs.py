"""Small or sparse files that would become gigabytes, one for each reader."""

from __future__ import annotations

import copy
import gzip
import io
import json
import os
import re
import struct
import zipfile

import numpy as np
import torch

from rlrr_kernels import load_official_adapter
from rlrr_kernels.checkpoint import load_npz_backbone
from rlrr_kernels.checkpoint.manifest import Manifest
from rlrr_kernels.finetune.backbone import load_backbone
from rlrr_kernels.finetune.data.arrays import read_fashion_mnist, read_npz
from rlrr_kernels.finetune.data.tasks import read_json_list, read_text_list
from rlrr_kernels.finetune.saved_run import read_metrics, read_state
from rlrr_kernels.io.reading import read_safetensors
from tests.checkpoint.test_npz import google_arrays
from tests.reliability import hostile

GIB = 2**30

#: Kinds of them.
BOMBS = (
    *("json", "metrics", "vtab", "fgvc", "state", "safetensors", "npz", "backbone", "gzip"),
    *("pth, packed", "pth, strides", "pth, strides, legacy"),
    *("pth, bytearray", "pth, bytearray, legacy", "pth, overlapping"),
)


def sparse(path, start, size):
    """A file that begins with ``start`` and goes on with zeros that take no disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(start)
    os.truncate(path, size)
    return path


def packed_zeros(size):
    """The packed half of an array of ``size`` zero bytes, made without having it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name in ("train_images", "train_labels", "test_images", "test_labels"):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(
                    file, {"descr": "|u1", "fortran_order": False, "shape": (size, 1, 1)}
                )
                for _ in range(size // 2**20):
                    file.write(bytes(2**20))
    return buffer.getvalue()


class Zeros:
    """Pickled in 30 bytes, and so many zeros when it is read."""

    def __init__(self, size):
        self.size = size

    def __reduce__(self):
        return bytearray, (self.size,)


def overlapping(path):
    """An archive of 64 tensors whose entries are all the bytes of the first."""
    torch.save({f"a{i}": torch.full((2**20,), i / 7) for i in range(64)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist() if not re.search(r"data/[1-9]", name)}
        others = [name for name in archive.namelist() if name not in entries]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
        first = next(entry for entry in archive.infolist() if entry.filename.endswith("data/0"))
        for name in others:
            same = copy.copy(first)
            same.filename = name
            archive.filelist.append(same)
    return buffer.getvalue()


def bomb(kind, folder):
    """(what reads it, what its error says) of a small or sparse file that would become gigabytes."""
    path = folder / "a.pth"
    if kind == "json":
        path = sparse(folder / "adapter_config.json", b'{"a": [[', 2 * GIB)
        return lambda: Manifest.read(folder), "has more than 4194304 bytes"
    if kind == "metrics":
        sparse(folder / "metrics.json", b"[" * 1000, 2 * GIB)
        return lambda: read_metrics(folder), "metrics.json has more than"
    if kind == "vtab":
        path = sparse(folder / "train800.txt", b"a.jpg 1\n", 2 * GIB)
        return lambda: read_text_list(path, folder, 5), "has more than"
    if kind == "fgvc":
        path = sparse(folder / "train.json", b"{", 2 * GIB)
        return lambda: read_json_list(path), "has more than"
    if kind == "state":
        sparse(folder / "state" / "last.safetensors", struct.pack("<Q", 2**40), 2 * GIB)
        return lambda: read_state(folder), "expected a header of up to 16777216 bytes, got 1099511627776"
    if kind == "safetensors":
        header = {"a": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}
        text = json.dumps(header).encode()
        path = folder / "a.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
        return lambda: read_safetensors(path), "is not a safetensors file"
    if kind == "npz":
        path = folder / "a.npz"
        path.write_bytes(packed_zeros(2**27))
        return lambda: read_npz(path, 0), "it would unpack to 53687"
    if kind == "backbone":
        # as large as allowed, and of another shape than the model's
        path = folder / "a.npz"
        arrays = google_arrays(hostile.tiny_vit()) | {"cls": np.zeros((1, 2**22, 8), "f4")}
        np.savez_compressed(path, **arrays)
        return lambda: load_npz_backbone(hostile.tiny_vit(), path), r"cls of shape \[1, 4194304, 8\], expected"
    if kind == "gzip":
        zeros = gzip.compress(bytes(2**24), 1) * 64
        path = folder / "train-images-idx3-ubyte.gz"
        path.write_bytes(gzip.compress(struct.pack(">IIII", 2051, 6, 28, 28)) + zeros)
        return lambda: read_fashion_mnist(folder, "train"), "expected at most 60000 of 784 bytes each"
    if kind == "pth, packed":
        torch.save({"head.weight": torch.zeros(3, 8), "b": torch.zeros(2**22)}, path)
        with zipfile.ZipFile(path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in entries.items():
                archive.writestr(name, data)
        return lambda: load_official_adapter(hostile.tiny_vit(), path), "it is compressed, as no checkpoint is"
    if kind.startswith("pth, bytearray"):
        torch.save({"a": Zeros(GIB)}, path, _use_new_zipfile_serialization=kind == "pth, bytearray")
        return lambda: load_official_adapter(hostile.tiny_vit(), path), "it holds a bytearray"
    if kind == "pth, overlapping":
        path.write_bytes(overlapping(path))
        return lambda: load_backbone(hostile.tiny_vit(), path), "its entries overlap"
    stem = "transformer.encoder.layer.0.attn"
    huge = {f"{stem}.{part}.scale_line": torch.zeros(1).expand(2**34, 1) for part in ("query", "key", "value")}
    torch.save(huge, path, _use_new_zipfile_serialization=kind == "pth, strides")
    words = r"scale_line' of shape \[17179869184, 1\] claims more than the \d+ bytes of the file"
    return lambda: load_official_adapter(hostile.tiny_vit(), path), words
