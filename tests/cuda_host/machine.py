"""Build the CUDA kernels with a C++ compiler and run them on the model of a GPU in this folder."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from tests.oracle import Answer, Problem

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc" / "cuda"
PASSES = ("forward", "grad_input", "grad_scales")
FLAGS = ("-std=c++17", "-ffp-contract=off", "-fPIC", "-Wno-unknown-pragmas")
#: The units of the model, each with the root of its headers.
MODEL = [(HERE / f"{name}.cpp", SOURCES) for name in ("model", "copies", "products", "entry")]

FORWARDS, BACKWARDS, SHUFFLED = range(3)

#: Numbers of multiprocessors: with one the plans choose large tiles, with very many small ones.
LARGE, SMALL = 1, 4096


def compiler() -> str | None:
    """Return the C++ compiler, or None if there is none."""
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")


def _cache() -> Path:
    folder = Path(tempfile.gettempdir()) / f"rlrr_cuda_host_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _produce(command: list[str], target: Path) -> Path:
    """Run ``command -o target`` unless the file exists; other processes that need it wait."""
    with FileLock(f"{target}.lock"):
        if not target.exists():
            subprocess.run([*command, "-o", f"{target}.part"], check=True)
            os.replace(f"{target}.part", target)
    return target


def _link(prefix: str, flags: tuple[str, ...], units: list[tuple[Path, Path]]) -> Path:
    """Make a shared library of units, each with the root of its headers, and compile only what has changed."""
    cxx = compiler()
    assert cxx is not None
    version = subprocess.run([cxx, "--version"], check=True, capture_output=True).stdout

    def compiled(unit: Path, root: Path) -> Path:
        command = [cxx, *flags, f"-I{HERE / 'include'}", f"-I{root}"]
        # an object depends on the preprocessed text alone
        text = subprocess.run([*command, "-E", "-P", "-xc++", str(unit)], check=True, capture_output=True).stdout
        key = hashlib.sha256(version + " ".join(flags).encode() + text).hexdigest()[:20]
        return _produce([*command, "-c", "-xc++", str(unit)], _cache() / f"{prefix}_{unit.stem}_{key}.o")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, *zip(*units, strict=True)))
    key = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:20]
    return _produce([cxx, "-shared", *map(str, objects)], _cache() / f"{prefix}_{key}.so")


def build(sources: Path = SOURCES, passes: tuple[str, ...] = PASSES, optimise: str = "-O2") -> Path:
    """Make a shared library of some passes of the kernels in ``sources``."""
    units = [(sources / f"{name}.cu", sources) for name in passes] + MODEL
    return _link("kernels", (*FLAGS, optimise), units)


def build_hopper(sources: Path = SOURCES, passes: tuple[str, ...] = PASSES) -> Path:
    """Make a shared library of some passes of the Hopper kernels in ``sources``."""
    units = [(sources / "hopper" / f"{name}.cu", sources) for name in (*passes, "tensor_map")] + MODEL
    return _link("hopper", (*FLAGS, "-O3", "-Wno-psabi", "-DRLRR_HOPPER"), units)


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("col_stride", ctypes.c_int64),
        ("dtype", ctypes.c_int),
    )


class _Vector(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("dtype", ctypes.c_int))


class _Device(ctypes.Structure):
    _fields_ = (("capability", ctypes.c_int), ("multiprocessors", ctypes.c_int), ("shared_memory", ctypes.c_int))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("m", "n", "k", "groups")),
        ("weight", _Matrix),
        ("u", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("tf32", ctypes.c_bool),
        ("device", _Device),
    )


class _Forward(ctypes.Structure):
    _fields_ = (
        ("layer", _Layer),
        ("x", _Matrix),
        ("bias", _Vector),
        ("shift", _Vector),
        ("y", _Matrix),
        ("workspace", ctypes.c_void_p),
    )


class _GradInput(ctypes.Structure):
    _fields_ = (("layer", _Layer), ("dy", _Matrix), ("dx", _Matrix), ("workspace", ctypes.c_void_p))


class _GradScales(ctypes.Structure):
    _fields_ = (
        ("layer", _Layer),
        ("dy", _Matrix),
        ("x", _Matrix),
        *((name, ctypes.c_void_p) for name in ("du", "dv", "df", "workspace")),
    )


class _Options(ctypes.Structure):
    _fields_ = (("blocks", ctypes.c_int), ("warps", ctypes.c_int), ("seed", ctypes.c_uint64))


_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def _matrix(t: Tensor) -> _Matrix:
    return _Matrix(t.data_ptr(), *t.stride(), _DTYPES[t.dtype])


def _vector(t: Tensor | None) -> _Vector:
    return _Vector(None, 0) if t is None else _Vector(t.data_ptr(), _DTYPES[t.dtype])


def rows_apart(rows: int, cols: int, stride: int, dtype: torch.dtype) -> Tensor:
    """Return a matrix of NaN whose rows are ``stride`` elements apart; memory between them is not touched."""
    storage = torch.empty((rows - 1) * stride + cols, dtype=dtype)
    return storage.as_strided((rows, cols), (stride, 1)).fill_(float("nan"))


class MachineError(RuntimeError):
    """The model ended a launch because of an access, a barrier or an instruction that it does not allow."""


class Machine:
    """The kernels of one build on the model of a GPU."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        for name in (*(f"{name}_workspace_floats" for name in PASSES), "blocks_launched", "bank_conflicts"):
            getattr(self.library, f"model_{name}").restype = ctypes.c_int64
        self.library.model_message.restype = ctypes.c_char_p

    def blocks_launched(self) -> int:
        """Return the number of blocks of the last pass."""
        return int(self.library.model_blocks_launched())

    def bank_conflicts(self) -> int:
        """Return the number of rows that ldmatrix had to wait for in the last pass."""
        return int(self.library.model_bank_conflicts())

    def _workspace_floats(self, name: str, problem: ctypes.Structure) -> int:
        return int(getattr(self.library, f"model_{name}_workspace_floats")(ctypes.byref(problem)))

    def workspace_floats(
        self,
        name: str,
        m: int,
        n: int,
        k: int,
        groups: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        multiprocessors: int = 132,
    ) -> int:
        """Return the workspace of a pass for these sizes, with x and W of one dtype. Nothing is computed."""
        matrix = _Matrix(None, k, 1, _DTYPES[dtype])
        layer = _Layer(m, n, k, groups, matrix, None, None, False, _Device(80, multiprocessors, 99 * 1024))
        problems = {
            "forward": lambda: _Forward(layer, matrix, _vector(None), _vector(None), matrix, None),
            "grad_input": lambda: _GradInput(layer, matrix, matrix, None),
            "grad_scales": lambda: _GradScales(layer, matrix, matrix, None, None, None, None),
        }
        return self._workspace_floats(name, problems[name]())

    def _call(self, name: str, problem: ctypes.Structure, options: _Options) -> None:
        # one element more than needed, so that an empty workspace has an address too
        workspace = torch.full((self._workspace_floats(name, problem) + 1,), float("nan"))
        problem.workspace = workspace.data_ptr()
        code = getattr(self.library, f"model_{name}")(ctypes.byref(problem), ctypes.byref(options))
        if code:
            raise MachineError(f"{name}: error {code}, {self.library.model_message().decode()}")

    def solve(
        self,
        p: Problem,
        multiprocessors: int = SMALL,
        *,
        tf32: bool = False,
        need_shift: bool = True,
        blocks: int = FORWARDS,
        warps: int = FORWARDS,
        seed: int = 0,
        passes: tuple[str, ...] = PASSES,
        row_stride: int | None = None,
    ) -> Answer:
        """Return all results of a problem, with NaN where a pass is left out or a kernel writes nothing.

        Args:
            multiprocessors: The number of multiprocessors of the GPU.
            blocks: The order in which blocks run.
            warps: The order in which the warps of a block run.
            row_stride: The row stride of y and dx; by default their width.
        """
        (m, k), n, groups = p.x.shape, p.weight.shape[0], p.scale_in.shape[0]
        u, v = p.scale_out.float().contiguous(), p.scale_in.float().contiguous()
        device = _Device(80, multiprocessors, 99 * 1024)
        layer = _Layer(m, n, k, groups, _matrix(p.weight), u.data_ptr(), v.data_ptr(), tf32, device)
        options = _Options(blocks, warps, seed)
        nan = float("nan")
        y, dx = (rows_apart(m, width, row_stride or width, p.x.dtype) for width in (n, k))
        du, dv = torch.full((n, 1), nan), torch.full((groups, 1, k), nan)
        df = torch.full((n if need_shift else 0,), nan)
        if "forward" in passes:
            problem = _Forward(layer, _matrix(p.x), _vector(p.bias), _vector(p.shift), _matrix(y), None)
            self._call("forward", problem, options)
        if "grad_input" in passes:
            self._call("grad_input", _GradInput(layer, _matrix(p.dy), _matrix(dx), None), options)
        if "grad_scales" in passes:
            df_pointer = df.data_ptr() if need_shift else None
            scales = _GradScales(layer, _matrix(p.dy), _matrix(p.x), du.data_ptr(), dv.data_ptr(), df_pointer, None)
            self._call("grad_scales", scales, options)
        return Answer(y, dx, du, dv, df)


class Unsupported(RuntimeError):
    """The Hopper kernels do not support a problem."""


class TensorMap(ctypes.Structure):
    """The description of a matrix for the copy engine, in the layout of the model."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "row_bytes")),
        *((name, ctypes.c_int) for name in ("box_rows", "box_cols", "element_bytes", "type")),
        ("swizzled", ctypes.c_bool),
        ("_", ctypes.c_char * 79),
    )


class HopperMachine(Machine):
    """The Hopper kernels of one build on the model of a Hopper GPU."""

    capability = 90

    def maps_encoded(self) -> int:
        """Return the number of tensor maps that the driver has encoded since the start."""
        function = self.library.model_maps_encoded
        function.restype = ctypes.c_int64
        return int(function())

    def describe(self, data: int, dtype: int, rows: int, cols: int, row_stride: int, box_rows: int) -> TensorMap:
        """Return the tensor map of a matrix, new or from the cache; ``dtype`` as in ``csrc/cuda/passes.h``."""
        made = TensorMap()
        matrix = _Matrix(data, row_stride, 1, dtype)
        sizes = ctypes.c_int64(rows), ctypes.c_int64(cols)
        assert self.library.model_describe(ctypes.byref(matrix), *sizes, box_rows, ctypes.byref(made)) == 0
        return made

    def matrix_descriptor(self, address: int, next_box: int) -> int:
        """Return wgmma's descriptor of a matrix at any address of the shared window."""
        function = self.library.model_matrix_descriptor
        function.restype = ctypes.c_uint64
        return int(function(ctypes.c_uint32(address), next_box))

    def hang(self) -> str:
        """Return the message for a kernel whose second block never ends."""
        assert self.library.model_hang() != 0
        return str(self.library.model_message().decode())

    def tile_tokens(self, tokens: int, row_tiles: int, steps: int, multiprocessors: int = 132) -> int:
        """Return the number of tokens of the tile that forward and grad_input choose."""
        sizes = map(ctypes.c_int64, (tokens, row_tiles, steps))
        return int(self.library.model_tile_tokens(*sizes, multiprocessors))

    def _call(self, name: str, problem: ctypes.Structure, options: ctypes.Structure) -> None:
        problem.layer.device.capability = self.capability
        supported = getattr(self.library, f"model_{name}_supported")
        supported.restype = ctypes.c_bool
        if not supported(ctypes.byref(problem)):
            raise Unsupported(name)
        super()._call(name, problem, options)
