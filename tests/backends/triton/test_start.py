"""A kernel started by its handle is started as Triton's own binder would."""

import json
import os
import subprocess
import sys

import pytest
import torch

from rlrr_kernels.backends.triton import start as start_module
from rlrr_kernels.backends.triton.start import ceil_div
from tests.once import once


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    def probe(folder):
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", "tests.backends.triton.start_probe"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr[-3000:]
        (folder / "cases").write_text(done.stdout)

    lines = (once(tmp_path_factory, "start probe", probe) / "cases").read_text().splitlines()
    return {(c["case"], c["op"]): c for c in map(json.loads, lines)}


@pytest.mark.slow
def test_the_second_call_launches_the_same_without_the_binder(cases):
    for (case, op), found in cases.items():
        first, second = found["first"], found["second"]
        assert first["launches"] == second["launches"], (case, op)
        kernels = 2 if op == "grad_scales" or case == "split" else 1
        assert len(first["launches"]) == kernels, (case, op)
        if (case, op) != ("unaligned", "forward"):
            assert second["asked"] == 0, (case, op)


@pytest.mark.slow
def test_what_the_compiled_code_depends_on_is_asked_of_the_binder(cases):
    fresh = {op: cases["boxes", op]["first"]["asked"] for op in ("forward", "grad_input", "grad_scales")}
    assert fresh == {"forward": 1, "grad_input": 1, "grad_scales": 2}
    others = ("shift in bfloat16", "8 warps", "2 stages", "another device")
    for case in ("split", "vectors", "another M", "float16", *others):
        assert cases[case, "forward"]["first"]["asked"] > 0, case
    assert cases["no bias", "forward"]["first"]["asked"] == 1
    assert cases["no bias", "grad_input"]["first"]["asked"] == 0, "it has no bias to lack"
    # which operand is not aligned changes the code, and only the binder looks at each
    assert [cases["unaligned", "forward"][n]["asked"] for n in ("first", "second")] == [1, 1]


@pytest.mark.slow
def test_a_launch_is_given_the_operands_sizes_and_constants_in_order(cases):
    (function, grid, stream, warps, *arguments), *_ = cases["split", "forward"]["first"]["launches"]
    assert (function, grid, stream, warps) == ("forward_kernel", [8, 2, 1], 7, 4)
    x, w, v, u, bias, shift, out, *numbers = arguments
    assert x == ["boxes", [128, 128], [128, 1], [64, 64], ["torch.bfloat16", [128, 128], [128, 1], 0]]
    assert w[1:4] == [[256, 128], [128, 1], [64, 64]]
    assert v[1:4] == [[2, 128], [128, 1], [1, 64]]
    assert (u[1], bias[1], shift[1], out[:2]) == ([256], [256], [256], ["torch.float32", [2, 128, 256]])
    # M, N, K, rows of a group, depth of a split, strides; then what was compiled in
    assert numbers[:11] == [128, 256, 128, 128, 64, 128, 1, 128, 1, 128, 256]
    assert numbers[11:] == [False, False, True, True, True, True, True, "ieee", False, False, 64, 64, 64]


def test_handles_are_given_up_when_there_are_too_many(monkeypatch):
    class Handle:
        def __getitem__(self, grid):
            return lambda *args: calls.append(("handle", grid, args))

    class Kernel:
        arg_names = ["operand", "size", "BLOCK"]  # noqa: RUF012

        def __getitem__(self, grid):
            return lambda *args, **constants: (calls.append("binder"), Handle())[1]

    calls = []
    monkeypatch.setattr(start_module, "CompiledKernel", Handle)
    monkeypatch.setattr(start_module, "_handles", handles := {})
    monkeypatch.setattr(start_module, "MOST_HANDLES", 2)
    kernel, x = Kernel(), torch.zeros(8)
    for size in (1, 2, 1, 3, 1):
        start_module.start(kernel, (4,), (x,), (size,), {"BLOCK": 16}, {"num_warps": 4}, None)
    # the third key finds two, and both are gone; the first is asked for anew
    assert [c if c == "binder" else c[1] for c in calls] == ["binder", "binder", (4, 1, 1), "binder", "binder"]
    assert len(handles) == 2
    kernel.pre_run_hooks = [print]
    start_module.start(kernel, (4,), (x,), (1,), {"BLOCK": 16}, {"num_warps": 4}, None)
    assert calls[-1] == "binder", "hooks want to be called"


@pytest.mark.parametrize(
    ("a", "b", "expected"), [(0, 3, 0), (1, 3, 1), (3, 3, 1), (4, 3, 2), (2**40 + 1, 2, 2**39 + 1)]
)
def test_ceil_div(a, b, expected):
    assert ceil_div(a, b) == expected
