"""Handles of compiled kernels; ``driver/`` shows that a launch by one is the launch that Triton's binder makes."""

import torch

from rlrr_kernels.backends.triton import start as start_module


def test_handles_are_given_up_when_there_are_too_many(monkeypatch):
    class Handle:
        def __getitem__(self, grid):
            return lambda *args: calls.append(("handle", grid, args))

    class Kernel:
        arg_names = ["operand", "free", "size", "BLOCK"]  # noqa: RUF012
        do_not_specialize = ["free"]  # noqa: RUF012

        def __getitem__(self, grid):
            return lambda *args, **constants: (calls.append("binder"), Handle())[1]

    calls = []
    monkeypatch.setattr(start_module, "CompiledKernel", Handle)
    monkeypatch.setattr(start_module, "_handles", handles := {})
    monkeypatch.setattr(start_module, "MOST_HANDLES", 2)
    kernel, x = Kernel(), torch.zeros(8)

    def start(free, size):
        start_module.start(kernel, (4,), (x,), (free,), (size,), {"BLOCK": 16}, {"num_warps": 4}, None)

    for free, size in enumerate((1, 2, 1, 3, 1)):
        start(free, size)
    # the third key finds two, and both are gone; the first is asked for anew
    assert [c if c == "binder" else c[1] for c in calls] == ["binder", "binder", (4, 1, 1), "binder", "binder"]
    assert calls[2][2] == (x, 2, 1, 16)
    assert len(handles) == 2
    start(2**31, 1)
    assert calls[-1] == "binder", "64 bits are other code"
    kernel.pre_run_hooks = [print]
    start(1, 1)
    assert calls[-1] == "binder", "hooks want to be called"
