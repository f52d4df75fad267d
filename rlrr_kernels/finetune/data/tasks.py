"""The layouts on disk of the two benchmarks: VTAB-1k's text lists and FGVC's JSON lists."""

from __future__ import annotations

from pathlib import Path

from rlrr_kernels.finetune.data.parts import (
    Entry,
    Listed,
    Parts,
    check_distinct,
    check_exists,
    check_images,
    check_label_counts,
    check_union,
    equal_files,
    numbered,
    set_aside,
    share_files,
)
from rlrr_kernels.finetune.recipes import FGVC, VTAB
from rlrr_kernels.io.checks import LARGEST_LIST, inside, read_bytes, read_json

#: Folder of an FGVC task under the root, and folder of its images in it.
FGVC_FOLDERS = {
    "cub": ("CUB_200_2011", "images"),
    "nabirds": ("NABirds", "images"),
    "flowers": ("OxfordFlowers", "."),
    "cars": ("StanfordCars", "."),
    "dogs": ("StanfordDogs", "."),
}


def read_vtab(root: Path, task: str) -> Parts:
    """Read ``root/<task>/{train800,val200,train800val200,test}.txt``.

    Each line is ``<path relative to root/task> <label>``; the path may contain blanks. ``train800val200`` lists the
    images of ``train800`` and ``val200``. In the public copies it names files of its own, which must be as many for
    each label; if it names a file of ``train800`` or ``val200``, it must name exactly theirs, with the same labels.
    No list names a file twice, and ``test`` none of another list.

    Args:
        root: Folder of all tasks.
        task: A name in :data:`~rlrr_kernels.finetune.recipes.VTAB`.

    Raises:
        FileNotFoundError: If a folder, list or image does not exist.
        OSError: If an image cannot be read, see :func:`~rlrr_kernels.finetune.data.parts.check_images`.
        ValueError: If a line or label is invalid, a list is empty, or lists contradict each other.
    """
    folder, classes = root / task, VTAB[task].classes
    files = {name: folder / f"{name}.txt" for name in ("train800", "val200", "train800val200", "test")}
    for file in files.values():
        check_exists(file, f"vtab/{task}")
    train, val, both, test = (read_text_list(file, folder, classes) for file in files.values())
    shared = share_files(both, [*train, *val])
    check_distinct(train, val, test)
    (check_union if shared else check_label_counts)(files["train800val200"], both, train, val)
    check_distinct(both, test)
    for entries in (train, val, *([] if shared else [both]), test):
        check_images(entries)
    notes = equal_files(train, val, ("train800", "val200"))
    notes += equal_files([*train, *val, *both], test, ("train800val200", "test"))
    return Parts(Listed(train), Listed(val), Listed(test), numbered(classes), Listed(both), tuple(notes), named=False)


def read_text_list(file: Path, folder: Path, classes: int) -> list[Entry]:
    """Read one list of VTAB-1k.

    Raises:
        ValueError: If a line is not a path and a label, a label is not in 0 to ``classes - 1``, or the list is empty.
    """
    try:
        text = read_bytes(file, LARGEST_LIST).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected UTF-8 text: {error}") from error
    entries = []
    # not splitlines: a path may contain other line separators of Unicode
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            path, label = line.rsplit(maxsplit=1)
            entry = Entry(str(folder / path), int(label), where)
        except ValueError:
            raise ValueError(f"{where}: expected '<path> <label>', got {line.strip()!r}") from None
        if not inside(path):
            raise ValueError(f"{where}: expected a path below {folder}, got {path!r:.80}")
        if not 0 <= entry.label < classes:
            raise ValueError(f"{where}: label {entry.label} is out of range, expected 0 to {classes - 1}")
        entries.append(entry)
    if not entries:
        raise ValueError(f"{file}: the list is empty")
    return entries


def read_fgvc(root: Path, task: str, seed: int) -> Parts:
    """Read ``root/<Name>/{train,val,trainval,test}.json``, each ``{path relative to the images: class id}``.

    Labels number the sorted class ids of all lists together: numbered for each list, as in the published code, they
    would shift if a list lacks a class. Without ``val.json``, a fifth of each class in ``train.json`` is set aside by
    the seed. ``trainval.json`` is optional and must list what train and val list.

    Args:
        root: Folder of all tasks.
        task: A name in :data:`~rlrr_kernels.finetune.recipes.FGVC`.
        seed: Seed of the validation split.

    Raises:
        FileNotFoundError: If a folder, list or image does not exist.
        OSError: If an image cannot be read.
        ValueError: If a list is invalid, the task has another number of classes, or lists contradict each other.
    """
    name, images = FGVC_FOLDERS[task]
    folder = root / name
    files = {split: folder / f"{split}.json" for split in ("train", "test", "val", "trainval")}
    for split in ("train", "test"):
        check_exists(files[split], f"fgvc/{task}")
    found = {split: read_json_list(file) for split, file in files.items() if file.is_file()}
    label = _labels(found, folder, FGVC[task].classes)
    lists = {
        split: [Entry(str(folder / images / path), label[key], str(files[split])) for path, key in items.items()]
        for split, items in found.items()
    }
    train, test, val = lists["train"], lists["test"], lists.get("val", [])
    check_distinct(train, val, test)
    if "trainval" in lists:
        check_union(files["trainval"], lists["trainval"], train, val)
    for entries in (train, val, test):
        check_images(entries)
    notes = (*equal_files(train, val, ("train", "val")), *equal_files([*train, *val], test, ("train and val", "test")))
    drawn_from = "" if val else "train.json"
    if drawn_from:
        kept, aside = set_aside([entry.label for entry in train], seed)
        train, val = [train[i] for i in kept], [train[i] for i in aside]
    names = tuple(map(str, label))
    return Parts(Listed(train), Listed(val), Listed(test), names, notes=notes, drawn_from=drawn_from)


def read_json_list(file: Path) -> dict[str, int | str]:
    """Read one list of FGVC: class ids, whole numbers or strings, by image path.

    Raises:
        ValueError: If it is not such a list, has an image twice, or is empty.
    """

    items = read_json(file, LARGEST_LIST)
    if not items:
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
    """Labels by class id, over all lists."""
    keys = {key for items in found.values() for key in items.values()}
    if len({type(key) for key in keys}) > 1:
        raise ValueError(f"{folder}: class ids are numbers in some lists and strings in others")
    if len(keys) != classes:
        files = ", ".join(f"{split}.json" for split in found)
        raise ValueError(f"{folder}: expected {classes} classes in {files} together, got {len(keys)}")
    return {key: label for label, key in enumerate(sorted(keys))}  # type: ignore[type-var]
