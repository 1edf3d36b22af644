"""docs/bad-input.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
TABLE = (TESTS.parent / "docs" / "bad-input.md").read_text()
ROWS = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", TABLE)))


def test_every_row_names_a_test() -> None:
    rows = [line for line in TABLE.splitlines() if line.startswith("| ")]
    headers = sum(line.endswith("| test |") for line in rows)
    assert headers == TABLE.count("\n## ")
    assert len(re.findall(r"`[\w/]+\.py::\w+` \|$", TABLE, re.M)) == len(rows) - headers > 40


@pytest.mark.parametrize(("path", "name"), ROWS)
def test_a_test_named_in_the_table_exists(path: str, name: str) -> None:
    assert re.search(rf"^(async )?def {name}\(", (TESTS / path).read_text(), re.M)
