"""Tensor parallel by DTensor: column- and row-sharded layers and models equal one process."""

import subprocess
import sys

import pytest

from tests.reliability import tensor_parallel_2d, tensor_parallel_models
from tests.reliability.in_processes import check, parameters

QUICK = (
    "a_column_parallel_layer_equals_one_process",
    "a_row_parallel_layer_equals_one_process",
    "a_vit_trains_as_in_one_process",
)


@pytest.mark.parametrize("name", parameters(tensor_parallel_models, *QUICK))
def test_two_processes(two, name):
    check(two, name)


@pytest.mark.parametrize("name", parameters(tensor_parallel_2d))
def test_a_mesh_of_two_by_two(four, name):
    check(four, name, 4)


def test_the_package_does_not_load_dtensor():
    """Its import takes longer than the package's, and PyTorch is built without it in places."""
    script = "import rlrr_kernels, sys; print('torch.distributed.tensor' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
