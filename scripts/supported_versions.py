"""Makes the tables of docs/versions.md: which versions are accepted, which the tests run with, and what ran in others.

    python -m scripts.supported_versions                    # writes the tables
    python -m scripts.supported_versions --check            # fails if the page is not what pyproject.toml and the pins say
    python -m scripts.supported_versions --run PYTHON ...   # runs the sample by each interpreter, and writes the tables
    python -m scripts.supported_versions --run PYTHON --megatron-lm CHECKOUT   # with a checkout's megatron.core

Accepted is what pyproject.toml says, tested is the pin of scripts/constraints.txt. A package without a pin is an error: it
would be tested with whatever is newest.

The second table has a row for each combination of WANTED, and for each that was run. Its numbers are in
docs/data/versions.json. An interpreter's environment needs torch, pytest, pytest-xdist, tyro, tqdm and
pytorch_optimizer; with megatron-core, einops and psutil the sample has Megatron's layouts as well. A checkout of
Megatron-LM comes before what is installed, and counts as its main branch.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "versions.md"
BEGIN, END = "<!-- scripts/supported_versions.py: begin -->", "<!-- scripts/supported_versions.py: end -->"
LAST = ("launch", "bench", "optimizers", "dev", "docs")  # extras of those who work on dist_clip, in this order
PYTHON = "3.11"  # of CI

RUNS = ROOT / "docs" / "data" / "versions.json"
RUNS_BEGIN, RUNS_END = (
    "<!-- scripts/supported_versions.py: runs -->",
    "<!-- scripts/supported_versions.py: end of runs -->",
)
NO_MEGATRON = "none"
WANTED = (  # Python, torch, megatron-core
    ("3.10", "2.11.0", NO_MEGATRON),
    ("3.11", "2.11.0", "0.16.1"),
    ("3.11", "2.13.0", "0.16.1"),
    ("3.11", "2.14.1", NO_MEGATRON),
    ("3.12", "2.13.0", "0.18.2"),
    ("3.12", "2.13.0", "0.19.2"),
    ("3.12", "2.13.0", "0.20.0 (main)"),
    ("3.12", "2.14.1", "0.19.2"),
    ("3.13", "2.14.1", NO_MEGATRON),
)
UNIT = ("clipper", "state", "functional", "guards", "torch_kernels", "selectors", "sharded")
LAYOUTS = ("ddp-2", "fsdp-uneven-2", "fsdp-mp-4", "hsdp-4", "tp-fsdp-4", "tp-sequence-fsdp-4", "ep-4", "pp-chunks-2")
MEGATRON = ("tp2-sp", "pp2-interleaved-tied", "zero-instances", "ep2-zero", "tp2-pp2-tied-bf16", "layer-wise-bf16")
PROBE = """
import json, platform, torch
try: from megatron.core.package_info import __version__ as core
except ImportError: core = None
python = ".".join(platform.python_version_tuple()[:2])
print(json.dumps([python, torch.__version__.partition("+")[0], core and core.partition("+")[0]]))
"""


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


def tests_of(megatron: bool) -> list[str]:
    """The sample, as arguments of pytest."""
    files = [*(f"tests/unit/test_{name}.py" for name in UNIT), "tests/distributed/test_layouts.py"]
    names = [f"test_training[{name}-" for name in LAYOUTS]
    if megatron:
        files += ["tests/mcore/test_layouts.py", "tests/mcore/test_megatron_fsdp.py"]
        names += [f"test_training[{name}]" for name in (*MEGATRON, "zero-3")]
    collected = [*files[: len(UNIT)]]
    for file in files[len(UNIT) :]:
        text = subprocess.run(
            [sys.executable, "-m", "pytest", "--collect-only", "-q", file], cwd=ROOT, capture_output=True, text=True
        ).stdout
        ids = [line for line in text.splitlines() if "::" in line]
        collected += [each for each in ids if each.partition("::")[2].startswith(tuple(names))]
    return collected


def run(python: str, megatron_lm: Path | None = None) -> dict[str, object]:
    """Run the sample by another interpreter. Returns its versions and how many tests passed, failed and were skipped."""
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(os.environ)
        if megatron_lm is not None:
            # Not the checkout itself, whose package "tests" would hide ours.
            (Path(folder) / "megatron").symlink_to(megatron_lm.resolve() / "megatron")
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
        made = _run(python, environment)
    if megatron_lm is not None:
        made["megatron-core"] = f"{made['megatron-core']} (main)"
    return made


def _run(python: str, environment: dict[str, str]) -> dict[str, object]:
    probe = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    version, torch, core = json.loads(probe.stdout)
    command = [
        python,
        "-m",
        "pytest",
        "-q",
        "-n",
        "2",
        "--dist",
        "loadfile",
        "-p",
        "no:cacheprovider",
    ]
    tests = tests_of(core is not None)
    result = subprocess.run([*command, *tests], cwd=ROOT, capture_output=True, text=True, env=environment)
    last = result.stdout.strip().splitlines()[-1]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    if not counts:
        raise RuntimeError(f"{python}: {last}\n{result.stderr}")
    failed = sorted(set(re.findall(r"^(?:FAILED|ERROR) (\S+)", result.stdout, re.MULTILINE)))
    today = datetime.date.today().isoformat()
    return {
        "python": version,
        "torch": torch,
        "megatron-core": core or NO_MEGATRON,
        "date": today,
        **counts,
        "ids": failed,
    }


def runs_table() -> str:
    """The table of what ran in which versions."""
    kept = {(row["python"], row["torch"], row["megatron-core"]): row for row in json.loads(RUNS.read_text())}
    lines = ["| Python | torch | megatron-core | run on | passed | failed | skipped |", "|---|---|---|---|---|---|---|"]
    for key in sorted({*WANTED, *kept}):
        row = kept.get(key)
        numbers = (
            [row["date"], *(row.get(word, 0) for word in ("passed", "failed", "skipped"))]
            if row
            else ["not run", "", "", ""]
        )
        lines.append(f"| {' | '.join(map(str, [*key, *numbers]))} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with the tables in their places."""
    for begin, made, finish in ((BEGIN, table, END), (RUNS_BEGIN, runs_table, RUNS_END)):
        before, _, rest = text.partition(begin)
        _, end, after = rest.partition(finish)
        if not end:
            raise ValueError(f"{PAGE} has no {begin} ... {finish}")
        text = f"{before}{begin}\n\n{made()}\n\n{finish}{after}"
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is out of date")
    parser.add_argument("--run", nargs="+", default=[], metavar="PYTHON", help="interpreters that run the sample first")
    parser.add_argument(
        "--megatron-lm", type=Path, metavar="CHECKOUT", help="whose megatron.core to run the sample with"
    )
    options = parser.parse_args(arguments)
    for python in options.run:
        made = run(python, options.megatron_lm)
        print(made, flush=True)
        same = [made[key] for key in ("python", "torch", "megatron-core")]
        kept = [
            row
            for row in json.loads(RUNS.read_text())
            if [row[k] for k in ("python", "torch", "megatron-core")] != same
        ]
        RUNS.write_text(json.dumps([*kept, made], indent=1) + "\n")
    text = PAGE.read_text(encoding="utf-8")
    if not options.check:
        PAGE.write_text(page(text), encoding="utf-8")
    elif page(text) != text:
        print("docs/versions.md is out of date: python -m scripts.supported_versions", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
