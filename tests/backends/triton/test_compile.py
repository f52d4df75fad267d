"""Shipped configurations, compiled for GPUs that need not be here: a sample; the search has compiled them all."""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import search
from benchmarks.disassemble import as_case, probe
from benchmarks.search_space import TARGETS, Row, rows, shapes
from rlrr_kernels.backends.triton import compiler, tiles_table
from rlrr_kernels.backends.triton import config as configs
from rlrr_kernels.backends.triton.compiler import keeps_operands
from rlrr_kernels.backends.triton.config import Config, Device, fitting_tiles
from tests import gates
from tests.hazards import products

A100, H100 = TARGETS["sm_80"], TARGETS["sm_90"]
ALIGNED = {"m": 6304, "n": 2304, "k": 768}


KERNELS = ("forward", "grad_input", "grad_scales")
#: The part of the table that the installed Triton would launch from on a Hopper; all that may have a hazard is read.
HOPPER = gates.launched(keeps_operands())


def _cases(arch: str, kernel: str, row: Row, configs: list[Config]) -> list[dict]:
    return [case for config in configs for case in gates.cases(arch, kernel, row, config)]


def _sample(arch: str, kernel: str, row: Row) -> list[dict]:
    """The tile that serves most shapes, the one kept last, and of 16-bit products the first with its sum split."""
    tiles = gates.tiles(arch, kernel, row)
    whole = [tile for tile in tiles if tile.splits == 1]
    split = [tile for tile in tiles if tile.splits > 1 and row.kind == "half" and row.path != "elements"]
    return _cases(arch, kernel, row, [*dict.fromkeys((whole[0], whole[-1])), *split])


def _read(arch: str, kernel: str, row: Row) -> list[dict]:
    """All that may have a hazard: not what does without tensor cores."""
    return _sample(arch, kernel, row) if row.kind == "ieee" else gates.every(arch, kernel, row)


def _widest_tile(arch: str, kernel: str, row: Row) -> Config:
    return max(gates.tiles(arch, kernel, row), key=lambda tile: tile.block_m * tile.block_n * tile.block_k)


def _widest(arch: str, kernel: str, row: Row) -> list[dict]:
    return _cases(arch, kernel, row, [_widest_tile(arch, kernel, row)])


@pytest.mark.parametrize(
    ("arch", "kernels", "first", "choose"),
    [
        pytest.param("sm_80", KERNELS, 1, _widest, id="widest-sm_80"),
        pytest.param(HOPPER, KERNELS, 1, _widest, id="widest-hopper"),
        *(
            pytest.param(arch, (kernel,), None, _sample, id=f"{arch}-{kernel}", marks=pytest.mark.slow)
            for arch in TARGETS
            if TARGETS[arch].capability[0] != 9
            for kernel in KERNELS
        ),
        *(
            pytest.param(HOPPER, (kernel,), None, _read, id=f"hopper-{kernel}", marks=pytest.mark.slow)
            for kernel in KERNELS
        ),
    ],
)
def test_configurations_may_be_launched(arch, kernels, first, choose):
    """No spills, no more shared memory than there is, no box out of place, and on Hopper no hazard."""
    device = TARGETS[arch]
    wanted = [case for kernel in kernels for row in rows(device)[:first] for case in choose(arch, kernel, row)]
    reports = probe({"device": dataclasses.asdict(device), "cases": wanted})
    second_kernels = sum(case["kernel"] == "grad_scales" or case["config"]["splits"] > 1 for case in wanted)
    assert len(reports) == len(wanted) + second_kernels
    failed = [f"{r['case']}: {why}" for r in reports for why in gates.wrong(r, device)]
    assert not failed, "\n".join(failed)


def test_w_in_registers_is_for_compilers_that_leave_them_alone():
    """The tile that serves most tokens: its hazards are seen where the installed Triton makes some."""
    row = Row("half", "boxes", "bfloat16", "bfloat16")
    cases = _widest("sm_90", "forward", row)
    reports = probe({"device": dataclasses.asdict(H100), "cases": cases})
    found = [why for report in reports for why in gates.wrong(report, H100)]
    assert not found if keeps_operands() else any("writes to the left operand" in why for why in found)


@pytest.mark.parametrize("version", ["3.6.0", "3.8.0", "3.9.1", "3.10.0"])
def test_w_goes_through_shared_memory_with_a_compiler_that_is_not_known_to_be_clean(monkeypatch, version):
    monkeypatch.setattr(compiler.triton, "__version__", version)
    assert not keeps_operands()
    monkeypatch.setattr(compiler.triton, "__version__", "3.9.0")
    own = str(Path(compiler.triton.__file__).with_name("ptxas"))
    for ptxas, path, clean in (("12.9", own, True), ("12.8", own, False), ("12.9", "/usr/bin/ptxas", False)):
        nvidia = SimpleNamespace(ptxas=SimpleNamespace(version=ptxas, path=path))
        monkeypatch.setattr(compiler, "knobs", SimpleNamespace(nvidia=nvidia))
        assert keeps_operands() is clean
    assert not Device((9, 0), 132, 232_448, keeps_operands=False).weight_left
    assert Device((10, 0), 148, 232_448, keeps_operands=False).weight_left


def test_the_table_was_searched_with_these_kernels():
    """What the sample leaves out, the search has compiled: of these kernels."""
    old = search.stale(tiles_table.FILE)
    assert not old, f"run python -m benchmarks.search: found with other kernels: {', '.join(old)}"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", pytest.param(HOPPER, id="hopper")])
def test_sizes_of_one_compile(arch):
    """Triton turns an integer argument of 1 into a constant, which is another kernel."""
    sizes = [(1, 1, 1, 1), (1, 16, 16, 1), (16, 1, 16, 1), (16, 16, 1, 1), (3, 3, 5, 3)]
    cases = [
        as_case(kernel, kind, dtype=dtype, weight_dtype=dtype, m=m, n=n, k=k, groups=groups)
        for kernel in ("forward", "grad_input", "grad_scales")
        for kind, dtype in (("half", "bfloat16"), ("ieee", "float32"))
        for m, n, k, groups in sizes
    ]
    reports = probe({"device": dataclasses.asdict(TARGETS[arch]), "cases": cases})
    assert len(reports) == len(cases) * 4 // 3  # grad_scales is two kernels


#: bf16 multiply-adds a Hopper multiprocessor does in a cycle (dense peak over clock and multiprocessors)
HOPPER_FMA_PER_CYCLE = 2048
SCHEDULERS = 4


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["forward", "grad_input"])
def test_on_hopper_the_rescaled_weight_stays_in_registers_and_fits_under_the_tensor_cores(kernel):
    """Of the tiles that serve many tokens: ViT-L's fc1 at batch 256."""
    row = Row("half", "boxes", "bfloat16", "bfloat16")
    choose = configs.forward_config if kernel == "forward" else configs.grad_input_config
    config = choose(50_432, 4096, 1024, 1, "half", "boxes", 2, 2, H100)
    tensors = {"dtype": row.dtype, "weight_dtype": row.weight_dtype, "path": row.path, "disassemble": True}
    cases = [as_case(kernel, row.kind, config, **tensors, **shape) for shape in shapes(row.path, kernel)]
    reports = probe({"device": dataclasses.asdict(H100), "cases": cases})
    assert len(reports) == len(cases)
    for report in reports:
        assert all(found := products(report["loop"])), f"W' goes through shared memory in {report['case']}"
        assert found, f"no wgmma in the loop of {report['case']}"
        stores = [i for i in report["loop"] if re.match(r"(?:@!?\w+ )?STS", i)]
        assert not stores, f"something goes back to shared memory in {report['case']}: {stores}"
        if report["case"]["groups"] == 1 or kernel == "forward":
            slots = len(report["loop"]) * config.num_warps / SCHEDULERS
            cycles = config.block_m * config.block_n * config.block_k / HOPPER_FMA_PER_CYCLE
            assert slots < 0.60 * cycles, f"{kernel}: {slots:.0f} issue slots against {cycles:.0f} cycles"


@pytest.mark.slow
def test_the_table_holds_what_is_counted():
    """One row again: registers, shared memory and slots of the table are those of the machine code."""
    row = Row("half", "vectors", "bfloat16", "bfloat16")
    tile = fitting_tiles("forward", row.kind, row.path, 2, 2, A100)[0]
    tensors = {"dtype": row.dtype, "weight_dtype": row.weight_dtype, "path": row.path, "disassemble": True}
    (shape,) = shapes(row.path, "forward")
    case = as_case("forward", row.kind, tile.config(), **tensors, **shape)
    reports = probe({"device": dataclasses.asdict(A100), "cases": [case]})
    counted = search.as_tile("forward", row, tile.config(), "sm_80", reports)
    assert counted.slots == pytest.approx(tile.slots, rel=0.25), "another Triton may differ by this much"
    assert counted.shared == pytest.approx(tile.shared, rel=0.5)
    assert counted.registers == pytest.approx(tile.registers, rel=0.5)


@pytest.mark.slow
def test_the_probe_sees_a_spill_and_shared_memory():
    """The gate can fail: a tile far too large for its warps is reported with a stack."""
    config = Config(block_m=128, block_n=256, block_k=64, num_warps=4, num_stages=2)
    case = as_case(
        "forward", "half", config, dtype="bfloat16", weight_dtype="bfloat16", groups=1, path="vectors", **ALIGNED
    )
    (report,) = probe({"device": dataclasses.asdict(A100), "cases": [case]})
    assert report["stack"] > 0
    assert report["shared"] > 2**15
