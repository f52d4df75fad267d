"""Layers whose tensors are computed from others, and linears of other kinds: right results, or one clear error."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing._internal.two_tensor import TwoTensor

from rlrr_kernels import FusedRLRRLinear, apply_rlrr, disable_adapter, merge
from rlrr_kernels import merge_and_unload as unload
from tests.small_models import ROWS as x
from tests.small_models import formula_of as formula
from tests.small_models import small_layer as layer


class Doubled(nn.Module):
    def forward(self, value):
        return 2 * value

    def right_inverse(self, value):
        return value / 2


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


PARAMETRISED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "prune": partial(prune.l1_unstructured, name="weight", amount=0.5),
    "bias": lambda it: parametrize.register_parametrization(it, "bias", Doubled()),
}


@pytest.mark.parametrize("name", ["weight", "bias", "scale_out", "scale_in", "shift"])
def test_any_tensor_can_be_parametrised(name):
    made = layer(groups=3)
    plain = {n: p.detach().clone() for n, p in made.named_parameters()}
    parametrize.register_parametrization(made, name, Doubled(), unsafe=True)
    original = getattr(made.parametrizations, name).original
    assert torch.equal(original, plain[name] / 2)
    assert torch.allclose(made(x), formula(made), atol=1e-6)
    assert torch.allclose(copy.deepcopy(made)(x), made(x))
    assert torch.allclose(made.to_linear()(x), made(x), atol=1e-6)
    made(x).sum().backward()
    trains = name in ("scale_out", "scale_in", "shift")
    assert original.requires_grad == trains
    assert (original.grad is not None) == trains
    parametrize.remove_parametrizations(made, name)
    assert torch.equal(getattr(made, name), plain[name])


@pytest.mark.parametrize("how", PARAMETRISED)
def test_a_parametrised_weight_is_rescaled_and_refuses_to_be_merged_in_place(how):
    model = nn.Sequential(layer(), FusedRLRRLinear(6, 6))
    made = PARAMETRISED[how](model[0])
    assert torch.allclose(made(x), formula(made), atol=1e-6)
    made.eval()(x).sum().backward()
    assert made.scale_out.grad.any()
    for attempt in (made.merge, lambda: merge(model), made.reset_parameters):
        with pytest.raises(RuntimeError, match=r"cannot (merge|reset) while (weight|bias) is computed from other tens"):
            attempt()
    with pytest.raises(RuntimeError, match=r"cannot unload while (weight|bias) is computed from other tensors"):
        unload(model)
    assert [type(module) for module in model] == [type(made), FusedRLRRLinear]
    assert not any(module.merged for module in model)
    assert torch.allclose(made.to_linear()(x), made(x), atol=1e-6)


def test_scales_that_are_pruned_or_parametrised_merge_and_unmerge():
    made = prune.l1_unstructured(layer(), "scale_out", 0.5)
    parametrize.register_parametrization(made, "scale_in", Doubled())
    assert int((made.scale_out == 0).sum()) == 3
    made.eval()
    y = made(x)
    made.merge()
    assert torch.allclose(made(x), y, atol=1e-6)
    made.unmerge()
    assert torch.equal(made(x), y)
    for attempt, verb in ((made.reset_scales, "reset"), (lambda: unload(made), "unload")):
        with pytest.raises(RuntimeError, match=f"cannot {verb} while scale_out is computed from other tensors"):
            attempt()


@pytest.mark.parametrize("name", ["weight", "bias", "scale_out", "scale_in", "shift"])
def test_a_refused_reset_draws_nothing(name):
    made = layer()
    parametrize.register_parametrization(made, name, Doubled())
    before = {n: p.detach().clone() for n, p in made.named_parameters()}
    with pytest.raises(RuntimeError, match=f"cannot reset while {name} is computed from other tensors"):
        made.reset_parameters()
    assert all(torch.equal(p, before[n]) for n, p in made.named_parameters())


def test_a_model_that_cannot_be_switched_off_stays_merged():
    model = nn.Sequential(layer(), FusedRLRRLinear(6, 6)).eval()
    merge(model)
    parametrize.register_parametrization(model[1], "weight", Doubled())
    y = model(x)
    with pytest.raises(RuntimeError, match="cannot unmerge while weight is computed from other tensors"):
        disable_adapter(model).__enter__()
    assert model[0].merged
    assert torch.equal(model(x), y)


def test_a_merged_weight_that_is_then_parametrised_is_refused_by_name():
    made = layer().eval()
    made.merge()
    parametrize.register_parametrization(made, "weight", Doubled())
    for attempt, verb in ((made.unmerge, "unmerge"), (made.state_dict, "give a state dict")):
        with pytest.raises(RuntimeError, match=f"cannot {verb} while weight is computed from other tensors"):
            attempt()
    parametrize.remove_parametrizations(made, "weight")
    made.unmerge()


def linear_of(make_weight):
    """A linear whose weight ``make_weight`` computes from a dense one ``[6, 8]``."""
    made = nn.Linear(8, 6)
    made.weight = nn.Parameter(make_weight(made.weight.detach()), requires_grad=False)
    return made


def patched():
    made = nn.Linear(8, 6)
    made.forward = lambda x: x
    return made


REFUSED = {
    "its forward is another": (lambda: Halved(8, 6), "expected a plain nn.Linear, got .*Halved, whose forward is its"),
    "its forward is patched": (patched, "expected a plain nn.Linear, got .*Linear, whose forward is its own"),
    "int8": (
        lambda: linear_of(torch.Tensor.char),
        r"weight: expected float16, bfloat16, float32 or float64, got torch\.int8",
    ),
    "sparse": (
        lambda: linear_of(torch.Tensor.to_sparse_csr),
        "weight: expected a plain tensor, got Parameter of layout torch.sparse_csr",
    ),
    "wrapped": (lambda: linear_of(lambda w: TwoTensor(w, w)), "weight: expected a plain tensor, got TwoTensor"),
    "flattened": (lambda: linear_of(torch.flatten), r"weight: expected shape \[6, 8\] as its features say, got \[48\]"),
    **{
        how: (lambda how=how: PARAMETRISED[how](nn.Linear(8, 6)), "its (weight|bias) is no parameter but computed from")
        for how in PARAMETRISED
    },
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
def test_from_linear_refuses_what_computes_something_else(case):
    make, words = REFUSED[case]
    kind = ValueError if case == "flattened" else TypeError
    with pytest.raises(kind, match=f"linear.*{words}"):
        FusedRLRRLinear.from_linear(make())
    model = nn.Sequential(nn.Linear(8, 8), make())
    with pytest.raises(kind, match=rf"^1.*{words}.*\. Name it in exclude_modules to leave it as it is"):
        apply_rlrr(model, target_modules=["*"])
    assert not isinstance(model[0], FusedRLRRLinear)
    assert all(p.requires_grad for p in model[0].parameters())
    apply_rlrr(model, target_modules=["*"], exclude_modules=["1"])
    assert isinstance(model[0], FusedRLRRLinear)


def test_lazy_modules_are_called_before():
    with pytest.raises(TypeError, match="linear: LazyLinear has no weight yet; call it once before"):
        FusedRLRRLinear.from_linear(nn.LazyLinear(6))
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(6))
    words = "model: 1.weight has no shape yet, as its module is lazy; call the model once before"
    for targets in (["*"], ["0"]):
        with pytest.raises(ValueError, match=words):
            apply_rlrr(model, target_modules=targets)
    assert model[0].weight.requires_grad
    y = model(x)
    assert torch.allclose(apply_rlrr(model, target_modules=["*"], init="identity")(x), y, atol=1e-6)


@pytest.mark.parametrize("given", [None, nn.Conv2d(3, 3, 3), layer()], ids=lambda g: type(g).__name__)
def test_from_linear_refuses_what_is_no_plain_linear(given):
    with pytest.raises(TypeError, match=f"linear: expected a plain nn.Linear, got .*{type(given).__name__}"):
        FusedRLRRLinear.from_linear(given)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_dtypes_that_the_layer_does_not_compute_in_are_refused(dtype):
    words = f"dtype: expected float16, bfloat16, float32 or float64, got {dtype}"
    with pytest.raises(TypeError, match=words):
        FusedRLRRLinear(8, 6, dtype=dtype)
    with pytest.raises(TypeError, match=words):
        FusedRLRRLinear.from_linear(nn.Linear(8, 6), dtype=dtype)


def test_a_subclass_that_computes_the_same_is_taken():
    same = nn.modules.linear.NonDynamicallyQuantizableLinear(8, 6)
    assert torch.allclose(FusedRLRRLinear.from_linear(same, init="identity")(x), same(x), atol=1e-6)


def test_a_float64_copy_of_the_weight_has_float64_scales():
    made = FusedRLRRLinear.from_linear(nn.Linear(8, 6), dtype=torch.float64)
    assert {p.dtype for p in made.parameters()} == {torch.float64}
    assert made(x.double()).dtype is torch.float64
