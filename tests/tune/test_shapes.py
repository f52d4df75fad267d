"""Shapes from the command line and from models."""

from __future__ import annotations

import pytest

from rlrr_kernels.tune.shapes import Shape, of_model, parse, unique


def test_parse():
    assert parse("12608,768,3072") == Shape(12608, 768, 3072)
    assert parse("197, 2304, 768, 3") == Shape(197, 2304, 768, 3)


@pytest.mark.parametrize("text", ["", "1,2", "1,2,3,4,5", "0,768,768", "a,b,c", "1,2,3,-1", "1.5,2,3"])
def test_bad_shapes_are_shown(text):
    with pytest.raises(ValueError, match=r"^shape: expected M,N,K or M,N,K,groups.*got "):
        parse(text)


def test_groups_must_divide():
    with pytest.raises(ValueError, match="5 groups do not divide N = 768"):
        parse("10,768,768,5")


def test_a_vit():
    found = unique(of_model("vit_base_patch16_224", 64))
    name = "vit_base_patch16_224: blocks.*."
    assert found == [
        Shape(12608, 2304, 768, 3, name + "attn.qkv"),
        Shape(12608, 768, 768, 1, name + "attn.proj"),
        Shape(12608, 3072, 768, 1, name + "mlp.fc1"),
        Shape(12608, 768, 3072, 1, name + "mlp.fc2"),
    ]


def test_an_image_size_changes_the_tokens():
    assert of_model("vit_tiny_patch16_224", 2, img_size=384)[0].m == 2 * (24 * 24 + 1)


def test_swin_has_other_tokens_in_each_stage():
    found = unique(of_model("swin_tiny_patch4_window7_224", 8))
    tokens = {(shape.n, shape.k): shape.m for shape in found}
    assert tokens[288, 96] == 8 * 3136
    assert tokens[2304, 768] == 8 * 49
    assert tokens[192, 384] == 8 * 784  # the downsampling: four patches in one
    assert {shape.groups for shape in found} == {1}


def test_a_layer_of_both_models_comes_once():
    found = unique([Shape(1, 2, 3, 1, "a"), Shape(4, 5, 6), Shape(1, 2, 3, 1, "b"), Shape(1, 2, 3, 1, "a")])
    assert found == [Shape(1, 2, 3, 1, "a, b"), Shape(4, 5, 6)]


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("vit_nonsense", None, "model: 'vit_nonsense' cannot be built"),
        ("resnet18", None, "expected a ViT, EVA, BEiT or Swin"),
        ("vit_tiny_patch16_224", 7, r"model: 'vit_tiny_patch16_224' does not run on images of \[3, 7, 7\]"),
    ],
)
def test_models_that_are_refused_are_named(name, size, words):
    with pytest.raises((ValueError, TypeError), match=words):
        of_model(name, 1, size)
