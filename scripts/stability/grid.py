"""A grid: from a file to an ordered list of runs, each with the options of launch/train.py that make it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tomllib

from launch.faults import IN_BATCHES

DEFAULT = Path(__file__).with_name("grid.toml")
QUICK = Path(__file__).with_name("quick.toml")
AXES = ("size", "corpus", "optimizer", "condition", "policy", "fault")
NONE = "none"
"""The fault that is none."""
RULES, TUNING = "rules", "tuning"
"""Parts of the study: the rules, which is the part of blocks that name none, and what their settings were chosen from."""

Options = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Spec:
    """One run of the grid: where it stands on each axis, its options, and what it should take."""

    size: str
    corpus: str
    optimizer: str
    condition: str
    policy: str
    fault: str
    seed: int
    options: tuple[str, ...] = dataclasses.field(compare=False)
    """Of launch/train.py: all that decides the numbers."""
    ranks: int = dataclasses.field(compare=False)
    steps: int = dataclasses.field(compare=False)
    fault_step: int = dataclasses.field(compare=False)
    """First step of the fault; for a run without one, of its branches' fault."""
    seconds: float = dataclasses.field(compare=False)
    """Estimate of a run from the start; a branch takes its share of the steps."""

    @property
    def id(self) -> str:
        return "/".join((*(getattr(self, axis) for axis in AXES), str(self.seed)))

    @property
    def twin(self) -> str:
        """The id of the run without a fault that this one is held against."""
        return dataclasses.replace(self, fault=NONE).id

    @property
    def corrupts_batches(self) -> bool:
        return self.options[self.options.index("--fault") + 1] in IN_BATCHES

    @property
    def command(self) -> str:
        launcher = "python" if self.ranks == 1 else f"torchrun --standalone --nproc-per-node {self.ranks}"
        return " ".join(["OMP_NUM_THREADS=1", launcher, "-m", "launch.train", *self.options])

    @property
    def cost(self) -> float:
        """Seconds of one core; a branch goes on from its twin's snapshot, which only a single process has."""
        branches = self.fault != NONE and self.ranks == 1
        share = (self.steps - self.fault_step + 1) / self.steps if branches else 1.0
        return self.seconds * share * self.ranks


@dataclasses.dataclass(frozen=True)
class Family:
    """A run without a fault and the faulted ones that branch off it: the work that one worker takes at a time."""

    block: str
    twin: Spec
    branches: tuple[Spec, ...]

    @property
    def specs(self) -> tuple[Spec, ...]:
        return (self.twin, *self.branches)


@dataclasses.dataclass(frozen=True)
class Grid:
    """What grid.toml says."""

    raw: dict[str, Any]

    @classmethod
    def load(cls, path: Path = DEFAULT) -> Grid:
        """Read a grid's file; a name without a folder and an ending is one beside grid.toml, such as "gpu"."""
        if path.name == str(path) and not path.suffix:
            path = DEFAULT.with_name(f"{path.name}.toml")
        grid = cls(tomllib.loads(path.read_text(encoding="utf-8")))
        list(grid.families())  # a name that is not there shows now
        return grid

    def title(self, axis: str, key: str) -> str:
        return self.raw[axis][key]["title"]

    def families(self) -> Iterator[Family]:
        """In the file's order, no run twice: a seed of all cells of a block before the next seed."""
        seen: set[str] = set()
        for block in self.raw["block"]:
            for specs in self._cells(block):
                new = [spec for spec in specs if spec.id not in seen]
                seen.update(spec.id for spec in new)
                if new:
                    yield Family(block["name"], specs[0], tuple(spec for spec in new if spec.fault != NONE))

    def ids(self, part: str) -> list[str]:
        """The runs of the blocks of a part, in the file's order, each once, whichever other blocks have them as well."""
        blocks = [block for block in self.raw["block"] if part in block.get("parts", [RULES])]
        return list(dict.fromkeys(spec.id for block in blocks for specs in self._cells(block) for spec in specs))

    def _cells(self, block: dict[str, Any]) -> Iterator[list[Spec]]:
        """A run without a fault, followed by those that branch off it; a seed of all cells before the next seed."""
        axes = [block[axis] for axis in ("size", "corpus", "optimizer", "condition", "policy")]
        for seed, *place in itertools.product(block["seeds"], *axes):
            yield [self.spec(*place, fault, seed) for fault in (NONE, *block["faults"])]

    def spec(self, size: str, corpus: str, optimizer: str, condition: str, policy: str, fault: str, seed: int) -> Spec:
        place = dict(zip(AXES, (size, corpus, optimizer, condition, policy, fault), strict=True))
        options: Options = dict(self.raw["common"])
        ranks = 1
        for axis in AXES:
            entry = self.raw[axis][place[axis]]
            options |= entry["options"]
            ranks = max(ranks, entry.get("ranks", 1))
        for override in self.raw.get("override", []):
            if all(place[axis] in wanted for axis, wanted in override.items() if axis != "options"):
                options |= override["options"]
        options |= self.raw["condition"][condition]["options"]  # once more: it departs from what was tuned
        options["seed"] = seed
        seconds = self.raw["size"][size]["seconds_per_step"]
        return Spec(
            **place,
            seed=seed,
            options=tuple(arguments(options)),
            ranks=ranks,
            steps=options["steps"],
            fault_step=options["fault-step"],
            seconds=options["steps"] * seconds.get(optimizer, seconds["default"]) * (3.0 if ranks > 1 else 1.0),
        )

    def find(self, name: str) -> Family:
        """The family of the run with this id."""
        for family in self.families():
            for spec in family.specs:
                if spec.id == name:
                    return family
        raise KeyError(f"no run {name!r} in the grid; `plan --runs` lists them")


def arguments(options: Options) -> Iterator[str]:
    """{"lr": 0.01, "zero-init": True} as --lr 0.01 --zero-init."""
    for name, value in options.items():
        if isinstance(value, bool):
            yield f"--{name}" if value else f"--no-{name}"
        else:
            yield f"--{name}"
            yield from map(str, value if isinstance(value, list) else [value])


def select(families: Iterable[Family], policies: tuple[str, ...], blocks: tuple[str, ...]) -> list[Family]:
    """Those of the named policies and blocks; of all where none is named."""
    return [
        family
        for family in families
        if (not policies or family.twin.policy in policies) and (not blocks or family.block in blocks)
    ]
