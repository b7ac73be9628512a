"""Stages the pages of the documentation site: what zensical builds from.

    python -m scripts.website build/website

Files of the repository stay what they are, so that GitHub shows them too. The staged copy has the repository's own
folders, and differs in four ways:

- README.md of a folder is its index.md.
- A link to a file that is no page (a test, a script) leads to a page with its source, as there is no other copy of it
  in the site. A link to a folder leads to a page with a list of its files.
- `reference/` has a page for each kind of public name, made by mkdocstrings from the docstrings.
- zensical.toml has the navigation: the tables of docs/README.md in their order, docs/frameworks, the reference.

Every page of docs/ has to be in a table of docs/README.md or lie in docs/frameworks; what lies elsewhere is an error.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
FENCE = re.compile(r"^(```+).*?^\1[ ]*$", re.MULTILINE | re.DOTALL)
IMAGES = {".png", ".svg", ".jpg", ".gif"}
TITLES = {  # of pages whose file name does not make one
    "olmo_core": "OLMo-core",
    "torchtitan": "torchtitan",
    "transformers": "Transformers, TRL",
    "muon": "Muon and AdamW",
    "rules": "Published rules",
    "versions": "Supported versions",
    "CONTRIBUTING": "Contributing",
    "CHANGELOG": "Changes",
}
SECTIONS = {  # of the reference, by the module that a name is defined in; the first that fits
    "dist_clip.policies": ("Policies", "Rules that say how gradients are scaled, and what a rule of one's own needs."),
    "dist_clip.guards": ("Guards", "Rules that say which steps not to take, and what a guard of one's own needs."),
    "dist_clip.errors": ("Errors", "What is raised, and when."),
    "dist_clip": ("Clipping", "The clipper, its reports and what goes with them."),
}
FIRST = {"GradClipper", "ClipReport", "clip_grad_norm_", "recommended"}  # on their page of the reference
PRIVATE = {"adapter"}  # modules of the package's top that adapters share, and which nobody else imports


def pages() -> list[str]:
    """The repository's pages that the site has, as paths from its root."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("launch/*.md")]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def staged(path: str) -> str:
    """Where the site has a file or folder of the repository, as a path from its root."""
    if path.endswith(".md"):
        return re.sub(r"README\.md$", "index.md", path)
    if Path(path).suffix in IMAGES or path.startswith("docs/"):
        return path
    if (ROOT / path).is_dir():
        return f"source/{path}/index.md"
    return f"source/{path}.md"


def targets(text: str, page: str) -> Iterator[str]:
    """Paths from the root of what a page links to in the repository, in order, without anchors."""
    for match in LINK.finditer(FENCE.sub("", text)):
        path = resolved(match[2], page)
        if path is not None:
            yield path


def resolved(target: str, page: str) -> str | None:
    """The path from the root that a link of a page leads to, without its anchor; None for links out of the repository."""
    path = target.partition("#")[0]
    if not path or re.match(r"[a-z]+:", path):
        return None
    return os.path.normpath(PurePosixPath(page).parent / path)


def rewritten(text: str, page: str) -> str:
    """A page's text with links and lists as the site needs them. Blocks of code stay as they are.

    What belongs to an item of a numbered list is indented by three here, which is where GitHub wants it, and by four in
    the site, whose engine wants that of every list.
    """

    def link(match: re.Match[str]) -> str:
        path = resolved(match[2], page)
        if path is None:
            return match[0]
        _, hash_, anchor = match[2].partition("#")
        return match[1] + os.path.relpath(staged(path), Path(staged(page)).parent) + hash_ + anchor + match[3]

    def prose(part: str) -> str:
        return re.sub(r"^(?= {3})", " ", LINK.sub(link, part), flags=re.MULTILINE)

    parts, end = [], 0
    for fence in FENCE.finditer(text):
        parts += [prose(text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, prose(text[end:])])


def tracked(folder: str) -> list[str]:
    """Files of a folder that belong to the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", folder],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return sorted(listed.stdout.split())


def source_pages(wanted: set[str]) -> dict[str, str]:
    """Pages with the source of files, and with the lists of folders, that pages link to."""
    made = {}
    todo = sorted(wanted)
    while todo:
        path = todo.pop()
        front = f"---\ntitle: {PurePosixPath(path).name}\nsearch:\n  exclude: true\n---\n\n# `{path}`\n\n"
        if staged(path) in made:
            continue
        if (ROOT / path).is_dir():
            files = [name for name in tracked(path) if (ROOT / name).suffix in {".py", ".sh", ".toml", ".txt"}]
            here = Path(staged(path)).parent
            lines = [f"- [{name}]({os.path.relpath(staged(name), here)})\n" for name in files]
            made[staged(path)] = front + "".join(lines)
            todo += files
        else:
            text = (ROOT / path).read_text(encoding="utf-8")
            ticks = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
            language = {".py": "python", ".sh": "bash", ".sbatch": "bash", ".toml": "toml"}.get(
                Path(path).suffix, "text"
            )
            made[staged(path)] = f"{front}{ticks}{language}\n{text.rstrip()}\n{ticks}\n"
    return made


def defined_in(path: str) -> dict[str, str]:
    """The module in which each public name of a module is defined; read from the source, so that torch is not needed."""
    own = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    modules = {
        alias.asname or alias.name: node.module or ""
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return {name: modules.get(name, own) for name in exported(path) if not name.startswith("__")}


def public_names() -> dict[str, str]:
    """The module in which each public name of the package is defined."""
    return defined_in("dist_clip/__init__.py")


def exported(path: str) -> list[str]:
    """The names in a module's ``__all__``."""
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "__all__" for t in node.targets):
            return list(ast.literal_eval(node.value))
    return []


def adapters() -> list[str]:
    """Public modules that the package does not import by itself: one a framework. All have an ``__all__``."""
    tops = [*ROOT.glob("dist_clip/*.py"), *ROOT.glob("dist_clip/*/__init__.py")]
    modules = {(path.parent if path.name == "__init__.py" else path).stem: path for path in tops}
    imported = {module.split(".")[1] for module in public_names().values() if "." in module}
    return sorted(
        name
        for name, path in modules.items()
        if not name.startswith("_") and name not in imported | PRIVATE | {"dist_clip"}
        and path.parent != ROOT and exported(path.relative_to(ROOT).as_posix())
        and (path.name != "__init__.py" or name == "megatron")
    )  # fmt: skip


def entry(name: str, module: str = "dist_clip", level: int = 2) -> str:
    """What mkdocstrings makes the entry of a public name of a module from."""
    return (
        f"\n::: {identifier(name, module)}\n    options:\n      heading: {module}.{name}\n      toc_label: {name}\n"
        f"      heading_level: {level}\n"
    )


def identifier(name: str, module: str = "dist_clip") -> str:
    """What the reference finds a public name by: where a module has the same name, by the place of its definition."""
    folder = module.replace(".", "/")
    if (ROOT / folder / f"{name}.py").exists():
        return f"{defined_in(f'{folder}/__init__.py')[name]}.{name}"
    return f"{module}.{name}"


def reference_pages() -> dict[str, str]:
    """The pages of the reference: each public name once, under the kind of thing that it is."""
    sections: dict[str, list[str]] = {prefix: [] for prefix in SECTIONS}
    for name, module in public_names().items():
        sections[next(prefix for prefix in SECTIONS if module.startswith(prefix))].append(name)
    made = {}
    index = ["# Reference\n\nEverything public, from the docstrings.\n"]
    for prefix in reversed(SECTIONS):
        title, what = SECTIONS[prefix]
        names = sorted(sections[prefix], key=lambda name: (name not in FIRST, name.lower()))
        page = title.lower() + ".md"
        made[f"reference/{page}"] = f"# {title}\n\n{what}\n" + "".join(map(entry, names))
        links = " · ".join(f"[`{name}`]({page}#{identifier(name)})" for name in names)
        index.append(f"\n## [{title}]({title.lower()}.md)\n\n{what}\n\n{links}\n")
    modules = adapters()
    text = "# Frameworks\n\nA module for each framework; `import dist_clip` imports none of them.\n"
    for name in modules:
        module = f"dist_clip.{name}"
        file = f"dist_clip/{name}.py"
        names = exported(file if (ROOT / file).exists() else f"dist_clip/{name}/__init__.py")
        text += f"\n::: {module}\n    options:\n      members: false\n"
        text += "".join(entry(each, module, 3) for each in names)
    made["reference/frameworks.md"] = text
    links = " · ".join(f"[`dist_clip.{name}`](frameworks.md#dist_clip.{name})" for name in modules)
    index.append(f"\n## [Frameworks](frameworks.md)\n\n{links}\n")
    return {"reference/index.md": "".join(index), **made}


def title(path: str) -> str:
    """A short title for the navigation."""
    stem = PurePosixPath(path).stem
    if stem in ("README", "index"):
        return str(PurePosixPath(path).parent).capitalize()
    return TITLES.get(stem, stem[0].upper() + stem[1:].replace("_", " ").replace("-", " "))


def navigation() -> list[dict[str, object]]:
    """Sections and pages, in the order of docs/README.md; fails if a page of docs/ is in none of them."""
    index = "docs/README.md"
    nav: list[dict[str, object]] = [{"dist_clip": "index.md"}, {"All pages": staged(index)}]
    text = (ROOT / index).read_text(encoding="utf-8")
    seen = {index, "README.md"}
    for heading, body in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL):
        entries = []
        for path in targets(body, index):
            if path.endswith(".md") and path not in seen and not path.startswith("docs/frameworks/"):
                seen.add(path)
                entries.append({title(path): staged(path)})
        nav.append({heading: entries})
    frameworks = [path for path in pages() if path.startswith("docs/frameworks/")]
    seen.update(frameworks)
    if frameworks:
        nav.insert(3, {"Frameworks": [{title(path): staged(path)} for path in frameworks]})
    lost = [path for path in pages() if path.startswith("docs/") and path not in seen]
    if lost:
        raise ValueError(f"docs/README.md, from which the navigation is made, does not link to {lost}")
    return [*nav, {"Reference": [{title(path): path} for path in reference_pages()]}]


def toml(value: object) -> str:
    """Strings, lists and dicts as TOML on one line. JSON's strings are TOML's."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    assert isinstance(value, dict)
    return "{" + ", ".join(f"{toml(key)} = {toml(item)}" for key, item in value.items()) + "}"


def stage(out: Path) -> None:
    """Write all pages to out/pages and the configuration to out/zensical.toml."""
    shutil.rmtree(out / "pages", ignore_errors=True)
    nav = navigation()
    made = reference_pages()
    wanted: set[str] = set()
    for page in pages():
        text = (ROOT / page).read_text(encoding="utf-8")
        made[staged(page)] = rewritten(text, page)
        for path in targets(text, page):
            if not (ROOT / path).exists():
                raise ValueError(f"{page} links to {path}, which is not there")
            if path.endswith(".md"):
                continue
            if staged(path) == path:
                (out / "pages" / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / path, out / "pages" / path)
            else:
                wanted.add(path)
    made.update(source_pages(wanted))
    for path, text in made.items():
        (out / "pages" / path).parent.mkdir(parents=True, exist_ok=True)
        (out / "pages" / path).write_text(text, encoding="utf-8")
    shutil.copy(Path(__file__).parent / "extra.css", out / "pages" / "extra.css")
    template = (Path(__file__).parent / "zensical.toml").read_text(encoding="utf-8")
    assert template.count("nav = []") == 1
    config = template.replace("nav = []", "nav = [\n" + "".join(f"  {toml(entry)},\n" for entry in nav) + "]")
    config = config.replace('"ROOT', f'"{ROOT.as_posix()}')
    (out / "zensical.toml").write_text(config, encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the pages and zensical.toml")
    stage(parser.parse_args(arguments).out)


if __name__ == "__main__":
    main()
