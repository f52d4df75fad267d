"""Batches have the same bits whether images are kept or decoded in each epoch."""

import errno
import os
import tempfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from rlrr_kernels.finetune.batches import Batches
from rlrr_kernels.finetune.data import ImageSet, loading, make_transform
from rlrr_kernels.finetune.data.images import random_draws
from rlrr_kernels.finetune.data.parts import Entry, Listed
from rlrr_kernels.finetune.distributed import World

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COUNT = 7


class Counted(Listed):
    """Remembers which images it was asked for."""

    def __init__(self, entries):
        super().__init__(entries)
        self.asked = []

    def __getitem__(self, index):
        self.asked.append(index)
        return super().__getitem__(index)


@pytest.fixture
def entries(tmp_path, monkeypatch):
    """Images of several sizes, every third grey. Temporary files go into ``tmp_path / "kept"``."""
    (tmp_path / "kept").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "kept"))
    entries = [Entry(str(tmp_path / f"{i}.jpg"), i % 3, "") for i in range(COUNT)]
    for i, entry in enumerate(entries):
        write(entry.path, i)
    return entries


def write(path, i):
    shape = (40 + 5 * i, 60 - 3 * i, *(() if i % 3 == 2 else (3,)))
    Image.fromarray(np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8)).save(path)


def image_set(entries, seed=5, items=Counted, **options):
    transform = make_transform((3, 16, 24), MEAN, STD, "bicubic", **{"train": True, **options})
    return ImageSet(items(entries), transform, 3, seed)


def epochs(images, count=3, workers=2):
    """All batches of several epochs: (images, labels)."""
    order, found = Batches(len(images), 3, World(), seed=1), []
    for order.epoch in range(count):
        found += loading.batches(images, order, CPU, workers)
    return found


def same(one, other):
    return len(one) == len(other) > 0 and all(
        torch.equal(x, y) and x.stride() == y.stride() and torch.equal(labels, others)
        for (x, labels), (y, others) in zip(one, other, strict=True)
    )


def whole_transform(train, resize, flip):
    """The same as a chain of torchvision's transforms, for one image."""
    crop = [v2.RandomCrop([16, 24]) if train else v2.CenterCrop([16, 24])] if resize == "crop" else []
    return v2.Compose(
        [
            v2.RGB(),
            v2.Resize([18, 27] if crop else [16, 24], interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            *crop,
            *([v2.RandomHorizontalFlip()] if flip and train else []),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(MEAN), list(STD)),
        ]
    )


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("resize", "flip"), [("squash", False), ("squash", True), ("crop", False), ("crop", True)])
def test_kept_or_not_the_bits_are_those_of_the_whole_transform_on_each_image(entries, train, resize, flip):
    whole, plain, order = whole_transform(train, resize, flip), Listed(entries), Batches(COUNT, 3, World(), seed=1)
    expected = []
    for order.epoch in range(3):
        for keys in order:
            seen = []
            for epoch, index in keys:
                with random_draws(5, epoch, index):
                    seen.append(whole(plain[index][0]))
            expected.append((torch.stack(seen), torch.tensor([index % 3 for _, index in keys])))
    images = image_set(entries, train=train, resize=resize, flip=flip)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert same(epochs(images), expected)
    assert len(images.items.asked) == 3 * COUNT
    assert loading.keep(images, World(), 2, 2**30) >= COUNT * 16 * 24 * 3
    images.items.asked.clear()
    assert same(epochs(images), expected)
    assert images.items.asked == []
    assert torch.equal(images[2, 4][0], whole_of(whole, plain, 2, 4))
    assert torch.equal(torch.get_rng_state(), state)


def whole_of(whole, plain, epoch, index):
    with random_draws(5, epoch, index):
        return whole(plain[index][0])


def test_each_image_is_decoded_once_and_no_file_is_left(entries, tmp_path):
    images = image_set(entries)
    loading.keep(images, World(), 3, 2**30)
    # the first image is read once more for its shape
    assert sorted(images.items.asked) == [0, *range(COUNT)]
    assert list((tmp_path / "kept").iterdir()) == []


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("room", "fault", "said"), [(7_000, None, "--cache leaves 6.9 KiB"), (2**30, full, "kept: No space left on device")]
)
def test_without_room_one_line_says_so_and_images_are_decoded_anew(
    entries, tmp_path, monkeypatch, capsys, room, fault, said
):
    images = image_set(entries, flip=True)
    expected = epochs(images)
    if fault:
        monkeypatch.setattr(os, "posix_fallocate", fault)
    # counted as used though the disk is full: all machines must count alike
    assert loading.keep(images, World(), 1, room, quiet=False) == (COUNT * (16 * 24 * 3 + 8) if fault else 0)
    assert images.kept is None
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "warning: 7 images are decoded in each epoch: keeping them takes 8 KiB; " in err
    assert said in err
    assert list((tmp_path / "kept").iterdir()) == []
    assert same(epochs(images), expected)


def test_a_folder_that_cannot_be_written_is_no_room(entries, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    images = image_set(entries)
    loading.keep(images, World(), 1, 2**30, quiet=False)
    assert images.kept is None
    assert "(TMPDIR): No such file or directory" in capsys.readouterr().err


def test_an_image_that_cannot_be_read_is_named_and_nothing_is_left(entries, tmp_path):
    with open(entries[4].path, "r+b") as file:
        file.truncate(300)
    images = image_set(entries)
    for load in (lambda: epochs(images), lambda: loading.keep(images, World(), 2, 2**30)):
        with pytest.raises(OSError, match=r"image .*/4\.jpg cannot be read"):
            load()
    assert images.kept is None
    assert list((tmp_path / "kept").iterdir()) == []


def test_threads_read_no_further_ahead_than_two_batches(entries):
    images = image_set(entries * 10)
    loaded = loading.batches(images, Batches(len(images), 3, World()), CPU, 2)
    for taken in (1, 2):
        next(loaded)
        assert len(images.items.asked) <= 3 * taken + 2 * 3 + 1
    loaded.close()
