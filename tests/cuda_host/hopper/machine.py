"""Builds the Hopper kernels with the host's C++ compiler, for the model of a Hopper GPU in this folder."""

from __future__ import annotations

import ctypes
from pathlib import Path

from tests.cuda_host import machine as base

HERE = Path(__file__).parent
MODEL = ("model", "copies", "products", "entry")
FLAGS = (*base.FLAGS, "-O3", "-Wno-psabi")


def build(sources: Path = base.SOURCES, passes: tuple[str, ...] = base.PASSES) -> Path:
    """The Hopper kernels as a shared library, ``passes`` from ``sources``, the rest as they are."""
    roots = {name: sources if name in passes else base.SOURCES for name in (*base.PASSES, "tensor_map")}
    units = [(root, root / "hopper" / f"{name}.cu") for name, root in roots.items()]
    units += [(base.SOURCES, HERE / f"{name}.cpp") for name in MODEL]
    includes = (HERE / "include", base.HERE / "include")
    return base.link("hopper", FLAGS, [(unit, (*includes, root)) for root, unit in units])


class Unsupported(RuntimeError):
    """A problem that this path leaves to the other kernels."""


class Description(ctypes.Structure):
    """A matrix as the copy engine has it, in the model's own layout."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "row_bytes")),
        *((name, ctypes.c_int) for name in ("box_rows", "box_cols", "element_bytes", "type")),
        ("swizzled", ctypes.c_bool),
        ("_", ctypes.c_char * 79),
    )


class HopperMachine(base.Machine):
    """The Hopper kernels of one build. A launch that they do not support is not tried."""

    capability = 90

    def maps_encoded(self) -> int:
        """Descriptions of matrices that the driver was asked for, since the start."""
        function = self.library.model_maps_encoded
        function.restype = ctypes.c_int64
        return int(function())

    def describe(self, data: int, dtype: int, rows: int, cols: int, row_stride: int, box_rows: int) -> Description:
        """What the kernels hand to the copy engine, made or found again; ``dtype`` as in ``problem.h``."""
        made = Description()
        matrix = base._Matrix(data, row_stride, 1, dtype)
        sizes = ctypes.c_int64(rows), ctypes.c_int64(cols)
        assert self.library.model_describe(ctypes.byref(matrix), *sizes, box_rows, ctypes.byref(made)) == 0
        return made

    def matrix_descriptor(self, address: int, next_box: int) -> int:
        """What wgmma takes for a matrix in the 128-byte swizzle, of any address of the shared window."""
        function = self.library.model_matrix_descriptor
        function.restype = ctypes.c_uint64
        return int(function(ctypes.c_uint32(address), next_box))

    def hang(self) -> str:
        """What is said of a kernel whose second block waits for ever."""
        assert self.library.model_hang() != 0
        return str(self.library.model_message().decode())

    def tile_tokens(self, tokens: int, row_tiles: int, steps: int, multiprocessors: int = 132) -> int:
        """Tokens of the tile that forward or grad_input takes."""
        sizes = map(ctypes.c_int64, (tokens, row_tiles, steps))
        return int(self.library.model_tile_tokens(*sizes, multiprocessors))

    def _call(self, name: str, problem: ctypes.Structure, options: ctypes.Structure) -> None:
        problem.layer.device.capability = self.capability
        supported = getattr(self.library, f"model_{name}_supported")
        supported.restype = ctypes.c_bool
        if not supported(ctypes.byref(problem)):
            raise Unsupported(name)
        super()._call(name, problem, options)
