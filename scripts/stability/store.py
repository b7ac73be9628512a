"""The rows on disk: one JSON object a line, appended whole or not at all, by one writer at a time."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from filelock import FileLock  # torch requires it

Row = dict[str, Any]


class Rows:
    """A JSONL file of finished runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = FileLock(path.with_name(path.name + ".lock"))

    def read(self) -> dict[str, Row]:
        """Rows by id. A torn last line, of a process that was killed while writing, is left out."""
        if not self.path.exists():
            return {}
        rows: dict[str, Row] = {}
        lines = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            try:
                row = json.loads(line)
            except ValueError:
                if number == len(lines):  # no newline after it
                    continue
                raise ValueError(f"{self.path}, line {number} is not JSON: {line[:80]!r}") from None
            rows.setdefault(row["id"], row)
        return rows

    def append(self, row: Row) -> bool:
        """Write a row, through to the disk; False where the run has one already."""
        line = json.dumps(_plain(row), separators=(",", ":"), allow_nan=False).encode() + b"\n"
        with self.lock:
            if row["id"] in self.read():
                return False
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                if file.tell() and self._torn():
                    file.truncate(self._whole())
                    file.seek(0, os.SEEK_END)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        return True

    def _torn(self) -> bool:
        return not self.path.read_bytes().endswith(b"\n")

    def _whole(self) -> int:
        """Bytes up to the end of the last whole line."""
        return self.path.read_bytes().rfind(b"\n") + 1


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: null, and the row's "diverged" says so."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
