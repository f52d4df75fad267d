"""Faults planted in the kernels' source, one at a time: the tests beside this file must notice each."""

import itertools

import pytest
import torch
from torch import Tensor

from tests.cuda_host.faults import RESULTS, Fault, parameters
from tests.cuda_host.machine import BACKWARDS, FORWARDS, LARGE, SMALL, Machine, MachineError, build
from tests.cuda_host.test_kernels import BF16, HALF, SINGLE, far_apart, one_product, tf32_products
from tests.cuda_host.test_splits import FEW, cancelling
from tests.oracle import Problem, assert_close, differentiate, make_problem, strided

FAULTS = [
    Fault(*fields)
    for fields in (
        # synchronisation
        ("no barrier in the loop", "forward", "tile.cuh", "    ptx::barrier();\n", ""),
        ("no barrier in the loop", "grad_scales", "tile.cuh", "    ptx::barrier();\n", ""),
        (
            "copies before the barrier",
            "forward",
            "tile.cuh",
            "    ptx::barrier();\n    if (step + kStages - 1 < steps) copy(stage_to_fill);",
            "    if (step + kStages - 1 < steps) copy(stage_to_fill);\n    ptx::barrier();",
        ),
        ("no wait for copies", "forward", "tile.cuh", "    ptx::wait_copies<kStages - 2>();\n", ""),
        ("waits for a step too few", "grad_input", "tile.cuh", "copies<kStages - 2>", "copies<kStages - 1>"),
        (
            "commits only what it copied",
            "forward",
            "tile.cuh",
            "    ptx::commit_copies();\n    multiply(stage);",
            "    if (step + kStages - 1 < steps) ptx::commit_copies();\n    multiply(stage);",
        ),
        ("fills the stage that is read", "grad_input", "tile.cuh", "to_fill = kStages - 1", "to_fill = 0"),
        (
            "W overwrites a stage still read",
            "grad_scales",
            "reduce.cuh",
            "  ptx::barrier();  // the last stages of the pipeline lie here and must have been read\n",
            "",
        ),
        ("no wait for W", "grad_scales", "reduce.cuh", "  ptx::wait_copies<0>();\n", ""),
        ("no barrier after W", "grad_scales", "reduce.cuh", "  ptx::barrier();\n  reduce_warp", "  reduce_warp"),
        ("no barrier for shares", "grad_scales", "reduce.cuh", "  ptx::barrier();\n  add_shares", "  add_shares"),
        ("no barrier in df", "grad_scales", "grad_scales.cu", "  ptx::barrier();\n", ""),
        # layouts
        (
            "x's fragments swapped",
            "forward",
            "math.cuh",
            "s.at(row + l.index % 16, depth + l.index / 16 * 8)",
            "s.at(row + l.index / 16 * 8 + l.index % 8, depth + l.index / 8 % 2 * 8)",
        ),
        (
            "W's fragments swapped",
            "grad_input",
            "math.cuh",
            "s.at(depth + l.index % 16, col + l.index / 16 * 8)",
            "s.at(depth + l.index / 16 * 8 + l.index % 8, col + l.index / 8 % 2 * 8)",
        ),
        ("packed the wrong way round", "forward", "math.cuh", "(w[0][0], w[0][1]), ptx", "(w[0][1], w[0][0]), ptx"),
        ("scales of other depths", "forward", "math.cuh", "4 * (2 * l.t + 8)", "4 * (2 * l.t)"),
        ("a lane's sum left out", "grad_scales", "reduce.cuh", "    du += ptx::shuffle_xor(du, 2);\n", ""),
        # edges
        ("a row too many", "forward", "epilogue.cuh", "first_row + 8 * i >= rows", "first_row + 8 * i > rows"),
        ("a column too many", "grad_input", "epilogue.cuh", "col >= cols", "col > cols"),
        ("a depth too many", "forward", "tile.cuh", "r < rows && c < cols", "r < rows && c <= cols"),
        ("whole rows at the edge", "forward", "tile.cuh", "rows == Shared::kRows && cols == Shared::kCols", "true"),
        ("edges taken for whole tiles", "forward", "product.cuh", "p.tokens >= Tile::kRows && ", ""),
        ("edges taken for whole tiles", "grad_input", "product.cuh", " && p.features >= Tile::kCols", ""),
        ("a last step taken for a whole one", "grad_input", "product.cuh", "p.segment % Tile::kDepth == 0", "true"),
        ("elements taken for vectors", "forward", "product.cuh", "p.left.vectors && p.weight.vectors && ", ""),
        ("elements taken for vectors", "grad_scales", "grad_scales.cu", "p.dy.vectors && p.x.vectors && ", ""),
        ("the first step over and over", "forward", "tile.cuh", "    from_ += step_;\n", ""),
        ("another step of u", "grad_input", "product.cuh", "    depth_scale_ += Tile::kDepth;\n", ""),
        ("a row too low", "grad_scales", "tile.cuh", "kRowsAtOnce * matrix.row", "(kRowsAtOnce - 1) * matrix.row"),
        ("edges taken for whole tiles", "grad_scales", "grad_scales.cu", "left_in_group >= Tile::kRows && ", ""),
        ("a last step taken for a whole one", "grad_scales", "grad_scales.cu", "(last - first) % Tile::kDepth", "0"),
        ("whole vectors at the edge", "forward", "tile.cuh", "left > 16 ? 16 : left", "16"),
        ("a token too few", "grad_scales", "tile.cuh", "kRowsAtOnce < rows ?", "kRowsAtOnce + 1 < rows ?"),
        ("v beyond the end", "forward", "tile.cuh", "i < count ? from + i : from, i < count ? 4 : 0", "from + i, 4"),
        ("32-bit offsets", "forward", "tile.cuh", "const int64_t index", "const int index"),
        # groups and sums
        ("the first group's v", "forward", "forward.cu", "p.v + static_cast<int64_t>(group) * p.k", "p.v"),
        ("the first group's v", "grad_input", "grad_input.cu", "scale_stride = p.k", "scale_stride = 0"),
        ("the first group's u", "grad_input", "product.cuh", "p_.depth_scale + depth", "p_.depth_scale + offset_"),
        (
            "the first group's v",
            "grad_scales",
            "grad_scales.cu",
            "static_cast<int64_t>(group) * p.k + k_start",
            "k_start",
        ),
        ("splits share a row", "grad_scales", "grad_scales.cu", "split) * p.col_tiles", "0) * p.col_tiles"),
        ("a partial sum left out", "grad_scales", "partials.cuh", "if (row + i < rows)", "if (row + i + 1 < rows)"),
        ("no shift", "forward", "epilogue.cuh", "shift.data ?", "false ?"),
        # splits of the depth
        ("every split from the start", "forward", "forward.cu", "first_step = split *", "first_step = 0 * split *"),
        (
            "every split from the start",
            "grad_input",
            "grad_input.cu",
            "first_step = split *",
            "first_step = 0 * split *",
        ),
        ("a split to the end", "forward", "forward.cu", "p.steps - product.first_step < p.split_steps ?", "true ?"),
        ("steps beyond the end", "grad_input", "grad_input.cu", "first_step < p.split_steps ?", "first_step < 0 ?"),
        ("splits start with a segment", "grad_input", "product.cuh", "step(p.first_step % of_segment)", "step(0)"),
        (
            "splits start with the first v",
            "grad_input",
            "product.cuh",
            "segment(p.first_step / of_segment)",
            "segment(0)",
        ),
        (
            "v of the next group too late",
            "grad_input",
            "product.cuh",
            "start.of_segment - start.step",
            "start.of_segment",
        ),
        (
            "whole steps from the start",
            "forward",
            "product.cuh",
            "int64_t>(p.first_step) * Tile::kDepth",
            "int64_t>(0)",
        ),
        (
            "splits share a place",
            "forward",
            "forward.cu",
            "(static_cast<int64_t>(split) * p.m",
            "(static_cast<int64_t>(0) * p.m",
        ),
        (
            "the last split left out",
            "forward",
            "epilogue.cuh",
            "split < s.splits; ++split) {",
            "split + 1 < s.splits; ++split) {",
        ),
        (
            "the last split left out",
            "grad_input",
            "epilogue.cuh",
            "split < s.splits; ++split) sum",
            "split + 1 < s.splits; ++split) sum",
        ),
        (
            "another column's bias",
            "forward",
            "epilogue.cuh",
            "s.shift, column + 2), sum.w",
            "s.shift, column + 1), sum.w",
        ),
        ("a split rounded", "forward", "epilogue.cuh", "sum.x += more.x", "sum.x += widen(narrow<T>(more.x))"),
        # rounding
        (
            "S rounded too",
            "forward",
            "product.cuh",
            "ptx::fma(feature_scale[c], depth_scale[d], 1.0f)",
            "widen(narrow<typename Math::Element>(ptx::fma(feature_scale[c], depth_scale[d], 1.0f)))",
        ),
        ("W' cut to TF32", "grad_input", "math.cuh", "{{ptx::round_tf32(w[0][0]), ", "{{ptx::bits(w[0][0]), "),
        ("dy cut to TF32", "grad_scales", "math.cuh", "ptx::round_tf32(ptx::from_bits(a.r[i]))", "a.r[i]"),
        ("x cut to TF32", "forward", "product.cuh", "      Math::round(left);\n", ""),
    )
]

#: One of each class above.
QUICK = (
    "grad_input: waits for a step too few",
    "grad_scales: a lane's sum left out",
    "forward: a depth too many",
    "grad_input: the first group's v",
    "forward: the last split left out",
    "grad_scales: dy cut to TF32",
)


def padded(p: Problem) -> Problem:
    """A row or column less of everything, and NaN in its place: rows of whole vectors with a ragged end."""

    def less(t: Tensor) -> Tensor:
        return t[:-1]

    x, dy, weight = (strided(t[:, :-1], "rows apart") for t in (p.x, p.dy, p.weight))
    return Problem(x, less(weight), less(p.scale_out), p.scale_in[..., :-1], less(p.bias), less(p.shift), dy)


def transposed(p: Problem) -> Problem:
    """The same with x and dy, and W beside them, laid out column by column."""
    p.x, p.dy, p.weight = (strided(t, "transposed") for t in (p.x, p.dy, p.weight))
    return p


def disagreement(machine: Machine, seen_in: str, p: Problem, **how: object) -> str | None:
    """Hold a pass's results to the yardstick."""
    if how.get("tf32"):
        exact, plain = tf32_products(p, torch.float64), tf32_products(p, SINGLE)
    else:
        keep = ("weight", "scale_out", "scale_in", "bias", "shift")
        exact = differentiate(p, torch.float64)
        plain = differentiate(p, SINGLE) if seen_in == "grad_scales" else differentiate(p, p.x.dtype, keep)
    try:
        got = machine.solve(p, passes=(seen_in,), **how)
        for name in RESULTS[seen_in]:
            assert_close(name, getattr(got, name), getattr(plain, name), getattr(exact, name))
    except (AssertionError, MachineError) as reason:
        return f"{p.x.dtype}, x {list(p.x.shape)}, {how}: {reason}"
    return None


def complaint(machine: Machine, seen_in: str) -> str | None:
    """The first thing amiss, over arithmetics, tiles, load paths, groups and orders of execution."""
    p, y = one_product(BF16)
    deep, exact = cancelling(BF16)
    try:
        if seen_in == "forward" and not torch.equal(machine.solve(p, passes=("forward",)).y, y):
            return "one product is not rounded once each way"
        if seen_in == "forward" and not torch.equal(machine.solve(deep, passes=("forward",)).y.double(), exact):
            return "a deep sum is not rounded once"
    except MachineError as reason:
        return f"K = 1 or 1600: {reason}"
    if reason := disagreement(machine, seen_in, far_apart(make_problem(2, 2, 40), 2**31 + 1)):
        return reason
    kinds = [(SINGLE, True), (BF16, False), (HALF, False), (SINGLE, False)]
    for (dtype, tf32), size, warps in itertools.product(kinds, (SMALL, LARGE), (FORWARDS, BACKWARDS)):
        problems = [
            make_problem(70, 30, 67, 3, dtype),
            padded(make_problem(140, 152, 168, 1, dtype)),
            make_problem(100, 160, 232, 2, dtype),
            make_problem(128, 256, 128, 2, dtype),  # whole tiles and steps throughout
            transposed(make_problem(64, 128, 64, 2, dtype)),
        ]
        for p in problems:
            if reason := disagreement(machine, seen_in, p, multiprocessors=size, tf32=tf32, warps=warps):
                return reason
    # depths that are split where multiprocessors are idle: whole vectors, and elements
    for (dtype, tf32), groups, warps in itertools.product(kinds, (1, 3), (FORWARDS, BACKWARDS)):
        for rows, width in ((9, 20), (9, 33), (64, 64)):
            sizes = (rows, 3 * width, 1184) if seen_in == "forward" else (rows, 1176 if width < 64 else 1248, width)
            p = make_problem(*sizes, groups, dtype)
            if reason := disagreement(machine, seen_in, p, multiprocessors=FEW, tf32=tf32, warps=warps):
                return reason
    return None


@pytest.mark.parametrize(
    "seen_in", ["forward", *(pytest.param(n, marks=pytest.mark.slow) for n in ("grad_input", "grad_scales"))]
)
def test_the_comparison_passes_what_is_right(machine, seen_in):
    assert complaint(machine, seen_in) is None


@pytest.mark.parametrize("fault", parameters(FAULTS, *QUICK))
def test_every_fault_is_noticed(machine, fault, tmp_path):
    faulty = Machine(build(fault.plant(tmp_path / "cuda"), (fault.seen_in,), "-O1"))
    assert complaint(faulty, fault.seen_in) is not None
