"""Loading batches of a split onto a device, and keeping its decoded images for the whole run."""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rlrr_kernels.finetune import distributed
from rlrr_kernels.finetune.data.images import ImageSet
from rlrr_kernels.finetune.distributed import World
from rlrr_kernels.io.files import in_units

A = TypeVar("A")
B = TypeVar("B")


def threads(workers: int) -> int:
    """Number of threads: ``workers``, or for 0 this process's share of the cores."""
    return workers or max(1, len(os.sched_getaffinity(0)) // distributed.machine().size)


def ahead(work: Callable[[A], B], items: Iterable[A], workers: int, count: int) -> Iterator[B]:
    """``map(work, items)`` in threads, at most ``count`` items ahead of the consumer."""
    pool = ThreadPoolExecutor(workers, "images")
    waiting: deque[Future[B]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def batches(
    images: ImageSet, keys: Iterable[Sequence[int | tuple[int, int]]], device: torch.device, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches: the model's inputs ``[batch, C, H, W]`` on ``device``, and int64 labels ``[batch]`` on the CPU.

    Images that are not kept are decoded by threads, up to two batches ahead. Order and random draws do not depend on
    that.

    Args:
        images: The split.
        keys: Indices of each batch, as :class:`ImageSet` takes them.
        device: Where the model is.
        workers: See :func:`threads`.

    Raises:
        OSError, ValueError: As :class:`ImageSet`, at the image's batch.
    """
    pairs = [[key if isinstance(key, tuple) else (0, key) for key in batch] for batch in keys]
    indices = [index for batch in pairs for _, index in batch]
    if images.kept:
        found: Iterator[tuple[Tensor, int]] = map(images.fixed, indices)
    else:
        found = ahead(images.fixed, indices, threads(workers), 2 * max(map(len, pairs)))
    pin = device.type == "cuda"
    for batch in pairs:
        drawn, labels = [], []
        for epoch, index in batch:
            pixels, label = next(found)
            drawn.append(images.drawn(pixels, epoch, index))
            labels.append(label)
        together = torch.empty((len(batch), *drawn[0].shape), dtype=drawn[0].dtype, pin_memory=pin)
        pixels = torch.stack(drawn, out=together).to(device, non_blocking=True)
        yield images.transform.finished(pixels), torch.tensor(labels, pin_memory=pin)


def keep(images: ImageSet, world: World, workers: int, room: int, *, quiet: bool = True) -> int:
    """Decode a split's images once for the rest of the run. All processes must call this.

    The pixels are in one mapped temporary file for all processes of a machine. The file is unlinked before it is
    written, so it disappears with the last process, even a killed one. If there is too little room, nothing is kept
    and a warning is printed.

    Args:
        images: The split; its ``kept`` is set.
        world: This process.
        workers: See :func:`threads`.
        room: Bytes that may be used.
        quiet: Whether to print no progress bar and no warning.

    Returns:
        Bytes of ``room`` that were used; the same in all processes, even if the disk of one machine is full.

    Raises:
        OSError, ValueError: As :class:`ImageSet` for an image that fails, or if the file cannot be written.
    """
    shape = tuple(images.fixed(0)[0].shape)
    record = np.dtype([("pixels", np.uint8, shape), ("label", np.int64)])
    size = len(images) * record.itemsize
    if size > room:
        _warn_not_kept(len(images), size, f"--cache leaves {in_units(room)}", quiet)
        return 0
    descriptor = _shared_file(world, len(images), size, quiet)
    if descriptor is None:
        distributed.all_gather(world, None)
        return size
    with os.fdopen(descriptor, "r+b") as file:
        machine = distributed.machine()
        own = range(machine.rank, len(images), machine.size)
        found = tqdm(ahead(images.fixed, own, threads(workers), 64), "images", len(own), leave=False, disable=quiet)
        for index, (pixels, label) in zip(own, found, strict=True):
            file.seek(index * record.itemsize)
            file.write(pixels.numpy().tobytes() + np.int64(label).tobytes())
        file.flush()
        distributed.all_gather(world, None)
        kept = np.frombuffer(mmap.mmap(file.fileno(), size), record)
    images.kept = torch.from_numpy(kept["pixels"]), kept["label"].tolist()
    return size


def _shared_file(world: World, count: int, size: int, quiet: bool) -> int | None:
    """Open an unlinked file of ``size`` bytes in all processes of the machine; None if there is no room."""
    machine = distributed.machine()
    file, name = None, ""
    try:
        if machine.main:
            try:
                file, name = tempfile.mkstemp(prefix="rlrr-images-")
                # a full disk must fail here: a store into the mapped file would kill the process
                os.posix_fallocate(file, 0, size)
            except OSError as error:
                place = os.path.dirname(name) or "the folder for temporary files (TMPDIR)"
                _warn_not_kept(count, size, f"{place}: {error.strerror}", quiet)
                if file is not None:
                    os.close(file)
                    os.unlink(name)
                file, name = None, ""
        shared = distributed.all_gather(world, name)[world.rank - machine.rank]
        if shared and not machine.main:
            file = os.open(shared, os.O_RDWR)
        distributed.all_gather(world, None)
    finally:
        if name:
            os.unlink(name)
    return file


def _warn_not_kept(count: int, size: int, why: str, quiet: bool) -> None:
    if not quiet:
        print(
            f"warning: {count:,} images are decoded in each epoch: keeping them takes {in_units(size)}; {why}",
            file=sys.stderr,
        )
