"""Data parallel training (DDP, FSDP2, FSDP1) over two processes equals one with the whole batch."""

import pytest

from tests.reliability import data_parallel
from tests.reliability.in_processes import check, outcomes


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return outcomes(data_parallel, tmp_path_factory)


@pytest.mark.slow
@pytest.mark.parametrize("name", data_parallel.CASES)
def test_two_processes(two, name):
    check(two, name)
