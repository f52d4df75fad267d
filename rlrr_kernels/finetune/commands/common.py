"""What every command is, how it fails, and how it speaks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from rlrr_kernels.finetune.distributed import launched
from rlrr_kernels.io.files import check_writable

INTERRUPTED = 130


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Attributes:
        summary: a line, for the list of commands.
        description: for its own ``--help``.
        add_arguments: gives a parser the command's options.
        run: does it, and returns the exit status.
        several: whether it can run in several processes, under torchrun.
    """

    summary: str
    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    several: bool = False


class CommandError(Exception):
    """Ends the program with one line and an exit status: 2 for what was asked, 1 for what went wrong."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def checking_input() -> Iterator[None]:
    """Errors in here are about what the user gave: status 2."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise CommandError(str(error), 2) from error


def say(*lines: str) -> None:
    """Print for the user, once however many processes run."""
    if launched().main:
        print(*lines, sep="\n", flush=True)


def console() -> Console:
    """Where tables go. A log file has no width of its own: long rows are not folded there."""
    return Console() if sys.stdout.isatty() else Console(width=200, soft_wrap=True)


def new_file(path: Path, suffixes: tuple[str, ...], overwrite: bool) -> Path:
    """Check where a command is to write, before it starts to work.

    Raises:
        ValueError: another suffix.
        FileExistsError: the file exists and ``overwrite`` is False, or it is a folder.
        FileNotFoundError: its folder does not exist.
        OSError: nothing can be written there.
    """
    if path.suffix not in suffixes:
        raise ValueError(f"out: expected a name that ends in {' or '.join(suffixes)}, got {path}")
    if path.is_dir() or (path.exists() and not overwrite):
        raise FileExistsError(f"out: {path} exists" + ("" if path.is_dir() else "; --overwrite replaces it"))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"out: the folder {path.parent} does not exist")
    check_room(path, 0)
    return path


def check_room(path: Path, needed: int) -> None:
    """``OSError`` unless a file of so many bytes can be written; the file itself is not touched."""
    try:
        check_writable(path.parent, needed)
    except OSError as error:
        raise OSError(error.errno, f"out: {error.strerror}") from error
