"""Compiled and wrapped models: the inner model is adapted, or the wrapper is refused before anything changes."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from rlrr_kernels import (
    FusedRLRRLinear,
    apply_rlrr,
    count_parameters,
    disable_adapter,
    load_adapter,
    merge,
    merge_and_unload,
    param_groups,
    save_adapter,
    unmerge,
)
from tests.small_models import X, small_layer, small_vit, stir, tuned


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def blocks_compiled(model):
    for i, block in enumerate(model.blocks):
        model.blocks[i] = compiled(block)
    return model


WRAPPERS = {
    "compiled": compiled,
    "compiled in place": compiled_in_place,
    "blocks compiled": blocks_compiled,
    "DataParallel": DataParallel,
    "both": lambda model: DataParallel(compiled(model)),
}


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["compiled", "blocks compiled", "DataParallel"])
@torch.no_grad()
def test_a_wrapped_model_is_adapted_merged_and_taken_apart_as_a_plain_one(name):
    """A model that was compiled and run before its modules were replaced does not keep using the compiled code."""
    base, model = small_vit(depth=1), WRAPPERS[name](small_vit(depth=1))
    options = {"target_modules": ["blocks.0.*"], "groups": {"blocks.0.attn.qkv": 3}, "norm_affine": True}
    assert torch.allclose(model(X), base(X), atol=1e-6)
    assert apply_rlrr(model, **options) is model
    plain = stir(apply_rlrr(small_vit(depth=1), **options))
    assert count_parameters(model) == count_parameters(plain)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        ours.copy_(theirs)
    logits = plain(X)
    assert not torch.allclose(logits, base(X), atol=0.1)
    assert torch.allclose(model(X), logits, atol=1e-5)
    for ours, theirs in zip(param_groups(model, 0.1), param_groups(plain, 0.1), strict=True):
        assert [p.shape for p in ours["params"]] == [p.shape for p in theirs["params"]]
    with disable_adapter(model):
        assert torch.allclose(model(X), base(X), atol=1e-5)
    merge(model, keep=False)
    assert torch.allclose(model(X), logits, atol=1e-5)
    unmerge(model, base.state_dict())
    assert torch.allclose(model(X), logits, atol=1e-5)
    merge_and_unload(model)
    assert not any(isinstance(module, FusedRLRRLinear) for module in model.modules())
    assert torch.allclose(model(X), logits, atol=1e-5)


@pytest.mark.parametrize("name", WRAPPERS)
def test_an_adapter_is_saved_from_and_loaded_into_wrapped_models(name, tmp_path):
    save_adapter(WRAPPERS[name](tuned()), tmp_path / "adapter")
    fresh = WRAPPERS[name](small_vit())
    assert load_adapter(fresh, tmp_path / "adapter") is fresh
    for ours, theirs in zip(fresh.parameters(), tuned().parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_compiled_layer_is_unloaded_to_a_plain_linear():
    layer = small_layer()
    assert type(merge_and_unload(compiled(layer))) is nn.Linear


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_model_inside_ddp_is_refused(tmp_path):
    """DDP's reducer would wait for parameters that do not train, and not know those that do."""
    save_adapter(tuned(), tmp_path / "adapter")

    class Around(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.head = DistributedDataParallel(model), nn.Linear(5, 2)

    for model in (
        DistributedDataParallel(small_vit()),
        compiled(DistributedDataParallel(small_vit())),
        Around(small_vit()),
    ):
        before = copy.copy(list(model.modules()))
        with pytest.raises(TypeError, match=r"model: DistributedDataParallel has taken over .* wrap or shard it then"):
            apply_rlrr(model, target_modules=["*"])
        assert list(model.modules()) == before
        assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(TypeError, match="model: DistributedDataParallel has taken over its parameters"):
        load_adapter(DistributedDataParallel(small_vit()), tmp_path / "adapter")
    # a model that was adapted before is loaded, used and merged through the wrapper
    model = DistributedDataParallel(apply_rlrr(small_vit()))
    assert torch.equal(load_adapter(model, tmp_path / "adapter")(X), tuned()(X))
    with disable_adapter(model), torch.no_grad():
        assert torch.equal(model(X), small_vit()(X))
    assert torch.allclose(merge(model)(X), tuned()(X), atol=1e-5)
