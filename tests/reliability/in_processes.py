"""Tests that run in several processes of one gloo group, on the CPU."""

import functools
import importlib
import math
import multiprocessing
import os
import tempfile
import traceback
from datetime import timedelta
from multiprocessing import connection

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

#: Beyond what any of these tests takes on a busy machine.
TIMEOUT = timedelta(minutes=20)

_meshes: list[DeviceMesh] = []


def mesh() -> DeviceMesh:
    """The mesh of this process's group; two dimensions are named "data" and "tensor"."""
    return _meshes[0]


def full(t):
    """A DTensor as a plain tensor; other tensors as they are."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def in_processes(*shape):
    """Decorate a test to run in each process of a mesh of this shape; it fails if it fails in one of them."""

    def decorate(function):
        @functools.wraps(function)
        def test():
            _run(function, shape)

        return test

    return decorate


def _run(function, shape):
    # children of a process that has used a GPU, or started autograd's threads, cannot run autograd
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm", "rlrr_kernels", "torch.distributed.fsdp", __name__])
    running, processes = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(math.prod(shape)):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (function.__module__, function.__name__, rank, shape, f"{folder}/store", theirs)
            processes.append(context.Process(target=_child, args=arguments, daemon=True))
            processes[-1].start()
            theirs.close()
            running[ours] = rank
        try:
            while running:
                ended = connection.wait(list(running), TIMEOUT.total_seconds())
                if not ended:
                    pytest.fail(f"processes {list(running.values())} did not end")
                for one in ended:
                    rank, error = running.pop(one), _received(one)
                    if error:
                        pytest.fail(f"process {rank}: {error}")
        finally:
            for process in processes:
                process.kill()
                process.join()


def _received(pipe):
    try:
        return pipe.recv()
    except EOFError:
        return "it ended without an answer"


def _child(module, name, rank, shape, store, answer):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)  # those of OpenMP do not survive a fork
    try:
        dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=math.prod(shape), timeout=TIMEOUT)
        _meshes.append(init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor")[-len(shape) :]))
        getattr(importlib.import_module(module), name).__wrapped__()
        dist.barrier()
        answer.send(None)
        dist.destroy_process_group()
    except (Exception, pytest.fail.Exception):  # pytest.raises raises the second
        answer.send(traceback.format_exc()[-3000:])
