"""Stand-ins for GPUs, for Triton's own launcher: ``libcuda.c`` replaces the driver, ``Machine`` PyTorch's view of it.

Inside a :class:`Machine` CPU tensors claim to be on a GPU. Their memory is all that the driver knows: it refuses
pointers to anything else. Nothing is computed; the driver's log has all calls.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch.overrides import TorchFunctionMode
from triton.runtime.driver import driver

from rlrr_kernels.backends.triton import launch
from rlrr_kernels.backends.triton.choose import Device

#: Stream of device i, as ``libcuda.c`` numbers them.
FIRST_STREAM = 16


def load(folder: str) -> ctypes.CDLL:
    """``libcuda.so.1``, built from ``libcuda.c`` into ``folder`` and put in the place of a real one.

    The folder must stay: Triton's launchers are linked with what lies there.
    """
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    path = Path(folder) / "libcuda.so.1"
    flags = ["-std=gnu17", "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{include}", "-o", str(path)]
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, *flags, str(Path(__file__).with_name("libcuda.c"))], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = folder
    # by its name: what is loaded later and asks for libcuda.so.1 gets this one
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    library.stand_in_log.restype = ctypes.c_char_p
    library.stand_in_memory.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
    library.cuCtxSetCurrent.argtypes = [ctypes.c_void_p]
    return library


class Machine(TorchFunctionMode):
    """Some GPUs, numbered from 0. ``device`` is the one that all tensors lie on, ``current`` PyTorch's current one."""

    def __init__(self, devices: Sequence[Device]) -> None:
        super().__init__()
        self.devices, self.device, self.current, self.capturing = devices, 0, 0, False
        self._known: dict[tuple[int, int], torch.UntypedStorage] = {}  # kept, so that no address is used twice
        self.names: dict[str, torch.Tensor] = {}
        self._folder = tempfile.TemporaryDirectory()
        self._library = load(self._folder.name)
        for index, d in enumerate(devices):
            self._library.stand_in_device(index, *d.capability, d.multiprocessors, d.shared_memory)
        self._patches = contextlib.ExitStack()

    def log(self) -> list[dict[str, Any]]:
        """The driver's log since the last call of this, with names in place of addresses.

        Memory of a tensor in ``names`` is called so, any other ``new 0``, ``new 1`` ... in the order in which a
        launch is first given it; bytes from the start follow after a ``+``.
        """
        lines = [json.loads(line) for line in self._library.stand_in_log().decode().splitlines()]
        with torch._C.DisableTorchFunction():
            named = {t.untyped_storage().data_ptr(): name for name, t in self.names.items()}
        for line in lines:
            if "parameters" in line:
                line["parameters"] = [self._readable(p, named) for p in line["parameters"]]
        return lines

    def _readable(self, parameter: str, named: dict[int, str]) -> str | int:
        """Return the name of the memory that an address is in, or a number as an integer."""
        value = int(parameter, 16)
        for first, size in self._known if len(parameter) == 16 and value >= 2**32 else ():
            if first <= value < first + size:
                if first == 0:
                    return f"memory+{value % 16}"
                name = named.setdefault(first, f"new {sum(name.startswith('new') for name in named.values())}")
                return name if value == first else f"{name}+{value - first}"
        return value

    def capture(self, on: bool) -> None:
        """A CUDA graph's capture begins or ends on every stream."""
        self.capturing = on
        self._library.stand_in_capture(on)

    def all_memory(self) -> None:
        """Any address is the device's from here on, and the log tells no more of it than what 16 leaves."""
        self._known = {(0, 2**63): torch.UntypedStorage(0)}
        self._library.stand_in_memory(0, 2**63)

    def forget(self) -> None:
        """All memory that was the device's so far is no longer."""
        self._known.clear()
        self.names = {}
        self._library.stand_in_forget_memory()

    def _exchange(self, index: int) -> int:
        before, self.current = self.current, index if index >= 0 else self.current
        self._library.cuCtxSetCurrent(self.current + 1)
        return before

    def _properties(self, device: Any = None) -> Any:
        d = self.devices[self.current if device is None else torch.device("cuda", device).index]
        return SimpleNamespace(
            major=d.capability[0],
            minor=d.capability[1],
            multi_processor_count=d.multiprocessors,
            shared_memory_per_block_optin=d.shared_memory,
        )

    def __enter__(self) -> Machine:
        capability = lambda device=None: (self._properties(device).major, self._properties(device).minor)  # noqa: E731
        for name, value in (
            ("is_available", lambda: True),
            ("current_device", lambda: self.current),
            ("get_device_capability", capability),
            ("get_device_properties", self._properties),
            ("get_device_name", lambda device=None: "a GPU that is not there"),
            ("is_current_stream_capturing", lambda: self.capturing),
            ("_exchange_device", self._exchange),
            ("_maybe_exchange_device", self._exchange),
        ):
            self._patches.enter_context(mock.patch.object(torch.cuda, name, value))
        from triton.backends.nvidia.driver import CudaDriver

        active = CudaDriver()
        active.get_current_stream = lambda device: FIRST_STREAM + device
        driver.set_active(active)
        self._exchange(0)
        assert not launch.interpreting(), "TRITON_INTERPRET was set when the kernels were imported"
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._patches.close()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            real = func(*args)
            return torch.device("cuda", self.device) if real.type == "cpu" else real
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = "cpu"
        result = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
            for t in result if isinstance(result, tuple | list) else (result,):
                if isinstance(t, torch.Tensor) and not t.is_meta:
                    self._know(t.untyped_storage(), given)
        return result

    def _know(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        """What an op has allocated is the device's; what it was given is what it was."""
        place = storage.data_ptr(), storage.nbytes()
        if place[0] and place[0] not in given and place not in self._known:
            self._known[place] = storage
            self._library.stand_in_memory(*place)
