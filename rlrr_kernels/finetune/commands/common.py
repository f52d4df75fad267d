"""What all commands share: their form and errors, options made from settings, tables, and checks of output files."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlrr_kernels.finetune.distributed import launched
from rlrr_kernels.finetune.settings import FIELDS, PATHS, format_value
from rlrr_kernels.io.files import check_writable

#: Exit status after Ctrl-C.
INTERRUPTED = 130


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Attributes:
        summary: One line for the list of commands.
        description: Text of its ``--help``.
        add_arguments: Adds its options to a parser.
        run: Runs it and returns the exit status.
        multiprocess: Whether it supports several processes, under torchrun.
    """

    summary: str
    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    multiprocess: bool = False


class CommandError(Exception):
    """Ends the program with a message and an exit status: 2 for wrong arguments, 1 for failed work."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def checking_input() -> Iterator[None]:
    """Turn errors about the user's input into :class:`CommandError` with status 2."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise CommandError(str(error), 2) from error


def print_lines(*lines: str) -> None:
    """Print lines from the main process only."""
    if launched().main:
        print(*lines, sep="\n", flush=True)


def console() -> Console:
    """The console for tables. A log file has no width, so long rows are not wrapped there."""
    return Console() if sys.stdout.isatty() else Console(width=200, soft_wrap=True)


def new_file(path: Path, suffix: str, overwrite: bool) -> Path:
    """Check where a command will write, before it works.

    Raises:
        ValueError: If the file has another suffix.
        FileExistsError: If the file exists and ``overwrite`` is False, or it is a folder.
        FileNotFoundError: If its folder does not exist.
        OSError: If nothing can be written there.
    """
    if path.suffix != suffix:
        raise ValueError(f"out: expected a name that ends in {suffix}, got {path}")
    if path.is_dir() or (path.exists() and not overwrite):
        raise FileExistsError(f"out: {path} exists" + ("" if path.is_dir() else "; --overwrite replaces it"))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"out: the folder {path.parent} does not exist")
    check_out(path.parent)
    return path


def check_out(folder: Path, needed: int = 0) -> None:
    """Raise ``OSError`` if ``needed`` bytes cannot be written into the folder that ``--out`` names."""
    try:
        check_writable(folder, needed)
    except OSError as error:
        raise OSError(error.errno, f"out: {error.strerror}") from error


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    """Add the positional argument of commands that read a run."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, or the folder of an adapter")


def add_settings(
    parser: argparse._ActionsContainer, only: Collection[str] | None = None, skip: Collection[str] = ()
) -> None:
    """Add an option for each setting: ``--a-b`` for ``a_b``, and ``--x/--no-x`` for booleans.

    An option that is not given is absent from the namespace, so that its value can come from a recipe, a run or the
    default.

    Args:
        parser: The parser or argument group.
        only: The settings to add; their help texts have no defaults, as those come from elsewhere. None: all.
        skip: Settings to leave out.
    """
    for name, setting in FIELDS.items():
        if name in skip or (only is not None and name not in only):
            continue
        flag, text, default = (
            "--" + name.replace("_", "-"),
            setting.metadata["help"].replace("%", "%%"),
            setting.default,
        )
        if only is None and default not in (None, ""):
            text += f" (default: {format_value(default) if isinstance(default, bool) else default})"
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif name in PATHS:
            options |= {"type": Path, "metavar": "PATH"}
        elif setting.metadata["choices"]:
            # the empty string stands for an option that is not given
            options |= {"type": str, "choices": [choice for choice in setting.metadata["choices"] if choice]}
        else:
            options |= {"type": type(default), "metavar": {int: "N", float: "X"}.get(type(default), "NAME")}
        parser.add_argument(flag, **options)


def given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that the user gave."""
    return {name: value for name, value in vars(arguments).items() if name in FIELDS}


#: ``name=value`` in a message, as Python writes an argument.
_ARGUMENT = re.compile(r"(?<![\w./-])(\w+)=('[^']*'|[\w.+-]*\w)")


def as_options(message: str, parser: argparse.ArgumentParser, words: Iterable[str]) -> str:
    """Rewrite settings in an error message as options: ``lr: ... epochs=1`` becomes ``--lr: ... --epochs 1``.

    Args:
        message: The message. It is returned as it is if it does not start with the name of an argument.
        parser: The command's parser. Names without an option are not rewritten.
        words: What the user typed. Text that is part of an argument's value is not rewritten.
    """
    name, colon, text = message.partition(": ")
    if not (name.isidentifier() and colon):
        return message
    flags: dict[str, str] = {}
    for action in parser._actions:
        if action.option_strings:
            # an option with several values stands for each of them: --lrs for lr
            flags[action.dest.removesuffix("s") if action.nargs == "+" else action.dest] = action.option_strings[0]
    typed = [word for word in words if not word.startswith("-")]

    def option(found: re.Match[str]) -> str:
        name, value = found.groups()
        if name not in flags or any(found[0] in word for word in typed):
            return found[0]
        if value in ("True", "False"):
            return "--" + "no-" * (value == "False") + flags[name].removeprefix("--")
        return f"{flags[name]} {shlex.quote(value.strip(chr(39)))}"

    return f"{flags.get(name, name)}: {_ARGUMENT.sub(option, text)}"


@dataclass
class Grid:
    """A table for the terminal and for Markdown.

    Attributes:
        title: Heading.
        header: Names of the columns.
        labels: Number of columns with left-aligned text; the others hold figures.
        rows: Cells of each row.
        breaks: Numbers of rows after which a terminal shows a line.
        notes: Lines below the table.
    """

    title: str
    header: Sequence[str]
    labels: int = 1
    rows: list[Sequence[str]] = field(default_factory=list)
    breaks: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        """Append a row.

        Raises:
            ValueError: If the number of cells differs from the header's.
        """
        if len(cells) != len(self.header):
            raise ValueError(f"cells: expected {len(self.header)}, one a column, got {len(cells)}")
        self.rows.append(cells)

    def end_section(self) -> None:
        """Draw a line after the last row, in a terminal only."""
        self.breaks.append(len(self.rows))

    def rich(self) -> Table:
        """The table for ``rich.console.Console.print``."""
        table = Table(title=escape(self.title), title_justify="left", caption_justify="left")
        for number, name in enumerate(self.header):
            table.add_column(escape(name), justify="left" if number < self.labels else "right", no_wrap=True)
        for number, row in enumerate(self.rows, 1):
            table.add_row(*map(escape, row), end_section=number in self.breaks)
        if self.notes:
            table.caption = escape("\n".join(self.notes))
        return table

    def markdown(self) -> str:
        """The table in Markdown, with a heading and the notes."""
        rule = ["---" if number < self.labels else "---:" for number in range(len(self.header))]
        lines = [
            "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
            for row in (self.header, rule, *self.rows)
        ]
        notes = ["", *(f"{note}  " for note in self.notes)] if self.notes else []
        return "\n".join([f"## {self.title}", "", *lines, *notes]) + "\n"
