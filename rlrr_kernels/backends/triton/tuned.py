"""Choices that ``rlrr-tune`` measured on this GPU, which the launcher prefers to its heuristic.

Read only here; ``rlrr_kernels.tune.store`` writes. The file is read once a process, at the first lookup. What
it says counts only for the GPU, the Triton and the kernels' sources it was measured with, so that an upgrade
falls back to the heuristic instead of using what no longer holds. A file that is damaged, in whole or in part,
costs one warning and never a training run.

``RLRR_TUNED=0`` switches it off; ``RLRR_TUNED_FILE`` names another file than ``rlrr_kernels/tuned.json`` in the
user's cache folder. Both are read with the file.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, overload

import torch

from rlrr_kernels import cachefile
from rlrr_kernels.backends.triton import config as configs
from rlrr_kernels.backends.triton.config import Arithmetic, Config, Device, Product
from rlrr_kernels.backends.triton.config import Path as LoadPath
from rlrr_kernels.backends.triton.start import ceil_div
from rlrr_kernels.backends.triton.tuned_file import Entry, Kernel, Layer, Where, fits_workspace, parse, read

#: A tuned M serves others up to this ratio away.
NEAREST = 2**0.5

#: From this many waves on, the last one, partly filled, no longer decides between tiles.
MANY_WAVES = 8


Choice = Config | tuple[Config, int]


class Table:
    """Entries by layer and M."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._tokens: dict[tuple[Where, Layer], dict[int, Entry]] = {}
        for entry in entries:
            self._tokens.setdefault((entry.where, entry.layer), {})[entry.m] = entry

    def __bool__(self) -> bool:
        return bool(self._tokens)

    def lookup(self, where: Where, layer: Layer, m: int, device: Device) -> Choice | None:
        """The choice for ``m`` tokens, or None for the heuristic's.

        It is that of the same M; else that of the nearest (by ratio) if it is within :data:`NEAREST`, and would
        launch as many waves of programs over the multiprocessors as where it was measured (or many both times).
        ``grad_scales`` keeps the number of splits, hence of programs, and divides the tokens among them anew.
        """
        tokens = self._tokens.get((where, layer))
        if not tokens:
            return None
        entry = tokens[min(tokens, key=lambda tuned: (max(tuned, m) / min(tuned, m), tuned))]
        if entry.config is None or max(entry.m, m) > NEAREST * min(entry.m, m) or not _loads(entry, device):
            return None
        if layer.kernel == "grad_scales":
            return _divided(entry, m)
        if not fits_workspace(layer, entry.config, m):
            return None
        waves, tuned = (_waves(layer, entry.config, tokens, device) for tokens in (m, entry.m))
        return entry.config if waves == tuned or min(waves, tuned) >= MANY_WAVES else None


def _waves(layer: Layer, config: Config, m: int, device: Device) -> int:
    if layer.kernel == "forward":
        columns = layer.groups * ceil_div(layer.n // layer.groups, config.block_n)
    else:
        columns = ceil_div(layer.k, config.block_k)
    return ceil_div(ceil_div(m, config.block_m) * columns * config.splits, device.multiprocessors)


def _divided(entry: Entry, m: int) -> tuple[Config, int] | None:
    """grad_scales' choice with as many splits for ``m`` tokens as the entry's has for its own, or None."""
    if entry.config is None or entry.split_tokens is None:
        return None
    if m == entry.m:
        return entry.config, entry.split_tokens
    splits = ceil_div(entry.m, entry.split_tokens)
    split_tokens = ceil_div(ceil_div(m, entry.config.block_m), splits) * entry.config.block_m
    return (entry.config, split_tokens) if ceil_div(m, split_tokens) == splits else None


def _loads(entry: Entry, device: Device) -> bool:
    """Whether the device can take it, which a file that was edited need not ask.

    The stages in flight fit in its shared memory; no ``wgmma`` has an operand in registers where that is not safe.
    """
    layer, c = entry.layer, entry.config
    assert c is not None
    from_registers = layer.kernel == "grad_scales" and layer.kind == "tf32" and c.block_n >= 64
    if from_registers and device.has_wgmma and not device.weight_left:
        return False
    if layer.kernel == "forward":
        stage = c.block_k * (c.block_m * layer.x_size + c.block_n * layer.weight_size)
    elif layer.kernel == "grad_input":
        stage = c.block_n * (c.block_m * layer.x_size + c.block_k * layer.weight_size)
    else:
        stage = c.block_m * (c.block_n + c.block_k) * layer.x_size
    return (c.num_stages - 1) * stage <= device.shared_memory


def default_file() -> Path | None:
    """Where choices are kept: ``RLRR_TUNED_FILE``, else in the user's cache folder; None where there is no home."""
    return cachefile.default_file("RLRR_TUNED_FILE", "tuned.json")


def load() -> Table:
    """The table of the file in use, empty where it is switched off or missing.

    What cannot be used is left out with one warning that names the file and the first reason.
    """
    path = default_file()
    if path is None or os.environ.get("RLRR_TUNED") == "0":
        return Table()
    missing = "there is no such file, though RLRR_TUNED_FILE names it" if os.environ.get("RLRR_TUNED_FILE") else None
    return Table(cachefile.load(path, read, parse, "left out, the heuristic chooses there", missing))


_loading = threading.Lock()
_table: Table | None = None


def _renew_lock() -> None:
    global _loading
    _loading = threading.Lock()


if hasattr(os, "register_at_fork"):  # a child inherits the lock of a thread that it lacks, locked for ever
    os.register_at_fork(after_in_child=_renew_lock)


def _loaded() -> Table:
    global _table
    with _loading:  # backward has threads of its own
        if _table is None:
            _table = load()
        return _table


@functools.lru_cache(maxsize=8192)
def _find(
    kernel: Kernel,
    m: int,
    n: int,
    k: int,
    groups: int,
    kind: Arithmetic,
    path: LoadPath,
    x_size: int,
    weight_size: int,
    device_index: int | None,
) -> Choice | None:
    table = _loaded()
    if device_index is None or not table:
        return None
    device = configs.cuda_device(device_index)
    where = Where.on(torch.cuda.get_device_name(device_index), device.capability)
    return table.lookup(where, Layer(kernel, n, k, groups, kind, path, x_size, weight_size), m, device)


def reload() -> None:
    """Forget what was read: the next lookup reads the file and the environment anew."""
    global _table
    with _loading:
        _table = None
    _find.cache_clear()


@overload
def find(
    kernel: Product,
    m: int,
    n: int,
    k: int,
    groups: int,
    kind: Arithmetic,
    path: LoadPath,
    x_size: int,
    weight_size: int,
    device_index: int | None,
) -> Config | None: ...
@overload
def find(
    kernel: Literal["grad_scales"],
    m: int,
    n: int,
    k: int,
    groups: int,
    kind: Arithmetic,
    path: LoadPath,
    x_size: int,
    weight_size: int,
    device_index: int | None,
) -> tuple[Config, int] | None: ...
def find(
    kernel: Kernel,
    m: int,
    n: int,
    k: int,
    groups: int,
    kind: Arithmetic,
    path: LoadPath,
    x_size: int,
    weight_size: int,
    device_index: int | None,
) -> Choice | None:
    """The tuned choice for a launch, or None where the heuristic is to choose.

    Args:
        kernel: which of the three.
        m, n, k, groups: tokens, output features, input features, groups of W's rows.
        kind, path: how products are computed and tiles are loaded.
        x_size, weight_size: bytes of an element of x (or dy) and of W.
        device_index: of the CUDA device; None where there is none, as in the interpreter.

    Returns:
        A Config; for ``grad_scales`` with the tokens of one split. Remembered by argument: a
        microsecond after the first time.
    """
    return _find(kernel, m, n, k, groups, kind, path, x_size, weight_size, device_index)
