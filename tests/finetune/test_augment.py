"""Mixup and cutmix: timm's, on any batch size, with draws keyed to the step."""

import numpy as np
import pytest
import torch

from rlrr_kernels.finetune import Settings
from rlrr_kernels.finetune.batches import Mixing


def batch(count):
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 1, 6, 6, generator=generator), torch.arange(count) % 5


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_mixup_is_a_convex_sum_of_two_images_and_of_their_labels(count):
    images, labels = batch(count)
    before = images.clone()
    mixed, targets = Mixing(Settings(mixup=1.0, seed=1), 5)(images, labels, 7, 0)
    assert torch.equal(images, before)
    # with an odd number the first image is its own partner, and the others are paired in reverse
    partner = [0, *range(count - 1, 0, -1)] if count % 2 else list(range(count - 1, -1, -1))
    one_hot = torch.nn.functional.one_hot(labels, 5).float()
    moving = next((i for i in range(count) if labels[i] != labels[partner[i]]), None)
    share = 1.0 if moving is None else targets[moving, labels[moving]].item()
    assert moving is None or 0 < share < 1
    torch.testing.assert_close(mixed, share * images + (1 - share) * images[partner])
    torch.testing.assert_close(targets, share * one_hot + (1 - share) * one_hot[partner])


def test_cutmix_takes_a_box_and_labels_by_its_area():
    images, labels = batch(4)
    for step in range(5):
        mixed, targets = Mixing(Settings(cutmix=1.0), 5)(images, labels, step, 0)
        own = (mixed[0] == images[0]).float().mean().item()
        assert torch.equal(torch.where(mixed == images, images, images.flip(0)), mixed)
        assert targets[0, labels[0]].item() == pytest.approx(own)


def test_smoothing_is_part_of_the_mixed_targets():
    images, labels = batch(4)
    _, targets = Mixing(Settings(mixup=1.0, label_smoothing=0.2), 5)(images, labels, 0, 0)
    assert targets.min().item() == pytest.approx(0.04)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))


def test_draws_depend_on_seed_and_step_alone_and_move_nobody_elses():
    images, labels = batch(6)
    np.random.seed(5)  # noqa: NPY002
    expected = np.random.rand()  # noqa: NPY002
    np.random.seed(5)  # noqa: NPY002
    mixing = Mixing(Settings(mixup=1.0, cutmix=1.0), 5)
    first = mixing(images, labels, 3, 0)[0]
    assert np.random.rand() == expected  # noqa: NPY002
    assert torch.equal(mixing(images, labels, 3, 0)[0], first)
    assert not torch.equal(mixing(images, labels, 4, 0)[0], first)
    assert not torch.equal(mixing(images, labels, 3, 1)[0], first)
    assert not torch.equal(Mixing(Settings(mixup=1.0, cutmix=1.0, seed=1), 5)(images, labels, 3, 0)[0], first)


def test_without_either_a_batch_stays_as_it_is():
    images, labels = batch(3)
    mixed, targets = Mixing(Settings(label_smoothing=0.1), 5)(images, labels, 0, 0)
    assert mixed is images
    assert targets is labels
