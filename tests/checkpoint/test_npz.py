"""Google's .npz weights: the function they stand for, and what is refused before anything is copied."""

import re

import numpy as np
import pytest
import torch
from timm.layers import resample_abs_pos_embed

from rlrr_kernels import apply_rlrr, merge
from rlrr_kernels.checkpoint import load_npz_backbone
from tests.small_models import X, small_swin, small_vit, stir


def google_arrays(model):
    """A ViT's weights under Google's names and in its layouts: kernels [in, out], heads apart."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    heads, dim = model.blocks[0].attn.num_heads, model.embed_dim
    arrays = {
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    for i in range(len(model.blocks)):
        ours, theirs = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        weights, biases = (np.split(state[f"{ours}.attn.qkv.{kind}"], 3) for kind in ("weight", "bias"))
        for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            arrays[f"{attention}/{part}/kernel"] = weight.T.reshape(dim, heads, -1)
            arrays[f"{attention}/{part}/bias"] = bias.reshape(heads, -1)
        arrays[f"{attention}/out/kernel"] = state[f"{ours}.attn.proj.weight"].T.reshape(heads, -1, dim)
        arrays[f"{attention}/out/bias"] = state[f"{ours}.attn.proj.bias"]
        for j in (0, 1):
            arrays[f"{theirs}/MlpBlock_3/Dense_{j}/kernel"] = state[f"{ours}.mlp.fc{j + 1}.weight"].T
            arrays[f"{theirs}/MlpBlock_3/Dense_{j}/bias"] = state[f"{ours}.mlp.fc{j + 1}.bias"]
            arrays[f"{theirs}/LayerNorm_{2 * j}/scale"] = state[f"{ours}.norm{j + 1}.weight"]
            arrays[f"{theirs}/LayerNorm_{2 * j}/bias"] = state[f"{ours}.norm{j + 1}.bias"]
    return arrays


def source(**options):
    """Where the weights come from: every parameter random, biases and norms too."""
    return stir(small_vit(**options))


@pytest.mark.parametrize("prefix", ["", "opt/target/"])
def test_logits_are_those_of_the_model_that_was_written(tmp_path, prefix):
    model = source()
    np.savez(tmp_path / "a b.npz", **{prefix + name: array for name, array in google_arrays(model).items()})
    other = small_vit()
    assert not torch.equal(other(X), model(X))
    assert load_npz_backbone(other, tmp_path / "a b.npz") is other
    assert torch.equal(other(X), model(X))


def test_a_prepared_model_gets_the_frozen_weights_and_keeps_its_adapter(tmp_path):
    np.savez(tmp_path / "a.npz", **google_arrays(source()))
    adapted = stir(apply_rlrr(small_vit()))
    scale = adapted.blocks[1].attn.qkv.scale_in.clone()
    load_npz_backbone(adapted, tmp_path / "a.npz")
    assert torch.equal(adapted.blocks[1].attn.qkv.weight, source().blocks[1].attn.qkv.weight)
    assert torch.equal(adapted.norm.weight, source().norm.weight)
    assert torch.equal(adapted.blocks[1].attn.qkv.scale_in, scale)


def test_a_head_of_other_classes_is_left_alone_and_positions_are_resized(tmp_path):
    np.savez(tmp_path / "a.npz", **google_arrays(source()))
    model = small_vit(classes=3, img_size=48)
    head = model.head.weight.clone()
    load_npz_backbone(model, tmp_path / "a.npz")
    assert torch.equal(model.head.weight, head)
    expected = resample_abs_pos_embed(source().pos_embed, [6, 6], interpolation="bilinear", antialias=False)
    assert torch.equal(model.pos_embed, expected)
    assert torch.equal(model.norm.bias, source().norm.bias)


def test_colours_are_summed_for_a_grey_model_as_timm_does(tmp_path):
    np.savez(tmp_path / "a.npz", **google_arrays(source()))
    model = load_npz_backbone(small_vit(in_chans=1), tmp_path / "a.npz")
    torch.testing.assert_close(model.patch_embed.proj.weight, source().patch_embed.proj.weight.sum(1, keepdim=True))


BLOCK = "Transformer/encoderblock_1/"
QUERY = BLOCK + "MultiHeadDotProductAttention_1/query/kernel"
POSITIONS = "Transformer/posembed_input/pos_embedding"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({BLOCK + "MlpBlock_3/Dense_1/bias": None}, r"missing Transformer/encoderblock_1/MlpBlock_3/Dense_1/bias$"),
        ({POSITIONS: None}, "missing Transformer/posembed_input/pos_embedding$"),
        # as many numbers, but of other heads
        ({QUERY: np.zeros((48, 4, 12), "f4")}, r"query/kernel of shape \[48, 4, 12\], expected \[48, 3, 16\]"),
        ({"cls": np.zeros((1, 1, 48), "i4")}, "cls of int32, expected floating point numbers"),
        ({POSITIONS: np.zeros((1, 12, 48), "f4")}, r"pos_embedding of shape \[1, 12, 48\], expected \[1, 17, 48\]"),
        (
            {"embedding/kernel": np.zeros((16, 16, 3, 48), "f4")},
            r"shape \[16, 16, 3, 48\], expected \[8, 8, 3, 48\]",
        ),
        ({"head/kernel": np.zeros((9, 5), "f4")}, r"head/kernel of shape \[9, 5\], expected \[48, 5\]"),
        ({"cls": np.array([{}], dtype=object)}, "allow_pickle=False"),
        ({"pos_embedding": np.zeros((1, 17, 48), "f4")}, "pos_embedding belongs to another layout"),
    ],
)
def test_arrays_that_do_not_fit_are_named_and_nothing_is_copied(tmp_path, change, words):
    arrays = {name: array for name, array in (google_arrays(source()) | change).items() if array is not None}
    np.savez(tmp_path / "a.npz", **arrays)
    model = small_vit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=words) as caught:
        load_npz_backbone(model, tmp_path / "a.npz")
    assert re.search(r"a\.npz (is damaged or no \.npz archive|does not fit the model): ", str(caught.value))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_models_that_the_format_does_not_hold_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", **google_arrays(source()))
    with pytest.raises(TypeError, match="expected a timm VisionTransformer, got SwinTransformer"):
        load_npz_backbone(small_swin(), tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"no array for its blocks\.0\.ls1\.gamma"):
        load_npz_backbone(small_vit(init_values=1e-5), tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"it has no blocks\.0\.attn\.qkv\.bias"):
        load_npz_backbone(small_vit(qkv_bias=False), tmp_path / "a.npz")
    with pytest.raises(ValueError, match="on the meta device"):
        load_npz_backbone(small_vit().to("meta"), tmp_path / "a.npz")
    with pytest.raises(ValueError, match="it is merged"):
        load_npz_backbone(merge(apply_rlrr(small_vit())), tmp_path / "a.npz")
    with pytest.raises(FileNotFoundError, match=r"none\.npz does not exist"):
        load_npz_backbone(small_vit(), tmp_path / "none.npz")
