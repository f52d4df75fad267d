"""VTAB-1k as it is distributed: a folder a task, with four lists of images and a folder of images for each list."""

from __future__ import annotations

from pathlib import Path

from rlrr_kernels.finetune.data.duplicates import check_distinct, equal_files
from rlrr_kernels.finetune.data.images import Parts, numbered
from rlrr_kernels.finetune.data.listed import (
    Entry,
    Listed,
    check_images,
    check_labels_together,
    check_together,
    need_file,
    share_files,
)
from rlrr_kernels.finetune.recipes import VTAB
from rlrr_kernels.io.reading import LARGEST_LIST, inside, read_bytes


def read_vtab(root: Path, task: str) -> Parts:
    """``root/<task>/{train800,val200,train800val200,test}.txt``.

    Each line is ``<path relative to root/task> <label>``; the label is what follows the last blank, so paths may
    contain blanks. ``train800val200`` lists the images of ``train800`` and ``val200``: in the public copies as files
    of its own (``images/train800val200/000000.jpg``), which must be as many for each label; where it names a file
    of ``train800`` or ``val200``, it must name all of theirs and no other, with the same labels. No list names a file
    twice, and ``test`` none that another list names.

    Args:
        root: the folder of all tasks.
        task: a name in :data:`~rlrr_kernels.finetune.recipes.VTAB`.

    Raises:
        FileNotFoundError: a folder, list or image that does not exist, with its path.
        OSError: an image that cannot be read, as far as
            :func:`~rlrr_kernels.finetune.data.listed.check_images` looks.
        ValueError: a bad line or label (``file:line``), an empty list, or lists that contradict each other.
    """
    folder, classes = root / task, VTAB[task].classes
    files = {name: folder / f"{name}.txt" for name in ("train800", "val200", "train800val200", "test")}
    for file in files.values():
        need_file(file, f"vtab/{task}")
    train, val, both, test = (read_list(file, folder, classes) for file in files.values())
    shared = share_files(both, [*train, *val])
    check_distinct(train, val, test)
    (check_together if shared else check_labels_together)(files["train800val200"], both, train, val)
    check_distinct(both, test)
    for entries in (train, val, *([] if shared else [both]), test):
        check_images(entries)
    notes = equal_files(train, val, ("train800", "val200"))
    notes += equal_files([*train, *val, *both], test, ("train800val200", "test"))
    return Parts(Listed(train), Listed(val), Listed(test), numbered(classes), Listed(both), tuple(notes), named=False)


def read_list(file: Path, folder: Path, classes: int) -> list[Entry]:
    """The images of one list.

    Raises:
        ValueError: a line that is no path and label, a label outside of 0 to ``classes - 1``, an empty list.
    """
    try:
        text = read_bytes(file, LARGEST_LIST).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected UTF-8 text: {error}") from error
    entries = []
    # not splitlines: a path may contain what Unicode counts as a line's end
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
