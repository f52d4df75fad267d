"""The table in ``docs/reliability.md`` says what is there: every test that it names, and how much each one runs.

A row is ``| promise | `file::test`, ... | count |``. The count is of collected cases (``12 cases``, and after a comma
what one goes through), or a constant that the test runs to and asserts (``2,000 examples (`file::NAME`)``).
"""

import importlib
import re
from collections import Counter
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "reliability.md"
NAME = re.compile(r"`(\w+)\.py::(\w+(?:\[[^\]]+\])?)`")


def rows():
    """(promise, [(file, test)], count cell) of each line that has tests."""
    found = []
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("|") and len(cells) == 3 and NAME.search(cells[1]):
            found.append((cells[0], NAME.findall(cells[1]), cells[2]))
    return found


def test_every_row_names_tests_that_are_there_and_what_they_run(request):
    config = request.config
    if config.option.keyword or config.option.markexpr or config.args != config.getini("testpaths"):
        pytest.skip("only the whole suite has collected every test that the table names")
    collected = Counter()
    for item in request.session.items:
        if item.path.parent == HERE:
            collected.update({(item.path.stem, name) for name in (item.name, item.name.partition("[")[0])})
    wrong = []
    for promise, tests, cell in rows():
        missing = [f"{file}::{test}" for file, test in tests if (file, test) not in collected]
        if missing:
            wrong.append(f"{promise}: no such test {missing}")
            continue
        number, _, unit = cell.partition(" ")
        declared = NAME.search(unit)
        if declared:
            file, name = declared.groups()
            runs = getattr(importlib.import_module(f"tests.reliability.{file}"), name)
        else:
            runs = sum(collected[test] for test in tests)
        if number != f"{runs:,}" or not (declared or unit.partition(",")[0] in ("case", "cases")):
            wrong.append(f"{promise}: {cell!r}, but {runs:,} are run")
    assert not wrong, "\n".join(wrong)
    assert len(rows()) > 40


def test_every_test_of_this_folder_is_in_the_table():
    named = {(file, test.partition("[")[0]) for _, tests, _ in rows() for file, test in tests}
    here = {
        (path.stem, name)
        for path in HERE.glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
        if path != Path(__file__)
    }
    assert sorted(here - named) == []
