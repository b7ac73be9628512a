"""The pages of the documentation site, as scripts/website stages them: all there, and read alike on GitHub and the site."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import markdown
import pytest
from markdown_it import MarkdownIt

import dist_clip
from scripts.website import __main__ as website

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("website")
    website.stage(out)
    return out


def test_every_public_name_is_in_the_reference_once(site: Path) -> None:
    found: Counter[str] = Counter()
    for page in (site / "pages/reference").glob("*.md"):
        found.update(re.findall(r"^      heading: dist_clip\.(\w+)$", page.read_text(encoding="utf-8"), re.MULTILINE))
    assert found == Counter(name for name in dist_clip.__all__ if name != "__version__")
    frameworks = (site / "pages/reference/frameworks.md").read_text(encoding="utf-8")
    assert "::: dist_clip.megatron\n" in frameworks
    for name in website.exported("dist_clip/megatron/__init__.py"):
        assert f"      heading: dist_clip.megatron.{name}\n" in frameworks


def test_every_page_is_in_the_navigation_and_all_links_lead_to_staged_files(site: Path) -> None:
    staged = {path.relative_to(site / "pages").as_posix() for path in (site / "pages").rglob("*.md")}
    config = (site / "zensical.toml").read_text(encoding="utf-8")
    for page in sorted(staged):
        if page.startswith(("docs/", "launch/", "reference/")):
            assert f'"{page}"' in config, page
    for page in sorted(staged):
        path = site / "pages" / page
        text = website.FENCE.sub("", path.read_text(encoding="utf-8"))
        for target in re.findall(r"\]\(([^)\s#]+)", text):
            if not re.match(r"[a-z]+:", target):
                assert (path.parent / target).exists(), f"{page} links to {target}"


def test_a_page_that_no_table_names_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(website, "pages", lambda: ["README.md", "docs/README.md", "docs/new.md"])
    with pytest.raises(ValueError, match=r"does not link to \['docs/new.md'\]"):
        website.navigation()


def test_a_new_page_of_a_framework_is_taken_into_the_navigation(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [*website.pages(), "docs/frameworks/some_framework.md"]
    monkeypatch.setattr(website, "pages", lambda: pages)
    assert {"Some framework": "docs/frameworks/some_framework.md"} in website.navigation()[3]["Frameworks"]  # type: ignore[operator]


def test_links_are_rewritten_and_code_is_not() -> None:
    text = (
        "[a](../README.md#use) [b](../tests/harness.py) [c](choosing.md) [d](https://x.org/README.md) "
        "![e](images/x.png) [f](#here) [g](../tests/gpu)\n   - i\n\n```\n   [h](../README.md)\n```\n"
    )
    assert website.rewritten(text, "docs/layouts.md") == (
        "[a](../index.md#use) [b](../source/tests/harness.py.md) [c](choosing.md) [d](https://x.org/README.md) "
        "![e](images/x.png) [f](#here) [g](../source/tests/gpu/index.md)\n    - i\n\n```\n   [h](../README.md)\n```\n"
    )


@pytest.mark.pages
@pytest.mark.parametrize("page", website.pages())
def test_github_and_the_site_read_a_page_alike(page: str) -> None:
    """GitHub reads CommonMark; the site's engine reads an older Markdown, to which a list right below a line is none."""
    text = (ROOT / page).read_text(encoding="utf-8")
    github = MarkdownIt("commonmark").enable("table").render(text)
    staged = website.rewritten(text, page)
    extensions = ["attr_list", "fenced_code", "tables"]
    theirs, ours = (tags(html) for html in (github, markdown.markdown(staged, extensions=extensions)))
    assert ours == theirs


def tags(html: str) -> dict[str, int]:
    names = ("a", "blockquote", "code", "h1", "h2", "h3", "img", "li", "ol", "td", "th", "ul")
    return {name: len(re.findall(rf"<{name}[ />]", html)) for name in names}
