"""Random problems on every backend: shapes, strides, dtypes, groups, ranks, missing parts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda_host.machine import compiler
from tests.oracle import device_of
from tests.reliability import properties, soak
from tests.reliability.properties.solvers import missing

#: Backend -> examples of the first part, which is not slow; examples of a further part, and how many of those, which
#: workers share. More than 2,000 in all.
PARTS = {
    "reference": (24, 220, 2),
    "panels": (24, 220, 1),
    "cpu": (60, 400, 3),
    # on a GPU an example compiles two to five kernels, each of which takes seconds
    "triton": (6, 58 if device_of("triton") == "cpu" else 12, 3),
    "cuda_host": (12, 48, 2),
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
def test_every_property_holds_for_random_problems(name, examples, part):
    if reason := missing(name):
        pytest.skip(reason)
    passed = soak.run(name, examples, part)
    assert passed.total() >= examples
    assert min(passed.values()) >= examples // len(passed)


@pytest.mark.slow
@pytest.mark.parametrize("capability", soak.LEVELS[:3])
def test_every_property_holds_with_fewer_instructions(capability):
    if capability not in soak.lower_capabilities():
        pytest.skip("this CPU has no more than that, or there is no CPU library")
    assert soak.run_limited(capability, 120, seed=1).total() >= 120


@pytest.mark.parametrize("capability", [None, pytest.param("baseline", marks=pytest.mark.slow)])
def test_the_cpu_kernels_touch_nothing_outside_their_tensors(tmp_path, capability):
    """With the heap of ``guard.c``, where inputs, results and scratch each end where memory does."""
    if reason := missing("cpu"):
        pytest.skip(reason)
    if compiler() is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler")
    source, library = Path(properties.__file__).with_name("guard.c"), tmp_path / "guard.so"
    subprocess.run([compiler(), "-xc", "-O1", "-shared", "-fPIC", source, "-o", library], check=True)
    environment = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    environment |= {"RLRR_CPU_CAPABILITY": capability} if capability else {}
    command = [sys.executable, "-m", "tests.reliability.soak", "--backend", "cpu", "--examples", "60", "--seed", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "'values': 10" in done.stdout
