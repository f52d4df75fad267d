"""The Gluon kernels' machine code, without a GPU: a sample of what ``make gates`` compiles, and who reads it."""

import dataclasses

import pytest

from benchmarks.disassemble import probe
from tests import gates
from tests.gluon_code import Figures, disorder, figures

CASES = [case for kernel in ("forward", "grad_input", "grad_scales") for case in gates.gluon_cases(kernel)]
#: The widest product, which has the fewest registers to spare but for grad_scales.
QUICK = CASES[:1]


@pytest.mark.parametrize("cases", [QUICK, pytest.param(CASES, marks=pytest.mark.slow)], ids=["widest", "all"])
def test_kernels_may_be_launched(cases):
    """No hazard, no spill, few instructions, no barrier of the block in a step, and no thread ahead of the others."""
    reports = [r for r in probe({"device": dataclasses.asdict(gates.H100), "cases": cases}) if gates.of_gluon(r)]
    assert len(reports) == len(cases)
    failed = [f"{r['case']}: {why}" for r in reports for why in gates.wrong(r, gates.H100)]
    assert not failed, "\n".join(failed)


def warpgroup(number: int, step: int, after: int, barrier: str) -> list[str]:
    """A loop of tiles around one of products, of so many instructions from the last product on."""
    outer, inner = f".L_x_{number}", f".L_x_{number + 1}"
    product = ["HGMMA.64x256x16.F32.BF16 R24, R152, gdesc[UR16], R24, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0"]
    last = ["UTMASTG.2D [UR8], [UR6]", f"@!P0 BRA `({outer})"]
    loop = [*product, barrier, *["FADD R4, R4, R5"] * (step - 4), f"@P1 BRA `({inner})"]
    return [outer, "MOV R1, R2", inner, *loop, *product, *["FADD R4, R4, R5"] * (after - 2), *last]


def test_figures_are_of_the_slower_warpgroup():
    own, whole = "BAR.SYNC.DEFER_BLOCKING 0x2, 0x80", "BAR.SYNC.DEFER_BLOCKING 0x1"
    # a branch back from cold code, into a loop, is none
    cold = ["EXIT", ".L_x_9", "BRA `(.L_x_1)"]
    lines = [*warpgroup(0, 20, 30, own), *warpgroup(2, 25, 10, own), *cold]
    assert figures(lines) == Figures(step=25, longest=25, after=30, barriers=(1, 0), block_barriers=0)
    # of a group's first step: the others skip it
    lines[3:3] = ["@P2 BRA `(.L_x_8)", *["LDG.E R6, desc[UR30][R4.64]"] * 9, ".L_x_8"]
    assert (figures(lines).step, figures(lines).longest) == (25, 30)
    for barrier in (whole, "BAR.SYNC.DEFER_BLOCKING 0x0, 0x180"):
        assert figures([*warpgroup(0, 20, 30, own), *warpgroup(2, 25, 10, barrier)]).block_barriers == 1
    with pytest.raises(ValueError, match="two warpgroups, got 1"):
        figures(warpgroup(0, 20, 30, own))


BAR, FENCE, ARRIVE = "BAR.SYNC.DEFER_BLOCKING 0x2, 0x80", "FENCE.VIEW.ASYNC.S", "@P0 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R2]"
WAIT, STORED, WRITE, STORE = (
    "WARPGROUP.DEPBAR.LE gsb0, 0x1",
    "DEPBAR.LE SB0, 0x0",
    "STSM.16.MT88.4 [R12], R4",
    "UTMASTG.2D [UR8], [UR6]",
)
RIGHT = [WAIT, BAR, ARRIVE, STORED, BAR, WRITE, WRITE, FENCE, BAR, STORE, STORED]


@pytest.mark.parametrize(
    ("left_out", "why"),
    [
        (1, "frees a stage that another warp's product may still read"),
        (4, "writes to memory that a store may still read"),
        (7, "stores what another warp may not have written yet"),
        (8, "stores what another warp may not have written yet"),
    ],
)
def test_each_missing_barrier_is_seen(left_out, why):
    assert list(disorder(RIGHT)) == []
    (report, *_) = disorder(RIGHT[:left_out] + RIGHT[left_out + 1 :])
    assert report.endswith(why)
