"""Where there is no GPU the Triton kernels run in Triton's interpreter, on CPU tensors."""

import os

# workers share the cores: with a thread for each core in each worker, threads that wait for each other by spinning
# take the cores from those that they wait for, and a run of seconds takes minutes
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# PyTorch's bfloat16 products by AMX tiles read past rows: a NaN beside a matrix reaches results, nn.Linear's too
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

# what failed on the developer's machine would change what auto chooses
os.environ.setdefault("RLRR_CHECKED", "0")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

from rlrr_kernels.backends.triton import launch


@pytest.fixture(
    params=[
        pytest.param("cpu", id="interpreter"),
        pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
    ]
)
def triton_device(request: pytest.FixtureRequest) -> str:
    """Device of tensors for the Triton backend: interpreted here, real where there is a GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if request.param == "cpu" and not launch.interpreting():
        pytest.skip("the kernels were compiled for the GPU that is here, not interpreted")
    return request.param


@pytest.fixture
def gpu() -> str:
    """The first GPU; skips where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return "cuda"
