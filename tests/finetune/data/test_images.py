"""A split seen through a transform: draws keyed by seed, epoch and index, and errors that name the image."""

import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Subset

from rlrr_kernels.finetune.data import ImageSet, Transform
from rlrr_kernels.finetune.data.parts import Entry, Listed

from .folders import write_image


class Numbers:
    """Item i is a blank image of label i modulo 3."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return Image.new("L", (2, 2)), index % 3


def blank(image):
    return torch.zeros(1, 2, 2, dtype=torch.uint8)


noise = Transform(blank, lambda pixels: torch.rand(4))


def draws(images, keys):
    return torch.stack([images[key][0] for key in keys])


def test_draws_depend_on_seed_epoch_and_index_and_on_nothing_else():
    images = ImageSet(Numbers(), noise, 3, seed=7)
    keys = [(epoch, index) for epoch in range(3) for index in range(24)]
    first = draws(images, keys)
    torch.manual_seed(123)
    again = draws(images, keys[::-1]).flip(0)
    assert torch.equal(first, again)
    assert len({tuple(row.tolist()) for row in first}) == len(keys)
    other = draws(ImageSet(Numbers(), noise, 3, seed=8), keys)
    assert not (first == other).all(dim=1).any()
    # seed 7, epoch 1, index 2 is another key than seed 7, epoch 2, index 1
    assert not torch.equal(images[1, 2][0], images[2, 1][0])


def test_draws_are_evenly_spread_over_neighbouring_keys():
    images = ImageSet(Numbers(), noise, 3)
    values = draws(images, [(epoch, index) for epoch in range(20) for index in range(24)])[:, 0]
    assert abs(values.mean().item() - 0.5) < 0.05
    assert abs(values.std().item() - 12**-0.5) < 0.03


def test_a_plain_index_is_epoch_0():
    images = ImageSet(Numbers(), noise, 3)
    assert torch.equal(images[5][0], images[0, 5][0])


def test_the_process_draws_on_as_if_no_image_had_been_loaded():
    images = ImageSet(Numbers(), noise, 3)
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    got = [torch.rand(1)]
    images[0]
    got.append(torch.rand(1))
    assert torch.equal(torch.cat(got), expected)

    def fail(pixels):
        torch.rand(1)
        raise RuntimeError("no")

    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="no"):
        ImageSet(Numbers(), Transform(blank, fail), 3)[0]
    assert torch.equal(torch.rand(2), expected)


def test_a_negative_seed_is_a_seed():
    images = ImageSet(Numbers(), noise, 3, seed=-1)
    assert torch.equal(images[0][0], images[0][0])
    assert not torch.equal(images[0][0], ImageSet(Numbers(), noise, 3, seed=1)[0][0])


@pytest.mark.parametrize("key", [(0, 0, 0), (1, 2, 3)])
def test_fixing_the_draws_costs_less_than_50_microseconds(key):
    """Of processor time, the least of many, so that other programs do not count."""
    from rlrr_kernels.finetune.data.images import random_draws

    best = float("inf")
    for _ in range(50):
        start = time.thread_time()
        for _ in range(20):
            with random_draws(*key):
                pass
        best = min(best, (time.thread_time() - start) / 20)
    assert best < 50e-6


def test_labels_out_of_range_are_an_error():
    images = ImageSet(Numbers(), noise, 2)
    assert images[1][1] == 1
    with pytest.raises(ValueError, match="image 2 has label 2, expected 0 to 1"):
        images[2]


def test_a_truncated_image_is_named_by_its_path_through_subsets_and_joins(tmp_path):
    entries = [Entry(str(tmp_path / f"a photo {i}.jpg"), 0, "list") for i in range(3)]
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for entry in entries:
        Image.fromarray(pixels).save(entry.path)
    whole = (tmp_path / "a photo 1.jpg").read_bytes()
    (tmp_path / "a photo 1.jpg").write_bytes(whole[: len(whole) // 2])
    images = ImageSet(ConcatDataset([Listed(entries[:1]), Subset(Listed(entries), [0, 2, 1])]), noise, 1)
    assert [images[i][1] for i in range(3)] == [0, 0, 0]
    with pytest.raises(OSError, match=r"image .*/a photo 1\.jpg cannot be read: .*truncated"):
        images[3]


@pytest.mark.parametrize(
    "damage", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0", b"BM" + b"\0" * 60, b"II*\0\xff"]
)
def test_whatever_pillow_raises_the_path_is_named(tmp_path, damage):
    path = tmp_path / "b.png"
    path.write_bytes(damage)
    with pytest.raises(OSError, match=r"b\.png cannot be read"):
        ImageSet(Listed([Entry(str(path), 0, "list")]), noise, 1)[0]


def test_iteration_ends_at_the_last_image(tmp_path):
    write_image(tmp_path / "a.png", 9)
    images = ImageSet(Listed([Entry(str(tmp_path / "a.png"), 0, "list")]), noise, 1)
    assert len(list(images)) == 1
