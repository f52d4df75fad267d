"""The table in ``docs/reliability.md`` and this folder agree: a row is ``| promise | `file::test`, ... |``."""

import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "reliability.md"


def named():
    """(file, test, case or nothing) of every row."""
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and ".py::" in line]
    assert len(rows) > 40
    return {found for row in rows for found in re.findall(r"`(\w+)\.py::(\w+)(?:\[([^\]]+)\])?`", row)}


def functions(pattern, prefix=""):
    """(file, name) of every function at the top of a file."""
    found = re.compile(rf"^def ({prefix}\w+)", re.MULTILINE)
    return {(path.stem, name) for path in HERE.glob(pattern) for name in found.findall(path.read_text())}


def test_the_table_and_this_folder_name_the_same_tests():
    assert {(file, test) for file, test, _ in named()} == functions("test_*.py", "test_") - functions("test_table.py")


def test_every_case_that_the_table_names_is_there():
    """Those that run in several processes are functions of other files."""
    assert {case for *_, case in named() if case} <= {name for _, name in functions("*.py")}
