"""Build the libraries of csrc/; everything else about the package is in pyproject.toml.

Two shared libraries, each of which torch loads by ``torch.ops.load_library`` and
neither of which knows Python: ``librlrr_cpu.so`` where there is a C++ compiler,
``librlrr_cuda.so`` where there is an nvcc and a torch built for CUDA. They use
LibTorch's stable ABI alone, so one build serves every torch from 2.11 on. What
cannot be built is left out and said; the package works without.

Environment:
    RLRR_BUILD_CPU, RLRR_BUILD_CUDA   0: do not build; 1: fail where it cannot be built
    CUDA_HOME                         the toolkit to use, before the PATH and pip's packages
    TORCH_CUDA_ARCH_LIST              default "8.0;9.0a", and PTX of the lowest for later GPUs
    RLRR_DEBUG_WAITS                  1: Hopper kernels that end, and name the barrier, where one waits for ever
    CXX, MAX_JOBS                     the compiler; how many files to compile at once
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
TORCH = (2, 11)  # the oldest torch that the libraries run with
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# the formula's roundings, one by one: a fused multiply-add would skip the one of u v
CPU_FLAGS = [*FLAGS, "-fopenmp-simd", "-ffp-contract=off", "-Wno-uninitialized"]


class Unavailable(Exception):
    """Why a library cannot be built here."""


def torch_folder() -> Path | None:
    """Where torch is installed: visible to this build, or beside it, outside of pip's isolation."""
    spec = importlib.util.find_spec("torch")
    beside = [sysconfig.get_path(kind) for kind in ("purelib", "platlib")]
    for folder in ([Path(spec.origin).parent] if spec and spec.origin else []) + [Path(p) / "torch" for p in beside]:
        if (folder / "include" / "torch" / "csrc" / "stable").is_dir():
            return folder
    return None


def torch_version(torch: Path) -> tuple[int, int]:
    found = re.search(r"__version__ = '(\d+)\.(\d+)", (torch / "version.py").read_text())
    if found is None:
        raise Unavailable(f"no version in {torch / 'version.py'}")
    return int(found[1]), int(found[2])


def compiler() -> list[str] | None:
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    found = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    return [found] if found else None


def host_compiler(cxx: list[str]) -> str:
    """The compiler itself, for nvcc: without options, and without a launcher such as ccache."""
    return [word for word in cxx if not word.startswith("-")][-1]


def switch(variable: str) -> bool | None:
    """A variable of the environment that is 1, 0 or not set."""
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{variable}: expected 0 or 1, got {value!r}")
    return None if value == "" else value == "1"


def wanted(name: str) -> bool | None:
    """RLRR_BUILD_<NAME>: True must be built, False must not, None if it can."""
    return switch(f"RLRR_BUILD_{name.upper()}")


def cuda_home() -> Path | None:
    """The toolkit that has an nvcc: CUDA_HOME's, the PATH's, or one of pip's packages."""
    if os.environ.get("CUDA_HOME"):
        home = Path(os.environ["CUDA_HOME"])
        if not (home / "bin" / "nvcc").exists():
            raise Unavailable(f"CUDA_HOME={home} holds no bin/nvcc")
        return home
    on_path = shutil.which("nvcc")
    if on_path:
        # the PATH may hold a script; nvcc itself knows its toolkit
        dry = subprocess.run([on_path, "--dryrun", "x.cu"], capture_output=True, text=True, check=False).stderr
        top = re.search(r"^#\$ TOP=(.+)$", dry, re.MULTILINE)
        return Path(top[1]).resolve() if top else Path(on_path).resolve().parents[1]
    site = Path(sysconfig.get_path("purelib")) / "nvidia"
    return next((p.parents[1] for p in sorted(site.glob("*/bin/nvcc"), reverse=True)), None)


class Build:
    """Objects and one shared library, made anew only where a source or a command has changed."""

    def __init__(self, name: str, temp: Path, torch: Path, cxx: list[str]) -> None:
        self.name, self.temp, self.torch, self.cxx = name, temp / name, torch, cxx
        headers = (*CSRC.glob("*.h"), *(CSRC / name).rglob("*.*h"))
        self.newest_header = max(p.stat().st_mtime for p in headers)
        version = torch_version(torch)
        if version < TORCH:
            raise Unavailable(f"it needs torch {TORCH[0]}.{TORCH[1]} or later, {torch} holds {version[0]}.{version[1]}")
        self.torch_flags = [
            f"-DTORCH_TARGET_VERSION=0x{TORCH[0]:02x}{TORCH[1]:02x}000000000000",
            f'-DRLRR_BUILD="torch {version[0]}.{version[1]} headers, {Path(host_compiler(cxx)).name}"',
            "-isystem",
            str(torch / "include"),
        ]

    def object(self, source: Path) -> Path:
        return self.temp / source.relative_to(CSRC).with_suffix(source.suffix + ".o")

    def compile(self, commands: dict[Path, list[str]]) -> None:
        stale = {source: command for source, command in commands.items() if self._stale(source, command)}
        # the largest first: the last to start is then not the last to end
        order = sorted(stale, key=lambda source: -source.stat().st_size)
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            list(pool.map(lambda source: self._run(source, stale[source]), order))

    def _stale(self, source: Path, command: list[str]) -> bool:
        result, stamp = self.object(source), self.object(source).with_suffix(".cmd")
        if not (result.exists() and stamp.exists() and stamp.read_text() == shlex.join(command)):
            return True
        return result.stat().st_mtime < max(source.stat().st_mtime, self.newest_header)

    def _run(self, source: Path, command: list[str]) -> None:
        result = self.object(source)
        result.parent.mkdir(parents=True, exist_ok=True)
        self._call([*command, "-c", str(source), "-o", str(result)])
        result.with_suffix(".cmd").write_text(shlex.join(command))

    def link(self, sources: list[Path], libraries: list[str], out: Path) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        # torch's own libraries are named as needed even where no symbol says so, and found by torch's import
        torch_libraries = ["-L" + str(self.torch / "lib"), "-Wl,--no-as-needed", *libraries, "-Wl,--as-needed"]
        objects = [str(self.object(source)) for source in sources]
        self._call([*self.cxx, "-shared", *objects, *torch_libraries, "-Wl,-z,defs", "-s", "-o", str(out)])

    def _call(self, command: list[str]) -> None:
        print(shlex.join(command), flush=True)
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise Unavailable(f"{command[0]} does not run: {error.strerror}") from error
        if done.stderr.strip():
            print(done.stderr, flush=True)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise Unavailable(f"{Path(command[0]).name} failed: {last[0]}")


def build_cpu(build: Build, out: Path) -> None:
    sources = sorted((CSRC / "cpu").rglob("*.cpp"))
    build.compile(
        {s: [*build.cxx, *CPU_FLAGS, *(build.torch_flags if s.name == "register.cpp" else [])] for s in sources}
    )
    build.link(sources, ["-ltorch_cpu"], out)


def architectures() -> tuple[list[str], str | None]:
    """TORCH_CUDA_ARCH_LIST as sm numbers ("80", "90a"), and the one to add PTX of."""
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    numbers, ptx = [], None
    for item in given or ["8.0+PTX", "9.0a"]:
        found = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", item)
        if found is None:
            raise Unavailable(f'TORCH_CUDA_ARCH_LIST: expected numbers like "8.0" or "9.0a+PTX", got {item!r}')
        if int(found[1]) < 8:
            print(f"rlrr_kernels: left out {item}: the CUDA kernels need compute capability 8.0 or later")
            continue
        numbers.append(found[1] + found[2] + found[3])
        ptx = numbers[-1] if found[4] else ptx
    if not numbers:
        raise Unavailable("TORCH_CUDA_ARCH_LIST holds no compute capability of 8.0 or later")
    return numbers, ptx


def build_cuda(build: Build, out: Path) -> None:
    home = cuda_home()
    if home is None:
        raise Unavailable("no CUDA_HOME, and no nvcc on the PATH or in pip's packages")
    if not (build.torch / "lib" / "libtorch_cuda.so").exists():
        raise Unavailable(f"the torch in {build.torch} is built without CUDA")
    static = next((p for d in ("lib64", "lib") for p in [home / d / "libcudart_static.a"] if p.exists()), None)
    if static is None:
        raise Unavailable(f"no libcudart_static.a in {home}")
    numbers, ptx = architectures()
    hopper = "90a" in numbers
    # the general kernels use nothing that only 9.0a has
    plain = sorted({n.rstrip("af") for n in numbers})
    general = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in plain]
    if ptx:
        general.append(f"-gencode=arch=compute_{ptx.rstrip('af')},code=compute_{ptx.rstrip('af')}")
    nvcc = [str(home / "bin" / "nvcc"), "-ccbin", host_compiler(build.cxx), "-std=c++20", "-O3", "-Xcompiler=-fPIC"]
    nvcc += ["-Xcompiler=-fvisibility=hidden", "--expt-relaxed-constexpr"]
    host = [*build.cxx, *FLAGS, *build.torch_flags, "-DUSE_CUDA", f"-DRLRR_HOPPER={int(hopper)}"]
    host += [f'-DRLRR_ARCHITECTURES="{" ".join(numbers)}"', "-isystem", str(home / "include")]
    if not hopper:
        host.append("-Wno-unused-parameter")  # the switch for it has nothing to switch
    commands = {s: [*nvcc, *general] for s in sorted((CSRC / "cuda").glob("*.cu"))}
    if hopper:
        ninety = [
            "-gencode=arch=compute_90a,code=sm_90a",
            *(["-DRLRR_DEBUG_WAITS"] if switch("RLRR_DEBUG_WAITS") else []),
        ]
        commands |= {s: [*nvcc, *ninety] for s in sorted((CSRC / "cuda" / "hopper").glob("*.cu"))}
    commands |= dict.fromkeys(sorted((CSRC / "cuda").glob("*.cpp")), host)
    build.compile(commands)
    # the runtime is linked in: the driver is all that must match
    build.link(list(commands), ["-ltorch_cpu", "-ltorch_cuda", str(static), "-ldl", "-lrt", "-lpthread"], out)


def _short(ext: Extension) -> str:
    return str(ext.name).rpartition("rlrr_")[2]


class BuildLibraries(build_ext):
    """``python setup.py build_ext``, as pip calls it."""

    def get_ext_filename(self, fullname: str) -> str:
        *folders, name = fullname.split(".")
        return os.path.join(*folders, f"lib{name}.so")

    def copy_extensions_to_source(self) -> None:
        # for an editable install, whose folder git does not keep
        folder = ROOT / "rlrr_kernels" / "lib"
        folder.mkdir(exist_ok=True)
        for ext in self.extensions:
            # what could not be built must not be left from an earlier time; what was not to be built stays
            if not Path(self.build_lib, self.get_ext_filename(ext.name)).exists() and wanted(_short(ext)) is None:
                (folder / Path(self.get_ext_filename(ext.name)).name).unlink(missing_ok=True)
        super().copy_extensions_to_source()

    def build_extension(self, ext: Extension) -> None:
        name = _short(ext)
        must = wanted(name)
        try:
            if must is False:
                raise Unavailable(f"RLRR_BUILD_{name.upper()}=0")
            cxx, torch = compiler(), torch_folder()
            if sys.platform != "linux":
                raise Unavailable(f"it is built on Linux, and this is {sys.platform}")
            if cxx is None:
                raise Unavailable("no C++ compiler (g++, clang++ or CXX)")
            if torch is None:
                raise Unavailable("no torch to build against")
            build = Build(name, Path(self.build_temp).absolute(), torch, cxx)
            {"cpu": build_cpu, "cuda": build_cuda}[name](build, Path(self.get_ext_fullpath(ext.name)).absolute())
        except Unavailable as reason:
            if must:
                raise SystemExit(f"rlrr_kernels: RLRR_BUILD_{name.upper()}=1, but: {reason}") from reason
            # nor may one of an earlier build pass for it
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            print(f"rlrr_kernels: built without its {name.upper()} library: {reason}", flush=True)


class Wheel(bdist_wheel):
    """One wheel for every Python 3: the libraries have no Python in them."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


OPTIONS = {
    "ext_modules": [
        # optional: a library that was left out is no error when files are copied either
        Extension(f"rlrr_kernels.lib.rlrr_{name}", sources=[], optional=True)
        for name in ("cpu", "cuda")
    ],
    "cmdclass": {"build_ext": BuildLibraries, "bdist_wheel": Wheel},
    # headers only; pip would otherwise fetch a second torch beside the one that is there
    "setup_requires": [] if torch_folder() or compiler() is None else [f"torch>={TORCH[0]}.{TORCH[1]}"],
}

if __name__ == "__main__":
    setup(**OPTIONS)
