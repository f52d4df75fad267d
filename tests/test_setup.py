"""What setup.py builds, what it leaves out, and its messages."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rlrr_kernels.backends import choice

ROOT = Path(__file__).parents[1]
BUILD = ("RLRR_BUILD_CPU", "RLRR_BUILD_CUDA", "RLRR_DEBUG_WAITS", "MAX_JOBS")
VARIABLES = ("CXX", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST", *BUILD)


@pytest.fixture
def setup(monkeypatch) -> ModuleType:
    """setup.py as a module, in an environment without its variables."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("rlrr_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "tool"), [("cpu", "g++"), ("cuda", "nvcc")])
def test_a_library_is_built_wherever_its_compiler_is(name, tool):
    """The other tests of a library are skipped where it is missing."""
    if shutil.which(tool) is None or os.environ.get(f"RLRR_BUILD_{name.upper()}") == "0":
        pytest.skip(f"no {tool}, or not to be built")
    if name == "cuda" and torch.version.cuda is None:
        pytest.skip("torch is built without CUDA")
    module = choice.load(name)
    assert not isinstance(module, str), module


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, (["80", "90a"], "80")),
        ("", (["80", "90a"], "80")),
        ("8.6", (["86"], None)),
        ("8.0;9.0a+PTX", (["80", "90a"], "90a")),
        ("7.5 8.9 12.0+PTX", (["89", "120"], "120")),
    ],
)
def test_architectures(setup, monkeypatch, given, expected):
    if given is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    assert setup.architectures() == expected


@pytest.mark.parametrize(("given", "words"), [("Ampere", "got 'Ampere'"), ("7.0", "no compute capability of 8.0")])
def test_architectures_that_cannot_be_built(setup, monkeypatch, given, words):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    with pytest.raises(setup.Unavailable, match=words):
        setup.architectures()


def test_nvcc_takes_the_compiler_without_its_launcher_and_options(setup, monkeypatch):
    monkeypatch.setenv("CXX", "ccache g++-12 -m64")
    assert setup.host_compiler(setup.compiler()) == "g++-12"


def test_a_toolkit_that_is_not_one(setup, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(setup.Unavailable, match=rf"CUDA_HOME={tmp_path} holds no bin/nvcc"):
        setup.cuda_home()


def test_switches(setup, monkeypatch):
    assert setup.wanted("cpu") is None
    monkeypatch.setenv("RLRR_BUILD_CPU", "0")
    assert setup.wanted("cpu") is False
    for name in ("RLRR_BUILD_CPU", "RLRR_DEBUG_WAITS"):
        monkeypatch.setenv(name, "yes")
        with pytest.raises(SystemExit, match=f"{name}: expected 0 or 1, got 'yes'"):
            setup.switch(name)


class Commands:
    """Records the commands of a build, which are not run."""

    def __init__(self, torch: Path) -> None:
        self.torch, self.cxx, self.torch_flags = torch, ["g++"], []
        self.given: dict[Path, list[str]] = {}

    def compile(self, commands: dict[Path, list[str]]) -> None:
        self.given = commands

    def link(self, sources: list[Path], libraries: list[str], out: Path) -> None:
        assert sources == list(self.given)


@pytest.mark.parametrize(("value", "defined"), [("1", True), ("0", False), ("", False)])
def test_waits_of_the_hopper_kernels_are_bounded_on_request(setup, monkeypatch, tmp_path, value, defined):
    for file in ("bin/nvcc", "lib64/libcudart_static.a", "lib/libtorch_cuda.so"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("RLRR_DEBUG_WAITS", value)
    setup.build_cuda(build := Commands(tmp_path), tmp_path / "out")
    having = {source for source, command in build.given.items() if "-DRLRR_DEBUG_WAITS" in command}
    assert having == (set((ROOT / "csrc" / "cuda" / "hopper").glob("*.cu")) if defined else set())


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of the sources."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "rlrr_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("lib", "__pycache__", "weights"))
    return tmp_path


def _build(tree: Path, **environment: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=tree, env=clean | environment, capture_output=True, text=True, check=False)


def test_a_compiler_that_fails_leaves_the_library_out_and_no_older_one_in_its_place(tree):
    library = tree / "rlrr_kernels" / "lib" / "librlrr_cpu.so"
    library.parent.mkdir()
    library.write_bytes(b"of an earlier build")
    for compiler, words in (
        ("/nonexistent/g++", "/nonexistent/g++ does not run"),
        ("false", "false failed: no message"),
    ):
        done = _build(tree, CXX=compiler, RLRR_BUILD_CUDA="0")
        assert done.returncode == 0, done.stderr
        assert f"built without its CPU library: {words}" in done.stdout
        assert not library.exists()
    library.write_bytes(b"of an earlier build")
    assert _build(tree, RLRR_BUILD_CPU="0", RLRR_BUILD_CUDA="0").returncode == 0
    assert library.exists(), "what was not to be built is left alone"


def test_a_library_that_must_be_built_and_cannot_is_an_error(tree):
    done = _build(tree, CXX="/nonexistent/g++", RLRR_BUILD_CPU="1", RLRR_BUILD_CUDA="0")
    assert done.returncode == 1
    assert "RLRR_BUILD_CPU=1, but: /nonexistent/g++ does not run" in done.stderr


#: Makes the file that it is asked for, empty.
COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do [ "$1" != -o ] || : > "$2"; shift; done
"""


@pytest.mark.slow
def test_only_what_changed_is_compiled_again(tree):
    """Without a real compiler: `make` has built the libraries with one."""
    compiler, cpu = tree / "compiler", tree / "csrc" / "cpu"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)

    def compiled(*options: str) -> int:
        done = _build(tree, CXX=" ".join([str(compiler), *options]), RLRR_BUILD_CPU="1", RLRR_BUILD_CUDA="0")
        assert done.returncode == 0, done.stderr
        assert (tree / "rlrr_kernels" / "lib" / "librlrr_cpu.so").exists()
        return done.stdout.count(" -c ")

    every = len(list(cpu.rglob("*.cpp")))
    assert compiled() == every >= 8
    assert compiled() == 0
    (cpu / "passes.cpp").touch()
    assert compiled() == 1
    (cpu / "packed" / "pack.h").touch()
    assert compiled() == every
    assert compiled("-g") == every
