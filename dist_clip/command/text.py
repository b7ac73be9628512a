"""Tables in plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int = 100) -> str:
    """Return a table with aligned columns, whose last column is wrapped at `width` characters of the line."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header) - 1)]
    room = max(30, width - sum(widths) - 2 * len(widths))
    lines = []
    for row in (
        header,
        ["-" * each for each in (*widths, min(room, max(len(row[-1]) for row in (header, *rows))))],
        *rows,
    ):
        wrapped = textwrap.wrap(row[-1], room) or [""]
        for i, part in enumerate(wrapped):
            cells = row[:-1] if i == 0 else [""] * len(widths)
            lines.append("  ".join([*(cell.ljust(w) for cell, w in zip(cells, widths, strict=True)), part]).rstrip())
    return "\n".join(lines)
