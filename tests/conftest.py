"""Where there is no GPU the Triton kernels run in Triton's interpreter, on CPU tensors."""

import os
import sys

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

from collections.abc import Generator

import pytest

from rlrr_kernels.backends.triton import launch


@pytest.hookimpl(tryfirst=True)  # before pytest itself selects by -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What launches Triton's kernels is of ``-m gpu`` too where there is a GPU: there it runs, not interpreted."""
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
    """A test that leaves the GPU unusable ends its process: every later one would fail, and name the wrong test.

    A worker of pytest-xdist is replaced by a fresh one.
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
    """Device of tensors for the Triton backend: interpreted here, real where there is a GPU."""
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
