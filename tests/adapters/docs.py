"""The samples of docs/frameworks, which the tests of the frameworks run."""

from __future__ import annotations

import re
from pathlib import Path

PAGES = Path(__file__).parents[2] / "docs" / "frameworks"


def first_code_block(path: Path | str) -> str:
    """Return the first Python block of a page of docs/frameworks, by its name or path."""
    found = re.search(r"^```python\n(.*?)^```", (PAGES / path).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert found, f"{path} has no Python block"
    return found[1]
