"""Which clipping rule does what to the loss: a sweep of small training runs, and the tables and figures made from it.

    python -m scripts.study plan                       # what there is to run, and how long it will take
    python -m scripts.study run                        # all of it; stop it when you like, it goes on where it was
    python -m scripts.study run --quick --out DIR      # a few tiny runs, to see that everything works
    python -m scripts.study row ID                     # run one row again and compare the numbers
    python -m scripts.study run --grid gpu --workers 1 # 125M parameters on one GPU, about 25 minutes
    python -m scripts.study carriers                   # which tensors carry what corrupted batches did
    python -m scripts.study report                     # the pages' tables and figures, from the committed rows

docs/stability.md has the question, the set-up and the results of the rules, docs/recommended.md those of the guards.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import tyro

from launch.metrics import read_run
from scripts.stability import carriers, rates
from scripts.stability.grid import DEFAULT, QUICK, Family, Grid, select
from scripts.stability.report import GUARDS_PAGE, RULES_PAGE, report
from scripts.stability.results import Results
from scripts.stability.runner import remaining, run_all, start
from scripts.stability.store import Rows

ROWS = Path("docs/data/study/rows.jsonl")
CARRIERS = Path("docs/data/study/carriers.jsonl")
PAGES = Path("docs")
IMAGES = Path("docs/images")


def rows_of(grid: Path) -> Path:
    """The committed rows of a grid."""
    return ROWS if grid == DEFAULT else ROWS.with_name(f"{grid.stem}.jsonl")


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Which part of the grid."""

    grid: Path = DEFAULT
    """The grid's file, or the name of one in scripts/stability: gpu."""
    rows: Path | None = None
    """Where the finished runs are. Default: the grid's file in docs/data/study."""
    policies: tuple[str, ...] = ()
    """Only these policies; default all."""
    blocks: tuple[str, ...] = ()
    """Only these blocks; default all."""

    @property
    def finished(self) -> Rows:
        return Rows(self.rows or rows_of(self.grid))

    def families(self) -> list[Family]:
        return select(Grid.load(self.grid).families(), self.policies, self.blocks)


@dataclasses.dataclass(frozen=True)
class Plan(Chosen):
    """Print how many runs each block has, how many are left and what they should take."""

    workers: int = 2
    """Processes, of one thread each."""
    runs: bool = False
    """Print each run's id instead."""

    def __call__(self) -> int:
        families, done = self.families(), self.finished.read().keys()
        if self.runs:
            print("\n".join(spec.id for family in families for spec in family.specs))
            return 0
        total = 0.0
        print(f"{'block':<36} {'runs':>5} {'left':>5} {'min left':>9} {'so far':>7}")
        for block in dict.fromkeys(family.block for family in families):
            inside = [family for family in families if family.block == block]
            # A later block may add branches to a twin that an earlier one has.
            specs = {spec.id for family in inside for spec in family.specs}
            minutes = sum(remaining(family, done) for family in inside) / self.workers / 60
            total += minutes
            print(f"{block:<36} {len(specs):>5} {len(specs - done):>5} {minutes:>9.1f} {total:>7.1f}")
        return 0


@dataclasses.dataclass(frozen=True)
class Run(Chosen):
    """Run what has no row yet, and show what is left and for how long."""

    workers: int = 2
    """Processes, of one thread each."""
    work: Path = Path("runs/study")
    """Folder for what runs need while they run: logs and snapshots."""
    quick: bool = False
    """A few tiny runs and a report of them, all below --out; the committed rows are left alone."""
    out: Path = Path("runs/study-quick")
    """--quick: the folder."""

    def __call__(self) -> int:
        if not self.quick:
            grid, rows = Grid.load(self.grid), self.finished
            failed = run_all(grid, self.families(), rows, self.work, self.workers)
        else:
            grid, rows = Grid.load(QUICK), Rows(self.out / "rows.jsonl")
            failed = run_all(grid, list(grid.families()), rows, self.out / "work", self.workers)
            self.out.mkdir(parents=True, exist_ok=True)
            for page in (RULES_PAGE, GUARDS_PAGE):
                shutil.copy(Path(__file__).parents[1] / PAGES / page, self.out / page)
            report(grid, rows.read(), [], self.out, self.out)
        for line in failed:
            print("failed:", line, file=sys.stderr)
        return 1 if failed else 0


@dataclasses.dataclass(frozen=True)
class Row:
    """Run one row again, from the start, and compare its numbers with the recorded ones."""

    id: Annotated[str, tyro.conf.Positional]
    grid: Path = DEFAULT
    rows: Path | None = None

    def __call__(self) -> int:
        recorded = Rows(self.rows or rows_of(self.grid)).read().get(self.id)
        spec = next(spec for spec in Grid.load(self.grid).find(self.id).specs if spec.id == self.id)
        print(spec.command)
        with tempfile.TemporaryDirectory() as folder:
            start(spec, Path(folder))
            run = read_run(Path(folder))
        loss, versions = run.validation[-1]["loss"], run.header["versions"]
        print(f"validation loss {loss!r}")
        if recorded is None:
            return 0
        same = loss == recorded["validation"]
        print(f"recorded        {recorded['validation']!r}: {'the same' if same else 'NOT the same'}")
        for what, here in (("command", spec.command), ("versions", versions), ("data", run.header["data"]["digest"])):
            if recorded[what] != here:
                print(f"the recorded run had other {what}: {recorded[what]}")
        return 0 if same else 1


@dataclasses.dataclass(frozen=True)
class Carriers:
    """Put parts of faulted models back as their twins have them, and see what is left of the loss's excess."""

    grid: Path = DEFAULT
    rows: Path = CARRIERS
    workers: int = 2
    """Processes, of one thread each."""
    work: Path = Path("runs/study-carriers")
    """Folder for logs and snapshots."""

    def __call__(self) -> int:
        carriers.run(Grid.load(self.grid), Rows(self.rows), self.work, self.workers)
        return 0


@dataclasses.dataclass(frozen=True)
class Report:
    """Make the pages' tables and the figures from the rows."""

    grid: Path = DEFAULT
    """The grid's file, or its name. Of another than the default one, the tables of learning rates are printed."""
    rows: Path | None = None
    """Where the finished runs are. Default: the grid's file in docs/data/study."""
    carriers: Path = CARRIERS
    pages: Path = PAGES
    """The folder of the pages."""
    images: Path = IMAGES

    def __call__(self) -> int:
        grid, rows = Grid.load(self.grid), Rows(self.rows or rows_of(self.grid)).read()
        if self.grid != DEFAULT:
            print("\n\n".join(rates.tables(Results(grid, rows, rates.PART)).values()))
            return 0
        report(grid, rows, list(Rows(self.carriers).read().values()), self.pages, self.images)
        return 0


def main() -> None:
    started = time.monotonic()
    commands = {"plan": Plan, "run": Run, "row": Row, "carriers": Carriers, "report": Report}
    command = tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)  # type: ignore[arg-type]
    code = command()
    print(f"took {time.monotonic() - started:.0f} s")
    sys.exit(code)


if __name__ == "__main__":
    main()
