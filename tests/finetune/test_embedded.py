"""The weights that are part of the package."""

import pytest
import timm
import torch
from safetensors import safe_open

from rlrr_kernels.finetune.data import FASHION_MNIST_FOLDER, read_fashion_mnist
from rlrr_kernels.finetune.embedded import EMBEDDED_MODEL, WEIGHTS


def test_timm_builds_it_by_name_with_its_weights():
    model = timm.create_model(EMBEDDED_MODEL, pretrained=True)
    with safe_open(WEIGHTS, framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    state = model.state_dict()
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], stored[name].float()) for name in stored)
    assert 0.9e6 < sum(p.numel() for p in model.parameters()) < 1.1e6
    assert timm.create_model(EMBEDDED_MODEL, pretrained=True, num_classes=3).head.out_features == 3


def test_its_positions_are_resized_to_another_image_size():
    model = timm.create_model(EMBEDDED_MODEL, pretrained=True, img_size=14)
    assert model.pos_embed.shape == (1, 1 + 2 * 2, 128)
    assert torch.equal(model.pos_embed[:, 0], timm.create_model(EMBEDDED_MODEL, pretrained=True).pos_embed[:, 0])


@pytest.mark.slow
def test_its_accuracy_is_what_the_card_says():
    if not FASHION_MNIST_FOLDER.is_dir():
        pytest.skip("needs the Debian package dataset-fashion-mnist")
    images, labels = read_fashion_mnist(FASHION_MNIST_FOLDER, "t10k")
    model = timm.create_model(EMBEDDED_MODEL, pretrained=True).eval()
    with torch.inference_mode():
        hits = sum(
            int((model(x.float() / 127.5 - 1).argmax(1) == y).sum())
            for x, y in zip(images.split(500), labels.split(500), strict=True)
        )
    with safe_open(WEIGHTS, framework="pt") as file:
        claimed = float(file.metadata()["test_accuracy"])
    assert hits / len(labels) == pytest.approx(claimed, abs=1e-3)
