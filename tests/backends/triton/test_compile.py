"""Every configuration the heuristic can return, compiled for GPUs that need not be here."""

import dataclasses
import itertools
import re

import pytest

from rlrr_kernels.backends.triton import config as configs
from rlrr_kernels.backends.triton.config import Config, Device
from tests.backends.triton.compile_probe import as_case, probe

A100 = Device((8, 0), 108, 166_912)
L40S = Device((8, 9), 142, 101_376)
H100 = Device((9, 0), 132, 232_448)
B200 = Device((10, 0), 148, 232_448)
RTX5090 = Device((12, 0), 170, 101_376)
DEVICES = {"sm_80": A100, "sm_89": L40S, "sm_90": H100, "sm_100": B200, "sm_120": RTX5090}

KINDS = [
    ("half", "bfloat16", "bfloat16"),
    ("half", "float16", "float32"),
    ("tf32", "float32", "float32"),
    ("ieee", "float32", "float32"),
]
SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}

# ViT-B's fused qkv, and a shape that is a multiple of nothing
ALIGNED = {"m": 6304, "n": 2304, "k": 768}
ODD = {"m": 197, "n": 771, "k": 769, "groups": 3}
SHAPES_OF_PATH = {
    "boxes": [ALIGNED | {"groups": 1}, ALIGNED | {"groups": 3}],
    "vectors": [ALIGNED | {"groups": 3}],
    "elements": [ODD],
}


def _configs(
    kernel: str, kind: configs.Arithmetic, path: configs.Path, x: int, weight: int, device: Device
) -> list[Config]:
    if kernel == "grad_scales":
        tiles = configs.scales_tiles(kind, path, x, device)
    else:
        tiles = configs.product_tiles(kernel, kind, path, x, weight, device)
    assert tiles, f"no tile of {kernel} fits {device}"
    return [tile.config(kernel) for tile in tiles]


def _cases(kernel: str, device: Device) -> list[dict]:
    cases = []
    for (kind, dtype, weight_dtype), (path, shapes) in itertools.product(KINDS, SHAPES_OF_PATH.items()):
        if path == "boxes" and (kind == "ieee" or not device.has_wgmma):
            continue
        for config in _configs(kernel, kind, path, SIZE[dtype], SIZE[weight_dtype], device):
            shared = {"dtype": dtype, "weight_dtype": weight_dtype, "path": path}
            if kernel == "grad_scales":
                shared["split_tokens"] = 4 * config.block_m
            cases += [as_case(kernel, kind, config, **shared, **shape) for shape in shapes]
    return cases


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["forward", "grad_input", "grad_scales"])
@pytest.mark.parametrize("arch", DEVICES)
def test_every_configuration_compiles_without_spills(arch, kernel):
    device = DEVICES[arch]
    cases = _cases(kernel, device)
    reports = probe({"device": dataclasses.asdict(device), "cases": cases})
    kernels_a_case = 2 if kernel == "grad_scales" else 1
    assert len(reports) == len(cases) * kernels_a_case
    spilled = [r for r in reports if r["stack"] > 0]
    assert not spilled, "\n".join(str(r) for r in spilled)
    too_large = [r for r in reports if r["shared"] > device.shared_memory]
    assert not too_large, "\n".join(str(r) for r in too_large)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_sizes_of_one_compile(arch):
    """Triton turns an integer argument of 1 into a constant, which is another kernel."""
    sizes = [(1, 1, 1, 1), (1, 16, 16, 1), (16, 1, 16, 1), (16, 16, 1, 1), (3, 3, 5, 3)]
    cases = [
        as_case(kernel, kind, dtype=dtype, weight_dtype=dtype, m=m, n=n, k=k, groups=groups)
        for kernel in ("forward", "grad_input", "grad_scales")
        for kind, dtype in (("half", "bfloat16"), ("ieee", "float32"))
        for m, n, k, groups in sizes
    ]
    reports = probe({"device": dataclasses.asdict(DEVICES[arch]), "cases": cases})
    assert len(reports) == len(cases) * 4 // 3  # grad_scales is two kernels


#: bf16 multiply-adds a Hopper multiprocessor does in a cycle (dense peak over clock and multiprocessors)
HOPPER_FMA_PER_CYCLE = 2048
SCHEDULERS = 4


def _hopper_loops(kernel: str) -> list[dict]:
    cases = [
        as_case(kernel, "half", config, dtype="bfloat16", weight_dtype="bfloat16", disassemble=True, path=path, **shape)
        for path, shapes in SHAPES_OF_PATH.items()
        if path != "elements"
        for config in _configs(kernel, "half", path, 2, 2, H100)
        for shape in shapes
    ]
    return probe({"device": dataclasses.asdict(H100), "cases": cases})


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["forward", "grad_input"])
def test_on_hopper_the_rescaled_weight_stays_in_registers_and_fits_under_the_tensor_cores(kernel):
    m, n, k = 50_432, 4096, 1024  # ViT-L's fc1 at batch 256
    choose = configs.forward_config if kernel == "forward" else configs.grad_input_config
    largest = choose(m, n, k, 1, "half", "boxes", 2, 2, H100)
    seen_largest = False
    for report in _hopper_loops(kernel):
        products = [i for i in report["loop"] if "GMMA" in i]
        assert products, f"no wgmma in the loop of {report['case']}"
        for instruction in products:
            left = re.match(r"(?:@!?\w+ )?HGMMA\S* R\d+, (R\d+|gdesc)", instruction)
            assert left, instruction
            assert left[1].startswith("R"), f"W' goes through shared memory in {report['case']}: {instruction}"
        if report["case"]["path"] == "boxes":
            stores = [i for i in report["loop"] if re.match(r"(?:@!?\w+ )?STS", i)]
            assert not stores, f"something goes back to shared memory in {report['case']}: {stores}"
        config = Config(**report["case"]["config"])
        if config == largest and report["case"]["path"] == "boxes" and report["case"]["groups"] == 1:
            seen_largest = True
            slots = len(report["loop"]) * config.num_warps / SCHEDULERS
            cycles = config.block_m * config.block_n * config.block_k / HOPPER_FMA_PER_CYCLE
            assert slots < 0.60 * cycles, f"{kernel}: {slots:.0f} issue slots against {cycles:.0f} cycles"
    assert seen_largest


def test_the_probe_sees_a_spill_and_shared_memory():
    """The gate can fail: a tile far too large for its warps is reported with a stack."""
    config = Config(block_m=128, block_n=256, block_k=64, num_warps=4, num_stages=2)
    case = as_case(
        "forward", "half", config, dtype="bfloat16", weight_dtype="bfloat16", groups=1, path="vectors", **ALIGNED
    )
    (report,) = probe({"device": dataclasses.asdict(A100), "cases": [case]})
    assert report["stack"] > 0
    assert report["shared"] > 2**15
