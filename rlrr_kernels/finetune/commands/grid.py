"""A table once, printed to a terminal or as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.markup import escape
from rich.table import Table


@dataclass
class Grid:
    """Header, rows of text, and lines of explanation. The first ``labels`` columns are text, the others figures."""

    title: str
    header: Sequence[str]
    labels: int = 1
    rows: list[Sequence[str]] = field(default_factory=list)
    #: numbers of rows after which a line is drawn
    breaks: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        """Append a row.

        Raises:
            ValueError: it has more or fewer cells than the header.
        """
        if len(cells) != len(self.header):
            raise ValueError(f"cells: expected {len(self.header)}, one a column, got {len(cells)}")
        self.rows.append(cells)

    def end_section(self) -> None:
        """Draw a line after what is there (a terminal only: Markdown has no such line)."""
        self.breaks.append(len(self.rows))

    def rich(self) -> Table:
        """For ``rich.console.Console.print``."""
        table = Table(title=escape(self.title), title_justify="left", caption_justify="left")
        for number, name in enumerate(self.header):
            table.add_column(escape(name), justify="left" if number < self.labels else "right", no_wrap=True)
        for number, row in enumerate(self.rows, 1):
            table.add_row(*map(escape, row), end_section=number in self.breaks)
        if self.notes:
            table.caption = escape("\n".join(self.notes))
        return table

    def markdown(self) -> str:
        """A heading, the table, and the notes under it."""
        rule = ["---" if number < self.labels else "---:" for number in range(len(self.header))]
        lines = [
            "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
            for row in (self.header, rule, *self.rows)
        ]
        notes = ["", *(f"{note}  " for note in self.notes)] if self.notes else []
        return "\n".join([f"## {self.title}", "", *lines, *notes]) + "\n"
