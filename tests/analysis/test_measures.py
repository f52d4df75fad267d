"""What linear algebra says about each form of update, told by the numbers that are reported."""

import math

import pytest
import torch

from rlrr_kernels.analysis import LayerView, decompose, layer_view, principal_angles, scales_view
from rlrr_kernels.analysis.measures import SPECTRUM_POINTS, effective_rank


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def signs(n, seed=0):
    return torch.where(normal(n, seed=seed) > 0, 1.0, -1.0).double()


W = normal(20, 12)
LOW = normal(20, 5, seed=1) @ normal(5, 12, seed=2)  # of rank 5


def zero(angles, atol=1e-6):
    return max(angles) < atol


def test_a_weight_left_as_it_was():
    view = layer_view(W, W.clone(), top=4)
    assert zero(view.angles_out)
    assert zero(view.angles_in)
    assert view.relative_update == view.update_norm == view.update_effective_rank == view.update_rank == 0
    assert view.norm_ratio == 1
    assert view.share_out is view.share_in is view.share_rescaling is view.share_low_rank is None


def test_one_factor_for_all_turns_nothing_and_scales_every_singular_value():
    view = layer_view(W, 1.5 * W, top=4)
    assert zero(view.angles_out)
    assert zero(view.angles_in)
    assert view.relative_update == pytest.approx(0.5)
    assert view.norm_ratio == pytest.approx(1.5)
    assert view.singular_values_updated == pytest.approx([1.5 * s for s in view.singular_values])
    assert view.effective_rank_updated == pytest.approx(view.effective_rank)
    assert (view.share_out, view.share_in) == pytest.approx((1, 1), rel=1e-12)


@pytest.mark.parametrize("side", ["out", "in"])
def test_signs_on_one_side_turn_that_side_alone_and_keep_singular_values(side):
    """diag(+-1) is orthogonal: with W = U s V^T, diag(d) W has U' = diag(d) U, and the same s and V."""
    updated = signs(20)[:, None] * W if side == "out" else W * signs(12)
    view = layer_view(W, updated, top=4)
    moved, kept = (view.angles_out, view.angles_in) if side == "out" else (view.angles_in, view.angles_out)
    assert zero(kept)
    assert min(moved) > 1
    assert view.spectrum_updated == pytest.approx(view.spectrum)
    assert (view.share_out, view.share_in)[side == "in"] == pytest.approx(1)
    assert (view.share_in, view.share_out)[side == "in"] < 0.9


def test_a_small_scaling_of_one_side_turns_that_side_more():
    """To first order direction i turns towards j by A_ij (s_i^2 + s_j^2) / (s_i^2 - s_j^2) on the scaled side.

    A = U^T diag(a) U; on the other side by A_ij 2 s_i s_j / (s_i^2 - s_j^2), which is never more.
    """
    size = 1e-5
    weight = torch.diag(torch.tensor([3.0, 2.0]).double()) @ torch.linalg.qr(normal(2, 2, seed=1)).Q
    weight = torch.linalg.qr(normal(2, 2)).Q @ weight
    a = normal(2, seed=2)
    u = decompose(weight).u
    towards = float((u.T @ a.diag() @ u)[0, 1].abs()) * size
    view = layer_view(weight, (1 + size * a)[:, None] * weight, top=1)
    assert math.radians(view.rotation_out) == pytest.approx(towards * (9 + 4) / (9 - 4), rel=1e-3)
    assert math.radians(view.rotation_in) == pytest.approx(towards * 12 / (9 - 4), rel=1e-3)


def test_rescaling_of_both_sides_turns_both_and_keeps_the_rank_of_its_update():
    """W * (u v^T) = diag(u) W diag(v): of W's own rank, unlike LoRA's of rank r."""
    u, v = normal(20, 1, seed=3), normal(1, 12, seed=4)
    view = layer_view(LOW, LOW * (1 + 0.3 * u @ v), top=20)
    assert view.top == 5  # directions past the rank are rounding's
    assert min(view.angles_out[-1], view.angles_in[-1]) > 1
    assert view.update_rank == 5
    assert layer_view(W, W * (1 + 0.3 * u @ v)).update_rank == 12


def test_rotations_of_known_angle_are_told_apart_by_side():
    """W' turned by 30 degrees in the plane of the 2nd and 4th output direction, and W' turned in the input likewise."""
    old = decompose(W)
    angle = math.radians(30)
    turned = old.u.clone()
    turned[:, 1] = math.cos(angle) * old.u[:, 1] + math.sin(angle) * old.u[:, 3]
    turned[:, 3] = math.cos(angle) * old.u[:, 3] - math.sin(angle) * old.u[:, 1]
    view = layer_view(old, turned @ old.s.diag() @ old.vh, top=2)
    assert view.angles_out == pytest.approx([0, 30], abs=1e-6)
    assert view.angles_in == pytest.approx([0, 0], abs=1e-6)
    assert (view.rotation_out, view.rotation_in) == pytest.approx((30 / math.sqrt(2), 0), abs=1e-6)
    # the same on the other side is the transposed weight's
    other = layer_view(W.T, (turned @ old.s.diag() @ old.vh).T, top=2)
    assert (other.angles_in, other.angles_out) == (
        pytest.approx(view.angles_out, abs=1e-6),
        pytest.approx(view.angles_in, abs=1e-6),
    )
    assert layer_view(old, turned @ old.s.diag() @ old.vh, top=4).angles_out == pytest.approx([0] * 4, abs=1e-6)


@pytest.mark.parametrize("degrees", [1e-7, 1e-3, 45, 90 - 1e-7, 90])
def test_angles_are_exact_near_zero_and_near_ninety(degrees):
    angle = math.radians(degrees)
    first = torch.eye(5, dtype=torch.float64)[:, :2]
    second = first.clone()
    second[:, 1] = math.cos(angle) * first[:, 1] + math.sin(angle) * torch.eye(5, dtype=torch.float64)[:, 3]
    assert principal_angles(first, second).tolist() == pytest.approx([0, degrees], rel=1e-8, abs=1e-13)


def test_sizes_and_ranks_of_matrices_known_by_heart():
    weight = torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0]))
    view = layer_view(weight, torch.diag(torch.tensor([4.0, 2.0, 1.0, 3.0])), top=2)
    assert view.shape == (4, 4)
    assert view.singular_values == [4, 2]
    assert view.singular_values_updated == [4, 3]
    assert view.gap == pytest.approx((2 - 1) / 4)
    assert view.relative_update == pytest.approx(2 / math.sqrt(22))
    assert view.update_norm == pytest.approx(2 / 4)
    assert view.norm_ratio == 1
    assert view.update_rank == 1
    assert view.update_effective_rank == pytest.approx(1)
    assert view.angles_out == pytest.approx([0, 90])
    p = [0.5, 0.25, 0.125, 0.125]
    assert view.effective_rank == pytest.approx(math.exp(-sum(q * math.log(q) for q in p)))
    assert len(view.spectrum) == SPECTRUM_POINTS
    assert (view.spectrum[0], view.spectrum[-1]) == (4, 1)
    assert layer_view(weight, weight, top=9).gap == pytest.approx(1 / 4)  # nothing follows the last
    assert effective_rank(torch.ones(7)) == pytest.approx(7)


def test_an_updates_rank_is_not_fooled_by_the_rounding_of_the_weight():
    """W + B A was rounded at W's size, so W' - W has that noise in every direction."""
    view = layer_view(W, W + 1e-6 * normal(20, 1, seed=7) @ normal(1, 12, seed=8))
    assert view.update_rank == 1
    assert layer_view(W, W + 1e-6 * normal(20, 12, seed=7)).update_rank == 12


def test_shares_name_the_form_of_the_update():
    a, c = normal(20, 1, seed=3), normal(1, 12, seed=4)
    rows, columns = layer_view(W, W * (1 + 0.1 * a)), layer_view(W, W * (1 + 0.1 * c))
    assert (rows.share_out, columns.share_in) == pytest.approx((1, 1))
    assert rows.share_in < 0.3
    assert columns.share_out < 0.3
    both = layer_view(W, W * (1 + 0.1 * a @ c))
    assert both.share_rescaling == pytest.approx(1, abs=1e-6)
    assert both.share_out < 0.5
    assert both.share_in < 0.5
    rank = layer_view(W, W + 0.1 * a @ c, top=1)
    assert rank.share_low_rank == pytest.approx(1)
    assert rank.share_rescaling < 0.6


def test_one_sided_shares_are_least_squares_fits():
    update = normal(20, 12, seed=9)
    view = layer_view(W, W + update)
    left = sum(float(W[n] @ update[n]) ** 2 / float(W[n] @ W[n]) for n in range(20)) / float(update.square().sum())
    right = sum(float(W[:, k] @ update[:, k]) ** 2 / float(W[:, k] @ W[:, k]) for k in range(12)) / float(
        update.square().sum()
    )
    assert (view.share_out, view.share_in) == pytest.approx((left, right))
    assert max(left, right) <= view.share_rescaling < 1


def test_the_share_of_rescaling_is_a_stationary_point():
    """No small step of a or c gives more: found against torch's own optimiser."""
    update = W * (0.1 * normal(20, 1, seed=3) @ normal(1, 12, seed=4)) + 0.05 * normal(20, 12, seed=5)
    share = layer_view(W, W + update).share_rescaling
    a, c = normal(20, 1, seed=3).requires_grad_(), (0.1 * normal(1, 12, seed=4)).requires_grad_()
    optimizer = torch.optim.LBFGS([a, c], max_iter=300, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = (update - W * (a @ c)).square().sum() / update.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    assert share == pytest.approx(1 - float(loss().detach()), abs=1e-6)


def test_zero_rows_and_columns_do_not_spoil_the_shares():
    weight = W.clone()
    weight[3], weight[:, 2] = 0, 0
    view = layer_view(weight, weight * (1 + 0.1 * normal(20, 1, seed=3)))
    assert (view.share_out, view.share_rescaling) == pytest.approx((1, 1), rel=1e-12)


def test_a_decomposition_may_be_shared():
    assert layer_view(decompose(W), 2 * W) == layer_view(W, 2 * W)
    assert isinstance(layer_view(W.bfloat16(), W.half()), LayerView)


@pytest.mark.parametrize(
    ("weight", "updated", "options", "words"),
    [
        (W, W[:5], {}, r"updated: expected shape \[20, 12\], got \[5, 12\]"),
        (W, W, {"top": 0}, "top: expected 1 or more, got 0"),
        (W[0], W[0], {}, r"weight: expected a floating-point matrix, got torch.float64 of shape \[12\]"),
        (W.int(), W.int(), {}, "expected a floating-point matrix, got torch.int32"),
        (W / 0, W, {}, "expected finite numbers"),
        (W, 0 * W, {}, "all zero"),
        (W[:0], W[:0], {}, "expected a floating-point matrix"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(weight, updated, options, words):
    with pytest.raises(ValueError, match=words):
        layer_view(weight, updated, **options)


def test_scales_are_described_by_quantiles_moments_and_counts():
    view = scales_view(torch.tensor([-2.0, 0.0, 1.0, 3.0]), torch.tensor([0.5, -1.0]))
    assert view.u.quantiles[0] == view.u.low == -2
    assert view.u.quantiles[-1] == view.u.high == 3
    assert view.u.quantiles[3] == pytest.approx(0.5)  # the median lies between 0 and 1
    assert view.u.mean == pytest.approx(0.5)
    assert view.u.std == pytest.approx(math.sqrt(3.5 - 0.25))
    assert sum(view.u.counts) == 4
    assert sum(view.factor.counts) == 8
    assert (view.factor.low, view.factor.high) == (-2, 3)  # 1 + 3 * -1 and 1 + -2 * -1
    assert view.rms == pytest.approx(math.sqrt(3.5) * math.sqrt(0.625))
    assert view.flipped == pytest.approx(1 / 8)  # 1 - 3 alone; 1 - 1 is no sign


def test_scales_of_any_rank_and_constants():
    u, v = normal(6, 2), normal(2, 4, seed=1)
    assert scales_view(u, v).rms == pytest.approx(float((u @ v).square().mean().sqrt()))
    constant = scales_view(torch.zeros(6), torch.ones(4))
    assert sum(constant.u.counts) == 6
    assert (constant.rms, constant.flipped, constant.v.std) == (0, 0, 0)


@pytest.mark.parametrize(
    ("u", "v", "words"),
    [
        (torch.ones(4, 2), torch.ones(3, 5), r"scale_in: expected \[r, K\] with scale_out \[N, r\]"),
        (torch.ones(4, 1), torch.ones(3, 1, 5), "scale_in: expected"),
        (torch.full((4,), math.nan), torch.ones(5), "expected finite numbers"),
    ],
)
def test_scales_that_do_not_multiply_are_refused(u, v, words):
    with pytest.raises(ValueError, match=words):
        scales_view(u, v)


@pytest.mark.gpu
def test_a_gpu_computes_the_same_in_float32(gpu):
    updated = W * (1 + 0.1 * normal(20, 1, seed=3) @ normal(1, 12, seed=4))
    there, here = layer_view(W.to(gpu), updated.to(gpu)), layer_view(W, updated)
    assert there.rotation_out == pytest.approx(here.rotation_out, rel=1e-3)
    assert there.rotation_in == pytest.approx(here.rotation_in, rel=1e-3)
    assert there.relative_update == pytest.approx(here.relative_update, rel=1e-5)
    assert there.share_rescaling == pytest.approx(here.share_rescaling, rel=1e-4)
