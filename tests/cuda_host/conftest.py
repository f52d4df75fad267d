"""The CUDA kernels and the Hopper kernels, built once for all tests."""

import pytest

from tests.cuda_host.machine import HopperMachine, Machine, build, build_hopper, compiler


@pytest.fixture(scope="session")
def machine() -> Machine:
    """The CUDA kernels, built by a C++ compiler; skips if there is none."""
    if compiler() is None:
        pytest.skip("needs a C++ compiler (c++ or g++, or the one that CXX names)")
    return Machine(build())


@pytest.fixture(scope="session")
def hopper(machine) -> HopperMachine:
    """The Hopper kernels in the same way."""
    return HopperMachine(build_hopper())
