"""What the pages and docstrings say: examples run, links lead somewhere, samples use what the study supports."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import dist_clip
from dist_clip.guards import registered_guards
from dist_clip.policies import options_of, registered

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("launch/*.md")])
IDS = [str(page.relative_to(ROOT)) for page in PAGES]

MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(dist_clip.__path__, "dist_clip.")
    if not name.endswith("__main__") and "triton" not in name
]


def public_objects() -> dict[str, Any]:
    """Public classes, functions and methods that do something, by name."""
    found = {}
    for name in dist_clip.__all__:
        value = getattr(dist_clip, name)
        if inspect.isfunction(value) or (inspect.isclass(value) and not issubclass(value, Exception)):
            found[name] = value
    return found


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some write a log
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if name.split(".")[1] not in dist_clip._PARTS:
            raise
        pytest.skip(str(error))
    registries = [importlib.import_module(f"dist_clip.{kind}.registry") for kind in ("policies", "guards")]
    before = [dict(registry._registered) for registry in registries]
    torch.manual_seed(0)
    try:
        results = doctest.testmod(module, extraglobs={"torch": torch})
    finally:
        for registry, known in zip(registries, before, strict=True):
            registry._registered.clear()
            registry._registered.update(known)
    assert results.failed == 0


@pytest.mark.parametrize("name", sorted(public_objects()))
def test_everything_public_has_an_example(name: str) -> None:
    value = public_objects()[name]
    assert value.__doc__, f"{name} has no docstring"
    if name not in ("Attachment", "StepInputs"):  # made by others, whose examples show them
        assert ">>>" in value.__doc__, f"the docstring of {name} has no example"


@pytest.mark.parametrize("name", sorted({**registered(), **registered_guards()}))
def test_every_option_of_a_policy_or_guard_has_a_help(name: str) -> None:
    for option in options_of({**registered(), **registered_guards()}[name]):
        assert option.help, f"{name}: {option.name} is not in the docstring's Args"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name} links to {target}"
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_prose_has_lines_of_at_most_120_characters(page: Path) -> None:
    long = [
        line
        for line in page.read_text(encoding="utf-8").splitlines()
        if len(line) > 120 and not re.match(r"\s*(\||!\[|<|\[\w+\]:|https?:)", line)
    ]
    assert not long, long[:3]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_samples_do_not_show_the_paper_s_minimum(page: Path) -> None:
    """docs/stability.md found AdaGC's default, the minimum of the warm-up, worse than GlobalNorm in most settings."""
    blocks = re.findall(r"^```.*?^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for block in blocks:
        assert "AdaGC()" not in block


def test_the_first_page_is_for_the_first_minute() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) < 700
