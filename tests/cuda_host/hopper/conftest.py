"""The machine that the Hopper kernels run on here: a model of a Hopper GPU, on the CPU."""

import pytest

from tests.cuda_host.hopper.machine import HopperMachine, build
from tests.cuda_host.machine import compiler


@pytest.fixture(scope="session")
def hopper() -> HopperMachine:
    """The Hopper kernels, built by the host's compiler; skips where there is none."""
    if compiler() is None:
        pytest.skip("needs a C++ compiler (c++ or g++, or the one that CXX names)")
    return HopperMachine(build())
