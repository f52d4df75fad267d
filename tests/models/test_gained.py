"""Merged layers that had no bias: what transformers saves it loads again whole, or the merge warned."""

import warnings

import pytest
import torch
from torch import nn

from rlrr_kernels import FusedRLRRLinear, apply_rlrr, merge, merge_and_unload
from tests.small_models import X, small_swin, stir

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IMAGES = {"image_size": 32, "patch_size": 8}
WORDS = {"vocab_size": 9, "num_key_value_heads": 2}
TOKENS = torch.arange(6)[None]

#: (model, its config's fields, what is adapted, what is to be said or None)
CASES = {
    "ViT with biases": ("ViT", IMAGES, "layers.*", None),
    "ViT's switch": ("ViT", IMAGES | {"qkv_bias": False}, "layers.*", None),
    "two switches of Llama": ("Llama", WORDS, "layers.*", None),
    "Llama's switch that governs others too": ("Llama", WORDS, "layers.*.q_proj", None),
    "no switch": ("Qwen2", WORDS, "layers.*", "layers.0.self_attn.o_proj.bias and 7 more tensors"),
    "one that has its bias": ("Qwen2", WORDS, "layers.*.v_proj", None),
}


def tuned(model: nn.Module, targets: str) -> nn.Module:
    return stir(apply_rlrr(model.eval(), target_modules=[targets], train_head=False))


@pytest.mark.parametrize(("kind", "options", "targets", "words"), CASES.values(), ids=CASES.keys())
def test_a_saved_merged_model_loads_whole_or_the_merge_warned(kind, options, targets, words, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL, **options)
    model = tuned(getattr(transformers, f"{kind}Model")(config), targets)
    x = X if kind == "ViT" else TOKENS
    expected = model(x)[0].detach()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plain = merge_and_unload(merge(model))
    assert torch.allclose(plain(x)[0], expected, atol=1e-4)
    plain.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path)(x)[0]
    assert torch.allclose(again, expected, atol=1e-4) is (words is None)
    assert [f"merging gave {words} to layers that had none" in str(each.message) for each in caught] == [True] * (
        words is not None
    )


def test_every_library_is_told_and_only_where_something_is_lost():
    model = apply_rlrr(small_swin())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_and_unload(apply_rlrr(small_swin()))  # f is 0
    with pytest.warns(UserWarning, match=r"merging gave layers.1.downsample.reduction.bias to .*SwinTransformer"):
        merge_and_unload(stir(model))
    bare = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, elementwise_affine=False))
    apply_rlrr(bare, target_modules=["0"], norm_affine=True)
    with pytest.warns(UserWarning, match=r"merging gave 1.weight and 1 more tensors to"):
        merge_and_unload(bare)


def test_peft_merges_with_the_same_word():
    peft = pytest.importorskip("peft")
    layer = FusedRLRRLinear(4, 4, bias=False)
    nn.init.ones_(layer.shift)
    model = peft.get_peft_model(nn.Sequential(layer), peft.LoraConfig(target_modules=["0"]))
    with pytest.warns(UserWarning, match="merging gives a bias that holds f to layers that had none"):
        model.merge_adapter()
