"""Batches of a split on a device; and its images, as they are before anything is drawn, kept for the run."""

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
    """``workers``, or for 0 this process's share of the cores."""
    return workers or max(1, len(os.sched_getaffinity(0)) // distributed.machine().size)


def ahead(work: Callable[[A], B], items: Iterable[A], workers: int, count: int) -> Iterator[B]:
    """``map(work, items)`` by so many threads, at most ``count`` items ahead of what is taken."""
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
    """Batches in order: images as the model is given them, on ``device``, and int64 labels ``[batch]`` on the CPU.

    Images that are not kept are decoded by threads, up to two batches ahead. What is drawn and the order are the
    same either way.

    Args:
        keys: of each batch, as :class:`ImageSet` takes them.
        workers: see :func:`threads`.

    Raises:
        OSError, ValueError: as :class:`ImageSet`, at the image's batch.
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
    """Decode a split's images once, for the rest of the run. All processes must call it alike.

    They lie in one mapped file for all processes of a machine, in the folder for temporary files. Its name is removed
    before anything is in it: it ends with the last process, however that ends, and no other run meets it. Nothing
    is read of it before all is written. Where there is no room nothing is kept, and a line says so.

    Args:
        workers: see :func:`threads`.
        room: bytes that may be taken.
        quiet: no progress bar and no such line.

    Returns:
        Bytes of the room that are gone: the same in all processes, also where a machine's disk had too few.

    Raises:
        OSError, ValueError: as :class:`ImageSet`, of an image that fails; or the file cannot be written after all.
    """
    shape = tuple(images.fixed(0)[0].shape)
    record = np.dtype([("pixels", np.uint8, shape), ("label", np.int64)])
    size = len(images) * record.itemsize
    if size > room:
        _say_not_kept(len(images), size, f"--cache leaves {in_units(room)}", quiet)
        return 0
    descriptor = _shared_file(world, len(images), size, quiet)
    if descriptor is None:
        distributed.everyones(world, None)
        return size
    with os.fdopen(descriptor, "r+b") as file:
        machine = distributed.machine()
        own = range(machine.rank, len(images), machine.size)
        found = tqdm(ahead(images.fixed, own, threads(workers), 64), "images", len(own), leave=False, disable=quiet)
        for index, (pixels, label) in zip(own, found, strict=True):
            file.seek(index * record.itemsize)
            file.write(pixels.numpy().tobytes() + np.int64(label).tobytes())
        file.flush()
        distributed.everyones(world, None)
        kept = np.frombuffer(mmap.mmap(file.fileno(), size), record)
    images.kept = torch.from_numpy(kept["pixels"]), kept["label"].tolist()
    return size


def _shared_file(world: World, count: int, size: int, quiet: bool) -> int | None:
    """A new file without a name, of so many bytes, open in all processes of the machine; None: there is no room."""
    machine = distributed.machine()
    file, name = None, ""
    try:
        if machine.main:
            try:
                file, name = tempfile.mkstemp(prefix="rlrr-images-")
                # now, and not at a store into the mapped file, which would end the process
                os.posix_fallocate(file, 0, size)
            except OSError as error:
                place = os.path.dirname(name) or "the folder for temporary files (TMPDIR)"
                _say_not_kept(count, size, f"{place}: {error.strerror}", quiet)
                if file is not None:
                    os.close(file)
                    os.unlink(name)
                file, name = None, ""
        theirs = distributed.everyones(world, name)[world.rank - machine.rank]
        if theirs and not machine.main:
            file = os.open(theirs, os.O_RDWR)
        distributed.everyones(world, None)
    finally:
        if name:
            os.unlink(name)
    return file


def _say_not_kept(count: int, size: int, why: str, quiet: bool) -> None:
    if not quiet:
        print(
            f"warning: {count:,} images are decoded in each epoch: keeping them takes {in_units(size)}; {why}",
            file=sys.stderr,
        )
