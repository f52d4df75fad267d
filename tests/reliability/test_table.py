"""``docs/reliability.md`` names the test files of this folder."""

import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "reliability.md"


def test_the_page_names_every_test_file_and_no_other():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    named = {name for row in rows for name in re.findall(r"`(test_\w+\.py)`", row)}
    assert named == {path.name for path in HERE.glob("test_*.py")} - {Path(__file__).name}
