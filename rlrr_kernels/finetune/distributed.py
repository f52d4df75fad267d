"""Training in one process, or in several that ``torchrun`` or ``accelerate launch`` starts.

The process group is read from the environment (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR``,
``MASTER_PORT``). All processes must see the run folder, on several machines through a shared file system.
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
    """The rank of this process and the number of processes."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0


#: Whether the process group may be destroyed at exit: not during a step, as the other processes would hang.
_idle = True


def launched() -> World:
    """The world that the launcher set in the environment; also valid before :func:`start`."""
    return World(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def machine() -> World:
    """The world of the processes on this machine."""
    if launched().size == 1:
        return World()
    return World(int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def choose_device(name: str) -> torch.device:
    """Turn a device's name into a device. ``auto`` is this process's GPU, or the CPU if there is none.

    Raises:
        ValueError: If the device cannot be used, or a GPU's number is given for several processes.
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
    """Join the process group of the environment, if there is one, and return the world."""
    world = launched()
    if world.size > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # gloo as well as nccl: Python objects are sent from the CPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        atexit.register(_leave)
    return world


def _leave() -> None:
    # after an error the others may be waiting in a collective, where destroying the group would wait too
    if _idle and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def working() -> Iterator[None]:
    """Mark work that uses collectives: after an error in it this process exits without waiting for the others."""
    global _idle
    _idle = False
    yield
    _idle = True


def on_main(world: World, work: Callable[[], T]) -> T:
    """Run ``work`` in the main process; all processes return its result or raise its error."""
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


def all_gather(world: World, value: T) -> list[T]:
    """Return the values of all processes by rank. Also a barrier."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def total(world: World, *values: Tensor | float, device: torch.device) -> list[float]:
    """Sum each value over all processes, in float64."""
    sums = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
    if world.size > 1:
        dist.all_reduce(sums)
    return sums.tolist()


def wrap(model: nn.Module, world: World, parallel: str, device: torch.device) -> nn.Module:
    """Return the module to call in training, which averages gradients over all processes.

    Args:
        model: On ``device``, with equal values in all processes.
        world: This process.
        parallel: ``ddp`` wraps the model; ``fsdp`` shards its parameters in place, block by block.
        device: This process's device.

    Returns:
        A DDP wrapper, or ``model`` itself in one process and with ``fsdp``. Values written to a parameter or shard
        take effect at the next forward pass.
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
    # by default the root keeps its gathered parameters after a forward pass. Without a backward pass the next forward
    # uses them again and would ignore values written to the shards in between
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    return model


def synchronising(wrapped: nn.Module, now: bool) -> AbstractContextManager[Any]:
    """Context of forward and backward: average gradients over processes ``now``, or only accumulate them."""
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(now)
    elif isinstance(wrapped, DistributedDataParallel) and not now:
        return wrapped.no_sync()
    return nullcontext()


def local(tensor: Tensor) -> Tensor:
    """This process's part of a parameter: its shard, or the whole if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather(part: Tensor, like: Tensor) -> Tensor:
    """Gather a tensor that is sharded as a parameter is, on the CPU. All processes must call this.

    Args:
        part: This process's part, or a sharded tensor.
        like: The parameter.
    """
    if isinstance(like, DTensor):
        if not isinstance(part, DTensor):
            shape, stride = like.shape, like.stride()
            part = DTensor.from_local(part, like.device_mesh, like.placements, shape=shape, stride=stride)
        part = part.full_tensor()
    return part.detach().cpu()


def scatter(whole: Tensor, like: Tensor) -> Tensor:
    """Shard and place a tensor as the parameter ``like``, without communication; the inverse of :func:`gather`."""
    whole = whole.to(like.device)
    if isinstance(like, DTensor):
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    return whole
