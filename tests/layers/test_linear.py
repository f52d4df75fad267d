"""FusedRLRRLinear behaves as nn.Linear, trains only u, v, f, and merges."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from rlrr_kernels import FusedRLRRLinear, RLRRConfig
from rlrr_kernels.backends import reference


def test_it_is_a_linear_with_the_same_arguments_and_keys():
    layer = FusedRLRRLinear(8, 6, False, "cpu", torch.float16)
    assert isinstance(layer, nn.Linear)
    assert layer.bias is None
    assert layer.weight.dtype is torch.float16
    plain = nn.Linear(8, 6)
    layer = FusedRLRRLinear(8, 6)
    missing, unexpected = layer.load_state_dict(plain.state_dict(), strict=False)
    assert (sorted(missing), unexpected) == (["scale_in", "scale_out", "shift"], [])
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(layer.bias, plain.bias)


def test_only_scales_and_shift_train_and_they_are_float32():
    layer = FusedRLRRLinear(8, 6, dtype=torch.bfloat16)
    trained = {name: p.dtype for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"scale_out": torch.float32, "scale_in": torch.float32, "shift": torch.float32}
    assert FusedRLRRLinear(8, 6, dtype=torch.float64).shift.dtype is torch.float64


@pytest.mark.parametrize(
    ("groups", "rank", "scaling", "v_shape"),
    [(1, 1, 1.0, (1, 8)), (3, 1, 1, (3, 1, 8)), (1, 4, 1.0, (4, 8)), (3, 2, 0.3, (3, 2, 8)), (1, 1, 2, (1, 8))],
)
def test_forward_is_the_formula(groups, rank, scaling, v_shape):
    layer = FusedRLRRLinear(8, 6, groups=groups, rank=rank, scaling=scaling)
    nn.init.normal_(layer.shift)
    assert layer.scale_out.shape == (6, rank)
    assert layer.scale_in.shape == v_shape
    x = torch.randn(2, 5, 8)
    v = layer.scale_in.view(groups, rank, 8)
    expected = reference.formula(x, layer.weight, scaling * layer.scale_out, v, layer.bias, layer.shift)
    assert torch.allclose(layer(x), expected, atol=1e-6)
    rows = 6 // groups
    by_group = [
        x @ (layer.weight[i * rows + j] * (1 + scaling * layer.scale_out[i * rows + j] @ v[i]))
        for i in range(groups)
        for j in range(rows)
    ]
    assert torch.allclose(layer(x), torch.stack(by_group, -1) + layer.bias + layer.shift, atol=1e-5)


def test_paper_init_is_uniform_with_the_bounds_of_the_paper():
    layer = FusedRLRRLinear(600, 500)
    for values, bound in ((layer.scale_in, math.sqrt(6 / 600)), (layer.scale_out, math.sqrt(6))):
        assert values.abs().max() <= bound
        assert values.abs().max() > 0.97 * bound
        assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert not layer.shift.any()


def test_the_variance_of_u_v_at_the_start_does_not_depend_on_the_rank():
    torch.manual_seed(0)
    spreads = []
    for rank in (1, 16):
        layer = FusedRLRRLinear(600, 500, rank=rank)
        spreads.append((layer.scale_out @ layer.scale_in).std().item())
    assert spreads[1] == pytest.approx(spreads[0], rel=0.1)
    assert spreads[0] == pytest.approx(2 / math.sqrt(600), rel=0.1)
    identity = FusedRLRRLinear(600, 500, rank=16, init="identity")
    assert not identity.scale_out.any()
    assert identity.scale_in.abs().max() <= math.sqrt(6 / (600 * 16)) < 1.03 * identity.scale_in.abs().max()


@pytest.mark.parametrize("rank", [1, 4])
def test_the_scaling_reaches_every_gradient_and_nothing_else(rank):
    torch.manual_seed(0)
    layer = FusedRLRRLinear(8, 6, rank=rank, scaling=0.5, dtype=torch.float64)
    x = torch.randn(3, 8, dtype=torch.float64)
    layer(x).square().sum().backward()
    u, v, f = (t.detach().requires_grad_() for t in (layer.scale_out, layer.scale_in, layer.shift))
    y = x @ (layer.weight * (1 + 0.5 * u @ v)).mT + layer.bias + f
    expected = torch.autograd.grad(y.square().sum(), (u, v, f))
    for got, right in zip((layer.scale_out, layer.scale_in, layer.shift), expected, strict=True):
        assert torch.allclose(got.grad, right)


def test_identity_init_starts_as_the_plain_layer_and_can_leave_it():
    plain = nn.Linear(8, 6)
    layer = FusedRLRRLinear.from_linear(plain, init="identity")
    x = torch.randn(4, 8)
    torch.testing.assert_close(layer(x), plain(x))
    layer(x).square().sum().backward()
    assert layer.scale_out.grad.abs().min() > 0  # u moves, since v is not 0
    assert not layer.scale_in.grad.any()  # v waits for u


def test_a_callable_init_fills_both_in_place_once():
    calls = []

    def ones(u, v):
        calls.append(u.device.type)
        u.fill_(1.0)
        v.fill_(2.0)

    layer = FusedRLRRLinear.from_linear(nn.Linear(8, 6), init=ones)
    assert calls == ["cpu"]
    assert torch.equal(layer.scale_out, torch.ones(6, 1))
    assert torch.equal(layer.scale_in, torch.full((1, 8), 2.0))
    assert "init=ones" in repr(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_from_linear_shares_and_freezes(dtype):
    plain = nn.Linear(8, 6, dtype=dtype).eval()
    layer = FusedRLRRLinear.from_linear(plain, groups=2, rank=3, scaling=0.5)
    assert (layer.rank, layer.scaling, layer.scale_out.shape, layer.scale_in.shape) == (3, 0.5, (6, 3), (2, 3, 8))
    assert layer.weight is plain.weight
    assert layer.bias is plain.bias
    assert not layer.weight.requires_grad
    assert not layer.training
    assert layer.scale_out.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert layer(torch.randn(3, 8, dtype=dtype)).dtype is dtype


def test_from_linear_on_meta_stays_there():
    layer = FusedRLRRLinear.from_linear(nn.Linear(8, 6, bias=False, device="meta"))
    assert layer.scale_out.is_meta
    assert layer(torch.empty(2, 8, device="meta")).shape == (2, 6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("groups", "rank", "scaling"), [(1, 1, 1.0), (3, 1, 1.0), (1, 3, 1.0), (3, 3, 0.3)])
def test_to_linear_and_merge_compute_the_same(groups, rank, scaling, bias):
    layer = FusedRLRRLinear(8, 6, bias, groups=groups, rank=rank, scaling=scaling).eval()
    nn.init.normal_(layer.shift)
    merged = layer.to_linear()
    assert type(merged) is nn.Linear
    x = torch.randn(5, 8)
    y = layer(x)
    assert torch.allclose(merged(x), y, atol=1e-6)
    assert merged.weight.data_ptr() != layer.weight.data_ptr()
    layer.merge()
    assert torch.allclose(layer(x), y, atol=1e-6)
    layer.unmerge()
    assert torch.equal(layer(x), y)


def test_merging_a_narrow_weight_rounds_once_from_float32():
    layer = FusedRLRRLinear(64, 32, dtype=torch.bfloat16)
    exact = layer.weight.double() * (1 + layer.scale_out.double() * layer.scale_in.double())
    assert torch.equal(layer.to_linear().weight, exact.float().bfloat16())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"groups": 4}, "groups: expected a divisor of out_features = 6, got 4"),
        ({"groups": 0}, "groups: expected 1 or more, got 0"),
        ({"groups": "3"}, "groups: expected an int, got str"),
        ({"init": "papr"}, "init: expected 'paper', 'identity' or a callable, got 'papr'"),
        ({"rank": 0}, "rank: expected 1 to 128, got 0"),
        ({"rank": 129}, "rank: expected 1 to 128, got 129"),
        ({"rank": 2.0}, "rank: expected an int, got float"),
        ({"scaling": 0}, "scaling: expected a finite number above 0, got 0"),
        ({"scaling": math.nan}, "scaling: expected a finite number above 0, got nan"),
        ({"scaling": math.inf}, "scaling: expected a finite number above 0, got inf"),
        ({"scaling": "2"}, "scaling: expected a float, got str"),
        ({"scaling": True}, "scaling: expected a float, got bool"),
        ({"scaling": 10**400}, "scaling: expected a finite number above 0, got 10"),
        ({"scaling": np.float32("inf")}, "scaling: expected a finite number above 0, got inf"),
        ({"rank": True}, "rank: expected an int, got bool"),
        ({"rank": np.float64(2)}, "rank: expected an int, got float64"),
        ({"rank": np.int64(0)}, "rank: expected 1 to 128, got 0"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises((ValueError, TypeError), match=words):
        FusedRLRRLinear(8, 6, **arguments)


@pytest.mark.parametrize("scaling", [np.float64(0.5), np.float32(0.5), Fraction(1, 2)], ids=lambda s: type(s).__name__)
def test_numbers_of_other_types_become_python_s(scaling):
    layer = FusedRLRRLinear(8, 6, rank=np.int64(2), scaling=scaling)
    assert (layer.rank, layer.scaling) == (2, 0.5)
    assert (type(layer.rank), type(layer.scaling)) == (int, float)
    config = RLRRConfig(rank=np.int64(2), scaling=scaling)
    assert json.loads(json.dumps(config.to_dict()))["rank"] == 2
    assert config == RLRRConfig(rank=2, scaling=0.5)


def test_repr():
    layer = FusedRLRRLinear(8, 6, groups=3, init="identity")
    assert repr(layer) == ("FusedRLRRLinear(in_features=8, out_features=6, bias=True, groups=3, init=identity)")
    layer = FusedRLRRLinear(8, 6, rank=4, scaling=0.5)
    assert repr(layer).endswith("bias=True, groups=1, rank=4, scaling=0.5, init=paper)")
