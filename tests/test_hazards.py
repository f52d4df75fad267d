"""The checker of wgmma's registers finds each kind of hazard on each kind of path, and nothing where there is none."""

import pytest

from tests.hazards import hazards, products

FIRST = "HGMMA.64x64x16.F32.BF16 R24, R60, gdesc[UR4], R24"  # sums in R24 to R55, left operand in R60 to R63
SECOND = "HGMMA.64x64x16.F32.BF16 R24, R64, gdesc[UR4], R24, gsb0"
OTHER = "HGMMA.64x64x16.F32.BF16 R100, R140, gdesc[UR4], R100, gsb0"
WAIT, WAIT_BUT_ONE = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"
TABLE = 'BRXU UR6 -0x3940    (*"BRANCH_TARGETS .L_x_0,.L_x_1"*)'
CALL = "CALL.REL.NOINC `($div)"
PARTED_AGAIN = ["BSSY B0, `(.L_x_3)", "BSYNC B0", ".L_x_3", WAIT]
W60, W64, W140 = "MOV R60, R1", "MOV R64, R1", "MOV R140, R1"
LEFT, SUMS, READS = "writes to the left operand", "writes to the sums", "reads the sums"


@pytest.mark.parametrize(
    ("instruction", "why"),
    [
        (W60, LEFT),
        ("LDS.64 R62, [R1]", LEFT),
        ("LDS.128 R60, [R1]", LEFT),
        ("LDSM.16.M88.4 R57, [R1]", LEFT),
        ("IMAD.WIDE R58, R1, R2, R4", None),
        ("IMAD.WIDE.U32 R59, R1, R2, R4", LEFT),
        ("CS2R R62, SRZ", LEFT),
        ("@!P3 F2FP.BF16.F32.PACK_AB R61, R1, R2", LEFT),
        ("HMMA.16816.F32.BF16 R60, R4, R8, R12", LEFT),
        ("B2R.RESULT RZ, P0", None),
        ("SHFL.IDX PT, R65, R1, R2, 0x1f", LEFT),
        ("@!PT MOV R60, R1", None),
        ("FADD R55, R1, R2", SUMS),
        ("FADD R1, R55, R2", READS),
        ("STG.E.128 desc[UR8][R2.64], R52", READS),
        ("STSM.16.M88.4 [R1], R21", READS),
        ("LDS.64 R2, [R23+UR13+0x100]", None),  # addresses in shared memory have 32 bits
        ("IMAD.WIDE.U32 R2, R4, R5, R23", READS),
        ("LDG.E R2, desc[UR8][R23.64]", READS),
        ("STS [R60], R61", None),  # the left operand may be read
        ("ISETP.GE.AND P0, PT, R23, R56, PT", None),
        ("ISETP.GE.AND P0, PT, R24, R56, PT", READS),
        ("HGMMA.64x8x16.F32.BF16 R32, R80, gdesc[UR4], R32, gsb0", "its sums are part"),
        ("HGMMA.64x8x16.F32.BF16 R60, R80, gdesc[UR4], R60, gsb0", "its sums are the left operand"),
        ("HGMMA.64x8x16.F32.BF16 R90, R52, gdesc[UR4], R90, gsb0", "its left operand is being written"),
        ("HGMMA.64x64x16.F32.BF16 R24, R80, gdesc[UR4], R24, gsb0", None),
    ],
)
def test_each_use_of_the_registers_of_a_running_product(instruction, why):
    reports = hazards([FIRST, SECOND, instruction, WAIT, "EXIT"])
    assert [report.startswith(f"{instruction}: {why}") for report in reports] == ([True] if why else [])
    assert hazards([FIRST, SECOND, WAIT, instruction, WAIT, "EXIT"]) == []


@pytest.mark.parametrize(
    ("lines", "expected"),
    {
        "products are waited for by groups": ([FIRST, SECOND, OTHER, W60, W64, W140, WAIT], [W60, W64, W140]),
        "a wait leaves the newest groups": ([FIRST, SECOND, OTHER, WAIT_BUT_ONE, W60, W64, W140, WAIT], [W140]),
        "a group that is not closed": ([FIRST, WAIT, W60, SECOND, WAIT], [W60]),
        "a guarded wait": ([SECOND, "@P0 " + WAIT, W64, WAIT], [W64]),
        "a wait that is never executed": ([SECOND, "@!PT " + WAIT, W64, WAIT], [W64]),
        "a guarded product": ([SECOND, "@!UP3 " + OTHER, WAIT_BUT_ONE, W64, WAIT], [W64]),
        "a product and wait that are always executed": (["@PT " + SECOND, "@PT " + WAIT, W64], []),
        "sums in float16 take half the registers": (
            ["HGMMA.64x64x16.F16 R24, gdesc[UR4], R24, gsb0", "MOV R39, R1", "MOV R40, R1", WAIT],
            ["MOV R39, R1"],
        ),
        # the hazard of Triton 3.6 and 3.8, which one pass over the code does not show
        "a step that begins while the last one runs": (
            [".L_x_0", "LDS.64 R64, [R1]", FIRST, SECOND, WAIT_BUT_ONE, "@P0 BRA `(.L_x_0)", WAIT],
            ["LDS.64 R64, [R1]"],
        ),
        "a step after a wait": ([".L_x_0", "LDS.64 R64, [R1]", FIRST, SECOND, WAIT, "@P0 BRA `(.L_x_0)", WAIT], []),
        **{
            f"both ways of {branch}": ([SECOND, branch, ".L_x_0", WAIT, "EXIT", ".L_x_1", W64, WAIT], [W64])
            for branch in ("@!P0 BRA `(.L_x_1)", "BRA.DIV UR4, `(.L_x_1)", "BRA.U UP0, `(.L_x_1)", TABLE)
        },
        "a jump over": ([SECOND, "BRA `(.L_x_1)", W64, ".L_x_1", WAIT], []),
        "an exit with a running product": ([SECOND], ["EXIT"]),
        "a guarded exit with a running product": ([SECOND, "@P0 EXIT", WAIT], ["@P0 EXIT"]),
        "a join is reached from where threads parted": (
            ["BSSY B0, `(.L_x_2)", SECOND, "BSYNC B0", WAIT, "EXIT", ".L_x_2", W64, WAIT, *PARTED_AGAIN],
            [W64],
        ),
        "a call returns to where it was made": (
            [SECOND, CALL, "MOV R66, R1", WAIT, CALL, "EXIT", "$div", W64, "RET.REL.NODEC R2 `(kernel)"],
            ["MOV R66, R1", W64],
        ),
        "registers beyond those of a warpgroup": (
            ["MOV R90, R1", "USETMAXREG.DEALLOC.CTAPOOL 0x38", "MOV R55, R1", "LDS.64 R54, [R1]", "LDS.64 R55, [R1]"],
            ["LDS.64 R55, [R1]"],
        ),
        "registers that a warpgroup took": (
            ["USETMAXREG.DEALLOC.CTAPOOL 0x38", "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe0", "MOV R90, R1"],
            [],
        ),
    }.values(),
)
def test_every_path_is_walked(lines, expected):
    assert [report.partition(":")[0] for report in hazards([*lines, "EXIT"])] == expected


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([SECOND, "CALL.ABS.NOINC `(printf)", "EXIT"], "one label"),
        ([SECOND, "RET.REL.NODEC R2 `(forward)", "EXIT"], "without a call"),
        ([SECOND, "BRX R4 -0x10", "EXIT"], "control flow"),
        ([SECOND, "HGMMA.SP.64x8 R1", "EXIT"], "product"),
        (["MOV R1, R2"], "past the last"),
        ([".L_x_0", SECOND, "@P0 BRA `(.L_x_0)", WAIT, "EXIT"], "more than 64 groups"),
    ],
)
def test_code_that_cannot_be_analysed_is_refused(lines, message):
    with pytest.raises(ValueError, match=message):
        hazards(lines)


def test_products_whose_left_operand_is_in_registers():
    shared = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0"
    assert products([FIRST, shared, "@P0 HGMMA.64x8x8.F32.TF32 R4, R60, gdesc[UR4], !UPT, gsb0"]) == [True, False, True]
