"""What the hot loops must look like in machine code, for GPUs that are not here."""

import dataclasses
import sys

import pytest

from benchmarks import loops
from benchmarks.disassemble import as_case, probe
from benchmarks.search_space import TARGETS, rows, shapes
from rlrr_kernels.backends.triton.config import fitting_tiles


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["forward", "grad_input", "grad_scales"])
def test_on_hopper_no_product_waits_for_the_one_before(kernel):
    device = TARGETS["sm_90"]
    cases = []
    for row in rows(device):
        if row.kind == "ieee" or row.path == "elements":
            continue
        if kernel == "grad_scales" and row.kind == "tf32":
            continue  # wgmma transposes no float32: its operands are turned in registers, and waited for
        tiles = fitting_tiles(kernel, row.kind, row.path, row.x_size, row.weight_size, device)
        tensors = {"dtype": row.dtype, "weight_dtype": row.weight_dtype, "path": row.path, "disassemble": True}
        split = {"split_tokens": 4 * tiles[0].block_m} if kernel == "grad_scales" else {}
        # the last of the shapes is the one with groups, whose loops are not the same
        cases.append(as_case(kernel, row.kind, tiles[0].config(), **tensors, **split, **shapes(row.path, kernel)[-1]))
    reports = {r["index"]: r for r in reversed(probe({"device": dataclasses.asdict(device), "cases": cases}))}
    assert len(reports) == len(cases) > 0
    for report in reports.values():
        assert any("GMMA" in text for text in report["loop"]), report["case"]
        assert not loops.serialised(report["loop"]), report["case"]


def test_a_wait_for_every_product_is_noticed():
    product = "HGMMA.64x256x16.F32.BF16 R24, R152, gdesc[UR24], R24, gsb0"
    assert loops.serialised([product, "WARPGROUP.DEPBAR.LE gsb0, 0x0"])
    assert not loops.serialised([product, "WARPGROUP.DEPBAR.LE gsb0, 0x1"])


@pytest.mark.slow
def test_on_ampere_a_pair_of_weights_takes_two_instructions_to_widen():
    """Eight warps form each element of W' twice at most, and widen it by one shift or mask."""
    cases = [(kernel, config) for arch, kernel, config in loops.LOOPS if arch == "sm_80" and kernel != "grad_scales"]
    for (kernel, c), report in zip(cases, loops.measure("sm_80", cases, sys.executable), strict=True):
        found = loops.names(report["loop"])
        weights = c.block_n * c.block_k // (32 * c.num_warps)  # of one thread, were none formed twice
        assert found.count("FMUL") <= 2 * weights, kernel
        assert found.count("PRMT") == 0, kernel
        assert len(found) < 240, kernel
