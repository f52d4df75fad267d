"""Checkpoints of the published code: what it computes, and what is refused."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

from rlrr_kernels import apply_rlrr, param_groups, use_backend
from rlrr_kernels.checkpoint.official import convert_official, load_official_adapter
from tests.checkpoint.test_adapter import assert_untouched, values_of
from tests.oracle import BACKENDS, assert_close, require
from tests.small_models import X, small_swin, small_vit, stir

#: What the published code computes in float64, on a ViT of two blocks and 48 features.
FIXTURE = dict(np.load(Path(__file__).parents[1] / "fixtures" / "official_vit_float64.npz"))


def of_fixture(prefix, dtype=torch.float64):
    """Published name -> tensor."""
    return {k.removeprefix(prefix): torch.from_numpy(v).to(dtype) for k, v in FIXTURE.items() if k.startswith(prefix)}


def published_vit(classes=None):
    """A timm ViT of the fixture's size with random weights, in float64."""
    patch, image, dim, hidden, heads, depth, published_classes = (int(n) for n in FIXTURE["meta"])
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=image,
        patch_size=patch,
        embed_dim=dim,
        mlp_ratio=hidden / dim,
        num_heads=heads,
        depth=depth,
        num_classes=published_classes if classes is None else classes,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    ).double()


def training(backend, dtype, steps):
    """Everything that the fixture holds, as this package computes it; ``steps`` of the optimiser."""
    device = require(backend, dtype)
    model = apply_rlrr(published_vit()).to(device, dtype)
    model.load_state_dict(convert_official(of_fixture("state/", dtype)))
    model.train()
    x, target = torch.from_numpy(FIXTURE["x"]).to(device, dtype), torch.from_numpy(FIXTURE["target"]).to(device)
    results, losses = {}, []
    with use_backend(backend):
        optimizer = torch.optim.AdamW(param_groups(model, 5e-2), lr=3e-3)
        for step in range(max(steps, 1)):
            logits = model(x)
            loss = F.cross_entropy(logits, target)
            optimizer.zero_grad()
            loss.backward()
            losses.append(loss.detach())
            if step == 0:
                results |= {"logits": logits.detach(), "loss": loss.detach()}
                results |= {f"grad {n}": p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
            optimizer.step()
        if steps:
            results |= {"losses": torch.stack(losses), "logits after": model(x).detach()}
    return {name: value.cpu() for name, value in results.items()}


def published(steps):
    results = {"logits": FIXTURE["logits"], "loss": FIXTURE["loss"]}
    if steps:
        results |= {"losses": FIXTURE["losses_10_steps"], "logits after": FIXTURE["logits_after"]}
    gradients = convert_official(of_fixture("grad/"))
    return {n: torch.from_numpy(v) for n, v in results.items()} | {f"grad {n}": g for n, g in gradients.items()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_loss_gradients_and_ten_steps_are_the_published_code_s(backend):
    """In float64 to 1e-9, of every tensor that trains there and of no other."""
    got, expected = training(backend, torch.float64, 10), published(10)
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("backend", "steps"),
    [
        *(pytest.param(*b.values, 10, marks=b.marks) for b in BACKENDS if b.values != ("triton",)),
        pytest.param("triton", 0, marks=[pytest.mark.slow, pytest.mark.triton]),
    ],
)
def test_float32_has_the_error_of_the_plain_formula(backend, steps):
    """Against the published values in float64."""
    got, plain, exact = (
        training(backend, torch.float32, steps),
        training("reference", torch.float32, steps),
        published(steps),
    )
    assert got.keys() == exact.keys()
    for name in exact:
        assert_close(name, got[name], plain[name], exact[name])


def adapter_only(state):
    """What the published code saves."""
    return {name: tensor for name, tensor in state.items() if any(part in name for part in ("head", "scale", "shift"))}


@pytest.fixture
def adapter_file(tmp_path):
    state = adapter_only(of_fixture("state/"))
    assert len(state) == 2 * 22 + 6
    torch.save(state, tmp_path / "vtab 75.12.pth")
    return tmp_path / "vtab 75.12.pth"


@pytest.mark.parametrize("prepared", [False, True])
def test_a_published_adapter_on_its_base_gives_the_published_logits(adapter_file, prepared):
    model = published_vit()
    base = {
        n: t for n, t in convert_official(of_fixture("state/")).items() if n in model.state_dict() and "head" not in n
    }
    model.load_state_dict(base, strict=False)
    if prepared:
        apply_rlrr(model)
    assert load_official_adapter(model, adapter_file) is model
    logits = model(torch.from_numpy(FIXTURE["x"]))
    torch.testing.assert_close(logits, torch.from_numpy(FIXTURE["logits"]), rtol=1e-9, atol=1e-9)


def test_a_published_adapter_has_rank_1(adapter_file):
    model = apply_rlrr(published_vit(), rank=4)
    before = model.blocks[0].mlp.fc1.scale_out.clone()
    with pytest.raises(
        ValueError, match=r"it has rank 1 and scaling 1, and the model's blocks\.0\.attn\.qkv has rank 4"
    ):
        load_official_adapter(model, adapter_file)
    assert torch.equal(model.blocks[0].mlp.fc1.scale_out, before)


def test_a_whole_published_state_brings_its_base_with_it(tmp_path):
    torch.save(of_fixture("state/"), tmp_path / "a.pth")
    model = load_official_adapter(published_vit(), tmp_path / "a.pth")
    logits = model(torch.from_numpy(FIXTURE["x"]))
    torch.testing.assert_close(logits, torch.from_numpy(FIXTURE["logits"]), rtol=1e-9, atol=1e-9)


def assert_plain(model, before):
    assert_untouched(model, before)
    assert not hasattr(model, "rlrr_config")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_head_of_other_classes_is_refused_unless_it_is_left_out(adapter_file):
    model = published_vit(classes=3)
    before = values_of(model)
    with pytest.raises(ValueError, match=r"its head has 7 classes, the model 3; build the model with num_classes=7"):
        load_official_adapter(model, adapter_file)
    assert_plain(model, before)
    load_official_adapter(model, adapter_file, load_head=False)
    assert torch.equal(model.head.weight, before["head.weight"])
    expected = of_fixture("state/")["transformer.encoder.layer.1.ffn.fc2.shift_bias"][0]
    assert torch.equal(model.blocks[1].mlp.fc2.shift, expected)


def test_a_head_may_be_missing_from_a_file_and_a_layer_may_not(tmp_path):
    state = {name: tensor for name, tensor in adapter_only(of_fixture("state/")).items() if "head" not in name}
    torch.save(state, tmp_path / "a.pth")
    model = published_vit(classes=3)
    before = model.head.weight.clone()
    load_official_adapter(model, tmp_path / "a.pth")
    assert torch.equal(model.head.weight, before)
    del state["transformer.encoder.layer.1.ffn.fc1.scale_line"], state["transformer.encoder.ssf_shift_enc_norm"]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"missing blocks\.1\.mlp\.fc1\.scale_out; missing norm\.ssf_shift$"):
        load_official_adapter(published_vit(), tmp_path / "a.pth")


def test_an_adapter_of_another_size_is_refused_and_the_model_stays_plain(adapter_file):
    model = small_vit(classes=7, depth=1)
    before = values_of(model)
    with pytest.raises(
        ValueError,
        match=r"12\.pth does not fit .*: unexpected blocks\.1\.attn\.proj\.scale_in; .* more",
    ):
        load_official_adapter(model, adapter_file)
    assert_plain(model, before)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"checkpoint .*none\.pth does not exist"):
        load_official_adapter(published_vit(), tmp_path / "none.pth")
    for content, words in (([torch.zeros(1)], "got list"), ({"a": torch.zeros(1)}, "no names of the published ViT")):
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(ValueError, match=words):
            load_official_adapter(published_vit(), tmp_path / "a.pth")


QUERY = "transformer.encoder.layer.0.attn.query."


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({QUERY + "scale_col": None}, r"blocks\.0\.attn\.qkv\.scale_in is incomplete: it has no query$"),
        ({QUERY + "mlp.bias": torch.zeros(5)}, r"blocks\.0\.attn\.qkv\.bias has q, k and v of shapes \[\[5\], \[48\]"),
        ({QUERY + "scale_col": torch.zeros(48)}, r"query\.scale_col: expected shape \[1, K\], got \[48\]"),
        ({QUERY + "scale_line": torch.zeros(48, 2)}, r"query\.scale_line: expected shape \[N, 1\], got \[48, 2\]"),
        ({QUERY + "shift_bias": torch.zeros(48, 1)}, r"query\.shift_bias: expected shape \[1, N\], got \[48, 1\]"),
        ({QUERY + "lora_A": torch.zeros(1)}, r"names that the published code does not have: .*query\.lora_A$"),
        ({QUERY + "weight": torch.zeros(48, 48)}, r"query\.weight: it is there twice, under two names"),
        ({"head.weight": "zeros"}, r"head\.weight: expected a tensor, got str"),
    ],
)
def test_what_does_not_belong_is_named(change, words):
    state = {name: value for name, value in (of_fixture("state/") | change).items() if value is not None}
    with pytest.raises(ValueError, match=words):
        convert_official(state)


def published_swin_names(model):
    """The state of one of our Swins under the names of the published code, written from its source."""
    state = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if parts[-1] == "shift":
            parts[-1], tensor = "shift_bias", tensor[None]
        parts[-1] = {"scale_in": "scale_col", "scale_out": "scale_line"}.get(parts[-1], parts[-1])
        if parts[-1] in ("ssf_scale", "ssf_shift"):
            kind = parts.pop()
            parts[-1] = f"{kind}_{'encode_norm' if parts == ['norm'] else parts[-1]}"
        if parts[:2] == ["head", "fc"]:
            del parts[1]
        if "downsample" in parts:  # at the end of the stage before
            parts[1] = str(int(parts[1]) - 1)
        state[".".join(parts)] = tensor
    state["layers.0.downsample.reduction.bias"] = torch.full((48,), 7.0)  # never used there
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
    return state


def test_a_published_swin_state_is_converted_with_patch_mergings_moved_a_stage():
    model = stir(apply_rlrr(small_swin()))
    state = published_swin_names(model)
    assert "layers.0.downsample.reduction.scale_col" in state
    assert "ssf_scale_encode_norm" in state
    converted = convert_official(state)
    assert converted.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, converted[name]) for name, tensor in model.state_dict().items())


def test_a_published_swin_adapter_loads_into_a_plain_swin(tmp_path):
    model = stir(apply_rlrr(small_swin()))
    state = adapter_only(published_swin_names(model))
    torch.save(state, tmp_path / "a.pth")
    other = load_official_adapter(small_swin(), tmp_path / "a.pth")
    assert torch.equal(other(X), model(X))
