"""Drawn problems on every backend: shapes, strides, dtypes, groups, missing parts."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cuda_host.machine import compiler
from tests.oracle import device_of
from tests.reliability import properties, soak
from tests.reliability.properties import run as runs
from tests.reliability.properties.run import run
from tests.reliability.properties.solvers import backend, missing
from tests.reliability.properties.strategies import cases

#: Backend -> examples of the first part, which is not slow; examples of a further part, and how many of those, which
#: workers share. More than 2,000 in all.
PARTS = {
    "reference": (48, 220, 2),
    "panels": (24, 220, 1),
    "cpu": (60, 400, 3),
    # on a GPU an example compiles two to five kernels, of seconds each
    "triton": (6, 58 if device_of("triton") == "cpu" else 12, 3),
    "cuda_host": (24, 48, 2),
    "cuda_host_large": (12, 48, 1),
    "hopper_host": (10, 30, 1),
}


@pytest.mark.parametrize(
    ("name", "examples", "part"),
    [
        *((name, few, 0) for name, (few, _, _) in PARTS.items()),
        *(
            pytest.param(name, examples, part + 1, marks=pytest.mark.slow)
            for name, (_, examples, parts) in PARTS.items()
            for part in range(parts)
        ),
        pytest.param("cuda", 420, 0, marks=pytest.mark.gpu),
    ],
)
def test_every_property_holds_of_drawn_problems(name, examples, part):
    if reason := missing(name):
        pytest.skip(reason)
    passed = run(name, examples, part)
    assert passed.total() >= examples
    assert min(passed.values()) >= examples // len(passed)


@pytest.mark.slow
@pytest.mark.parametrize("capability", soak.LEVELS[:3])
def test_every_property_holds_with_fewer_instructions(capability):
    if capability not in soak.lower_capabilities():
        pytest.skip("this CPU has no more than that, or there is no CPU library")
    assert soak.run_limited(capability, 120, seed=1).total() >= 120


@pytest.fixture(scope="module")
def guard(tmp_path_factory) -> dict[str, str]:
    """An environment whose processes have the heap of ``guard.c``."""
    if compiler() is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("guard") / "guard.so"
    source = Path(properties.__file__).with_name("guard.c")
    subprocess.run([compiler(), "-xc", "-O1", "-shared", "-fPIC", source, "-o", library], check=True)
    return os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}


TOUCH = """
import ctypes
libc, at = ctypes.CDLL(None), ctypes.c_void_p()
assert libc.posix_memalign(ctypes.byref(at), ctypes.c_size_t(64), ctypes.c_size_t(100)) == 0
{touch}
libc.free(at)
"""


@pytest.mark.parametrize(
    ("touch", "message"),
    [
        ("ctypes.memset(at.value, 1, 100)", None),
        ("ctypes.memset(at.value + 100, 1, 1)", "written past the end of a tensor"),
        ("ctypes.memset(at.value - 1, 1, 1)", "written before the start of a tensor"),
        ("ctypes.string_at(at.value + 128, 1)", ""),  # the process ends there
    ],
    ids=["inside", "written after", "written before", "read after"],
)
def test_the_guarded_heap_notices(guard, touch, message):
    done = subprocess.run(
        [sys.executable, "-c", TOUCH.format(touch=touch)], env=guard, capture_output=True, check=False
    )
    assert (done.returncode == 0) == (message is None)
    assert (message or "") in done.stderr.decode()


@pytest.mark.parametrize("capability", [None, pytest.param("baseline", marks=pytest.mark.slow)])
def test_the_cpu_kernels_touch_nothing_outside_their_tensors(guard, capability):
    """Inputs, results and scratch each end where memory does; what lies before and after each is looked at."""
    if reason := missing("cpu"):
        pytest.skip(reason)
    environment = guard | ({"RLRR_CPU_CAPABILITY": capability} if capability else {})
    command = [sys.executable, "-m", "tests.reliability.soak", "--backend", "cpu", "--examples", "60", "--seed", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "'values': 10" in done.stdout


FAULTS = {
    "one element of y": lambda got, inputs: got["y"].flatten()[-1:].add_(1e-3),
    "u's gradient in another order": lambda got, inputs: got["dscale_out"].copy_(got["dscale_out"].flip(0)),
    "a gradient of another dtype": lambda got, inputs: got.update(dscale_in=got["dscale_in"].double()),
    "a row that sees its neighbours": lambda got, inputs: got["y"].add_(0 * inputs.x.sum()),
    "something written beside x": lambda got, inputs: torch.as_strided(inputs.x, (1,), (1,), 0).fill_(1),
    "other bits each time": lambda got, inputs: got["y"].mul_(1 + 1e-7 * torch.rand(())),
    "y cut instead of rounded": lambda got, inputs: got["y"].view(torch.int32).bitwise_and_(-256),
}


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_a_planted_fault_is_found(monkeypatch, fault):
    whole = backend("reference")

    def broken(case, inputs):
        got = whole.solve(case, inputs)
        if fault is not None:
            FAULTS[fault](got, inputs)
        return got

    monkeypatch.setattr(runs, "backend", lambda name: dataclasses.replace(whole, solve=broken))
    monkeypatch.setattr(runs, "cases", float32_cases)
    if fault is None:
        assert run("whole", 60, 0, shrink=False).total() == 60
    else:
        with pytest.raises((AssertionError, BaseExceptionGroup)):
            run("broken", 60, 0, shrink=False)


def float32_cases(domain, also):
    """Cases of float32 alone, of everything and with room beside it, so that few are enough."""

    def plain(case):
        needs = (True,) * 4 + case.needs[4:]
        return dataclasses.replace(case, dtypes=("float32",) * 6, sizes=(1.0,) * 7, fence=3, needs=needs)

    return cases(dataclasses.replace(domain, empty=False), also).map(plain)
