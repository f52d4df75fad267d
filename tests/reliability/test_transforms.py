"""Transforms of torch.func, forward-mode AD and batched gradients equal those of the formula, eager and compiled."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import func
from torch.autograd import forward_ad, functional
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from rlrr_kernels import FusedRLRRLinear, SSFAffine, SSFLayerNorm, apply_rlrr, rescaled_linear
from rlrr_kernels.backends import reference
from rlrr_kernels.ops import linear, route
from tests.oracle import assert_close, make_problem
from tests.small_models import X, small_vit, stir

ALL = tuple(range(6))


@pytest.fixture(autouse=True)
def fresh():
    """A compiled function that was transformed is not compiled again in this process before a reset."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def arguments(groups: int = 3, rank: int = 1) -> list[torch.Tensor]:
    p = make_problem(5, 6, 4, groups, torch.float64, rank=rank)
    return list(p.forward_args)


def written_out(x, weight, u, v, bias, shift):
    """The layer, written without the package."""
    scale = 1 + (u.reshape(v.shape[0], -1, v.shape[1]) @ v).reshape(weight.shape)
    return F.linear(x, weight * scale, bias + shift)


def tangents(*tensors):
    return tuple(t.detach().cos() for t in tensors)


def batched(stack_dim):
    return lambda a: [torch.stack([t, 2 * t, t - 1], stack_dim) for t in a]


def total(f):
    return lambda *a: f(*a).sin().sum()


def dual(f, a):
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(f(*map(forward_ad.make_dual, a, tangents(*a)))))


def forward_over_reverse(f, a):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, t.cos()).requires_grad_() for t in a]
        return [tuple(forward_ad.unpack_dual(g)) for g in torch.autograd.grad(total(f)(*duals), duals)]


def tangent_of_the_gradient_alone(f, a):
    leaves = [t.clone().requires_grad_() for t in a]
    y = f(*leaves)
    with forward_ad.dual_level():
        dy = forward_ad.make_dual(y.detach().sin(), y.detach().cos())
        return [tuple(forward_ad.unpack_dual(g)) for g in torch.autograd.grad(y, leaves, dy)]


def batched_gradients(f, a, create_graph=False):
    leaves = [t.clone().requires_grad_() for t in a]
    y = f(*leaves)
    dy = torch.stack([y.detach().sin(), y.detach().cos(), y.detach()])
    return torch.autograd.grad(y, leaves, dy, is_grads_batched=True, create_graph=create_graph)


TRANSFORMS = {
    "vmap over x": lambda f, a: func.vmap(f, (0, *[None] * 5))(batched(0)(a)[0], *a[1:]),
    "vmap over parameters": lambda f, a: func.vmap(f, (None, *[0] * 5))(a[0], *batched(0)(a)[1:]),
    "vmap over the last dimension": lambda f, a: func.vmap(f, -1)(*batched(-1)(a)),
    "vmap in vmap": lambda f, a: func.vmap(func.vmap(f, (0, *[None] * 5)), (None, *[0] * 5))(
        batched(0)(a)[0], *batched(0)(a)[1:]
    ),
    "grad": lambda f, a: func.grad(total(f), ALL)(*a),
    "vmap of grad": lambda f, a: func.vmap(func.grad(total(f), ALL))(*batched(0)(a)),
    "grad of vmap": lambda f, a: func.grad(total(func.vmap(f)), ALL)(*batched(0)(a)),
    "vjp": lambda f, a: func.vjp(f, *a)[1](torch.ones(5, 6, dtype=torch.float64)),
    "jvp": lambda f, a: func.jvp(f, tuple(a), tangents(*a)),
    "linearize": lambda f, a: func.linearize(f, *a)[1](*tangents(*a)),
    "jacrev": lambda f, a: func.jacrev(f, ALL)(*a),
    "jacfwd": lambda f, a: func.jacfwd(f, ALL)(*a),
    "hessian": lambda f, a: func.hessian(total(f), ALL)(*a),
    "jvp of grad": lambda f, a: func.jvp(func.grad(total(f), ALL), tuple(a), tangents(*a)),
    "functionalize": lambda f, a: func.functionalize(f)(*a),
    "dual numbers": dual,
    "forward over reverse": forward_over_reverse,
    "tangent of dy alone": tangent_of_the_gradient_alone,
    "batched gradients": batched_gradients,
    "batched gradients with a graph": lambda f, a: batched_gradients(f, a, create_graph=True),
    "vectorised jacobian": lambda f, a: functional.jacobian(f, tuple(a), vectorize=True),
    "forward-mode jacobian": lambda f, a: functional.jacobian(f, tuple(a), vectorize=True, strategy="forward-mode"),
    "make_fx of grad": lambda f, a: make_fx(func.grad(total(f), ALL))(*a)(*a),
    "symbolic make_fx of vmap": lambda f, a: make_fx(func.vmap(f), tracing_mode="symbolic")(*batched(0)(a))(
        *batched(0)(a)
    ),
}
#: Without hessian: torch 2.11 does not compile its own basis for several arguments.
COMPILED = ("vmap over x", "vmap over parameters", "vmap of grad", "jvp", "jvp of grad")


def assert_same(got, expected):
    got, expected = tree_leaves(got), tree_leaves(expected)
    assert len(got) == len(expected) > 0
    for ours, theirs in zip(got, expected, strict=True):
        # float64 on both sides: only the order of sums differs; a missing term is of the order of 1
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("groups", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_gives_what_it_gives_of_the_formula(name, groups):
    a = arguments(groups)
    assert_same(TRANSFORMS[name](rescaled_linear, a), TRANSFORMS[name](written_out, a))


@pytest.mark.parametrize("name", ["vmap over parameters", "jvp", "forward over reverse", "batched gradients"])
def test_a_transform_at_rank_2_gives_what_it_gives_of_the_formula(name):
    a = arguments(rank=2)
    assert_same(TRANSFORMS[name](rescaled_linear, a), TRANSFORMS[name](written_out, a))


@pytest.mark.parametrize("name", COMPILED)
def test_a_transform_compiles_without_a_graph_break(name):
    a = arguments()
    compiled = torch.compile(lambda *a: TRANSFORMS[name](rescaled_linear, a), fullgraph=True, backend="aot_eager")
    assert_same(compiled(*a), TRANSFORMS[name](written_out, a))


def test_a_compiled_layer_is_transformed():
    a = arguments()
    compiled = torch.compile(rescaled_linear, backend="aot_eager")
    for name in ("grad", "vmap over x", "dual numbers", "batched gradients"):
        assert_same(compiled(*a), written_out(*a))
        assert_same(TRANSFORMS[name](compiled, a), TRANSFORMS[name](written_out, a))


def test_plain_pytorch_serves_transforms_alone():
    """If it served other calls too, their results would be right, but nothing would be fused."""
    assert not route.is_transformed()
    with forward_ad.dual_level():
        assert route.is_transformed()
    seen = []
    func.vmap(lambda t: (seen.append(route.is_transformed()), t)[1])(torch.zeros(2, 3))
    assert seen == [True]
    assert not route.is_transformed()
    p = make_problem(5, 6, 4)
    backend = SimpleNamespace(forward=lambda x, weight, *_: x.new_full((len(x), len(weight)), 7.0))
    with mock.patch.object(linear, "_backend", return_value=backend):
        assert (rescaled_linear(*p.forward_args) == 7).all(), "a backend serves"
        with forward_ad.dual_level():
            assert torch.equal(rescaled_linear(*p.forward_args), reference.forward(*p.forward_args))


def test_rounding_under_a_transform_is_the_formulas():
    p = make_problem(9, 24, 20, 3, torch.bfloat16, weight_dtype=torch.float32)
    y = func.vmap(rescaled_linear, (0, *[None] * 5))(p.x[:, None], *p.forward_args[1:])
    exact = reference.formula(*(t.double() for t in p.forward_args))
    assert_close("y", y[:, 0], reference.formula(*p.forward_args), exact)


def test_autocast_is_followed_under_a_transform():
    p = make_problem(9, 24, 20)
    with torch.autocast("cpu", torch.bfloat16):
        y = func.vmap(rescaled_linear, (0, *[None] * 5))(p.x[:, None], *p.forward_args[1:])
        # inside the region the formula's sum must not be rounded twice, nor its terms
        expected = func.vmap(rescaled_linear, (0, *[None] * 5))(p.x.bfloat16()[:, None], *p.forward_args[1:])
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, expected)


def test_gradcheck_forward_mode_and_batched():
    a = tuple(t.requires_grad_() for t in arguments())
    assert torch.autograd.gradcheck(
        rescaled_linear, a, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(rescaled_linear, a, check_fwd_over_rev=True, check_batched_grad=True)


def test_an_ensemble_of_layers():
    torch.manual_seed(0)
    layers = [FusedRLRRLinear(8, 6, groups=2, dtype=torch.float64) for _ in range(4)]
    parameters, buffers = func.stack_module_state(layers)
    x = torch.randn(5, 8, dtype=torch.float64)
    y = func.vmap(lambda p, b: func.functional_call(layers[0], (p, b), (x,)))(parameters, buffers)
    assert_same(y, torch.stack([layer(x) for layer in layers]))


def norms(dtype):
    torch.manual_seed(0)
    return {"SSFLayerNorm": SSFLayerNorm(8, dtype=dtype), "SSFAffine": SSFAffine(8, dtype=dtype)}


@pytest.mark.parametrize("name", ["SSFLayerNorm", "SSFAffine"])
def test_the_affines_are_transformed(name):
    norm = norms(torch.float64)[name]
    x = torch.randn(5, 8, dtype=torch.float64)
    parameters = {k: t.detach() for k, t in norm.named_parameters()}

    def call(p, x):
        return func.functional_call(norm, p, (x,))

    def by_hand(p, x):
        z = F.layer_norm(x, (8,), p["weight"], p["bias"], norm.eps) if "weight" in p else x
        return z * p["ssf_scale"] + p["ssf_shift"]

    direction = {k: t.cos() for k, t in parameters.items()}
    for f in (
        lambda g: func.vmap(func.grad(lambda p, x: g(p, x).sin().sum(), (0, 1)), (None, 0))(parameters, x),
        lambda g: func.jvp(g, (parameters, x), (direction, x.cos())),
        lambda g: func.hessian(lambda p: g(p, x).sin().sum())(parameters),
    ):
        assert_same(f(call), f(by_hand))


@pytest.mark.parametrize("name", ["SSFLayerNorm", "SSFAffine"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_batched_gradients_of_the_affines(name, dtype):
    """16-bit rows take the package's own ops, float64 rows PyTorch's LayerNorm."""
    norm = norms(dtype)[name]
    x = torch.randn(5, 8).to(dtype).requires_grad_()
    y, inputs = norm(x), (x, norm.ssf_scale, norm.ssf_shift)
    dy = torch.randn(3, 5, 8).to(dtype)
    got = torch.autograd.grad(y, inputs, dy, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, inputs, g, retain_graph=True) for g in dy]
    for ours, theirs in zip(got, map(torch.stack, zip(*each, strict=True)), strict=True):
        assert ours.dtype is theirs.dtype
        torch.testing.assert_close(ours, theirs)  # the same products, summed in another order


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bit_rows_under_a_transform_of_ssf_layer_norm(dtype):
    norm = norms(dtype)["SSFLayerNorm"]
    x = torch.randn(5, 8).to(dtype)
    y, dy = func.jvp(norm, (x,), (x.cos(),))
    assert torch.equal(y, norm(x))
    exact = norms(torch.float64)["SSFLayerNorm"]
    exact.load_state_dict({k: t.double() for k, t in norm.state_dict().items()})
    _, right = func.jvp(exact, (x.double(),), (x.cos().double(),))
    plain = func.jvp(lambda t: norm._frozen(t) * norm.ssf_scale + norm.ssf_shift, (x,), (x.cos(),))[1].to(dtype)
    assert_close("tangent", dy, plain, right)


def test_per_sample_gradients_of_a_whole_vit():
    model = stir(apply_rlrr(small_vit())).double()
    parameters = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    images = torch.cat([X, X.flip(0) * 0.5]).double()

    def loss(p, image):
        return func.functional_call(model, p, (image[None],)).square().sum()

    got = func.vmap(func.grad(loss), (None, 0))(parameters, images)
    for i, image in enumerate(images):
        trained = [model.get_parameter(k) for k in parameters]
        assert_same([g[i] for g in got.values()], torch.autograd.grad(model(image[None]).square().sum(), trained))
