"""Images set aside to validate on."""

import pytest

from rlrr_kernels.finetune.data.parts import set_aside


def test_a_fifth_is_set_aside_by_the_seed():
    kept, aside = set_aside([0] * 50, 3)
    assert sorted(kept + aside) == list(range(50))
    assert len(aside) == 10
    assert set_aside([0] * 50, 3) == (kept, aside)
    assert set(set_aside([0] * 50, 4)[1]) != set(aside)
    assert [len(part) for part in set_aside([0, 0], 0)] == [1, 1]


@pytest.mark.parametrize("sizes", [(100, 100, 100), (5, 25, 10), (3, 7, 1, 1, 12, 2), (1,) * 90 + (2,) * 5])
def test_classes_are_set_aside_in_proportion(sizes):
    """A class of one image is no part of it: nothing would be left to train on."""
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    aside = [labels[i] for i in set_aside(labels, 0)[1]]
    assert len(aside) == round(sum(size for size in sizes if size > 1) / 5)
    for label, size in enumerate(sizes):
        assert abs(aside.count(label) - size / 5) < 1
        assert size > 1 or label not in aside


@pytest.mark.parametrize("seed", range(6))
def test_each_class_keeps_an_image_to_train_on(seed):
    """Drawn without regard to classes, one or two of twenty lose both of theirs by three of these seeds."""
    labels = [label for label in range(20) for _ in range(2)] + [20]
    kept, aside = set_aside(labels, seed)
    assert {labels[i] for i in kept} == set(range(21))
    assert len(aside) == 8


def test_of_classes_that_give_an_image_or_none_the_seed_decides_which():
    labels = [label for label in range(50) for _ in range(2)]
    assert len({tuple(sorted(labels[i] for i in set_aside(labels, seed)[1])) for seed in range(10)}) == 10


@pytest.mark.parametrize("labels", [[0], [0, 1, 2], []])
def test_without_two_images_of_a_class_there_is_nothing_to_set_aside(labels):
    error = f"at least 2 training images, .* or a validation split; got {len(labels)} images of {len(labels)} classes"
    with pytest.raises(ValueError, match=error):
        set_aside(labels, 0)
