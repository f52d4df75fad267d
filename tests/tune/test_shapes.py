"""Shapes from the command line and from models, and how the launcher would classify them."""

from __future__ import annotations

import pytest
import torch

from rlrr_kernels.backends.triton import launch, tuned
from rlrr_kernels.backends.triton.tuned_file import Layer
from rlrr_kernels.tune.problem import KERNELS, copies_of, make_tensors, run, task_of, traffic
from rlrr_kernels.tune.shapes import Shape, of_model, parse, unique
from tests.tune.entries import DEVICE


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
def test_models_that_do_not_do_are_named(name, size, words):
    with pytest.raises((ValueError, TypeError), match=words):
        of_model(name, 1, size)


def test_sets_of_tensors_outgrow_the_second_cache():
    small = task_of("forward", Shape(197, 768, 768), torch.bfloat16, torch.bfloat16, DEVICE)
    assert traffic(small) == 2 * (197 * 768 * 2 + 768 * 768)
    copies = copies_of(small, 50 * 2**20)
    assert copies * traffic(small) >= 2 * 50 * 2**20
    assert (copies - 1) * traffic(small) < 2 * 50 * 2**20
    assert copies_of(small, 2**40) == 64
    assert copies_of(small, 0) == 2


def test_sets_of_tensors_differ_and_hold_what_the_kernel_reads():
    task = task_of("grad_input", Shape(5, 6, 7, 3), torch.bfloat16, torch.float32, DEVICE)
    first, second = make_tensors(task, 2, torch.device("cpu"))
    assert (first.dy.shape, first.weight.shape, first.x.shape) == ((5, 6), (6, 7), (0, 7))
    assert (first.dy.dtype, first.weight.dtype, first.bias.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert not torch.equal(first.dy, second.dy)
    assert not torch.equal(first.weight, second.weight)
    assert first.scale_in.shape == (3, 1, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [Shape(40, 48, 64), Shape(40, 192, 64, 3), Shape(40, 96, 64, 3), Shape(40, 24, 40), Shape(40, 30, 35)],
    ids=str,
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_key_is_the_one_that_the_launcher_looks_up(kernel, shape, dtype, monkeypatch, triton_device):
    asked = []
    monkeypatch.setattr(tuned, "find", lambda *key: asked.append(key))
    device = launch.device_of(torch.empty(1, device=triton_device))
    task = task_of(kernel, shape, dtype, dtype, device)
    t = make_tensors(task, 1, torch.device(triton_device))[0]
    if kernel == "forward":
        launch.forward(t.x, t.weight, t.scale_out, t.scale_in, t.bias, t.shift)
    elif kernel == "grad_input":
        launch.grad_input(t.dy, t.weight, t.scale_out, t.scale_in)
    else:
        launch.grad_scales(t.dy, t.x, t.weight, t.scale_out, t.scale_in, True)
    ((name, m, *rest, _),) = asked
    assert (Layer(name, *rest), m) == (task.layer, task.m)
    assert run(task, t, task.choices(device, 0)[0])[0].isfinite().all()
