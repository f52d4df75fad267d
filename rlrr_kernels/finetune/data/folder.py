"""Folders of class folders of images."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torch.utils.data import Subset

from rlrr_kernels.finetune.data.parts import (
    Entry,
    Listed,
    Parts,
    check_distinct,
    check_images,
    equal_files,
    set_aside,
)

#: Names of the folders and arrays of each split, in any letter case.
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}

#: Files and folders that operating systems create, besides names that begin with a dot.
JUNK = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "$recycle.bin"})

#: Formats of Pillow that are programs, containers or numbers rather than images.
NO_IMAGES = frozenset({"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"})


@dataclass
class Found:
    """The files in the folder of a split.

    Attributes:
        images: Sorted paths of the images of each class; empty for a class without images.
        deeper: Images in subfolders of a class folder.
        classless: Images beside the class folders.
        skipped: Files without an image's ending, by ending.
    """

    images: dict[str, list[str]] = field(default_factory=dict)
    deeper: list[str] = field(default_factory=list)
    classless: list[str] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def add(self, path: str, endings: set[str], images: list[str]) -> bool:
        """Add a file to ``images``, or to the skipped files; returns whether it is an image."""
        end = os.path.splitext(path)[1].lower()
        (images if end in endings else self.skipped.setdefault(end, [])).append(path)
        return end in endings

    def notes(self) -> list[str]:
        """Lines for the user about files that were skipped or lie in unexpected places."""
        notes = []
        if self.skipped:
            kinds = ", ".join(
                f"{len(paths):,} {end or 'without an ending'} ({_first(paths)})"
                for end, paths in sorted(self.skipped.items())
            )
            notes.append(f"skipped, no images by their names: {kinds}")
        if self.classless:
            notes.append(f"skipped, in no class folder: {_count(self.classless)}")
        if self.deeper:
            notes.append(f"note: in folders of class folders, taken as of the class: {_count(self.deeper)}")
        return notes


def _first(paths: list[str]) -> str:
    return paths[0] + (", ..." if len(paths) > 1 else "")


def _count(paths: list[str]) -> str:
    return f"{len(paths):,} image{'s' * (len(paths) > 1)} ({_first(paths)})"


def read_folder(root: Path, seed: int) -> Parts:
    """Read ``root/{train,val,test}/<class>/<image>``; a split may have any name in :data:`SPLITS`.

    If val or test is missing, validation images are set aside from train, and the other folder is the test split.
    Files with an ending of Pillow's image formats are images, also in subfolders of a class folder. Other files that
    are not hidden are counted in the notes.

    Raises:
        FileNotFoundError: If a split is missing, or a class folder has no images.
        OSError: If an image cannot be read.
        ValueError: If a folder is no split, two belong to one split, or splits have other classes or share a file.
    """
    folders = _splits(root)
    found = {split: _search(path) for split, path in folders.items()}
    for split, each in found.items():
        empty = [name for name, images in each.images.items() if not images]
        if empty or not each.images:
            what = f"no images for the classes {', '.join(empty)}" if empty else "no class folders"
            raise FileNotFoundError("; ".join([f"data: {folders[split]}: {what}", *each.notes()]))
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
    notes = [line for each in found.values() for line in each.notes()]
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
    """The split that a name means: ``train``, ``val``, ``test`` or None."""
    return next((split for split, names in SPLITS.items() if name.lower() in names), None)


def _ignored(name: str) -> bool:
    return name.startswith(".") or name.lower() in JUNK


def _is_folder(path: Path) -> bool:
    """Whether ``path`` is a folder. A broken link is an error, as images are missing."""
    if path.is_symlink() and not path.exists():
        raise ValueError(f"data: {path} is a link to {os.readlink(path)}, which does not exist")
    return path.is_dir()


def _splits(root: Path) -> dict[str, Path]:
    """Find the folder of each split, in the order of :data:`SPLITS`.

    Raises:
        FileNotFoundError: If there is no training split, or no other.
        ValueError: If a folder is no split, two belong to one split, or a link is broken.
    """
    expected = "; ".join(f"{split}: {', '.join(names)}" for split, names in SPLITS.items())
    found: dict[str, Path] = {}
    folders = sorted(path for path in root.iterdir() if _is_folder(path) and not _ignored(path.name))
    for path in folders:
        split = split_of(path.name)
        if split in found:
            raise ValueError(f"data: {found[split]} and {path} are both the {split} split, expected one of them")
        if split is not None:
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
    # registers Pillow's formats and their endings
    Image.init()
    endings = {
        end for end, name in Image.registered_extensions().items() if name in Image.OPEN and name not in NO_IMAGES
    }
    for child in sorted(os.scandir(folder), key=lambda child: child.name):
        if _ignored(child.name):
            continue
        if not _is_folder(Path(child.path)):
            found.add(child.path, endings, found.classless)
            continue
        images = found.images[child.name] = []
        for path, depth in _walk(child.path):
            if found.add(path, endings, images) and depth:
                found.deeper.append(path)
    return found


def _walk(folder: str) -> Iterator[tuple[str, int]]:
    """Yield the files below a folder and their depth, sorted as by ``os.walk``. Links are followed.

    Raises:
        ValueError: If a folder is a link to a folder above itself.
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
