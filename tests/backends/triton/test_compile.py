"""All tiles of the table, compiled without a GPU: no spills, no hazards, shared memory that fits."""

import dataclasses
import re

import pytest
import torch

from benchmarks.disassemble import as_case, probe
from rlrr_kernels.backends.problem import Problem
from rlrr_kernels.backends.triton import choose
from rlrr_kernels.backends.triton.choose import Choice, Device
from tests.hazards import hazards, products
from tests.sass import parsed

#: A GPU of each kind, with the least shared memory among its kind.
TARGETS = {
    "sm_80": Device((8, 0), 108, 166_912),
    "sm_89": Device((8, 9), 142, 101_376),
    "sm_90": Device((9, 0), 132, 232_448),
    "sm_100": Device((10, 0), 148, 232_448),
    "sm_120": Device((12, 0), 170, 101_376),
}
KERNELS = ("forward", "grad_input", "grad_scales")
#: arithmetic, x, W
KINDS = (
    ("half", "bfloat16", "bfloat16"),
    ("half", "float16", "float32"),
    ("tf32", "float32", "float32"),
    ("ieee", "float32", "float32"),
)
#: Pass -> rank: the most that forward and grad_input form in registers; grad_scales is the same for all from 2 on.
RANKS = {"forward": 4, "grad_input": 4, "grad_scales": 2}
ALIGNED = {"m": 6304, "n": 2304, "k": 768}
ODD = {"m": 197, "n": 771, "k": 769}


def cases(arch, kernel, kinds=KINDS, layouts=(True, False), most=None, rank=1):
    """Return each tile of the table at a shape it serves, with three groups; 16-bit products also split, with one."""
    found = []
    for kind, dtype, weight_dtype in kinds:
        for aligned in layouts:
            shape = ALIGNED if aligned else ODD
            types = (getattr(torch, dtype), getattr(torch, weight_dtype))
            problem = Problem(kernel, *shape.values(), 3, *types, kind == "tf32", rank)
            for tile in choose.tiles(problem, TARGETS[arch], aligned)[:most]:
                rest = {"dtype": dtype, "weight_dtype": weight_dtype, "sass": arch == "sm_90", "rank": rank, **shape}
                found.append(as_case(kernel, kind, tile, groups=3, **rest))
                if aligned and kernel != "grad_scales" and dtype == "bfloat16" and most is None:
                    found.append(as_case(kernel, kind, dataclasses.replace(tile, splits=2), groups=1, **rest))
    return found


def wrong(report, device):
    """Return why a compiled kernel may not be launched."""
    found = []
    if report["stack"]:
        found.append(f"spills {report['stack']} bytes")
    if report["tensor_memory"] > 512:
        found.append(f"takes {report['tensor_memory']} of 512 columns of tensor memory")
    if report["shared"] > device.shared_memory:
        found.append(f"takes {report['shared']} of {device.shared_memory} bytes of shared memory")
    if "sass" in report:
        lines = parsed(report["sass"])[report["name"]]
        found += [f"hazard: {hazard}" for hazard in hazards(lines)]
        if any(products(lines)):
            found.append("a product takes an operand from registers, which Triton before 3.9 overwrites too early")
    return found


@pytest.mark.parametrize(
    ("arch", "wanted"),
    [
        pytest.param("sm_90", {"kinds": KINDS[:1], "layouts": (True,), "most": 1}, id="widest-sm_90"),
        *(
            pytest.param(
                arch, {} if arch in ("sm_80", "sm_90") else {"layouts": (True,)}, id=arch, marks=pytest.mark.slow
            )
            for arch in TARGETS
        ),
    ],
)
def test_no_tile_of_the_table_spills_or_overwrites_an_operand(arch, wanted):
    """No tile needs more shared memory than the GPU has either."""
    asked = [case for kernel in KERNELS for case in cases(arch, kernel, **wanted)]
    reports = compiled(arch, asked)
    second_kernels = sum(case["kernel"] == "grad_scales" or case["choice"]["splits"] > 1 for case in asked)
    assert len(reports) == len(asked) + second_kernels


def compiled(arch, asked):
    """Return the reports on compiled cases, none of which is wrong."""
    device = TARGETS[arch]
    reports = probe({"device": dataclasses.asdict(device), "cases": asked})
    failed = [f"{r['case']}: {why}" for r in reports for why in wrong(r, device)]
    assert not failed, "\n".join(failed)
    # of kernels with wgmma products the machine code was read
    assert any("sass" in report for report in reports) == (arch == "sm_90")
    return reports


@pytest.mark.parametrize(
    ("arch", "ranks", "most"),
    [
        pytest.param("sm_90", {"forward": 4}, 1, id="widest-sm_90"),
        *(pytest.param(arch, RANKS, 4, id=arch, marks=pytest.mark.slow) for arch in ("sm_80", "sm_90")),
    ],
)
def test_no_first_tile_of_a_larger_rank_spills_or_overwrites_an_operand(arch, ranks, most):
    asked = []
    for kernel, rank in ranks.items():
        asked += cases(arch, kernel, KINDS[:1], (True,), most, rank)
    names = [report["name"] for report in compiled(arch, asked)]
    assert all(names.count(f"{kernel}_kernel") > 0 for kernel in ranks)


@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=() if arch == "sm_90" else pytest.mark.slow) for arch in TARGETS]
)
def test_the_kernel_of_panels_does_not_spill(arch):
    kinds = KINDS if arch == "sm_80" else KINDS[:1]
    asked = [
        as_case(kernel, kind, dtype=dtype, weight_dtype=weight_dtype, groups=3, rank=9, **shape)
        for kernel, shape in (("forward", ALIGNED), ("grad_input", ODD))
        for kind, dtype, weight_dtype in kinds
    ]
    reports = probe({"device": dataclasses.asdict(TARGETS[arch]), "cases": asked})
    assert {report["name"] for report in reports} == {"panel_kernel"}
    assert {report["index"] for report in reports} == set(range(len(asked)))
    assert not [(report["case"], why) for report in reports for why in wrong(report, TARGETS[arch])]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_sizes_of_one_compile(arch):
    """Triton makes a constant of an integer argument of 1, and so compiles another kernel."""
    sizes = [(1, 1, 1, 1), (1, 16, 16, 1), (16, 1, 16, 1), (16, 16, 1, 1), (3, 3, 5, 3)]
    asked = [
        as_case(kernel, kind, dtype=dtype, weight_dtype=dtype, m=m, n=n, k=k, groups=groups)
        for kernel in KERNELS
        for kind, dtype in (("half", "bfloat16"), ("ieee", "float32"))
        for m, n, k, groups in sizes
    ]
    reports = probe({"device": dataclasses.asdict(TARGETS[arch]), "cases": asked})
    assert len({report["index"] for report in reports}) == len(asked)


@pytest.mark.slow
def test_on_ampere_a_pair_of_weights_takes_two_instructions_to_widen():
    """Eight warps form each element of W' twice at most, and widen it by one shift or mask."""
    choices = {"forward": Choice(128, 128, 32, 8, 4), "grad_input": Choice(128, 32, 128, 8, 4)}
    rest = {"dtype": "bfloat16", "weight_dtype": "bfloat16", "groups": 1, "disassemble": True, **ALIGNED}
    asked = [as_case(kernel, "half", choice, **rest) for kernel, choice in choices.items()]
    reports = probe({"device": dataclasses.asdict(TARGETS["sm_80"]), "cases": asked})
    assert [report["name"] for report in reports] == ["forward_kernel", "grad_input_kernel"]
    for report in reports:
        found = [re.sub(r"^@!?U?P\w+ ", "", text).split()[0].split(".")[0] for text in report["loop"]]
        weights = 128 * 32 // (32 * 8)  # of one thread, were none formed twice
        assert 0 < found.count("FMUL") <= 2 * weights
        assert found.count("PRMT") == 0
        assert len(found) < 240
