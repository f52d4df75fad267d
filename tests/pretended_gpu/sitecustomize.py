"""A pretended Hopper GPU, to rehearse on a CPU what will run on a GPU: Python finds this file by PYTHONPATH.

"cuda" is the CPU, a CUDA graph replays nothing, and the GPU backends are the formula: this shows only that the programs
work together, and no number means anything. ``PRETENDED_FAULT=BACKEND.PASS=KIND,...`` makes a pass of "gluon",
"triton", "cuda" or "hopper" "hang", "die" (by a signal), lose the GPU ("lost": every later call fails) or compute
something "wrong", at ``PRETENDED_TOKENS`` tokens, by default 37.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import sys
import time
import types
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

NAME, CAPABILITY = "pretended GPU", (9, 0)
#: The M at which a fault shows; the default is one of the small shapes that are checked first.
TOKENS = int(os.environ.get("PRETENDED_TOKENS", "37"))


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device | str) and str(value).partition(":")[0] == "cuda":
        return torch.device("cpu")
    return value


class _CudaIsCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:  # a device without a tensor stays "cuda"
            return func(*args, **(kwargs or {}))
        return func(*map(_on_cpu, args), **{name: _on_cpu(value) for name, value in (kwargs or {}).items()})


class _IsGenerator(type):
    def __instancecheck__(cls, value: Any, real: type = torch.Generator) -> bool:
        return isinstance(value, real)


class _Generator(metaclass=_IsGenerator):
    def __new__(cls, device: Any = "cpu", real: type = torch.Generator) -> Any:
        return real(_on_cpu(device))


class _Properties:
    name = NAME
    major, minor = CAPABILITY
    multi_processor_count = 132
    shared_memory_per_block_optin = 232448
    L2_cache_size = 0  # one copy of each input
    total_memory = 141 << 30


class _Stream:
    cuda_stream = 0

    def wait_stream(self, other: Any) -> None: ...
    def synchronize(self) -> None: ...

    def is_capturing(self) -> bool:
        return False


class _Event:
    def __init__(self, enable_timing: bool = False) -> None: ...

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: _Event) -> float:
        return max((other.at - self.at) * 1e3, 1e-4)


class _Graph:
    def replay(self) -> None: ...


def _pretend() -> None:
    _CudaIsCpu().__enter__()
    torch.Generator = _Generator  # type: ignore
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.compile = lambda model=None, **_: model if model is not None else (lambda model: model)  # type: ignore
    answers: dict[str, Any] = {
        **{"is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0},
        **{"get_device_name": NAME, "get_device_capability": CAPABILITY, "get_device_properties": _Properties},
        **{"memory_allocated": 0, "max_memory_allocated": 0, "graph_pool_handle": (0, 0)},
        **{"is_current_stream_capturing": False, "is_bf16_supported": True},
        **dict.fromkeys(
            ("synchronize", "empty_cache", "reset_peak_memory_stats", "set_device", "set_stream", "_sleep")
        ),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    for name, stands in {"Stream": _Stream, "Event": _Event, "CUDAGraph": _Graph}.items():
        setattr(torch.cuda, name, stands)
    torch.cuda.current_stream = torch.accelerator.current_stream = lambda device=None: _Stream()  # type: ignore
    for name in ("stream", "device", "graph"):
        setattr(torch.cuda, name, lambda *_, **__: contextlib.nullcontext())


def _faulty(backend: str, which: str, module: types.ModuleType) -> Any:
    from rlrr_kernels.backends import reference

    faults = dict(one.split("=") for one in os.environ.get("PRETENDED_FAULT", "").split(",") if one)

    def run(*args: Any) -> Any:
        name = "hopper" if backend == "cuda" and module.HOPPER else backend
        fault = faults.get(f"{name}.{which}") if args[0].shape[0] == TOKENS else None
        if fault == "die":
            os.kill(os.getpid(), signal.SIGSEGV)
        if fault == "hang":
            time.sleep(10_000)
        if fault == "lost":

            def raises(device: Any = None) -> None:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

            torch.cuda.synchronize = raises
            raises()
        got = getattr(reference, which)(*args)
        if fault == "wrong":
            got = tuple(g * 1.1 for g in got) if isinstance(got, tuple) else got * 1.1
        return got

    return run


class _Backends:
    """An importer of ``rlrr_kernels.backends.choice`` that puts the formula behind its GPU backends."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "rlrr_kernels.backends.choice":
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            load(module)
            from rlrr_kernels.backends import reference

            for backend in ("gluon", "triton", "cuda"):
                pretended: Any = types.ModuleType(f"pretended_{backend}")
                for which in ("forward", "grad_input", "grad_scales"):
                    setattr(pretended, which, _faulty(backend, which, pretended))
                for which in ("grad_shift", "layer_norm", "layer_norm_backward"):
                    setattr(pretended, which, getattr(reference, which))
                pretended.unsupported = lambda x, weight, rank=1: None
                pretended.unsupported_layer_norm = lambda x: None
                pretended.HOPPER = False
                pretended.build = lambda: "pretended"
                module._loaded[backend] = pretended
                if backend == "cuda":  # others set its switch for Hopper's kernels
                    sys.modules["rlrr_kernels.backends.cuda"] = pretended
            # tensors of "cuda" are on the CPU: `auto` must try for them what it tries for a GPU
            module.BACKENDS["cpu"] = ("rlrr_kernels.backends.cpu", ())
            module.BACKENDS["triton"] = ("rlrr_kernels.backends.triton", ("cuda", "cpu"))

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_pretend()
sys.meta_path.insert(0, _Backends())  # type: ignore[arg-type]
