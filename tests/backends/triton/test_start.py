"""Which calls start a kept compiled kernel. ``driver/`` shows that such a launch equals the binder's."""

import torch

from rlrr_kernels.backends.triton import start as start_module


def test_kept_kernels_are_dropped_if_there_are_too_many_and_not_used_where_the_code_differs(monkeypatch):
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
    # the third key finds two kernels kept and drops both, so the first key goes through the binder again
    assert [c if c == "binder" else c[1] for c in calls] == ["binder", "binder", (4, 1, 1), "binder", "binder"]
    assert calls[2][2] == (x, 2, 1, 16)
    assert len(handles) == 2
    start(2**31, 1)
    assert calls[-1] == "binder", "the code for 64-bit integers is another"
    kernel.pre_run_hooks = [print]
    start(1, 1)
    assert calls[-1] == "binder", "hooks must be called"
