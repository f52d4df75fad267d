"""Groups of processes that several files ask for what became of their cases."""

import pytest

from tests.reliability import data_parallel, tensor_parallel_2d, tensor_parallel_models
from tests.reliability.in_processes import outcomes


@pytest.fixture(scope="session")
def two(request, tmp_path_factory):
    return outcomes(request, tmp_path_factory, 2, data_parallel, tensor_parallel_models)


@pytest.fixture(scope="session")
def four(request, tmp_path_factory):
    return outcomes(request, tmp_path_factory, 4, tensor_parallel_2d)
