"""Launch every kernel twice on a GPU that is not there, and print what each launch was given.

A process of its own (``python -m tests.backends.triton.start_probe``): the kernels must not be
imported for the interpreter here. One JSON line a case: the launches of the first and of the second call, and
how often Triton's binder was asked in each.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from rlrr_kernels.backends.triton import launch
from rlrr_kernels.backends.triton.config import Config, Device
from rlrr_kernels.backends.triton.start import start

#: All but the first differ from it in that one thing.
CASES = (
    *("boxes", "split", "vectors", "another M", "float16", "no bias", "unaligned"),
    *("shift in bfloat16", "8 warps", "2 stages", "another device"),
)

launches: list[list[Any]] = []


class Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448}

    def load_binary(self, name: str, *_: Any) -> tuple[Any, ...]:
        return 1, name, 100, 0, 1024


class Driver:
    """A target, and a launcher that writes down what it is to launch."""

    target, utils = GPUTarget("cuda", 90, 32), Utils()

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def write_down(*given: Any) -> None:
            grid, stream, function = list(given[:3]), given[3], given[4]
            launches.append([function, grid, stream, metadata.num_warps, *map(plain, given[9:])])

        return write_down


def plain(argument: Any) -> Any:
    """What identifies an argument: where it lies, its sizes."""
    if isinstance(argument, TensorDescriptor):
        return ["boxes", list(argument.shape), list(argument.strides), argument.block_shape, plain(argument.base)]
    if isinstance(argument, torch.Tensor):
        return [str(argument.dtype), list(argument.shape), list(argument.stride()), argument.data_ptr() % 16]
    return argument


def calls_of(case: str) -> dict[str, Any]:
    """The three ops on zeros, with a tile and a load path of their own."""
    m = 130 if case == "another M" else 128
    dtype = torch.float16 if case == "float16" else torch.bfloat16
    x, dy, w = (torch.zeros(shape, dtype=dtype) for shape in ((m, 128), (m, 256), (256, 128)))
    u, v, f = torch.zeros(256, 1), torch.zeros(2, 1, 128), torch.zeros(256)
    bias = None if case == "no bias" else f
    if case == "unaligned":
        f = torch.zeros(257)[1:]
    if case == "shift in bfloat16":
        f = f.bfloat16()
    given: dict[str, Any] = {
        "config": Config(
            *(64, 64, 64),
            num_warps=8 if case == "8 warps" else 4,
            num_stages=2 if case == "2 stages" else 3,
            splits=2 if case == "split" else 1,
        ),
        "path": {"vectors": "vectors", "unaligned": "vectors"}.get(case, "boxes"),
    }
    return {
        "forward": lambda: launch.forward(x, w, u, v, bias, f, **given),
        "grad_input": lambda: launch.grad_input(dy, w, u, v, **given),
        "grad_scales": lambda: launch.grad_scales(dy, x, w, u, v, True, split_tokens=64, **given),
    }


def main() -> None:
    driver.set_active(Driver())
    asked = [0]
    run = JITFunction.run

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked[0] += 1
        return run(self, *args, **kwargs)

    device = Device((9, 0), 132, 232_448)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", counting))
        for name, value in (("_device", device), ("_guard", contextlib.nullcontext())):
            stack.enter_context(mock.patch.object(launch, name, lambda *_, value=value: value))
        stack.enter_context(mock.patch.object(launch, "interpreting", return_value=False))
        for case in CASES:
            device_index = 1 if case == "another device" else None
            stack.enter_context(
                mock.patch.object(launch, "start", lambda *a, index=device_index: start(*a[:-1], index))
            )
            for op, call in calls_of(case).items():
                found = []
                for _ in range(2):
                    launches.clear()
                    asked[0] = 0
                    call()
                    found.append({"launches": list(launches), "asked": asked[0]})
                print(json.dumps({"case": case, "op": op, "first": found[0], "second": found[1]}), flush=True)


if __name__ == "__main__":
    main()
