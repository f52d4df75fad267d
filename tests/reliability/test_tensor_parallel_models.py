"""Tensor parallel models equal one process: training, autocast, state dicts, adapters, merging, FSDP2 on top."""

import copy
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn import functional as F

from rlrr_kernels import apply_rlrr, disable_adapter, load_adapter, merge, merge_and_unload, save_adapter, unmerge
from rlrr_kernels.layers import parallel
from rlrr_kernels.layers.parallel import RLRRColwiseParallel, RLRRRowwiseParallel
from tests.oracle import assert_close
from tests.reliability.in_processes import full, in_processes, mesh
from tests.small_models import small_vit, stir

WHOLE = Replicate()
PLAN = {
    # fused: the gathered y is what attention cuts into q, k and v
    "blocks.*.attn.qkv": RLRRColwiseParallel(output_layouts=WHOLE),
    "blocks.*.attn.proj": RLRRRowwiseParallel(input_layouts=WHOLE),
    "blocks.*.mlp.fc1": RLRRColwiseParallel(),
    "blocks.*.mlp.fc2": RLRRRowwiseParallel(),
}
IMAGES = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3])
CLIPS = (nn.utils.clip_grad_norm_, parallel.clip_grad_norm_)


def vit(dtype=torch.float64, **options):
    return stir(apply_rlrr(small_vit(**options))).to(dtype)


def sharded(model):
    return parallelize_module(copy.deepcopy(model), mesh(), PLAN)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def backward(model, images=IMAGES, labels=LABELS):
    """Logits and gradients, gathered, of what does not depend on rounding alone."""
    logits = model(images)
    F.cross_entropy(logits.double(), labels).backward()
    # a constant on all keys changes no attention: the gradient of their shift is rounding
    named = ((name, p) for name, p in model.named_parameters() if p.grad is not None and "qkv.shift" not in name)
    return logits.detach(), {name: full(p.grad).clone() for name, p in named}


@in_processes(2)
def test_a_vit_trains_as_in_one_process():
    """Three steps of AdamW with the gradients clipped: logits, norms and parameters, float64."""
    for bias in (True, False):
        one = vit(qkv_bias=bias)
        many = sharded(one)
        optimizers = [torch.optim.AdamW(trained(m), lr=1e-2) for m in (one, many)]
        for _ in range(3):
            (logits, grads), (ours, our_grads) = backward(one), backward(many)
            torch.testing.assert_close(ours, logits, rtol=1e-12, atol=1e-12)
            assert our_grads.keys() == grads.keys()
            for name, grad in grads.items():
                torch.testing.assert_close(our_grads[name], grad, rtol=1e-11, atol=1e-12, msg=name)
            norm, our_norm = (clip(trained(m), 0.05) for clip, m in zip(CLIPS, (one, many), strict=True))
            assert norm > 0.1
            torch.testing.assert_close(our_norm, norm, rtol=1e-12, atol=0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.slow
@in_processes(2)
def test_a_vit_under_autocast_is_as_accurate_as_in_one_process():
    exact, exact_grads = backward(vit())
    one = vit(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        plain, plain_grads = backward(one, IMAGES.float())
        ours, grads = backward(sharded(vit(torch.float32)), IMAGES.float())
    # a sum of two parts in bfloat16 is one rounding more in each of the four row parallel layers
    more = 4 * torch.finfo(torch.bfloat16).eps
    assert_close("logits", ours, plain, exact, more)
    for name, grad in grads.items():
        assert_close(name, grad, plain_grads[name], exact_grads[name], more)


@pytest.mark.slow
@in_processes(2)
def test_a_state_dict_is_gathered_and_loaded_whole():
    one = vit()
    options = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(sharded(one), options=options)
    if dist.get_rank() == 0:
        assert list(state) == list(one.state_dict())
    other = parallelize_module(apply_rlrr(small_vit()).double(), mesh(), PLAN)
    set_model_state_dict(other, one.state_dict(), options=options)
    for (name, values), ours in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(full(ours), values), name
        if dist.get_rank() == 0:
            assert torch.equal(state[name], values), name


@pytest.mark.slow
@in_processes(2)
def test_an_adapter_is_saved_and_loaded_sharded_or_not():
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    one = vit(torch.float32)
    save_adapter(sharded(one), Path(folder[0]) / "adapter")
    dist.barrier()
    plain = load_adapter(small_vit(), Path(folder[0]) / "adapter")
    many = load_adapter(parallelize_module(apply_rlrr(small_vit()), mesh(), PLAN), Path(folder[0]) / "adapter")
    for (name, values), a, b in zip(one.named_parameters(), plain.parameters(), many.parameters(), strict=True):
        assert torch.equal(a, values), name
        assert torch.equal(full(b), values), name
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])


@pytest.mark.slow
@in_processes(2)
def test_merged_unmerged_and_switched_off_equal_one_process():
    one = vit().eval()
    many = sharded(one)

    def agree():
        torch.testing.assert_close(many(IMAGES), one(IMAGES), rtol=1e-12, atol=1e-12)

    with torch.no_grad():
        for model in (one, many):
            merge(model)
        agree()
        for (name, values), ours in zip(one.named_parameters(), many.parameters(), strict=True):
            torch.testing.assert_close(full(ours), values, rtol=0, atol=1e-15, msg=name)
        for model in (one, many):
            unmerge(model)
        agree()
        with disable_adapter(one), disable_adapter(many):
            agree()
        for model in (one, many):
            merge_and_unload(model)
        agree()


@pytest.mark.slow
@in_processes(2)
def test_a_sharded_head_is_switched_off_with_the_adapters():
    one = vit().eval()
    many = parallelize_module(copy.deepcopy(one), mesh(), PLAN | {"head": ColwiseParallel(output_layouts=WHOLE)})
    with torch.no_grad():
        for model in (one, many):
            for parameter in model.head.parameters():
                parameter.mul_(2)
        tuned = one(IMAGES)
        with disable_adapter(one), disable_adapter(many):
            assert not torch.allclose(one(IMAGES), tuned)
            torch.testing.assert_close(many(IMAGES), one(IMAGES), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(many(IMAGES), tuned, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@in_processes(2)
def test_a_model_merged_without_a_copy_is_unmerged_from_whole_or_sharded_weights():
    one = vit().eval()
    base = one.state_dict()
    for given in (base, {name: p.detach().clone() for name, p in sharded(one).state_dict().items()}):
        many = merge(sharded(one), keep=False)
        unmerge(many, given)
        for (name, values), ours in zip(one.named_parameters(), many.parameters(), strict=True):
            assert torch.equal(full(ours), values), name
        assert many.blocks[0].mlp.fc1.weight.placements == (Shard(0),)
        assert many.blocks[0].mlp.fc2.weight.placements == (Shard(1),)
        with torch.no_grad():
            torch.testing.assert_close(many(IMAGES), one(IMAGES), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@in_processes(2)
def test_values_that_are_not_finite_in_one_process_are_refused_in_both():
    many = sharded(vit().eval())
    if dist.get_rank() == 1:
        with torch.no_grad():
            many.blocks[0].mlp.fc1.scale_out.to_local()[0] = torch.nan
    for attempt in (merge, merge_and_unload):
        with pytest.raises(ValueError, match=r"safe_merge: blocks\.0\.mlp\.fc1 would get values that are not finite"):
            attempt(many, safe_merge=True)


@pytest.mark.slow
@in_processes(2, 2)
def test_a_vit_under_fsdp2_and_tensor_parallel_trains_as_one_process():
    """FSDP2 over tensor parallel: a shard of rows is cut again, in another order than the mesh's."""
    one = vit()
    many = parallelize_module(copy.deepcopy(one), mesh()["tensor"], PLAN)
    for part in (*many.blocks, many):
        fully_shard(part, mesh=mesh()["data"])
    first = 2 * mesh()["data"].get_local_rank()
    optimizers = [torch.optim.AdamW(trained(m), lr=1e-2, foreach=False) for m in (one, many)]
    for _ in range(2):
        (_, grads), (_, ours) = backward(one), backward(many, IMAGES[first : first + 2], LABELS[first : first + 2])
        for name, grad in grads.items():
            torch.testing.assert_close(ours[name], grad, rtol=1e-11, atol=1e-12, msg=name)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.slow
@in_processes(2, 2)
def test_gradients_on_several_meshes_are_clipped_as_in_one_process():
    plain = [nn.Parameter(torch.zeros(6)) for _ in range(3)]
    many = []
    for i, (one, on) in enumerate(zip(plain, (None, mesh()["data"], mesh()), strict=True)):
        one.grad = torch.arange(6.0) + i
        values = (torch.zeros(6), one.grad.clone())  # a shard may share the memory of what it is made of
        if on is not None:
            values = [distribute_tensor(t, on, [Shard(0)] * on.ndim) for t in values]
        many.append(nn.Parameter(values[0]))
        many[-1].grad = values[1]
    norm = parallel.clip_grad_norm_(many, 1.5)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(plain, 1.5))
    for ours, one in zip(many, plain, strict=True):
        torch.testing.assert_close(full(ours.grad), one.grad)
    assert parallel.clip_grad_norm_([nn.Parameter(torch.zeros(1))], 1.0) == 0
    single = nn.Parameter(torch.zeros(3))
    single.grad = torch.full((3,), 2.0)
    assert parallel.clip_grad_norm_(single, 1.0) == 12**0.5
    torch.testing.assert_close(single.grad.norm(), torch.tensor(1.0))
