"""docs/versions.md says what pyproject.toml accepts and what scripts/constraints.txt pins."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest

from scripts import supported_versions
from scripts.supported_versions import ROOT, WANTED, main, rows, runs_table

PYPROJECT = """
[project]
name = "dist-clip"
requires-python = ">=3.10"
dependencies = ["torch>=2.11"]
[project.optional-dependencies]
dev = ["dist-clip[other]", "Some_Tool", "x<3,>=1"]
other = ["x>=1", "y==2; platform_system == 'Linux'", "z; platform_system == 'Linux'"]
"""


@pytest.mark.pages
def test_the_page_is_up_to_date() -> None:
    assert main(["--check"]) == 0


def test_torch_is_tested_with_the_version_that_runs_here() -> None:
    """The table speaks of this environment: its torch is the pin."""
    made = rows((ROOT / "pyproject.toml").read_text(), (ROOT / "scripts/constraints.txt").read_text())
    (tested,) = [row[2] for row in made if row[0] == "torch"]
    assert tested == importlib.metadata.version("torch").partition("+")[0]


def test_rows_have_the_ranges_the_pins_and_the_extras() -> None:
    constraints = "torch==2.13.0\nsome-tool==7\nx==2.5  # why\ny==2\nz==3\nunrelated==1\n"
    assert rows(PYPROJECT, constraints) == [
        ("Python", "≥ 3.10", "3.11", "always"),
        ("torch", "≥ 2.11", "2.13.0", "always"),
        ("x", "≥ 1, < 3", "2.5", "`[other]`, `[dev]`"),
        ("y", '2 (platform_system == "Linux")', "2", "`[other]`"),
        ("z", 'any (platform_system == "Linux")', "3", "`[other]`"),
        ("some-tool", "any", "7", "`[dev]`"),
    ]


def test_a_package_without_a_pin_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no version of \['some-tool', 'y', 'z'\]"):
        rows(PYPROJECT, "torch==2.13.0\nx==2\n")


def test_combinations_that_were_not_run_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for each combination that is wanted, and for any other that was run, with what failed there."""
    python, torch, core = WANTED[0]
    ran = [
        {"python": python, "torch": torch, "megatron-core": core, "date": "2026-01-02", "passed": 5, "failed": 1},
        {"python": "3.99", "torch": "9.9", "megatron-core": "none", "date": "2026-01-03", "passed": 7},
    ]
    (tmp_path / "versions.json").write_text(json.dumps(ran))
    monkeypatch.setattr(supported_versions, "RUNS", tmp_path / "versions.json")
    lines = runs_table().splitlines()
    assert len(lines) == 2 + len(WANTED) + 1
    assert f"| {python} | {torch} | {core} | 2026-01-02 | 5 | 1 | 0 |" in lines
    assert "| 3.99 | 9.9 | none | 2026-01-03 | 7 | 0 | 0 |" in lines
    assert sum("not run" in line for line in lines) == len(WANTED) - 1
