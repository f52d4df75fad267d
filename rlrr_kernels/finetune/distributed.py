"""Several processes, as ``torchrun`` and ``accelerate launch`` start them, or one: the same code for both.

A process group is read from the environment (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR``,
``MASTER_PORT``). All processes see the run folder, so on several machines it lies on a file system that they share.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's number, and how many there are."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0


#: Whether the group may be taken down at exit: not in the middle of a step, where others would wait.
_at_rest = True


def launched() -> World:
    """What the launcher says, before or after :func:`start`."""
    return World(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def machine() -> World:
    """This process's number among those of its machine, and how many they are."""
    if launched().size == 1:
        return World()
    return World(int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def choose_device(name: str) -> torch.device:
    """``auto`` is this process's GPU, or the CPU where there is none.

    Raises:
        ValueError: a device that is not here, or one GPU named for several processes.
    """
    local = os.environ.get("LOCAL_RANK", "0") if launched().size > 1 else None
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if local is not None and device.type == "cuda":
            if device.index is not None:
                raise ValueError(f"device: expected cuda or auto with {launched().size} processes, got {name!r}")
            device = torch.device("cuda", int(local))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def start(device: torch.device) -> World:
    """Join the process group of the environment, once; without one, a world of one process."""
    world = launched()
    if world.size > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # gloo beside nccl: objects are shared from the CPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        atexit.register(_leave)
    return world


def _leave() -> None:
    # after an error others may be waiting in a collective; taking the group down would join them there
    if _at_rest and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def working() -> Iterator[None]:
    """Around work in step with others: after an error in it this process must not wait for them at exit."""
    global _at_rest
    _at_rest = False
    yield
    _at_rest = True


def on_main(world: World, work: Callable[[], T]) -> T:
    """Do something in the main process alone; all get its result, or raise its error."""
    if world.size == 1:
        return work()
    answer: list[Any] = [None, None]
    if world.main:
        try:
            answer[0] = work()
        except Exception as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def everyones(world: World, value: T) -> list[T]:
    """Each process's value, in all of them; nobody goes on before all have given theirs."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def total(world: World, *values: Tensor | float, device: torch.device) -> list[float]:
    """Each value summed over all processes, in float64."""
    sums = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
    if world.size > 1:
        dist.all_reduce(sums)
    return sums.tolist()


def wrap(model: nn.Module, world: World, parallel: str, device: torch.device) -> nn.Module:
    """What to call in training so that gradients are averaged over all processes.

    Args:
        model: on ``device``, with equal values in all processes.
        parallel: ``ddp`` wraps the model; ``fsdp`` shards its parameters in place, a block at a time.

    Returns:
        ``model`` itself in one process, and with ``fsdp``. What is written to a parameter between two forward
        passes counts in the second, also where it is one process's shard.
    """
    if world.size == 1:
        return model
    if parallel == "ddp":
        ids = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids)
    mesh = init_device_mesh(device.type, (world.size,))
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] == "blocks":
            for block in module.children():
                fully_shard(block, mesh=mesh)
    # by default the root keeps its gathered parameters after a forward pass, and after one without a backward pass
    # the next takes them again: what was written to the shards in between would not be seen
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    return model


def synchronising(wrapped: nn.Module, now: bool) -> AbstractContextManager[Any]:
    """Around forward and backward: whether gradients are averaged ``now``, or kept for the next batch."""
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(now)
    elif isinstance(wrapped, DistributedDataParallel) and not now:
        return wrapped.no_sync()
    return nullcontext()


def local(tensor: Tensor) -> Tensor:
    """The part of a parameter that lies in this process: all of it, unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather(part: Tensor, like: Tensor) -> Tensor:
    """The whole of what is sharded as ``like`` is, on the CPU. All processes must call it alike.

    Args:
        part: this process's part, or a sharded tensor.
        like: a parameter.
    """
    if isinstance(like, DTensor):
        if not isinstance(part, DTensor):
            shape, stride = like.shape, like.stride()
            part = DTensor.from_local(part, like.device_mesh, like.placements, shape=shape, stride=stride)
        part = part.full_tensor()
    return part.detach().cpu()


def scatter(whole: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`gather`: a tensor sharded and placed as the parameter ``like``. No communication."""
    whole = whole.to(like.device)
    if isinstance(like, DTensor):
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    return whole
