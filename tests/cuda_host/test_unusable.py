"""The question whether a device can be used, on a runtime of two devices: its answer, and that it changes nothing."""

import ctypes
import subprocess

import pytest

from tests.cuda_host.machine import FLAGS, HERE, SOURCES, compiler

INSUFFICIENT_DRIVER, NO_KERNEL_IMAGE, LAUNCH_FAILURE = 35, 209, 719
VERSIONS = "(built with CUDA 13.0 for 80 90a, the driver serves CUDA 12.4)"


@pytest.fixture(scope="module")
def runtime(tmp_path_factory) -> ctypes.CDLL:
    if (cxx := compiler()) is None:
        pytest.skip("needs a C++ compiler (c++ or g++, or the one that CXX names)")
    library = tmp_path_factory.mktemp("runtime") / "unusable.so"
    command = [cxx, *FLAGS, f"-I{HERE / 'include'}", f"-I{SOURCES}", "-shared"]
    subprocess.run(
        [*command, "-xc++", str(SOURCES / "device.cu"), str(HERE / "runtime.cpp"), "-o", str(library)], check=True
    )
    loaded = ctypes.CDLL(str(library))
    loaded.runtime_unusable.restype = ctypes.c_char_p
    return loaded


@pytest.mark.parametrize("asked", [0, 1])
@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize(
    ("driver", "probe", "reason"),
    [
        (0, 0, ""),
        (INSUFFICIENT_DRIVER, INSUFFICIENT_DRIVER, f"error 35 {VERSIONS}"),
        (0, NO_KERNEL_IMAGE, f"error 209 {VERSIONS}"),
    ],
)
def test_the_answer_leaves_the_current_device_alone(runtime, current, asked, driver, probe, reason):
    runtime.runtime_begin(current, driver, 0, probe)
    assert runtime.runtime_unusable(asked).decode() == reason
    assert runtime.runtime_current() == current
    assert runtime.runtime_probed() == (-1 if driver else asked)
    assert runtime.runtime_recorded() == 0


@pytest.mark.parametrize(
    ("current", "asked", "on_second", "reason"),
    [(1, 7, 0, f"error 101 {VERSIONS}"), (0, 1, LAUNCH_FAILURE, f"error 719 {VERSIONS}")],
)
def test_a_device_that_is_not_there_or_has_no_context(runtime, current, asked, on_second, reason):
    runtime.runtime_begin(current, 0, on_second, 0)
    assert runtime.runtime_unusable(asked).decode() == reason
    assert runtime.runtime_current() == current
    assert runtime.runtime_probed() == -1
    assert runtime.runtime_recorded() == 0
