"""Writes small datasets in the layouts that the package reads."""

import json
from pathlib import Path
from types import SimpleNamespace

from PIL import Image

from rlrr_kernels.finetune.data import Splits, load_splits, make_transform
from rlrr_kernels.finetune.recipes import FGVC, VTAB

GREY = make_transform((1, 4, 4), (0.5,), (0.5,), "bilinear", train=False)


def load(train=GREY, test=GREY, **settings) -> Splits:
    """Splits of a run with these settings."""
    return load_splits(
        SimpleNamespace(**({"task": "", "data": "", "data_root": None, "seed": 0} | settings)), train, test
    )


def write_image(path: Path, red: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # a JPEG of this quality keeps grey exactly
    Image.new("RGB", (10, 6), (red % 256,) * 3).save(path, quality=100)


def red(images, index: int) -> int:
    """The value that :func:`write_image` was given."""
    return images.items[index][0].getpixel((0, 0))[0]


def write_vtab(
    root: Path, task: str = "cifar", train: int = 6, val: int = 3, test: int = 4, shared: bool = False
) -> Path:
    """Write a VTAB-1k task and return its folder. Image i has class i modulo the number of classes, and red value i.

    As in the public copies each list has a folder of images, and train800val200 copies of the others'.
    ``shared``: train800val200 names the others' files, which have blanks in their names.
    """
    folder, classes, number = root / task, VTAB[task].classes, 0
    lists: dict[str, list[str]] = {"train800val200": []}
    for split, count in (("train800", train), ("val200", val), ("test", test)):
        lists[split] = []
        for i in range(count):
            name = f"images/{split}/a picture {i}.png" if shared else f"images/{split}/{i:06d}.jpg"
            write_image(folder / name, number)
            lists[split].append(f"{name} {number % classes}")
            if split != "test":
                copy = name if shared else f"images/train800val200/{number:06d}.jpg"
                write_image(folder / copy, number)
                lists["train800val200"].append(f"{copy} {number % classes}")
            number += 1
    for split, lines in lists.items():
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return folder


def write_fgvc(root: Path, task: str = "flowers", name: str = "OxfordFlowers", images: str = ".") -> Path:
    """Write an FGVC task with class ids 3, 13, 23, ...: all of them in train, every second in val and test."""
    folder, lists, number = root / name, {}, 0
    ids = [3 + 10 * label for label in range(FGVC[task].classes)]
    for split, own in (("train", ids), ("val", ids[::2]), ("test", ids[1::2])):
        lists[split] = {}
        for key in own:
            path = f"class {key}/{split} picture.png"
            write_image(folder / images / path, number)
            lists[split][path] = key
            number += 1
    lists["trainval"] = lists["train"] | lists["val"]
    for split, items in lists.items():
        (folder / f"{split}.json").write_text(json.dumps(items))
    return folder


def write_classes(root: Path, counts: dict[str, int], grey: int = 100) -> None:
    """Write class folders with these numbers of images."""
    for label, (name, count) in enumerate(counts.items()):
        for i in range(count):
            write_image(root / name / f"image {i}.png", grey + label)
