"""docs/conformance.md says what the `report` markers of the tests say; markers that say nothing are refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scripts.conformance import Collector, page

ROOT = Path(__file__).parents[1]


@pytest.mark.pages
def test_the_page_is_what_the_tests_say() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.conformance", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in (ROOT / "docs/conformance.md").read_text().splitlines() if line.startswith("| [")]
    assert len(rows) >= 30


def test_markers_become_a_row_and_bad_ones_are_refused() -> None:
    collector = Collector()
    said = {"situation": "s", "right": "r"}
    collector.add(("a/b#2", "a/b#3"), said, ("tests/x.py", "test_x"))
    collector.add(("a/b#2",), {}, ("tests/y.py", "test_y"))
    (row,) = collector.rows.values()
    line = page([row]).splitlines()[-1]
    assert line == (
        "| [a/b#2](https://github.com/a/b/issues/2)<br>[a/b#3](https://github.com/a/b/issues/3) | s | r | right "
        "| [`test_x`](../tests/x.py)<br>[`test_y`](../tests/y.py) |"
    )
    for issues, kwargs in (
        (("b#2",), said),
        ((), said),
        (("a/b#4",), {**said, "here": "well"}),
        (("a/b#4",), {"why": ""}),
    ):
        with pytest.raises(ValueError, match="report marker"):
            collector.add(issues, kwargs, ("tests/x.py", "test_x"))
    with pytest.raises(ValueError, match="another row"):
        collector.add(("a/b#2",), {"situation": "t", "right": "r"}, ("tests/x.py", "test_x"))
