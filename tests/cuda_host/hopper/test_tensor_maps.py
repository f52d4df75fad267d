"""Descriptions of matrices that are kept: found again, and never one in another's place."""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cuda_host.faults import Fault, parameters
from tests.cuda_host.machine import HopperMachine, TensorMap, build_hopper, compiler

SINGLE, HALF, BF16 = range(3)
#: dtype of passes.h -> the driver's name for it, and bytes.
TYPES = {SINGLE: (7, 4), HALF: (6, 2), BF16: (9, 2)}
#: An address; nothing is read.
BASE = 2**40


def _expected(data: int, dtype: int, rows: int, cols: int, row_stride: int, box_rows: int) -> tuple[object, ...]:
    kind, size = TYPES[dtype]
    if dtype == SINGLE:
        row_stride, box_rows = cols, 1
    return data, rows, cols, row_stride * size, box_rows, 64, size, kind, dtype != SINGLE


def _got(made: TensorMap) -> tuple[object, ...]:
    return tuple(getattr(made, name) for name, _ in TensorMap._fields_[:-1])


def _alike() -> Iterator[tuple[int, int, int, int, int, int]]:
    """Matrices that differ in one thing alone, in so many values of it that slots of the table meet."""
    for rows in range(1, 9):
        for i in range(1, 1025):
            for dtype in (HALF, BF16, SINGLE):
                yield BASE + 16 * i, dtype, rows, 64, 8192, 128
                yield BASE, dtype, rows * i, 64, 8192, 128
                yield BASE, dtype, rows, 8 * i, 8192, 128
                yield BASE, dtype, rows, 64, 64 + 8 * i, 128
                yield BASE, dtype, rows, 64, 8192, (i - 1) % 256 + 1


def _wrong(machine: HopperMachine) -> int:
    """How often one matrix is handed another's description."""
    asked = list(_alike())
    random.Random(0).shuffle(asked)
    return sum(_got(machine.describe(*one)) != _expected(*one) for one in itertools.chain(_alike(), asked))


def test_no_matrix_is_handed_the_description_of_another(hopper):
    assert _wrong(hopper) == 0


# (layers, keys a layer): the linear layers of a ViT-B on the forward's thread and on autograd's, of a ViT-L on either
@pytest.mark.parametrize(("layers", "keys"), [(48, 3), (48, 5), (96, 3), (96, 5)])
def test_a_step_finds_the_descriptions_of_the_step_before(hopper, layers, keys):
    """Whatever the addresses: several models in turn, each of which the next may push out."""
    missed = 0
    for model in range(8):
        # matrices of a few shapes, in steps of torch's allocator
        place, step = itertools.count(BASE + model * 2**32, 512 * 1153), []
        for layer, key in itertools.product(range(layers), range(keys)):
            rows = (768, 2304, 3072, 6304)[(layer + key) % 4]
            step.append((next(place), BF16, rows, 768, 768, 64 if key % 2 else 256))
        for one in step:
            hopper.describe(*one)
        start = hopper.maps_encoded()
        for one in step:
            hopper.describe(*one)
        missed += hopper.maps_encoded() - start
    assert missed <= 0.1 * 8 * layers * keys


EQUAL = (
    "data == k.data && rows == k.rows && cols == k.cols && row_bytes == k.row_bytes && box_rows == k.box_rows &&\n"
    "           type == k.type"
)
FAULTS = [
    Fault("the address alone", "tensor_map", "hopper/tensor_map.cu", EQUAL, "data == k.data"),
    Fault("any address", "tensor_map", "hopper/tensor_map.cu", "data == k.data && ", "data && k.data && "),
    Fault("any rows", "tensor_map", "hopper/tensor_map.cu", "rows == k.rows && cols", "cols"),
    Fault("any columns", "tensor_map", "hopper/tensor_map.cu", "cols == k.cols && ", ""),
    Fault("any stride", "tensor_map", "hopper/tensor_map.cu", "row_bytes == k.row_bytes && ", ""),
    Fault("any box", "tensor_map", "hopper/tensor_map.cu", "box_rows == k.box_rows &&\n", "\n"),
    Fault("any type", "tensor_map", "hopper/tensor_map.cu", " &&\n           type == k.type", ""),
]


@pytest.mark.parametrize("fault", parameters(FAULTS, "tensor_map: any rows"))
def test_fault_is_noticed(tmp_path: Path, fault: Fault):
    if compiler() is None:
        pytest.skip("needs a C++ compiler")
    assert _wrong(HopperMachine(build_hopper(fault.plant(tmp_path / "cuda"), ()))) > 0
