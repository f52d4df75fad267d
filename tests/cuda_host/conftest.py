"""The machine that the kernels run on here: a model of a GPU, on the CPU."""

import pytest

from tests.cuda_host.machine import Machine, build, compiler


@pytest.fixture(scope="session")
def machine() -> Machine:
    """The CUDA kernels, built by the host's compiler; skips where there is none."""
    if compiler() is None:
        pytest.skip("needs a C++ compiler (c++ or g++, or the one that CXX names)")
    return Machine(build())
