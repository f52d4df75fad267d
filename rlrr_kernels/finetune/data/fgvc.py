"""The five fine-grained tasks (FGVC), split as JSON lists beside the original images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlrr_kernels.finetune.data.aside import set_aside
from rlrr_kernels.finetune.data.duplicates import check_distinct, equal_files
from rlrr_kernels.finetune.data.images import Parts
from rlrr_kernels.finetune.data.listed import Entry, Listed, check_images, check_together, need_file
from rlrr_kernels.finetune.recipes import FGVC
from rlrr_kernels.io.reading import LARGEST_LIST, inside, read_bytes

#: Folder of a task under the root, and of its images in there.
FOLDERS = {
    "cub": ("CUB_200_2011", "images"),
    "nabirds": ("NABirds", "images"),
    "flowers": ("OxfordFlowers", "."),
    "cars": ("StanfordCars", "."),
    "dogs": ("StanfordDogs", "."),
}


def read_fgvc(root: Path, task: str, seed: int) -> Parts:
    """``root/<Name>/{train,val,trainval,test}.json``, each ``{path relative to the images: class id}``.

    Labels are the sorted class ids of all lists together: counted for each list, as the published code does,
    they would shift where a list lacks a class. Without ``val.json``, a fifth of each class in ``train.json`` is
    set aside by the seed. ``trainval.json`` may be missing; where it is not, it must list what train and val list.

    Args:
        root: the folder of all tasks.
        task: a name in :data:`~rlrr_kernels.finetune.recipes.FGVC`.
        seed: of the validation split where the task brings none.

    Raises:
        FileNotFoundError: a folder, list or image that does not exist, with its path.
        OSError: an image that cannot be read.
        ValueError: a bad list, another number of classes than the task has, or lists that contradict each other.
    """
    name, images = FOLDERS[task]
    folder = root / name
    files = {split: folder / f"{split}.json" for split in ("train", "test", "val", "trainval")}
    for split in ("train", "test"):
        need_file(files[split], f"fgvc/{task}")
    found = {split: read_json(file) for split, file in files.items() if file.is_file()}
    label = _labels(found, folder, FGVC[task].classes)
    lists = {
        split: [Entry(str(folder / images / path), label[key], str(files[split])) for path, key in items.items()]
        for split, items in found.items()
    }
    train, test, val = lists["train"], lists["test"], lists.get("val", [])
    check_distinct(train, val, test)
    if "trainval" in lists:
        check_together(files["trainval"], lists["trainval"], train, val)
    for entries in (train, val, test):
        check_images(entries)
    notes = [*equal_files(train, val, ("train", "val")), *equal_files([*train, *val], test, ("train and val", "test"))]
    drawn_from = "" if val else "train.json"
    if drawn_from:
        kept, aside = set_aside([entry.label for entry in train], seed)
        train, val = [train[i] for i in kept], [train[i] for i in aside]
    return Parts(
        Listed(train), Listed(val), Listed(test), tuple(map(str, label)), notes=tuple(notes), drawn_from=drawn_from
    )


def read_json(file: Path) -> dict[str, int | str]:
    """One list: image path -> class id, a whole number or a string.

    Raises:
        ValueError: no such JSON, an image twice, an empty list.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"{twice!r} is listed twice")
        return result

    try:
        items = json.loads(read_bytes(file, LARGEST_LIST), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{error.lineno}: expected JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {error}") from error
    if not isinstance(items, dict) or not items:
        raise ValueError(f"{file}: expected an object {{path: class id}} with at least one image")
    outside = next((path for path in items if not inside(path)), None)
    if outside is not None:
        raise ValueError(f"{file}: expected paths below the folder of images, got {outside!r:.80}")
    kinds = {type(key) for key in items.values()}
    if kinds not in ({int}, {str}):
        path, key = next((p, k) for p, k in items.items() if type(k) is not (int if int in kinds else str))
        raise ValueError(f"{file}: expected whole numbers, or strings, as class ids, got {key!r:.80} for {path!r:.80}")
    return items


def _labels(found: dict[str, dict[str, int | str]], folder: Path, classes: int) -> dict[int | str, int]:
    """Class id -> label, over all lists."""
    keys = {key for items in found.values() for key in items.values()}
    if len({type(key) for key in keys}) > 1:
        raise ValueError(f"{folder}: class ids are numbers in some lists and strings in others")
    if len(keys) != classes:
        raise ValueError(
            f"{folder}: expected {classes} classes in {', '.join(f'{split}.json' for split in found)} together, "
            f"got {len(keys)}"
        )
    return {key: label for label, key in enumerate(sorted(keys))}  # type: ignore[type-var]
