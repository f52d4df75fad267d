"""Folders of class folders of images."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torch.utils.data import Subset

from rlrr_kernels.finetune.data.aside import set_aside
from rlrr_kernels.finetune.data.duplicates import check_distinct, equal_files
from rlrr_kernels.finetune.data.images import Parts
from rlrr_kernels.finetune.data.listed import Entry, Listed, check_images

#: What folders and arrays of a split are called; letter case does not count.
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}

#: What operating systems leave in folders, beside names that begin with a dot.
JUNK = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "$recycle.bin"})

#: Formats of Pillow that are programs, containers or numbers rather than images.
NO_IMAGES = frozenset({"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"})


@dataclass
class Found:
    """What lies under the folder of a split.

    Attributes:
        images: class -> paths, sorted; a class without images has none.
        deeper: images that lie in folders of a class folder. classless: those that lie beside the class folders.
        skipped: ending -> files of no image's name.
    """

    images: dict[str, list[str]] = field(default_factory=dict)
    deeper: list[str] = field(default_factory=list)
    classless: list[str] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)


def read_folder(root: Path, seed: int) -> Parts:
    """``root/{train,val,test}/<class>/<image>``, by the names in :data:`SPLITS`; of val and test one may be missing,
    and then validation images are set aside from train and the other folder is the test.

    Images are what is called as Pillow's formats are, also in folders of a class folder. What is not is counted in
    the notes, but for hidden files.

    Raises:
        FileNotFoundError: a split that is missing, or a class folder without images.
        OSError: an image that cannot be read.
        ValueError: a folder that is no split, two of one split, splits whose classes differ, or that share a file.
    """
    folders = _splits(root)
    found = {split: _search(path) for split, path in folders.items()}
    for split, each in found.items():
        empty = [name for name, images in each.images.items() if not images]
        if empty or not each.images:
            what = f"no images for the classes {', '.join(empty)}" if empty else "no class folders"
            raise FileNotFoundError("; ".join([f"data: {folders[split]}: {what}", *_notes(each)]))
    classes = tuple(found["train"].images)
    for split, each in found.items():
        if tuple(each.images) != classes:
            raise ValueError(
                f"data: {folders[split]} has classes {list(each.images)}, but {folders['train']} has {list(classes)}"
            )
    lists = {
        split: [
            Entry(path, label, str(folders[split]))
            for label, images in enumerate(each.images.values())
            for path in images
        ]
        for split, each in found.items()
    }
    check_distinct(*lists.values())
    for entries in lists.values():
        check_images(entries)
    notes = [line for each in found.values() for line in _notes(each)]
    train, *others = lists
    for i, other in enumerate(others):
        for earlier in (train, *others[:i]):
            notes += equal_files(lists[earlier], lists[other], (folders[earlier].name, folders[other].name))
    sets = {split: Listed(entries) for split, entries in lists.items()}
    if len(sets) == 3:
        return Parts(sets["train"], sets["val"], sets["test"], classes, notes=tuple(notes))
    last = others[0]
    kept, aside = set_aside([entry.label for entry in lists["train"]], seed)
    if last == "val":
        notes.insert(0, f"note: {folders[last].name}/ is the test, as there is no test/")
    parts = Subset(sets["train"], kept), Subset(sets["train"], aside), sets[last]
    return Parts(*parts, classes, notes=tuple(notes), drawn_from=f"{folders['train'].name}/")


def split_of(name: str) -> str | None:
    """``train``, ``val`` or ``test``, whichever a name means; None for none of them."""
    return next((split for split, names in SPLITS.items() if name.lower() in names), None)


def _ignored(name: str) -> bool:
    return name.startswith(".") or name.lower() in JUNK


def _is_folder(path: Path) -> bool:
    """
    Raises:
        ValueError: a link to nothing, which says where images should be.
    """
    if path.is_symlink() and not path.exists():
        raise ValueError(f"data: {path} is a link to {os.readlink(path)}, which does not exist")
    return path.is_dir()


def _splits(root: Path) -> dict[str, Path]:
    """Split -> its folder, in the order of :data:`SPLITS`.

    Raises:
        FileNotFoundError: no training split, or no other.
        ValueError: a folder that is none, two of one split, or a link to nothing.
    """
    expected = "; ".join(f"{split}: {', '.join(names)}" for split, names in SPLITS.items())
    found: dict[str, Path] = {}
    folders = sorted(path for path in root.iterdir() if _is_folder(path) and not _ignored(path.name))
    for path in folders:
        split = split_of(path.name)
        if split is None:
            continue
        if split in found:
            raise ValueError(f"data: {found[split]} and {path} are both the {split} split, expected one of them")
        found[split] = path
    if "train" not in found or len(found) < 2:
        names = ", ".join(path.name for path in folders[:8]) + (", ..." if len(folders) > 8 else "")
        raise FileNotFoundError(
            f"data: expected folders train and test (or val) of class folders in {root}, found {names or 'no folders'} "
            f"(names of the splits: {expected})"
        )
    for path in folders:
        if split_of(path.name) is None:
            raise ValueError(f"data: {path} is none of the splits, expected folders of these names ({expected})")
    return {split: found[split] for split in SPLITS if split in found}


def _search(folder: Path) -> Found:
    found = Found()
    # registers the formats and their endings
    Image.init()
    endings = {end for end, name in Image.registered_extensions().items() if name in Image.OPEN} - {
        end for end, name in Image.registered_extensions().items() if name in NO_IMAGES
    }
    for child in sorted(os.scandir(folder), key=lambda child: child.name):
        if _ignored(child.name):
            continue
        if not _is_folder(Path(child.path)):
            _put(found, child.path, endings, found.classless)
            continue
        images = found.images[child.name] = []
        for path, depth in _walk(child.path):
            if _put(found, path, endings, images) and depth:
                found.deeper.append(path)
    return found


def _put(found: Found, path: str, endings: set[str], images: list[str]) -> bool:
    """Add a file to ``images``, or to what is skipped; whether it is an image."""
    end = os.path.splitext(path)[1].lower()
    if end in endings:
        images.append(path)
    else:
        found.skipped.setdefault(end, []).append(path)
    return end in endings


def _walk(folder: str) -> Iterator[tuple[str, int]]:
    """Files under a folder and how many folders deeper each lies, links followed, sorted as ``os.walk`` has them.

    Raises:
        ValueError: a link to a folder above itself.
    """
    above: dict[str, str] = {}
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not _ignored(name))
        real = os.path.realpath(place)
        above[place] = real
        parent = place
        while parent != folder:
            parent = os.path.dirname(parent)
            if above[parent] == real:
                raise ValueError(f"data: {place} is a link to {parent}, which it lies in")
        depth = place.count(os.sep) - folder.count(os.sep)
        for name in sorted(files):
            if not _ignored(name):
                yield os.path.join(place, name), depth


def _notes(found: Found) -> list[str]:
    """What of a split was left out or may surprise, a line each."""
    notes = []
    if found.skipped:
        kinds = ", ".join(
            f"{len(paths):,} {end or 'without an ending'} ({paths[0]}{', ...' if len(paths) > 1 else ''})"
            for end, paths in sorted(found.skipped.items())
        )
        notes.append(f"skipped, no images by their names: {kinds}")
    if found.classless:
        notes.append(f"skipped, in no class folder: {_some(found.classless)}")
    if found.deeper:
        notes.append(f"note: in folders of class folders, taken as of the class: {_some(found.deeper)}")
    return notes


def _some(paths: list[str]) -> str:
    return f"{len(paths):,} image{'s' * (len(paths) > 1)} ({paths[0]}{', ...' if len(paths) > 1 else ''})"
