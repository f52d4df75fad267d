"""What ``-m gpu`` selects, and what a test that loses the GPU does to those after it: in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _pytest(*options: str) -> subprocess.CompletedProcess[str]:
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_INTERPRET"))
    }
    paths = [str(ROOT / "tests" / "pretended_gpu"), str(ROOT)]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options],
        cwd=ROOT,
        env=inherited | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_tritons_cases_are_the_gpus_where_there_is_one():
    """What is parametrised by backend, and what is marked; the CPU's are not."""
    done = _pytest(
        "--collect-only", "-m", "gpu", "tests/backends/test_numerics.py", "tests/layers/test_norm_numerics.py"
    )
    names = [line for line in done.stdout.splitlines() if "::" in line]
    backends = {name.partition("[")[2].partition("-")[0].rstrip("]") for name in names if "::test_strides" in name}
    assert backends == {"gluon", "triton", "cuda"}, done.stdout + done.stderr
    assert any("test_second_derivatives_through_the_kernels" in name for name in names)


LOST = """
import pytest, torch

def lost(*_):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_before():
    pass

def test_loses_it():
    torch.cuda.synchronize = lost
    assert 1 == 2, "its own reason"

def test_after():
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_one_that_loses_the_gpu_ends_its_process_and_not_the_others(tmp_path, workers):
    """Alone it ends the session, and the next is not blamed; a worker is replaced, and the next passes there."""
    (tmp_path / "test_it.py").write_text(LOST)
    own = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "tests.conftest"]
    done = _pytest(*own, "-n", str(workers), str(tmp_path / "test_it.py"))
    said = done.stdout + done.stderr
    assert "its own reason" in said
    assert "takes no more work in this process after" in said
    if workers:
        assert "2 passed" in done.stdout
        assert "1 failed" in done.stdout
    else:
        assert done.returncode == 3
        assert "1 passed" in done.stdout
