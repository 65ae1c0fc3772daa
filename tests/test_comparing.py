"""docs/comparing.md against what tests/comparing.py measures here, without other packages."""

import pytest
from conftest import REPOSITORY

from tests.comparing import rows

OURS = [row for row in rows() if row[0].startswith("here")]


@pytest.mark.parametrize(("who", "how", "measure"), OURS, ids=[how for _, how, _ in OURS])
def test_the_table_has_what_is_measured(who, how, measure):
    numbers = " | ".join(f"{100 * x:.2f}" for x in measure())
    assert f"| {who} |  | {how} | {numbers} |" in (REPOSITORY / "docs/comparing.md").read_text("utf-8")
