"""The Gluon kernels' machine code, compiled without a GPU: a part of what ``make gates`` compiles."""

import dataclasses

import pytest

from benchmarks.disassemble import probe
from tests import gates
from tests.gluon_code import disorder

CASES = [case for kernel in ("forward", "grad_input", "grad_scales") for case in gates.gluon_cases(kernel)]
#: The widest product, which has the fewest registers to spare but for grad_scales.
QUICK = CASES[:1]


@pytest.mark.parametrize("cases", [QUICK, pytest.param(CASES, marks=pytest.mark.slow)], ids=["widest", "all"])
def test_kernels_may_be_launched(cases):
    """They have no hazard, no spill, few instructions, no block barrier in a step, and all barriers that they need."""
    reports = [r for r in probe({"device": dataclasses.asdict(gates.H100), "cases": cases}) if gates.of_gluon(r)]
    assert ["sass" in r for r in reports] == [True] * len(cases)
    failed = [f"{r['case']}: {why}" for r in reports for why in gates.wrong(r, gates.H100)]
    assert not failed, "\n".join(failed)


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
