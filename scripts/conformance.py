"""Makes docs/conformance.md: publicly reported errors of norms and clipping, and the tests that hold what is right here.

    python -m scripts.conformance           # writes the page
    python -m scripts.conformance --check   # fails if the page is not what the tests say

A test says which reports it is about:

    @pytest.mark.report("owner/repository#1", "owner/repository#2", situation="...", right="...")

`here` says what this library does: "right" (the default), "error by name" or "not supported". A further test of the same
situation carries the marker with the first report alone. Reports without a test are in docs/data/conformance.json.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "conformance.md"
WITHOUT_TEST = ROOT / "docs" / "data" / "conformance.json"
RESULTS = ("right", "error by name", "not supported")

HEAD = """# Reported elsewhere, tested here

Norms that were too large or too small, clips that did nothing, and crashes, as people reported them in public. Each
row says what the report is about, what is right, and which test holds it. The right value is always that of one process
with plain tensors.

"error by name" is an error on all ranks that names the tensor or the optimizer and the way out. "not supported" is what
this library has nothing to do with. `python -m scripts.conformance` makes this page from the tests' `report` markers.

"""


@dataclasses.dataclass
class Row:
    issues: tuple[str, ...]
    situation: str = ""
    right: str = ""
    here: str = "right"
    tests: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # path from the root, name


class Collector:
    """A pytest plugin that reads the markers of all tests that are collected."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        for mark in item.iter_markers("report"):
            self.add(
                mark.args, mark.kwargs, (str(item.path.relative_to(ROOT)), getattr(item, "originalname", item.name))
            )

    def add(self, issues: tuple[str, ...], said: dict[str, Any], test: tuple[str, str] | None) -> None:
        wrong = [issue for issue in issues if not re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", issue)]
        if (
            wrong
            or not issues
            or set(said) - {"situation", "right", "here"}
            or said.get("here", "right") not in RESULTS
        ):
            raise ValueError(f"{test}: report marker {issues} {said}")
        row = self.rows.setdefault(issues[0], Row(issues))
        if said:
            if row.situation and (row.issues, row.situation) != (issues, said["situation"]):
                raise ValueError(f"{test}: {issues[0]} has another row already: {row}")
            row.issues = issues
            row.situation, row.right, row.here = said["situation"], said["right"], said.get("here", "right")
        if test is not None and test not in row.tests:
            row.tests.append(test)


def collected() -> list[Row]:
    """All rows: by the tests, and by the file of those without one."""
    collector = Collector()
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        arguments = ["--collect-only", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), str(ROOT / "tests")]
        code = pytest.main(arguments, plugins=[collector])
    if code != pytest.ExitCode.OK:
        raise RuntimeError(output.getvalue())
    for entry in json.loads(WITHOUT_TEST.read_text()):
        collector.add(tuple(entry.pop("issues")), entry, None)
    rows = list(collector.rows.values())
    nameless = [row.issues for row in rows if not row.situation]
    if nameless:
        raise ValueError(f"no test says what these reports are about: {nameless}")
    untested = [row.issues for row in rows if not row.tests and row.here != "not supported"]
    if untested:
        raise ValueError(f"only what is not supported needs no test: {untested}")
    return sorted(rows, key=lambda row: order(row.issues[0]))


def order(issue: str) -> tuple[str, int]:
    repository, _, number = issue.partition("#")
    return repository.lower(), int(number)


def link(issue: str) -> str:
    repository, _, number = issue.partition("#")
    return f"[{issue}](https://github.com/{repository}/issues/{number})"


def page(rows: list[Row]) -> str:
    counts = {result: sum(row.here == result for row in rows) for result in RESULTS}
    reports = sum(len(row.issues) for row in rows)
    lines = [
        HEAD,
        f"{len(rows)} situations from {reports} reports: {counts['right']} right, {counts['error by name']} an error by "
        f"name, {counts['not supported']} not supported.\n\n",
        "| report | situation | right | here | test |\n|---|---|---|---|---|\n",
    ]
    for row in rows:
        tests = "<br>".join(f"[`{name}`](../{path})" for path, name in sorted(row.tests))
        issues = "<br>".join(map(link, row.issues))
        lines.append(f"| {issues} | {row.situation} | {row.right} | {row.here} | {tests or '-'} |\n")
    return "".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is out of date")
    options = parser.parse_args(arguments)
    made = page(collected())
    if not options.check:
        PAGE.write_text(made)
    elif PAGE.read_text() != made:
        print(f"{PAGE.relative_to(ROOT)} is not what the tests say: python -m scripts.conformance", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
