"""Which images a step sees, in one process and in several."""

from itertools import chain

import pytest

from rlrr_kernels.finetune.batches import Batches, keyed_seed
from rlrr_kernels.finetune.distributed import World


def steps(batches):
    """The images that count, a list a step."""
    found, current = [], []
    for batch in batches.plan():
        current += batch.indices[: batch.counts]
        if batch.last:
            found.append(current)
            current = []
    assert not current
    return found


def together(images, batch_size, processes, accumulation):
    """Of all processes, a set a step."""
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
