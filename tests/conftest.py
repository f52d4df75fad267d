"""Where there is no GPU the Triton kernels run in Triton's interpreter, on CPU tensors."""

import os
import sys

# workers share the cores; with a thread for each core in each worker, spinning threads slow the suite down many times
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# PyTorch's bfloat16 products by AMX read past the end of rows, so that a NaN there reaches results
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

# faults that were recorded on this machine would change the choice of backends
os.environ.setdefault("RLRR_CHECKED", "0")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Generator

import pytest

from rlrr_kernels.backends.triton import launch
from tests.interpreter import replace_once_a_launch

if launch.interpreting() and launch.interpreter_misfit() is None:
    replace_once_a_launch()


@pytest.hookimpl(tryfirst=True)  # before pytest itself selects by -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is a GPU, tests that launch Triton's kernels are marked ``gpu``, as they run there."""
    misfit = launch.interpreter_misfit() if launch.interpreting() else None
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if item.get_closest_marker("triton") or "triton" in (params.get("backend"), params.get("name")):
            if misfit:
                item.add_marker(pytest.mark.skip(misfit))
            if torch.cuda.is_available():
                item.add_marker(pytest.mark.gpu)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, object, object]:
    """A test that leaves the GPU unusable ends its process, as every later test would fail there.

    pytest-xdist replaces a worker that ends.
    """
    report = yield
    if call.excinfo is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as fault:
            said = f"{call.excinfo.exconly()}\nThe GPU takes no more work in this process after {item.nodeid}: {fault}"
            if "PYTEST_XDIST_WORKER" in os.environ:
                print(said, file=sys.__stderr__, flush=True)
                os._exit(3)
            pytest.exit(said, returncode=3)
    return report


@pytest.fixture(
    params=[
        pytest.param("cpu", id="interpreter"),
        pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
    ]
)
def triton_device(request: pytest.FixtureRequest) -> str:
    """The device of tensors for the Triton backend: the interpreter's, and a GPU's where there is one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if request.param == "cpu":
        request.getfixturevalue("interpreted")
    return request.param


@pytest.fixture
def interpreted() -> None:
    """Skips where the kernels do not run in Triton's interpreter."""
    if not launch.interpreting():
        pytest.skip("the kernels were compiled for the GPU that is here, not interpreted")
    if (misfit := launch.interpreter_misfit()) is not None:
        pytest.skip(misfit)


@pytest.fixture
def gpu() -> str:
    """The first GPU; skips where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return "cuda"
