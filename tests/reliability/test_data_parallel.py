"""Data parallel training (DDP, FSDP2, FSDP1) over two processes equals one with the whole batch."""

import pytest

from tests.reliability import data_parallel
from tests.reliability.in_processes import check, parameters


@pytest.mark.parametrize("name", parameters(data_parallel, "ddp_trains_as_one_process", "fsdp2_trains_as_one_process"))
def test_two_processes(two, name):
    check(two, name)
