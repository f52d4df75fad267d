"""Data parallel training (DDP, FSDP2, FSDP1): two processes with half of a batch each equal one with all of it."""

import contextlib
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from rlrr_kernels import SSFLayerNorm, apply_rlrr, disable_adapter, merge, merge_and_unload, unmerge
from tests.oracle import assert_close
from tests.reliability.in_processes import full, in_processes, mesh
from tests.small_models import small_vit, stir

IMAGES = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3])


def vit(checkpointing=False, frozen_dtype=None, dtype=torch.float64, **options):
    """With ``frozen_dtype`` the frozen linears are in it and all else is in float32."""
    model = stir(apply_rlrr(small_vit(), frozen_dtype=frozen_dtype, **options))
    model.set_grad_checkpointing(checkpointing)
    return model if frozen_dtype else model.to(dtype)


def half(model, images=IMAGES, rank=None):
    rank = dist.get_rank() if rank is None else rank
    part = slice(2 * rank, 2 * rank + 2)
    return F.cross_entropy(model(images[part]).double(), LABELS[part])


def gradients(model):
    # a constant on all keys changes no attention: the gradient of their shift is rounding
    named = ((name.removeprefix("module."), p.grad) for name, p in model.named_parameters() if p.grad is not None)
    return {name: full(grad).clone() for name, grad in named if "qkv.shift" not in name}


def train(model, loss=half, images=IMAGES):
    """Gradients of three steps of AdamW, each of which sees what the last one changed."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for _ in range(3):
        loss(model, images).backward()
        found.append(gradients(model))
        optimizer.step()
        optimizer.zero_grad()
    return found


def whole(model, images=IMAGES):
    return F.cross_entropy(model(images).double(), LABELS)


def agree(ours, exact, rtol=1e-11, atol=1e-12):
    for step, expected in zip(ours, exact, strict=True):
        assert step.keys() == expected.keys()
        for name, grad in step.items():
            torch.testing.assert_close(grad, expected[name], rtol=rtol, atol=atol, msg=name)


def accumulated(model, synchronising):
    """One step's gradients with the half batch in two parts."""
    part = 2 * dist.get_rank()
    for i in range(2):
        images, labels = IMAGES[part + i : part + i + 1], LABELS[part + i : part + i + 1]
        with synchronising(model, i == 1):
            (F.cross_entropy(model(images), labels) / 2).backward()
    return gradients(model)


@in_processes(2)
def test_ddp_trains_as_one_process():
    agree(train(DistributedDataParallel(vit())), train(vit(), whole))


@pytest.mark.slow
@in_processes(2)
def test_ddp_trains_as_one_process_whatever_its_options():
    """Both ways of find_unused_parameters, static_graph and gradient_as_bucket_view: 8 settings."""
    exact = train(vit(), whole)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no parameter was unused
        for unused in (False, True):
            for static in (False, True):
                for view in (False, True):
                    options = {
                        "find_unused_parameters": unused,
                        "static_graph": static,
                        "gradient_as_bucket_view": view,
                    }
                    agree(train(DistributedDataParallel(vit(), **options)), exact)
    for static in (False, True):
        agree(train(DistributedDataParallel(vit(checkpointing=True), static_graph=static)), exact)


@pytest.mark.slow
@in_processes(2)
def test_ddp_accumulates_without_synchronising():
    def synchronising(model, now):
        return contextlib.nullcontext() if now else model.no_sync()

    agree([accumulated(DistributedDataParallel(vit()), synchronising)], train(vit(), whole)[:1])


@pytest.mark.slow
@in_processes(2)
def test_a_switched_off_layer_is_an_unused_parameter_to_ddp():
    def model():
        made = vit()
        made.blocks[0].mlp.fc1.enabled = False
        return made

    agree(train(DistributedDataParallel(model(), find_unused_parameters=True)), train(model(), whole))
    with pytest.raises(RuntimeError, match="parameters that were not used in producing loss"):
        train(DistributedDataParallel(model()))


def fsdp(model, groups=lambda model: model.blocks, **options):
    for module in groups(model):
        fully_shard(module, mesh=mesh(), **options)
    return fully_shard(model, mesh=mesh(), **options)


@in_processes(2)
def test_fsdp2_trains_as_one_process():
    exact = train(vit(), whole)
    for reshard in (True, False):
        agree(train(fsdp(vit(), reshard_after_forward=reshard)), exact)
    agree(train(fsdp(vit(checkpointing=True))), exact)
    # the parameters of a norm in a group of its own are freed when the linear behind it would form its input again
    agree(train(fsdp(vit(), lambda model: [m for m in model.modules() if isinstance(m, SSFLayerNorm)])), exact)
    options = {"rank": 3, "scaling": 0.5}  # FSDP parts the rows of v [3, K] and of v [groups, 3, K]
    agree(train(fsdp(vit(**options))), train(vit(**options), whole))

    @contextlib.contextmanager
    def synchronising(model, now):
        model.set_requires_gradient_sync(now)
        yield

    agree([accumulated(fsdp(vit()), synchronising)], exact[:1])


@pytest.mark.slow
@in_processes(2)
def test_fsdp2_shards_a_narrow_frozen_weight_beside_float32_scales():
    """bfloat16 W and b, float32 u, v, f and the rest: one group, or the frozen ones left out of it."""
    images = IMAGES.float()
    exact = train(vit(frozen_dtype=torch.bfloat16), whole, images)
    assert {p.dtype for p in vit(frozen_dtype=torch.bfloat16).parameters()} == {torch.bfloat16, torch.float32}
    for reshard in (True, False):
        model = fsdp(vit(frozen_dtype=torch.bfloat16), reshard_after_forward=reshard)
        ours = train(model, images=images)
        # float32 sums over the batch are parted otherwise
        agree(ours, exact, rtol=1e-4, atol=1e-5)
        fc1 = model.blocks[0].mlp.fc1
        assert [t.dtype for t in (fc1.weight, fc1.scale_out)] == [torch.bfloat16, torch.float32]
    model = vit(frozen_dtype=torch.bfloat16)
    frozen = {p for p in model.parameters() if not p.requires_grad}
    agree(train(fsdp(model, ignored_params=frozen), images=images), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@in_processes(2)
def test_fsdp2_mixed_precision_is_as_accurate_as_a_narrow_model():
    """param_dtype casts u, v, f too: as the model in bfloat16, whose halves' gradients are averaged in float32."""
    images = IMAGES.float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    halves = []
    for rank in range(2):
        narrow = vit(dtype=torch.bfloat16)
        half(narrow, images.bfloat16(), rank).backward()
        halves.append(gradients(narrow))
    exact = vit()
    whole(exact).backward()
    exact = gradients(exact)
    for frozen_dtype in (None, torch.bfloat16):
        model = fsdp(vit(frozen_dtype=frozen_dtype, dtype=torch.float32), mp_policy=policy)
        half(model, images).backward()
        for name, grad in gradients(model).items():
            assert grad.dtype is torch.float32
            plain = (halves[0][name].float() + halves[1][name].float()) / 2
            # bfloat16 values were rounded by both
            assert_close(name, grad, plain, exact[name], torch.finfo(torch.bfloat16).eps)


@pytest.mark.slow
@in_processes(2)
def test_fsdp2_clips_and_gathers_as_one_process():
    one, model = vit(frozen_dtype=torch.bfloat16), fsdp(vit(frozen_dtype=torch.bfloat16))
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() == 0:
        assert list(state) == list(one.state_dict())
        for name, values in one.state_dict().items():
            assert torch.equal(state[name], values), name
            assert state[name].dtype is values.dtype, name
    one, model = vit(), fsdp(vit())
    whole(one).backward()
    half(model).backward()
    norms = [full(nn.utils.clip_grad_norm_(m.parameters(), 0.05)) for m in (one, model)]
    assert norms[0] > 0.1
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-12, atol=0)
    agree([gradients(model)], [gradients(one)])


@pytest.mark.slow
@in_processes(2)
def test_fsdp2_switches_adapters_and_head_off_and_on():
    """Also where a pass without gradients left the root's parameters gathered, inside of the block and before it."""
    for gathered in (False, True):
        one, model = vit().eval(), fsdp(vit()).eval()
        with torch.no_grad():
            for parameter in (*one.head.parameters(), *model.head.parameters()):
                parameter.mul_(2)
            tuned = one(IMAGES)
            if gathered:
                torch.testing.assert_close(model(IMAGES), tuned, rtol=1e-12, atol=1e-12)
            with disable_adapter(one), disable_adapter(model):
                assert not torch.allclose(one(IMAGES), tuned)
                torch.testing.assert_close(model(IMAGES), one(IMAGES), rtol=1e-12, atol=1e-12)
            for _ in range(2):
                torch.testing.assert_close(model(IMAGES), tuned, rtol=1e-12, atol=1e-12)
                model.reshard()


@pytest.mark.slow
@in_processes(2)
def test_fsdp_refuses_to_have_its_parameters_replaced():
    """It would put W back in the place of W' at its next pass."""
    merged = fsdp(merge(vit().eval()))
    plain = fsdp(small_vit())
    with pytest.raises(TypeError, match=r"^model: FSDP has taken over its parameters; adapt the plain model"):
        apply_rlrr(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = FullyShardedDataParallel(vit(), use_orig_params=True, device_id=torch.device("cpu"))
    for model in (fsdp(vit()), first):
        layer = model.blocks[0].mlp.fc1
        for verb, attempt in (
            ("merge", merge),
            ("merge", lambda _, it=layer: it.merge()),
            ("unload", merge_and_unload),
        ):
            with pytest.raises(
                RuntimeError, match=f"cannot {verb} under FSDP, which would put its own parameters back"
            ):
                attempt(model)
        assert not layer.merged
    for attempt in (lambda: unmerge(merged), merged.blocks[0].mlp.fc1.unmerge, disable_adapter(merged).__enter__):
        with pytest.raises(RuntimeError, match="cannot unmerge under FSDP"):
            attempt()
    assert all(block.mlp.fc1.merged for block in merged.blocks)
    with pytest.raises(RuntimeError, match="FSDP1 holds the head, which cannot become that of the base model"):
        disable_adapter(first).__enter__()


@pytest.mark.slow
@in_processes(2)
def test_fsdp1_steps_as_one_process():
    """``use_orig_params=True``, which a block with frozen and trained parameters needs."""
    one, model = vit(), vit()
    policy = ModuleWrapPolicy({type(model.blocks[0])})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that frozen and trained parameters share a block
        model = FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
        )
    for m, loss in ((one, whole), (model, half)):
        optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=1.0)
        loss(m, IMAGES).backward()
        optimizer.step()
    with FullyShardedDataParallel.summon_full_params(model):
        stepped = {
            name.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for name, p in model.named_parameters()
        }
    before = dict(vit().named_parameters())
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(stepped[name], parameter.detach(), rtol=1e-11, atol=1e-12, msg=name)
        if parameter.requires_grad and "qkv.shift" not in name:
            assert not torch.equal(stepped[name], before[name]), name
