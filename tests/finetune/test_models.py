"""The model of a run: weights from files, rates and sizes that reach it, and what is left trainable."""

import numpy as np
import pytest
import timm
import torch
from timm.layers import DropPath

from rlrr_kernels import count_parameters
from rlrr_kernels.finetune import Settings, prepare
from rlrr_kernels.finetune.models import build_model, load_backbone
from tests.checkpoint.test_npz import google_arrays
from tests.models import small_swin, stir


def test_an_unknown_model_is_named():
    with pytest.raises(ValueError, match="model: timm does not know 'vit_nonsense'"):
        prepare(Settings(model="vit_nonsense"))


def test_drop_path_is_stochastic_depth_that_grows_with_depth():
    model = build_model(Settings(drop_path=0.4), 10)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4])


def test_a_drop_path_of_0_is_honoured_where_timm_has_another_default():
    options = {"model": "swin_tiny_patch4_window7_224", "pretrained": False, "method": "linear"}
    assert not [m for m in build_model(Settings(**options), 3).modules() if isinstance(m, DropPath)]


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        ({}, 21_642),
        ({"norm_affine": False}, 21_642 - (2 * 5 + 1) * 2 * 128),
        ({"patch_affine": False}, 21_642 - 2 * 128),
        ({"norm_affine": False, "patch_affine": False}, 18_570),
    ],
)
def test_affines_can_be_left_out(changes, trained):
    assert count_parameters(build_model(Settings(**changes), 10))[0] == trained


def test_frozen_weights_are_kept_in_the_precision_asked_for():
    model = build_model(Settings(frozen_dtype="bf16"), 10)
    assert model.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert model.blocks[0].mlp.fc1.scale_out.dtype == torch.float32
    assert build_model(Settings(), 10).blocks[0].mlp.fc1.weight.dtype == torch.float32


def test_the_image_size_reaches_the_model_and_the_images():
    ready = prepare(Settings(img_size=42, pretrained=False, device="cpu"))
    assert ready.model.patch_embed.img_size == (42, 42)
    image, _ = ready.splits.train[0]
    assert image.shape == (1, 42, 42)
    assert ready.model(image[None]).shape == (1, 10)


def test_a_model_without_an_image_size_says_so():
    with pytest.raises(ValueError, match="img_size: 'resnet10t' takes none, got 64"):
        build_model(Settings(model="resnet10t", pretrained=False, method="linear", img_size=64), 3)


def test_an_npz_goes_to_the_reader_of_published_vit_files(tmp_path):
    (tmp_path / "vit.npz").write_bytes(b"no such archive")
    with pytest.raises(ValueError, match=r"vit.npz"):
        build_model(Settings(checkpoint=tmp_path / "vit.npz"), 10)


def test_a_published_npz_replaces_the_pretrained_weights_but_not_the_head(tmp_path):
    donor = stir(timm.create_model(Settings.model, num_classes=10))
    np.savez(tmp_path / "vit.npz", **google_arrays(donor))
    model = build_model(Settings(checkpoint=tmp_path / "vit.npz", method="full"), 10)
    assert torch.equal(model.blocks[0].attn.qkv.weight, donor.blocks[0].attn.qkv.weight)
    assert torch.equal(model.patch_embed.proj.weight, donor.patch_embed.proj.weight)
    assert not torch.equal(model.head.weight, donor.head.weight)
    with pytest.raises(ValueError, match=r"checkpoint: .*vit.npz: model: expected a timm VisionTransformer, got Swin"):
        load_backbone(small_swin(), tmp_path / "vit.npz")


def test_a_checkpoint_file_replaces_the_pretrained_weights(tmp_path):
    from safetensors.torch import save_file

    donor = prepare(Settings(out=tmp_path / "x", method="full")).model
    state = {n: p.detach() + 0.125 for n, p in donor.state_dict().items()}
    state["head.weight"], state["head.bias"] = torch.zeros(7, 128), torch.zeros(7)  # another head
    save_file(state, tmp_path / "donor weights.safetensors")
    model = prepare(Settings(checkpoint=tmp_path / "donor weights.safetensors", method="full")).model
    assert torch.equal(model.blocks[0].attn.qkv.weight, state["blocks.0.attn.qkv.weight"])
    assert model.head.weight.shape == (10, 128)


def test_a_checkpoint_that_does_not_fit_is_refused_not_half_loaded(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "c.safetensors"
    state = {n: p.detach().clone() for n, p in prepare(Settings(method="full")).model.state_dict().items()}
    save_file({f"model.{n}": p for n, p in state.items()}, path)
    with pytest.raises(ValueError, match=r"checkpoint: .* does not fit VisionTransformer: missing cls_token"):
        prepare(Settings(checkpoint=path))
    save_file({"nonsense": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"checkpoint: .*(unexpected nonsense|does not fit|cannot be read)"):
        prepare(Settings(checkpoint=path))
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match=r"checkpoint: .* cannot be read"):
        prepare(Settings(checkpoint=path))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"cls_token": Payload()}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=r"checkpoint: .* cannot be read"):
        prepare(Settings(checkpoint=tmp_path / "c.pth"))
    assert not (tmp_path / "executed").exists()


def test_batch_norm_stays_frozen_or_is_refused():
    small = {"model": "resnet10t", "pretrained": False}
    model = build_model(Settings(**small, method="linear"), 3).train()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
    with pytest.raises(ValueError, match=r"has batch norm that would train with method='full': conv1\.1;"):
        prepare(Settings(**small, method="full"))
