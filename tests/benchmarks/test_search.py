"""The search over tiles, without a compiler: what it counts, keeps, and remembers."""

import json
import math

import pytest

from benchmarks import search
from benchmarks.disassemble import CompilerEnded, product_loop
from benchmarks.instructions import mix
from benchmarks.search_space import Row
from rlrr_kernels.backends.triton.config import Config, Device

AMPERE = [
    "LDSM.16.M88.4 R8, [R99+0x6000]",
    "LDSM.16.MT88.2 R4, [R2]",
    "LDS.64 R20, [R94]",
    "LDS R3, [R94]",
    "@!PT LDS RZ, [RZ]",
    "STS.128 [R3], R8",
    "@P1 LDGSTS.E.BYPASS.128 [R1], [R2.64]",
    *["PRMT R1, R2, 0x7632, R3", "SHF.L.U32 R1, R2, 0x10, RZ"] * 8,
    *["FFMA R1, R2, R3, R4", "FMUL R1, R2, R3", "IMAD.U32 R1, R2, R3, RZ"] * 4,
    *["HMMA.16816.F32.BF16 R4, R8, R12, R4"] * 4,
    "DEPBAR.LE SB0, 0x2",
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "NOP",
    "BRA `(.L_x_1)",
]


def test_a_loop_is_counted_by_pipes():
    """42 instructions; 16 of the 16-lane units; 12 multiply-adds, which sm_80 starts every other cycle."""
    counted = mix(AMPERE, "sm_80", 2, step_fma=4 * 16 * 8 * 16 * 4, warps=4)
    assert counted.instructions == 42
    assert counted.slots == 42
    assert counted.shared_bytes == 512 + 256 + 256 + 128 + 512
    assert (counted.waits, counted.tensor, counted.through_shared) == (2, 4, 0)
    integer = mix(AMPERE + ["LOP3.LUT R1, R2, R3, R4, 0xc0"] * 16, "sm_80", 2, 4 * 16 * 8 * 16 * 4, 4)
    assert (integer.instructions, integer.slots) == (58, 64)  # 32 of them for two cycles each
    floats = AMPERE + ["FADD R1, R2, R3"] * 40
    assert mix(floats, "sm_80", 2, 4 * 16 * 8 * 16 * 4, 4).slots == 104
    assert mix(floats, "sm_90", 2, 4 * 16 * 8 * 16 * 4, 4).slots == 82


def test_an_unrolled_loop_is_counted_by_the_step():
    counted = mix(AMPERE * 2, "sm_80", 2, step_fma=4 * 16 * 8 * 16 * 4, warps=4)
    assert (counted.instructions, counted.tensor, counted.waits) == (42, 4, 2)


def test_a_wgmma_reads_its_right_operand_from_shared_memory_and_perhaps_its_left():
    registers = "HGMMA.64x128x16.F32.BF16 R24, R92, gdesc[UR24], R24, gsb0"
    both = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20].tnspA.tnspB, R24"
    fma = 64 * 128 * 16
    assert mix([registers], "sm_90", 2, fma, 4).shared_bytes == 128 * 16 * 2 // 4
    from_shared = mix([both], "sm_90", 2, fma, 4)
    assert from_shared.shared_bytes == (128 + 64) * 16 * 2 // 4
    assert from_shared.through_shared == 1
    tf32 = "HGMMA.64x64x8.F32.TF32 R24, R92, gdesc[UR24], R24, gsb0"
    assert mix([tf32], "sm_90", 4, 64 * 64 * 8, 4).shared_bytes == 64 * 8 * 4 // 4


def test_packed_floats_are_two():
    assert mix(["FFMA2 R0, R2, R4, R6"] * 9 + ["UIADD3 UR4, UR5, 0x1, URZ"], "sm_100", 2, 1, 4).slots == 18


SASS = """
.L_x_0:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   FFMA R1, R2, R3, R4 ;
        /*0020*/              @P0  BRA `(.L_x_1) ;
.L_x_2:
        /*0030*/                   {0} ;
        /*0040*/                   FADD R1, R2, R3 ;
        /*0050*/              @P0  BRA `(.L_x_2) ;
        /*0060*/                   EXIT ;
"""


def test_the_loop_is_the_one_that_multiplies():
    loop, total = product_loop(SASS.replace("{0}", "HMMA.16816.F32.BF16 R4, R8, R12, R4"))
    assert [i.split()[0] for i in loop] == ["HMMA.16816.F32.BF16", "FADD", "@P0"]
    assert total == 7
    loop, _ = product_loop(SASS.replace("{0}", "FFMA R5, R6, R7, R8"))
    assert len(loop) == 2, "of two as dense, the shorter"


A, B, C, D = (Config(m, 64, 64, 4, 4) for m in (16, 32, 64, 128))


def test_the_few_that_lose_least_together_are_kept():
    """B is second everywhere; alone it would win, beside A and C it adds nothing."""
    times = {A: [1.0, 9.0, 9.0], B: [1.3, 1.3, 1.3], C: [9.0, 1.0, 1.0], D: [9.0, 9.0, 9.0]}
    assert search.choose(times, most=1) == [B]
    assert set(search.choose(times, most=3)) == {A, B, C}
    assert D not in search.choose(times, most=4)
    assert search.choose({A: [1.0], B: [1.001]}) == [A], "a gain below the least is none"
    assert search.choose({}) == []


DEVICE = Device((8, 0), 108, 166_912)


def test_a_case_that_ends_the_compiler_costs_only_itself(monkeypatch):
    def probe(request, python):
        done = []
        for index, case in enumerate(request["cases"]):
            if case["bad"]:
                raise CompilerEnded(done, "aborted")
            names = ["grad_scales_kernel", "sum_partials_kernel"] * (1 + case["id"] % 2)
            done += [{"name": name, "index": index, "id": case["id"]} for name in names]
        return done

    monkeypatch.setattr(search, "probe", probe)
    cases = [{"id": i, "bad": i in (0, 3, 4, 7)} for i in range(8)]
    found = search.measure("python", DEVICE, cases)
    assert [r and r["id"] for r in found] == [None, 1, 2, None, None, 5, 6, None]


def test_a_process_that_cannot_begin_is_no_failure_of_the_compiler(tmp_path):
    """Or every tile would be remembered as one that does not compile."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no module named torch >&2\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(RuntimeError, match="no module named torch"):
        search.measure(str(python), DEVICE, [{}])


ROW = Row("half", "vectors", "bfloat16", "bfloat16")


@pytest.fixture
def compiled(monkeypatch):
    """A compiler that remembers what it was asked for; tiles of 128 tokens spill."""
    asked = []

    def probe(request, python):
        asked.extend(c["config"]["block_m"] for c in request["cases"])
        return [
            {
                "name": "forward_kernel",
                "registers": 100,
                "stack": 8 if c["config"]["block_m"] == 128 else 0,
                "shared": 1000,
                "tensor_columns": 0,
                "loop": AMPERE,
                "outside": 77,
                "index": index,
            }
            for index, c in enumerate(request["cases"])
        ]

    monkeypatch.setattr(search, "probe", probe)
    monkeypatch.setattr(search, "triton_version", lambda python: python)
    return asked


def test_a_stopped_search_goes_on_where_it_was(tmp_path, compiled):
    first = search.Cache(tmp_path, "sm_80", "forward", "3.9")
    first.compile([(ROW, A, 1), (ROW, D, 1)])
    assert compiled == [16, 128]
    again = search.Cache(tmp_path, "sm_80", "forward", "3.9")
    again.compile([(ROW, A, 1), (ROW, B, 1), (ROW, A, 2)])
    assert compiled == [16, 128, 32, 16]
    tile = again.tile(ROW, A)
    assert again.tile(ROW, D) is None, "it spills"
    assert (tile.registers, tile.outside, tile.waits, tile.config()) == (100, 77, 2, A)
    # a step of one block: filling 64 x (16 + 64) bf16, and what four warps read in the two steps of this loop
    steps = round(4 * 16 * 8 * 16 * 4 / (16 * 64 * 64)) or 1
    assert tile.shared_bytes == 64 * (16 + 64) * 2 + math.ceil(1664 / steps) * 4
    search.Cache(tmp_path, "sm_80", "forward", "3.6").compile([(ROW, A, 1)])
    assert compiled[4:] == [16], "another Triton knows nothing yet"


def test_a_tile_that_the_oldest_triton_cannot_compile_is_not_shipped(tmp_path, compiled, monkeypatch):
    monkeypatch.setattr(search, "rows", lambda device: [ROW])
    monkeypatch.setattr(search, "variants", lambda kernel, row, device: [B, C])
    cache, floor = (search.Cache(tmp_path, "sm_80", "forward", version) for version in ("3.9", "3.6"))
    both, _ = search.search(cache, (floor,), None)
    kept = {tile.config() for tile in both[ROW.name]}
    refused = kept.pop()
    floor.known[floor._key(ROW, refused, 1)] = None
    tiles, remarks = search.search(cache, (floor,), None)
    assert [tile.config() for tile in tiles[ROW.name]] == [({B, C} - {refused}).pop()]
    assert remarks == []
    slower = floor.known[floor._key(ROW, *kept or ({B, C} - {refused}), 1)]
    slower["slots"] *= 3
    _, remarks = search.search(cache, (floor,), None)
    assert len(remarks) == 1
    assert "with Triton 3.6" in remarks[0]


def test_a_kernel_is_told_by_its_code_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "PACKAGE", tmp_path)
    (tmp_path / "tiles.py").write_text("")

    def text(code):
        (tmp_path / "forward.py").write_text(code)
        return search.kernel_text("forward")

    first = text("def f(x):\n    return x + 1\n")
    assert text("def f(x):  # why\n\n    return x + 1\n") == first
    assert text("def f(x):\n    return x + 2\n") != first


def test_results_are_merged_and_stale_ones_named(tmp_path):
    file = tmp_path / "table.json"
    now = search.kernel_text("forward")
    tile = {"block_m": 64, "slots": 3}
    search.write("sm_80", "forward", {"kernel": now, "triton": ["3.9"]}, {"half/2 vectors": [tile]}, file)
    search.write("sm_90", "forward", {"kernel": "of old", "triton": ["3.9"]}, {"half/2 vectors": [tile, tile]}, file)
    table = json.loads(file.read_text())
    assert table["tiles"]["sm_80"]["forward"]["half/2 vectors"] == [tile]
    assert len(table["tiles"]["sm_90"]["forward"]["half/2 vectors"]) == 2
    assert file.read_text().count("block_m") == sum('"block_m"' in line for line in file.read_text().splitlines())
    old = search.stale(file)
    assert "sm_80 forward" not in old
    assert {"sm_90 forward", "sm_80 grad_input", "sm_120 grad_scales"} <= set(old)
