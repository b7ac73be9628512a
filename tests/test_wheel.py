"""What a user installs: sdist and wheel have what they should, and the wheel works with torch and numpy alone.

The wheel is built from the sdist, and pip installs it into an environment of its own. That has links to torch, numpy and
what they require, as they are installed here, and nothing else: pip resolves the wheel's requirements against these
without an index.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts.website.__main__ import adapters, tracked

pytest.importorskip("hatchling", reason="builds with the project's own backend, without an index")

ROOT = Path(__file__).parents[1]


class Built(NamedTuple):
    sdist: Path
    wheel: Path


def run(*command: object, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    out = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", out, cwd=ROOT)
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(out / "unpacked", filter="data")
    (source,) = (out / "unpacked").iterdir()
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out, cwd=source)
    (wheel,) = out.glob("*.whl")
    return Built(sdist, wheel)


def required(*names: str) -> set[str]:
    """The distributions that `names` need here, themselves included."""
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = canonicalize_name(todo.pop())
        if name not in found:
            found.add(name)
            wanted = map(Requirement, importlib.metadata.requires(name) or ())
            todo += [each.name for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def python(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel, torch, numpy, and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    links = folder / "torch-and-numpy"
    links.mkdir()
    for name in required("torch", "numpy"):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            target = Path(str(distribution.locate_file(top)))
            if not (links / top).exists():
                (links / top).symlink_to(target)
    venv.create(folder / "env", with_pip=False, symlinks=True)
    interpreter = folder / "env/bin/python"
    (site,) = (folder / "env/lib").glob("python*/site-packages")
    (site / "torch-and-numpy.pth").write_text(f"{links}\n")
    pip = (sys.executable, "-m", "pip", "--python", interpreter, "--isolated", "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--no-index", "--no-compile", built.wheel, cwd=folder)
    return interpreter


def test_the_sdist_has_the_sources_the_tests_and_the_pages(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names - {"PKG-INFO"} <= {*tracked("."), ".gitignore"}, "what is not in the repository"
    for folder in ("dist_clip", "launch", "scripts", "tests", "docs"):
        assert set(tracked(folder)) <= names
    links = re.findall(r"\]\(([\w./-]+)(?=[#)])", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(links) > 10
    assert set(links) <= names
    assert {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_the_wheel_has_the_package_and_nothing_else(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
    assert names == set(tracked("dist_clip"))
    assert "dist_clip/py.typed" in names
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert {Requirement(line.partition(": ")[2]).name for line in needed} == {"torch", "numpy"}


SCRIPT = """
import importlib, json, sys
import numpy, torch
before = set(sys.modules)
import dist_clip
tops = {{name.partition(".")[0] for name in set(sys.modules) - before}}
said = {{"place": dist_clip.__file__, "imported": sorted(tops - set(sys.stdlib_module_names)), "errors": {{}}}}
for name in sys.argv[1:]:
    try:
        importlib.import_module("dist_clip." + name)
    except ImportError as error:
        said["errors"][name] = str(error)

torch.manual_seed(0)
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
loss = (1000 * model(torch.ones(2, 4))).square().sum()
weight = model.weight.detach().clone()
{example}
said["skip"] = bool(report.skip)
said["norm before"] = report.global_norm.item()
said["norm after"] = torch.nn.utils.get_total_norm(p.grad for p in model.parameters()).item()
said["moved"] = not torch.equal(weight, model.weight)
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process found: its imports, the errors of the frameworks' modules, README's first example."""
    example = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert example is not None
    assert "clip_()" in example[1]
    folder = tmp_path_factory.mktemp("example")
    (folder / "example.py").write_text(SCRIPT.format(example=example[1]))
    return json.loads(run(python, "-I", folder / "example.py", *adapters(), cwd=folder))


def test_importing_it_imports_torch_and_nothing_more(said: dict[str, Any], python: Path) -> None:
    assert Path(said["place"]).is_relative_to(python.parents[1])
    files = [file for name in required("torch", "numpy") for file in importlib.metadata.distribution(name).files or ()]
    assert set(said["imported"]) <= {"dist_clip", *(file.parts[0].removesuffix(".py") for file in files)}


def test_the_first_example_of_the_readme_runs_from_the_wheel(said: dict[str, Any]) -> None:
    assert not said["skip"]
    assert said["norm before"] > 1000
    assert said["norm after"] == pytest.approx(1.0, abs=1e-5)  # the first steps are clipped globally at 1
    assert said["moved"]


def test_a_framework_that_is_missing_is_an_error_that_names_it_or_the_extra(said: dict[str, Any]) -> None:
    assert said["errors"].keys() <= set(adapters())  # dist_clip.megatron imports megatron-core at its first use
    for name, error in said["errors"].items():
        assert "dist-clip[" in error or f"needs {name}" in error, (name, error)


def test_commands_name_the_extra_that_they_need(python: Path, tmp_path: Path) -> None:
    ours = [
        each
        for each in importlib.metadata.entry_points(group="console_scripts")
        if each.module.partition(".")[0] == "dist_clip"
    ]
    assert ours
    for command in ours:
        got = subprocess.run([python.parent / command.name, "--help"], cwd=tmp_path, capture_output=True, text=True)
        assert got.returncode == 1
        assert re.fullmatch(r'[\w-]+ needs \w+: pip install "dist-clip\[\w+\]"\n', got.stderr)
