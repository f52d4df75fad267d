"""Heads of timm's, torchvision's and transformers' models: found, trained, saved, and not matched by patterns."""

import copy
import json

import pytest
import timm
import torch
from torch import nn
from torchvision.models import ResNet, SwinTransformer, VisionTransformer
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.resnet import BasicBlock

from rlrr_kernels import FusedRLRRLinear, SSFLayerNorm, apply_rlrr, disable_adapter, load_adapter, save_adapter
from rlrr_kernels.checkpoint.trained import trained_parameters
from rlrr_kernels.models.modules import adapters, head
from tests.small_models import X, small_vit, stir


class Wrapped(nn.Module):
    """A wrapper that returns the logits of a model of transformers."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).logits


def of_transformers(family, kind, **options):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = getattr(transformers, f"{family}Config")(**sizes, image_size=32, patch_size=16, **options)
    return getattr(transformers, f"{family}{kind}")(config)


def tv_vit():
    return VisionTransformer(32, 16, 1, 2, 24, 32, num_classes=3)


def tv_swin():
    return SwinTransformer([4, 4], 24, [1, 1], [2, 2], [4, 4], num_classes=3)


def tv_convnext():
    return ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=3)


#: Model -> its maker, and the modules of its head whose parameters train.
MODELS = {
    "transformers ViT": (
        lambda: Wrapped(of_transformers("ViT", "ForImageClassification", num_labels=3)),
        {"model.classifier"},
    ),
    "transformers DeiT with a teacher": (
        lambda: Wrapped(of_transformers("DeiT", "ForImageClassificationWithTeacher", num_labels=3)),
        {"model.cls_classifier", "model.distillation_classifier"},
    ),
    "torchvision ViT": (tv_vit, {"heads.head"}),
    "torchvision Swin": (tv_swin, {"head"}),
    "torchvision ConvNeXt": (tv_convnext, {"classifier.0", "classifier.2"}),
    "timm": (small_vit, {"head"}),
    "timm DeiT with a teacher": (
        lambda: timm.create_model("deit_tiny_distilled_patch16_224", depth=1, num_classes=3, img_size=32),
        {"head", "head_dist"},
    ),
    "a model after a normalisation": (lambda: nn.Sequential(nn.Flatten(0, 0), small_vit()), {"1.head"}),
}


def make(name):
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def plain_trained(model):
    """Names of modules with trained parameters that are no adapters."""
    adapted = {name for name, _ in adapters(model)}
    owners = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    return owners - adapted


@pytest.mark.parametrize("name", MODELS)
def test_the_head_trains_and_is_saved_and_no_pattern_reaches_into_it(name, tmp_path):
    plain = make(name)
    base = plain(X)
    model = apply_rlrr(copy.deepcopy(plain), target_modules=["*"], init="identity")
    expected = MODELS[name][1]
    assert plain_trained(model) == expected
    assert not any(adapter in expected for adapter, _ in adapters(model))
    model(X).logsumexp(1).sum().backward()
    assert all(p.grad.any() for p in head(model).parameters())
    stir(model)
    tuned = model(X)
    assert not torch.allclose(tuned, base, atol=1e-3)
    with disable_adapter(model):
        assert torch.equal(model(X), base)
    assert torch.equal(model(X), tuned)
    save_adapter(model, tmp_path / "adapter")
    assert torch.equal(load_adapter(plain, tmp_path / "adapter")(X), tuned)
    assert plain_trained(plain) == expected


def test_backbones_have_no_head_to_train():
    for model in (
        of_transformers("ViT", "Model"),
        timm.create_model("convnext_tiny", num_classes=0, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)),
        small_vit(classes=0),
    ):
        assert plain_trained(apply_rlrr(model, target_modules=["*"])) == set()


class TaggerForTokenClassification(nn.Module):
    """Looks like a model of transformers by its name and config, but its head has an unknown name."""

    def __init__(self, labels):
        super().__init__()
        self.config = type("Config", (), {"num_labels": labels})()
        self.body, self.last = nn.Linear(4, 4), nn.Linear(4, 4)


def headless():
    model = tv_vit()
    model.heads = nn.Identity()
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TaggerForTokenClassification(5), "TaggerForTokenClassification has 5 classes"),
        (lambda: nn.Sequential(TaggerForTokenClassification(5)), "has 5 classes"),
        (headless, "VisionTransformer has 3 classes"),
    ],
)
def test_a_model_with_classes_and_no_head_is_refused(make, words):
    model = make()
    with pytest.raises(ValueError, match=rf"train_head: .*{words}, but no head was found.*train_head=\[.*train_head=F"):
        apply_rlrr(model, target_modules=["*"])
    assert all(p.requires_grad for p in model.parameters())
    assert plain_trained(apply_rlrr(model, target_modules=["*"], train_head=False)) == set()


def test_the_head_can_be_named(tmp_path):
    """The named head replaces the one that would be found: a part of it, or another module."""
    model = apply_rlrr(TaggerForTokenClassification(5), target_modules=["*"], train_head="last")
    assert (plain_trained(model), type(model.body)) == ({"last"}, FusedRLRRLinear)
    plain = tv_convnext().eval()
    named = "classifier.[12]", "features.3.0.block.5"
    model = apply_rlrr(copy.deepcopy(plain), target_modules=["*"], train_head=named)
    assert plain_trained(model) == {"classifier.2", "features.3.0.block.5"}
    save_adapter(stir(model), tmp_path / "adapter")
    assert torch.equal(load_adapter(plain, tmp_path / "adapter")(X), model(X))
    assert plain.rlrr_config.train_head == named
    for wrong in ("clasifier", "avgpool"):  # the second has no parameters
        with pytest.raises(ValueError, match=f"train_head: '{wrong}' matches no module with parameters of ConvNeXt"):
            apply_rlrr(tv_convnext(), target_modules=["*"], train_head=["classifier", wrong])


def test_full_names_reach_into_the_head():
    plain = apply_rlrr(small_vit(), target_modules=["*"], train_head=False)
    assert isinstance(plain.head, nn.Linear)
    assert not isinstance(plain.head, FusedRLRRLinear)
    model = tv_convnext().eval()
    base = model(X)
    stir(apply_rlrr(model, target_modules=["features.*", "classifier.2"]))
    assert isinstance(model.classifier[2], FusedRLRRLinear)
    assert plain_trained(model) == {"classifier.0"}
    with disable_adapter(model):
        assert torch.equal(model(X), base)
    apply_rlrr(small_vit(), target_modules=["*"], exclude_modules=["head"])  # the head is left out anyway; no error
    resnet = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3)
    with pytest.raises(ValueError, match=r"leave no nn\.Linear of ResNet .*head are adapted only where .* in full"):
        apply_rlrr(resnet, target_modules=["*"])
    assert isinstance(apply_rlrr(resnet, target_modules=["fc"]).fc, FusedRLRRLinear)


def test_affines_do_not_reach_into_the_head():
    outside = ["features.0.1", "features.2.0"]
    model = apply_rlrr(tv_convnext(), target_modules=["*"], norm_affine=True, exclude_modules=outside)
    assert {n for n, m in model.named_modules() if isinstance(m, SSFLayerNorm)} == {
        "features.1.0.block.2",
        "features.3.0.block.2",
    }
    assert model.classifier[0].weight.requires_grad


def test_adapters_from_when_patterns_reached_into_heads_load(tmp_path):
    """Adapters with a rescaled head, and with a head that stayed frozen although ``train_head`` is true."""
    for name, options in (
        ("timm", {"target_modules": ["*", "head"]}),
        ("torchvision ViT", {"target_modules": ["*"], "train_head": False}),
    ):
        model = stir(apply_rlrr(make(name), **options))
        save_adapter(model, tmp_path / name)
        file = tmp_path / name / "adapter_config.json"
        values = json.loads(file.read_text())
        values["rlrr"] |= {"target_modules": ["*"], "train_head": True}
        file.write_text(json.dumps(values))
        loaded = load_adapter(make(name), tmp_path / name)
        assert torch.equal(loaded(X), model(X))
        assert trained_parameters(loaded).keys() == trained_parameters(model).keys()
