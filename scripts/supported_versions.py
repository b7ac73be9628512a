"""Makes the table of docs/versions.md: which versions of other packages are accepted, and which the tests run with.

    python -m scripts.supported_versions           # writes the table
    python -m scripts.supported_versions --check   # fails if the page is not what pyproject.toml and the pins say

Accepted is what pyproject.toml says, tested is the pin of scripts/constraints.txt. A package without a pin is an error: it
would be tested with whatever is newest.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "versions.md"
BEGIN, END = "<!-- scripts/supported_versions.py: begin -->", "<!-- scripts/supported_versions.py: end -->"
LAST = ("launch", "bench", "optimizers", "dev", "docs")  # extras of those who work on dist_clip, in this order
PYTHON = "3.11"  # of CI


def pins(text: str) -> dict[str, str]:
    """Package to the version that scripts/constraints.txt pins it to."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    found = (Requirement(line) for line in lines if line)
    return {canonicalize_name(each.name): str(each.specifier).removeprefix("==") for each in found}


def rows(pyproject: str, constraints: str) -> list[tuple[str, str, str, str]]:
    """Package, accepted, tested and what needs it, for each requirement of the package and of its extras."""
    project = tomllib.loads(pyproject)["project"]
    pinned = pins(constraints)
    extras = project.get("optional-dependencies", {})
    order = sorted(extras, key=lambda extra: (LAST.index(extra) if extra in LAST else -1, extra))
    needed: dict[str, tuple[str, list[str]]] = {}
    for extra, requirements in [("", project["dependencies"]), *((extra, extras[extra]) for extra in order)]:
        for requirement in map(Requirement, requirements):
            name = canonicalize_name(requirement.name)
            if name == canonicalize_name(project["name"]):
                continue  # an extra that is made of others
            accepted, wanted_by = needed.setdefault(name, (spelled(requirement), []))
            if len(spelled(requirement)) > len(accepted):  # the narrower of two, as both hold where both are installed
                needed[name] = (spelled(requirement), wanted_by)
            wanted_by.append(f"`[{extra}]`" if extra else "always")
    unpinned = sorted(set(needed) - set(pinned))
    if unpinned:
        raise ValueError(f"scripts/constraints.txt has no version of {unpinned}, which pyproject.toml names")
    python = ("Python", project["requires-python"].replace(">=", "≥ "), PYTHON, "always")
    return [python, *((name, what, pinned[name], ", ".join(by)) for name, (what, by) in needed.items())]


def spelled(requirement: Requirement) -> str:
    """The accepted versions, lower bound first."""
    parts = sorted((str(each) for each in requirement.specifier), key=lambda each: (each[0] == "<", each))
    signs = {">=": "≥ ", "<=": "≤ ", "==": "", ">": "> ", "<": "< ", "!=": "not "}
    where = f" ({requirement.marker})" if requirement.marker else ""
    named = [re.sub(r"^(>=|<=|==|!=|>|<)", lambda sign: signs[sign[0]], part) for part in parts]
    return (", ".join(named) or "any") + where


def table() -> str:
    """The table of docs/versions.md."""
    lines = ["| package | accepted | tested with | needed by |", "|---|---|---|---|"]
    made = rows((ROOT / "pyproject.toml").read_text(), (ROOT / "scripts/constraints.txt").read_text())
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in made)])


def page(text: str) -> str:
    """The page with the table in its place."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{PAGE} has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is out of date")
    options = parser.parse_args(arguments)
    text = PAGE.read_text(encoding="utf-8")
    if not options.check:
        PAGE.write_text(page(text), encoding="utf-8")
    elif page(text) != text:
        print("docs/versions.md is out of date: python -m scripts.supported_versions", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
