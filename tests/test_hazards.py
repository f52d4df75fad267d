"""The checker of wgmma's registers sees each kind of hazard, on each kind of path, and nothing where there is none."""

import pytest

from tests.hazards import hazards, products

FIRST = "HGMMA.64x64x16.F32.BF16 R24, R60, gdesc[UR4], R24"  # sums R24 to R55, left operand R60 to R63
SECOND = "HGMMA.64x64x16.F32.BF16 R24, R64, gdesc[UR4], R24, gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
TABLE = 'BRXU UR6 -0x3940    (*"BRANCH_TARGETS .L_x_0,.L_x_1"*)'
ONE_LEFT = "WARPGROUP.DEPBAR.LE gsb0, 0x1"


def found(*lines: str) -> list[str]:
    """The instructions that are reported."""
    return [report.partition(":")[0] for report in hazards([*lines, "EXIT"])]


@pytest.mark.parametrize(
    ("instruction", "why"),
    [
        ("MOV R60, R1", "writes to the left operand"),
        ("MOV R63, R1", "writes to the left operand"),
        ("LDS.64 R62, [R1]", "writes to the left operand"),
        ("LDS.128 R60, [R1]", "writes to the left operand"),
        ("LDS.64 R66, [R1]", "writes to the left operand"),
        ("LDSM.16.M88.4 R57, [R1]", "writes to the left operand"),
        ("IMAD.WIDE R58, R1, R2, R4", None),
        ("IMAD.WIDE.U32 R59, R1, R2, R4", "writes to the left operand"),
        ("CS2R R62, SRZ", "writes to the left operand"),
        ("@!P3 F2FP.BF16.F32.PACK_AB R61, R1, R2", "writes to the left operand"),
        ("HMMA.16816.F32.BF16 R60, R4, R8, R12", "writes to the left operand"),
        ("HMMA.16816.F32.BF16 R62, R4, R8, R12", "writes to the left operand"),
        ("B2R.RESULT RZ, P0", None),
        ("B2R.RESULT R61, P0", "writes to the left operand"),
        ("SHFL.IDX PT, R65, R1, R2, 0x1f", "writes to the left operand"),
        ("@!PT MOV R60, R1", None),
        ("FADD R55, R1, R2", "writes to the sums"),
        ("FADD R1, R55, R2", "reads the sums"),
        ("STG.E.128 desc[UR8][R2.64], R52", "reads the sums"),
        ("STSM.16.M88.4 [R1], R21", "reads the sums"),
        ("LDS.64 R2, [R23+UR13+0x100]", None),  # shared memory's addresses have 32 bits
        ("IMAD.WIDE.U32 R2, R23, UR17, RZ", None),
        ("IMAD.WIDE.U32 R2, R4, R5, R23", "reads the sums"),
        ("LDG.E R2, desc[UR8][R23.64]", "reads the sums"),
        ("STS [R60], R61", None),  # the left operand may be read
        ("FADD R56, R57, R68", None),
        ("ISETP.GE.AND P0, PT, R23, R56, PT", None),
        ("ISETP.GE.AND P0, PT, R24, R56, PT", "reads the sums"),
        ("HGMMA.64x8x16.F32.BF16 R32, R80, gdesc[UR4], R32, gsb0", "its sums are part"),
        ("HGMMA.64x8x16.F32.BF16 R60, R80, gdesc[UR4], R60, gsb0", "its sums are the left operand"),
        ("HGMMA.64x8x16.F32.BF16 R90, R52, gdesc[UR4], R90, gsb0", "its left operand is being written"),
        ("HGMMA.64x64x16.F32.BF16 R24, R80, gdesc[UR4], R24, gsb0", None),
    ],
)
def test_each_use_of_a_running_products_registers(instruction, why):
    reports = hazards([FIRST, SECOND, instruction, WAIT, "EXIT"])
    assert [report.startswith(f"{instruction}: {why}") for report in reports] == ([True] if why else [])
    assert hazards([FIRST, SECOND, WAIT, instruction, WAIT, "EXIT"]) == []


def test_products_are_waited_for_by_groups():
    """A product is in the group of the next ``gsb0``, and a wait leaves the newest groups running."""
    other = "HGMMA.64x64x16.F32.BF16 R100, R140, gdesc[UR4], R100, gsb0"
    writes = ["MOV R60, R1", "MOV R64, R1", "MOV R140, R1"]
    assert found(FIRST, SECOND, other, *writes, WAIT) == writes
    assert found(FIRST, SECOND, other, ONE_LEFT, *writes, WAIT) == writes[2:]
    assert found(FIRST, WAIT, writes[0], SECOND, WAIT) == [writes[0]], "no group is closed: nothing to wait for"
    assert found(SECOND, ONE_LEFT, writes[1], WAIT) == [writes[1]]


@pytest.mark.parametrize("guard", ["@P0 ", "@!UP3 ", "@!PT "])
def test_a_guarded_wait_or_product_may_not_be_executed(guard):
    other = "HGMMA.64x64x16.F32.BF16 R100, R140, gdesc[UR4], R100, gsb0"
    assert found(SECOND, guard + WAIT, "MOV R64, R1", WAIT) == ["MOV R64, R1"]
    assert found(SECOND, guard + other, ONE_LEFT, "MOV R64, R1", WAIT) == ["MOV R64, R1"]
    assert found("@PT " + SECOND, "@PT " + WAIT, "MOV R64, R1") == []


def test_products_that_nobody_waits_for_are_refused():
    with pytest.raises(ValueError, match="more than 64 groups"):
        found(".L_x_0", SECOND, "@P0 BRA `(.L_x_0)", WAIT)


def test_sums_in_float16_take_half_the_registers():
    half = "HGMMA.64x64x16.F16 R24, gdesc[UR4], R24, gsb0"
    assert found(half, "MOV R39, R1", "MOV R40, R1", WAIT) == ["MOV R39, R1"]


def test_a_step_that_begins_while_the_last_one_runs():
    """What no single pass over the code shows: the hazard of Triton 3.6 and 3.8."""
    step = [".L_x_0", "LDS.64 R64, [R1]", "LDS.64 R60, [R1]", FIRST, SECOND, ONE_LEFT, "@P0 BRA `(.L_x_0)", WAIT]
    assert found(*step) == step[1:3]
    step[5] = WAIT
    assert found(*step) == []


@pytest.mark.parametrize("branch", ["@!P0 BRA `(.L_x_1)", "BRA.DIV UR4, `(.L_x_1)", "BRA.U UP0, `(.L_x_1)", TABLE])
def test_both_ways_of_a_branch_are_walked(branch):
    hidden = "MOV R64, R1"
    lines = [SECOND, branch, ".L_x_0", WAIT, "EXIT", ".L_x_1", hidden, WAIT]
    assert found(*lines) == [hidden]
    assert found(SECOND, "BRA `(.L_x_1)", hidden, ".L_x_1", WAIT) == [], "what is jumped over is not executed"


def test_an_exit_leaves_no_product_running():
    assert found(SECOND) == ["EXIT"]
    assert found(SECOND, "@P0 EXIT", WAIT) == ["@P0 EXIT"]
    assert found(SECOND, "@!PT EXIT", WAIT) == []


def test_a_join_can_be_reached_from_where_threads_parted():
    lines = ["BSSY B0, `(.L_x_2)", SECOND, "BSYNC B0", WAIT, "EXIT", ".L_x_2", "MOV R64, R1", WAIT]
    again = ["BSSY B0, `(.L_x_3)", "BSYNC B0", ".L_x_3", WAIT]  # the barrier's name serves another join
    assert found(*lines, *again) == ["MOV R64, R1"]


def test_a_call_is_followed_and_returns_to_where_it_was_made():
    lines = [SECOND, "CALL.REL.NOINC `($div)", "MOV R66, R1", WAIT, "CALL.REL.NOINC `($div)", "EXIT"]
    function = ["$div", "MOV R64, R1", "RET.REL.NODEC R2 `(kernel)"]
    reports = [report.partition(":")[0] for report in hazards([*lines, *function])]
    assert reports == ["MOV R66, R1", "MOV R64, R1"]


def test_registers_of_a_warpgroup_that_gave_some_away():
    lines = ["MOV R90, R1", "USETMAXREG.DEALLOC.CTAPOOL 0x38", "MOV R55, R1", "LDS.64 R54, [R1]", "LDS.64 R55, [R1]"]
    assert hazards([*lines, "EXIT"]) == [f"{lines[4]}: R56 is beyond the 56 registers of this warpgroup"]
    more = "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe0"
    assert hazards([lines[1], more, lines[0], "EXIT"]) == []


@pytest.mark.parametrize(
    "text", ["CALL.ABS.NOINC `(printf)", "RET.REL.NODEC R2 `(forward)", "BRX R4 -0x10", "JMP 0x80", "HGMMA.SP.64x8 R1"]
)
def test_what_cannot_be_read_is_refused(text):
    with pytest.raises(ValueError, match=r"without a call|one label|control flow|product"):
        hazards([SECOND, text, "EXIT"])
    with pytest.raises(ValueError, match="past the last"):
        hazards(["MOV R1, R2"])


def test_which_products_take_w_from_registers():
    shared = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0"
    assert products([FIRST, shared, "@P0 HGMMA.64x8x8.F32.TF32 R4, R60, gdesc[UR4], !UPT, gsb0"]) == [True, False, True]
