"""The images of each step, in one process and in several, and how they are mixed."""

from itertools import chain

import numpy as np
import pytest
import torch

from rlrr_kernels.finetune import Settings
from rlrr_kernels.finetune.batches import Batches, Mixing, keyed_seed
from rlrr_kernels.finetune.distributed import World


def steps(batches):
    """The images that count, as a list for each step."""
    found, current = [], []
    for batch in batches.plan():
        current += batch.indices[: batch.counts]
        if batch.last:
            found.append(current)
            current = []
    assert not current
    return found


def together(images, batch_size, processes, accumulation):
    """The images of all processes, sorted, for each step."""
    every = [
        steps(Batches(images, batch_size, World(rank, processes), accumulation=accumulation, seed=3))
        for rank in range(processes)
    ]
    return [sorted(chain(*parts)) for parts in zip(*every, strict=True)]


@pytest.mark.parametrize("images", [1, 31, 32, 33, 89, 96])
@pytest.mark.parametrize(("batch_size", "processes", "accumulation"), [(16, 2, 1), (8, 1, 4), (4, 2, 4), (8, 4, 1)])
def test_a_step_sees_the_same_images_however_it_is_cut(images, batch_size, processes, accumulation):
    whole = together(images, 32, 1, 1)
    assert together(images, batch_size, processes, accumulation) == whole
    assert sorted(chain(*whole)) == list(range(images))


@pytest.mark.parametrize("images", [33, 65, 70])
def test_processes_keep_step_and_know_how_many_images_a_step_has(images):
    plans = [Batches(images, 8, World(rank, 3), accumulation=2, seed=0).plan() for rank in range(3)]
    for parts in zip(*plans, strict=True):
        assert len({(p.step_images, p.last) for p in parts}) == 1
        assert all(len(p.indices) == max(1, p.counts) for p in parts)
        assert max(p.counts for p in parts) - min(p.counts for p in parts) <= 1
    per_step = [p.step_images for p in plans[0] if p.last]
    assert sum(per_step) == images
    assert per_step == [len(step) for step in together(images, 8, 3, 2)]


def test_lengths_agree_with_the_plan():
    for images in (1, 15, 16, 17, 63, 64, 65):
        batches = Batches(images, 8, World(), accumulation=2, seed=0)
        assert len(batches) == len(batches.plan()) == len(list(batches))
        assert batches.steps == sum(batch.last for batch in batches.plan())


def test_each_epoch_and_seed_has_its_own_order_and_hands_on_the_epoch():
    def order(seed, epoch):
        batches = Batches(40, 8, World(), seed=seed)
        batches.epoch = epoch
        return [pair for batch in batches for pair in batch]

    assert order(0, 0) == order(0, 0)
    assert {epoch for epoch, _ in order(0, 5)} == {5}
    orders = [[index for _, index in order(*key)] for key in ((0, 0), (0, 1), (1, 0))]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_without_a_seed_images_come_once_and_in_order():
    assert list(Batches(5, 2, World())) == [[0, 1], [2, 3], [4]]


def test_seeds_differ_by_purpose_and_by_every_part_of_the_key():
    keys = [("order", 0), ("order", 0, 0), ("order", 0, 1), ("order", 1, 0), ("mixing", 0, 0)]
    assert len({keyed_seed(*key) for key in keys if key != ("order", 0, 0)}) == 4
    assert keyed_seed("order", 0, 1) == keyed_seed("order", 0, 1)


def test_no_images_are_an_error():
    with pytest.raises(ValueError, match="images: expected at least 1, got 0"):
        Batches(0, 8, World())


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
