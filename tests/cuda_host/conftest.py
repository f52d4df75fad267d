"""The machines that the kernels run on here: models of a GPU and of a Hopper GPU, on the CPU."""

import pytest

from tests.cuda_host.hopper import machine as hopper_machine
from tests.cuda_host.hopper.machine import HopperMachine
from tests.cuda_host.machine import Machine, build, compiler


@pytest.fixture(scope="session")
def machine() -> Machine:
    """The CUDA kernels, built by the host's compiler; skips where there is none."""
    if compiler() is None:
        pytest.skip("needs a C++ compiler (c++ or g++, or the one that CXX names)")
    return Machine(build())


@pytest.fixture(scope="session")
def hopper(machine) -> HopperMachine:
    """The Hopper kernels in the same way."""
    return HopperMachine(hopper_machine.build())
