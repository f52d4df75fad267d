"""Calls that a driver refuses, through Triton's own launcher; each has a twin that it accepts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from triton.runtime.driver import driver

from rlrr_kernels.backends.triton import launch, start
from rlrr_kernels.backends.triton.choose import Choice
from tests.backends.triton.driver import cases
from tests.backends.triton.driver.stand_in import Machine

BF16, SWIZZLE_128 = 9, 3  # as the driver numbers them


def _map(t: torch.Tensor, **changed: Any) -> Callable[[], Any]:
    """Triton's call for a box of ``[64, 64]`` bfloat16, with some of its arguments changed."""
    utils: Any = driver.active.utils
    # 3.6's is called otherwise
    encode = getattr(utils, "fill_tma_descriptor_tiled", None) or utils.fill_tma_descriptor
    address = t.data_ptr() + changed.get("offset", 0)
    box, shape, strides = (
        changed.get("box", [64, 64]),
        changed.get("shape", [128, 128]),
        changed.get("strides", [128, 1]),
    )
    return lambda: encode(address, changed.get("swizzle", SWIZZLE_128), 2, BF16, box, shape, strides, 0)


def calls(machine: Machine) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """(name, part of the reason that the driver or the launcher must give, call); no reason: it must be accepted."""
    machine.device = cases.HOPPER
    machine._exchange(cases.HOPPER)
    t = torch.empty(128, 128, dtype=torch.bfloat16)
    yield "a map", "", _map(t)
    yield "a map from 8 bytes on", "address is no multiple of 16", _map(t, offset=8, shape=[127, 128])
    yield "a map of rows of 248 bytes", "stride is no multiple of 16", _map(t, shape=[128, 124], strides=[124, 1])
    yield "a map of rows that overlap", "rows overlap", _map(t, strides=[64, 1])
    yield "a map of no rows", "dimension 1 is not 1 to 2^32", _map(t, shape=[0, 128])
    yield "a map beyond the memory", "reaches beyond the device's memory", _map(t, shape=[129, 128])
    yield "a box of 512 rows", "box dimension 1 is not 1 to 256", _map(t, box=[512, 64])
    yield "a box of rows of 8 bytes", "a row of the box is no multiple of 16", _map(t, box=[64, 4])
    yield "a box of rows of 256 bytes", "longer than the swizzle's span", _map(t, box=[64, 128])
    yield "the same without a swizzle", "", _map(t, box=[64, 128], swizzle=0)
    machine._exchange(cases.AMPERE)
    yield "a map where there is no copy engine", "device 8.0 has no tensor maps", _map(t)
    machine._exchange(cases.HOPPER)

    choice = Choice(64, 64, 64, num_warps=4, num_stages=2)  # less shared memory than any block may have
    given = cases.tensors(cases.Case("plain"))
    x, w, u, v, b, f = (given[name] for name in ("x", "w", "u", "v", "b", "f"))
    start._handles.clear()

    def forward(**changed: Any) -> Any:
        return launch.forward(changed.get("x", x), w, u, v, b, changed.get("f", f), choice=choice)

    yield "a launch", "", forward
    foreign = memoryview(bytearray(1024 * 4))
    with torch._C.DisableTorchFunction():
        host = torch.frombuffer(foreign, dtype=torch.float32)[:256]
    yield "memory that is not the device's", "is not the device's", lambda: forward(f=host)

    (handle,) = start._handles.values()
    (_, operands, free, numbers, constants) = caught(forward)
    packed = handle.packed_metadata

    def again(grid: tuple[int, int, int] = (4, 1, 1), shared: int | None = None, warps: int | None = None) -> None:
        """The launch by its handle, with some of what Triton gives the driver changed."""
        num_warps, ctas, bytes_, *rest = packed
        handle.packed_metadata = (warps or num_warps, ctas, shared or bytes_, *rest)
        try:
            handle[grid](*operands, *free, *numbers, *constants.values())
        finally:
            handle.packed_metadata = packed

    yield "the launch by its handle", "", again
    yield "a grid as large as can be", "", lambda: again(grid=(2**31 - 1, 1, 1))
    yield "65,536 in the grid's second dimension", "grid y is not 1 to 65535", lambda: again(grid=(1, 65536, 1))
    yield "65,536 in the grid's third dimension", "grid z is not 1 to 65535", lambda: again(grid=(1, 1, 65536))
    yield "more warps than compiled for", "a block of 256 threads, the kernel takes 128", lambda: again(warps=8)
    yield "shared memory not opted in to", "opted in to 49152", lambda: again(shared=50_000)
    yield "more shared memory than there is", "the device has 232448", lambda: again(shared=232_449)
    active: Any = driver.active
    stream = active.get_current_stream
    active.get_current_stream = lambda device: stream(device) + 1
    yield "a stream of another device", "is not one of device 0", again
    active.get_current_stream = stream
    yield from _while_capturing(machine, forward, handle)
    machine._exchange(cases.BLACKWELL)
    yield "a kernel of another device", "the kernel was loaded on device 0, current is 2", again
    machine._exchange(cases.HOPPER)


def _while_capturing(machine: Machine, forward: Any, handle: Any) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    m, n, k, _ = cases.Case("").shape
    larger = torch.empty(m + 16, k, dtype=torch.bfloat16)
    given = cases.tensors(cases.Case("", dtype="float16"))
    cold = cases.calls(cases.Case("", dtype="float16", ops=("forward",)), given)["forward"]

    def load() -> None:
        utils: Any = driver.active.utils
        utils.load_binary(handle.name, handle.kernel, handle.metadata.shared, cases.HOPPER)

    machine.capture(True)
    yield "capture: a module", "a stream is capturing", load
    yield "capture: a kept handle", "", forward
    yield "capture: another size, for which the kernel is there", "", lambda: forward(x=larger)
    expected = f"forward_kernel is not on the GPU yet for [{m}, {k}] float16, [{n}, {k}] float16"
    yield "capture: a first use", expected, cold
    machine.capture(False)
    yield "capture over: the first use", "", cold
    machine.capture(True)
    yield "capture: warmed up", "", cold
    machine.capture(False)


def caught(call: Callable[[], Any]) -> Any:
    """grid, operands, free and other numbers, and constants of the launch that a call makes, which is not made."""
    found: list[Any] = []
    before = launch.start
    launch.start = lambda kernel, *args: found.append(args)
    try:
        call()
    finally:
        launch.start = before
    return found[0][:5]
