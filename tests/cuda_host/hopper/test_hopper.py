"""The Hopper kernels on a model of a Hopper GPU: several tiles a block, several turns of the ring, every edge."""

import itertools

import pytest
import torch

from tests.cuda_host.machine import BACKWARDS, FORWARDS, SHUFFLED, Unsupported
from tests.cuda_host.test_kernels import SPARED, assert_as_infinite, with_infinity
from tests.oracle import Answer, check, make_problem

HALF, BF16, SINGLE = torch.float16, torch.bfloat16, torch.float32

# tiles are 128 rows of W by 256 or 128 tokens by 64 of depth, the ring has four stages
SHAPES = [
    (1, 8, 8, 1),  # one of everything, nearly all of it padding
    (257, 136, 72, 1),  # every index a little beyond a tile, one step's depth
    (70, 200, 584, 1),  # the ring turns more than twice
    (520, 264, 328, 1),  # several tiles a block
    (300, 384, 192, 3),  # groups of one tile each, of two steps in grad_input
    (130, 576, 264, 3),  # groups of a tile and a half
    (100, 520, 520, 1),  # several tiles a block of few tokens
]
# groups that grad_input cannot walk in whole steps
RAGGED_GROUPS = [(200, 120, 136, 3), (100, 432, 72, 3)]
FEW = 3  # multiprocessors, so that blocks live through several tiles
MANY = 132  # so that narrow tiles fill more of them


@pytest.mark.parametrize("multiprocessors", [FEW, MANY])
@pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
@pytest.mark.parametrize(("m", "n", "k", "groups"), SHAPES)
def test_shapes(hopper, m, n, k, groups, dtype, multiprocessors):
    check(p := make_problem(m, n, k, groups, dtype), hopper.solve(p, multiprocessors))


@pytest.mark.parametrize(
    ("tokens", "row_tiles", "steps", "multiprocessors", "expected"),
    [
        (12608, 6, 12, 132, 256),  # waves enough either way
        (6304, 24, 12, 132, 256),
        (1576, 6, 12, 132, 128),  # 42 wide tiles leave most multiprocessors idle
        (197, 6, 48, 132, 128),
        (128, 1000, 12, 132, 128),  # nothing but padding in a wide tile's second half
        (520, 3, 6, 3, 256),
        (1000, 1, 12, 1, 256),
    ],
)
def test_tiles_are_narrow_where_wide_ones_leave_multiprocessors_idle(
    hopper, tokens, row_tiles, steps, multiprocessors, expected
):
    assert hopper.tile_tokens(tokens, row_tiles, steps, multiprocessors) == expected


def test_wide_and_narrow_tiles_agree_bit_for_bit(hopper):
    """Each element is one chain of the same products, whatever the tile."""
    p = make_problem(520, 264, 328, dtype=BF16)
    assert hopper.tile_tokens(520, 3, 6, FEW) != hopper.tile_tokens(520, 3, 6, MANY)
    passes = ("forward", "grad_input")
    wide, narrow = hopper.solve(p, FEW, passes=passes), hopper.solve(p, MANY, passes=passes)
    assert torch.equal(wide.y, narrow.y)
    assert torch.equal(wide.dx, narrow.dx)


@pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
@pytest.mark.parametrize(("m", "n", "k", "groups"), RAGGED_GROUPS)
def test_groups_that_end_inside_a_tile(hopper, m, n, k, groups, dtype):
    p = make_problem(m, n, k, groups, dtype)
    got = hopper.solve(p, FEW, passes=("forward", "grad_scales"))
    got.dx = (p.dy.float() @ (p.weight.float() * (1 + p.scale_out * p.scale_in[_group_of(n, groups), 0]))).to(dtype)
    check(p, got)
    with pytest.raises(Unsupported):
        hopper.solve(p, FEW, passes=("grad_input",))


def _group_of(n: int, groups: int) -> torch.Tensor:
    return torch.arange(n) // (n // groups)


@pytest.mark.parametrize("splits", [1, 7, 40])
def test_splits_of_the_tokens(hopper, splits):
    """As many multiprocessors ask for as many splits: of several steps, of one, and of none too few."""
    check(p := make_problem(1000, 128, 136, 1, BF16), hopper.solve(p, splits))


@pytest.mark.parametrize(("bias", "shift"), list(itertools.product([False, True], repeat=2)))
def test_bias_and_shift_each_absent(hopper, bias, shift):
    check(p := make_problem(40, 136, 72, dtype=BF16, bias=bias, shift=shift), hopper.solve(p, FEW))


def test_padded_rows(hopper):
    """Rows further apart than they are wide: what lies between them is neither read nor written."""
    p = make_problem(70, 136, 72, dtype=HALF)

    def padded(t):
        wide = torch.full((t.shape[0], t.shape[1] + 24), float("nan"), dtype=t.dtype)
        wide[:, : t.shape[1]] = t
        return wide[:, : t.shape[1]]

    p.x, p.dy, p.weight = padded(p.x), padded(p.dy), padded(p.weight)
    check(p, hopper.solve(p, FEW, row_stride=160))


def test_df_is_skipped_unless_asked_for(hopper):
    p = make_problem(300, 136, 264, dtype=BF16)
    with_df = hopper.solve(p, FEW, passes=("grad_scales",))
    without = hopper.solve(p, FEW, passes=("grad_scales",), need_shift=False)
    assert without.df.numel() == 0
    assert torch.equal(with_df.du, without.du)
    assert torch.equal(with_df.dv, without.dv)


def _equal(a: Answer, b: Answer) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("y", "dx", "du", "dv", "df"))


@pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
def test_no_order_of_blocks_warps_and_copies_changes_a_bit(hopper, dtype):
    p = make_problem(300, 192, 200, 3, dtype)
    for multiprocessors in (FEW, MANY):
        first = hopper.solve(p, multiprocessors)
        for blocks, warps, seed in [(BACKWARDS, BACKWARDS, 0), (FORWARDS, SHUFFLED, 1)]:
            assert _equal(first, hopper.solve(p, multiprocessors, blocks=blocks, warps=warps, seed=seed))


@pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_power_of_two_scales_equal_a_prescaled_weight_bit_for_bit(hopper, dtype, sign):
    p = make_problem(50, 128, 136, 2, dtype, bias=False, shift=False)
    # S in {2, 4}, or in {-2, -1/2}
    pick = torch.arange(128)[:, None] % 2
    p.scale_out = 1.0 + 2.0 * pick if sign > 0 else 1.0 - 0.5 * pick
    p.scale_in = torch.full_like(p.scale_in, 1.0 if sign > 0 else -3.0)
    scale = 1 + p.scale_out * p.scale_in[0, 0, 0]
    assert set(scale.flatten().tolist()) == ({2.0, 4.0} if sign > 0 else {-2.0, -0.5})
    plain = make_problem(50, 128, 136, 2, dtype, bias=False, shift=False)
    plain.weight = (plain.weight.float() * scale).to(dtype)
    plain.scale_out = torch.zeros_like(plain.scale_out)
    a, b = hopper.solve(p, FEW), hopper.solve(plain, FEW)
    assert torch.equal(a.y, b.y)
    assert torch.equal(a.dx, b.dx)


@pytest.mark.parametrize("groups", [1, 3])
def test_u_du_equals_v_dv(hopper, groups):
    p = make_problem(150, 384, 264, groups, BF16)
    got = hopper.solve(p, FEW, passes=("grad_scales",))
    left = (p.scale_out * got.du).double().view(groups, -1).sum(1)
    right = (p.scale_in * got.dv).double().view(groups, -1).sum(1)
    assert (left - right).abs().max() < 1e-6 * (p.scale_out * got.du).double().abs().sum()
    assert left.abs().min() > 1e-3  # not 0 = 0


def test_infinity_reaches_only_what_it_should(hopper):
    """A tile's padding, and the next group's rows in it, must not carry an infinity to anyone else."""
    p = make_problem(70, 240, 72, 3, HALF)  # tiles reach over into the next group
    p.x[3, 4] = float("inf")
    y = hopper.solve(p, FEW, passes=("forward",)).y
    finite = torch.isfinite(y).all(1)
    assert not finite[3]
    assert finite.sum() == 69
    p = make_problem(70, 240, 72, 3, HALF)
    p.dy[5, 80] = float("inf")  # the first row of the second group
    got = hopper.solve(p, FEW, passes=("grad_scales",))
    assert torch.isfinite(got.dv[:, 0]).all(1).tolist() == [True, False, True]
    assert torch.isfinite(got.du[:, 0]).sum() == torch.isfinite(got.df).sum() == 239


@pytest.mark.parametrize("multiprocessors", [FEW, MANY])
@pytest.mark.parametrize("shape", [(70, 240, 72, 3), (70, 200, 136, 1), (70, 64, 200, 1)], ids=str)
def test_beyond_every_edge_an_infinity_finds_no_zero(hopper, shape, multiprocessors):
    """Tokens, depth, rows of a group and columns all end inside a tile: padding must not make NaN of it."""
    passes = {"forward": ("y",), "grad_input": ("dx",), "grad_scales": ("du", "dv", "df")}
    if shape[-1] > 1:
        del passes["grad_input"]  # groups of no whole steps, which it refuses
    for name, place in itertools.product(("x", "dy", "weight", "scale_out", "scale_in"), (0, -1)):
        p = with_infinity(make_problem(*shape, dtype=BF16), name, place)
        got = hopper.solve(p, multiprocessors, passes=tuple(passes))
        results = [result for results in passes.values() for result in results if result in SPARED.get(name, results)]
        assert_as_infinite(p, got, results, f"{name} at {place}")


@pytest.mark.parametrize("address", [0x400, 0x3FC00, 0x40400, 0x1038400, 0xFFFFFC00], ids=hex)
def test_a_matrix_of_any_address_changes_no_other_field_of_its_descriptor(hopper, address):
    """14 bits of an address in units of 16 bytes: in a cluster, addresses go on beyond 256 KiB."""
    box = 64 * 128
    assert hopper.matrix_descriptor(address, box) == (
        address // 16 % 2**14  # start
        | box // 16 << 16  # from 64 columns to the next
        | 8 * 128 // 16 << 32  # from 8 rows to the next
        | 1 << 62  # the 128-byte swizzle
    )


def test_a_wait_that_never_ends_names_the_barrier_and_who_waits(hopper):
    assert hopper.hang() == (
        "block 1: nobody can go on, and no box is under way"
        "; warp 0 waits for phase 0 of empty[0]; warp 5 waits for phase 0 of full[1]"
    )


def test_descriptions_are_made_once_for_each_matrix(hopper):
    # Sizes of no other test: memory that another test gave back, under a shape it had, is rightly found described.
    p = make_problem(44, 168, 104, dtype=BF16)
    start = hopper.maps_encoded()
    first = hopper.solve(p, FEW, passes=("grad_scales",))
    made = hopper.maps_encoded() - start
    assert 0 < made <= 3  # dy, x and W
    assert torch.equal(first.du, hopper.solve(p, FEW, passes=("grad_scales",)).du)
    assert hopper.maps_encoded() == start + made
    # the same memory under another shape, and with other strides, is another matrix
    q = make_problem(22, 168, 104, dtype=BF16)
    q.x = p.x[:22].copy_(q.x)
    check(q, hopper.solve(q, FEW))
    q.x = p.x[::2].copy_(q.x)
    check(q, hopper.solve(q, FEW))


def _offset(t: torch.Tensor) -> torch.Tensor:
    """The same values, from one element into their storage on."""
    return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)


REFUSED = {
    "float32": lambda: make_problem(40, 128, 64, dtype=SINGLE),
    "another dtype of W": lambda: make_problem(40, 128, 64, dtype=BF16, weight_dtype=SINGLE),
    "rows of 63": lambda: make_problem(40, 120, 63, dtype=BF16),
    "rows of 60": lambda: make_problem(40, 120, 60, dtype=BF16),
    "60 outputs": lambda: make_problem(40, 60, 64, dtype=BF16),
}


@pytest.mark.parametrize("name", ["forward", "grad_input", "grad_scales"])
@pytest.mark.parametrize("what", REFUSED)
def test_what_it_leaves_to_the_other_kernels(hopper, what, name):
    with pytest.raises(Unsupported):
        hopper.solve(REFUSED[what](), FEW, passes=(name,))


@pytest.mark.parametrize("name", ["forward", "grad_input", "grad_scales"])
def test_misaligned_and_transposed_operands_are_refused(hopper, name):
    for change in (_offset, lambda t: t.mT.contiguous().mT, lambda t: t[:1].expand_as(t)):
        p = make_problem(40, 128, 64, dtype=BF16)
        p.x, p.dy = change(p.x), change(p.dy)
        with pytest.raises(Unsupported):
            hopper.solve(p, FEW, passes=(name,))


def test_another_gpu_is_refused(hopper, monkeypatch):
    monkeypatch.setattr(hopper, "capability", 100)
    with pytest.raises(Unsupported):
        hopper.solve(make_problem(40, 128, 64, dtype=BF16), FEW)
