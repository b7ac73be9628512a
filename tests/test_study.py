"""scripts/study.py: measures against series made by hand, the grid, resuming after a kill, rows that can be made again,
and a page that says what its rows say.

No tolerance where two runs are the same run: a branch off a snapshot, a run resumed after a kill and a row's own command
give the same bits, for one thread makes all sums in one order.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import math
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tyro")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest.importorskip("tomllib")

from launch.compare import steps_to_recover
from launch.metrics import Run, read_run
from launch.model import ModelConfig, build_model
from launch.train import parse
from scripts import synthetic_norms
from scripts.stability import carriers, figures, guard_tables, measures, rates, runner
from scripts.stability.grid import AXES, DEFAULT, NONE, QUICK, TUNING, Family, Grid, arguments, select
from scripts.stability.report import marked, paste, sections
from scripts.stability.results import BASELINE, FLOORS, Results, Setting
from scripts.stability.row import BIN, Recorded, make_row
from scripts.stability.runner import remaining, run_family
from scripts.stability.store import Rows
from scripts.stability.tables import tables
from scripts.study import Row as Again
from scripts.study import Run as Study

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "docs/data/study/rows.jsonl"
CARRIERS = ROOT / "docs/data/study/carriers.jsonl"
PAGE, GUARDS_PAGE = ROOT / "docs/stability.md", ROOT / "docs/recommended.md"
README = ROOT / "README.md"
IMAGES = ROOT / "docs/images"
FIGURES = ("excursions-batch", "excursions-grad", "price", "course", "clipping", "tracking")


def one_process() -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, initializer=runner.quiet_worker)


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    """Another process for runs, which join a process group there."""
    with one_process() as executor:
        yield executor


def elsewhere(process: ProcessPoolExecutor, function: Any, *args: Any) -> Any:
    return process.submit(function, *args).result(timeout=300)


# ---- measures --------------------------------------------------------------------------------------------------------


def test_t_quantiles_leave_two_and_a_half_percent_above() -> None:
    for df, quantile in enumerate(measures._T_975, start=1):
        scale = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
        steps = 2000
        # Simpson's rule from 0 to the quantile.
        values = [scale * (1 + (quantile * i / steps) ** 2 / df) ** (-(df + 1) / 2) for i in range(steps + 1)]
        area = (values[0] + values[-1] + 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2])) * quantile / steps / 3
        assert area == pytest.approx(0.475, abs=4e-5), df  # quantiles have 3 decimals


def test_intervals_by_hand() -> None:
    # Mean 2, standard deviation 1, standard error 1/sqrt(3), t of 2 degrees of freedom 4.303.
    got = measures.interval([1.0, 2.0, 3.0])
    assert got == (pytest.approx(2.0), pytest.approx(4.303 / math.sqrt(3)), 3)
    assert not got.excludes_zero
    assert measures.interval([4.0]) == (4.0, None, 1)
    # Over the seeds that both have: differences 1 and 2.
    assert measures.paired({0: 2.0, 1: 4.0, 2: 9.0}, {0: 1.0, 1: 2.0}) == measures.interval([1.0, 2.0])
    assert measures.paired({0: 1.0}, {1: 1.0}) is None


def test_excursion_and_recovery_by_hand() -> None:
    assert measures.excursion([0.1, 0.7, -0.2]) == 0.7
    assert measures.excursion([-0.1, -0.2]) == 0.0
    assert measures.excursion([0.1, math.nan]) == math.inf
    # Running means of 5 (fewer at the start): 1, .5, .33, .25, .2, then 0 once the 1 is out of the window.
    assert steps_to_recover([1.0] + [0.0] * 9) == 5
    assert steps_to_recover([0.04] * 10) == 0
    assert steps_to_recover([0.0] * 9 + [1.0]) is None
    assert steps_to_recover([1.0, math.nan, *[0.0] * 9]) == 6
    assert steps_to_recover([math.nan] * 4) is None


def test_spike_score_by_hand() -> None:
    flat = [1.0, 3.0] * 50  # mean 2, standard deviation 1
    assert measures.spikes([*flat, 8.9], 100) == 0
    assert measures.spikes([*flat, 9.1], 100) == 1
    assert measures.spikes([*flat, -5.1], 100) == 1
    assert measures.spikes([*flat, math.nan, math.inf, 2.0], 100) == 2
    assert measures.spikes([math.nan] * 101 + [2.0], 100) == 1
    # The first one has widened its successor's window: standard deviation 1.21, so 7 of them are 8.5, and it is 7.0 off.
    assert measures.spikes([*flat, 9.1, 9.1], 100) == 1
    assert measures.spikes([100.0, *flat[:50]], 100) == 0  # too short for a mean
    assert measures.spike_score([*flat, 9.1, 2.0], 100) == 0.5
    assert measures.binned([1.0, 3.0, 5.0], 2) == [2.0, 5.0]


def test_a_run_whose_loss_becomes_no_number_has_a_row(grid: Grid) -> None:
    spec = grid.spec("small", "stdlib", "adamw-999", "plain", "global", "batch", 0)
    common = {"clipped_fraction": 0.5, "mean_scale": 0.5, "fault": False, "skipped": False}

    def run_of(first: int, loss: float, fault: range = range(0)) -> Run:
        steps = [
            {"step": step, "loss": loss, **common, "fault": step in fault} for step in range(first, spec.steps + 1)
        ]
        header = {"policy": {}, "parameters": 1, "data": {"digest": ""}, "versions": {}}
        return Run(header, steps, [], [{"step": spec.steps, "loss": loss}], {"seconds": 1.0, "error": None})

    faulty = range(spec.fault_step, spec.fault_step + 12)
    row = make_row(spec, run_of(spec.fault_step, math.nan, faulty), run_of(1, 2.0), Recorded(excess=True))
    assert (row["diverged"], row["branched"], row["recovery"]) == (True, True, None)
    assert row["excursion"] == math.inf
    assert row["spikes"] == spec.steps - spec.fault_step + 1
    assert row["clipped"] == 0.5
    # Corrupted batches are not compared with the twin's.
    assert (row["compared_from"], row["recovery_of"]) == (12, 181 - 12)
    broken = run_of(spec.fault_step, 2.0, faulty)
    for record in broken.steps[:12]:
        record["loss"] = 9.0
    assert make_row(spec, broken, run_of(1, 2.0), Recorded())["excursion"] == 0.0
    with pytest.raises(ValueError, match="the log has 181 of 500 steps"):
        make_row(spec, run_of(spec.fault_step, 2.0), None, Recorded())


# ---- the grid --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grid() -> Grid:
    return Grid.load(DEFAULT)


def test_no_run_is_there_twice_and_every_branch_has_its_twin(grid: Grid) -> None:
    seen: set[str] = set()
    for family in grid.families():
        new = [spec.id for spec in (*family.branches, *([family.twin] if family.twin.id not in seen else []))]
        assert not seen & {spec.id for spec in family.branches}
        seen.update(new)
        for spec in family.branches:
            assert spec.twin == family.twin.id
            assert spec.fault != NONE
            # The same options but for those of the fault.
            mine, twins = (set(" ".join(other.options).split(" --")) for other in (spec, family.twin))
            assert all(option.startswith("fault") for option in mine ^ twins)
    assert len(seen) > 500


def test_the_grid_has_what_the_page_needs(grid: Grid) -> None:
    specs = [spec for family in grid.families() for spec in family.specs]

    def seeds(**wanted: str) -> int:
        plain = {"corpus": "stdlib", "condition": "plain", **wanted}
        found = [s for s in specs if all(getattr(s, axis) == value for axis, value in plain.items())]
        return len({spec.seed for spec in found if spec.seed < 100})

    for fault in (NONE, "batch", "grad"):
        for policy in ("global", "logclip", "adagc-min", "adagc-median", "zclip"):
            for optimizer in ("adamw-999", "adamw-95"):
                for size in ("small", "large"):
                    assert seeds(size=size, optimizer=optimizer, policy=policy, fault=fault) >= 5
            for optimizer in ("lion", "muon"):
                assert seeds(size="small", optimizer=optimizer, policy=policy, fault=fault) >= 2
    assert seeds(size="small", optimizer="adamw-999", policy="adagc-shard", fault="batch") >= 2
    tuning = {seed for block in grid.raw["block"] if TUNING in block.get("parts", []) for seed in block["seeds"]}
    others = {seed for block in grid.raw["block"] if TUNING not in block.get("parts", []) for seed in block["seeds"]}
    assert tuning
    assert not others & tuning


def test_faults_begin_after_all_warm_ups_and_leave_time_to_recover(grid: Grid) -> None:
    for family in grid.families():
        for spec in family.specs:
            assert spec.fault_step >= 200
            assert spec.steps - spec.fault_step >= 100


def test_a_grid_may_be_named_and_the_gpus_is_understood() -> None:
    families = list(Grid.load(Path("gpu")).families())
    runner.check(families)
    assert all(parse(family.twin.options).device == "cuda" for family in families)
    assert sum(family.twin.cost for family in families) < 25 * 60


def test_blocks_and_overrides(grid: Grid) -> None:
    def lr(*place: str) -> float | None:
        return parse(grid.spec(*place, NONE, 0).options).optim.lr

    assert lr("small", "stdlib", "adamw-999", "plain", "global") == 3e-3
    assert lr("large", "stdlib", "adamw-999", "plain", "global") == 1e-3
    assert lr("large", "stdlib", "adamw-999", "high-lr", "global") == 3e-2  # the condition has the last word
    assert list(arguments({"lr": 0.1, "zero-init": True, "plot": False, "betas": [0.9, 0.95]})) == [
        "--lr", "0.1", "--zero-init", "--no-plot", "--betas", "0.9", "0.95",
    ]  # fmt: skip
    chosen = select(grid.families(), ("zclip",), ())
    assert {family.twin.policy for family in chosen} == {"zclip"}
    with pytest.raises(KeyError, match="no run 'x'"):
        grid.find("x")


def test_what_branches_costs_its_share(grid: Grid) -> None:
    family = next(family for family in grid.families() if family.branches)
    twin, branch = family.twin, family.branches[0]
    assert branch.cost == pytest.approx(twin.cost * (twin.steps - twin.fault_step + 1) / twin.steps)
    every = {spec.id for spec in family.specs}
    assert remaining(family, every) == 0
    # Without its snapshot, which went with the folder, the twin has to be run again for a branch.
    assert remaining(family, every - {branch.id}) == pytest.approx(twin.cost + branch.cost)


def test_options_that_launch_train_does_not_take_are_named_before_anything_runs() -> None:
    grid = Grid.load(QUICK)
    runner.check(list(grid.families()))
    grid.raw["policy"]["zclip"]["options"]["clip"] = "nothing"
    with pytest.raises(ValueError, match=r"launch.train does not take .*--clip nothing"):
        runner.check(list(grid.families()))


# ---- rows on disk ----------------------------------------------------------------------------------------------------


def test_a_torn_last_line_is_left_out_and_replaced(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.jsonl")
    assert rows.read() == {}
    assert rows.append({"id": "a", "x": math.nan, "y": [math.inf, 1.0]})
    assert not rows.append({"id": "a", "x": 2.0})  # the first one stays
    with rows.path.open("ab") as file:
        file.write(b'{"id":"b","x":')  # killed here
    assert rows.read() == {"a": {"id": "a", "x": None, "y": [None, 1.0]}}
    assert rows.append({"id": "b", "x": 3.0})
    assert rows.read().keys() == {"a", "b"}
    assert [json.loads(line)["id"] for line in rows.path.read_text().splitlines()] == ["a", "b"]
    rows.path.write_bytes(b'{"id":\n{"id":"b"}\n')  # torn in the middle: no accident of this program
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        rows.read()


APPEND = """
import pathlib, sys
from scripts.stability.store import Rows
for number in range(10):
    Rows(pathlib.Path(sys.argv[1])).append({"id": f"{sys.argv[2]}:{number}", "padding": "x" * 5000})
"""


def test_two_writers_do_not_write_over_each_other(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    commands = [[sys.executable, "-c", APPEND, str(path), str(writer)] for writer in range(2)]
    writers = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert Rows(path).read().keys() == {f"{writer}:{number}" for writer in range(2) for number in range(10)}


# ---- runs ------------------------------------------------------------------------------------------------------------


RECORD = Grid.load(QUICK).raw["record"]


def quick_family(policy: str = "adagc-median") -> Family:
    return next(f for f in Grid.load(QUICK).families() if f.branches and f.twin.policy == policy)


def run_and_die(path: Path, work: Path, at: int) -> None:
    """Run a family; be killed in the middle of its run number `at`."""
    real, count = runner.train, 0

    def train(cfg: Any, *args: Any) -> None:
        nonlocal count
        count += 1
        if count == at:
            corrupt = cfg.fault.fault == "batch"
            assert corrupt
            import launch.train

            def killed(*_: Any) -> None:
                os.kill(os.getpid(), signal.SIGKILL)

            launch.train.corrupt_batch = killed  # type: ignore[assignment]
        real(cfg, *args)

    runner.train = train
    run_family(quick_family(), RECORD, path, work)


def run_and_count(path: Path, work: Path) -> tuple[int, int]:
    """Rows made, and runs that took."""
    real, count = runner.train, 0

    def train(*args: Any) -> None:
        nonlocal count
        count += 1
        real(*args)

    runner.train = train
    return run_family(quick_family(), RECORD, path, work), count


def comparable(rows: dict[str, Any]) -> dict[str, Any]:
    return {key: {name: value for name, value in row.items() if name != "seconds"} for key, row in rows.items()}


def study(*options: str) -> str:
    """What the command line prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "scripts.study", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the quick study, which all tests of runs share."""
    out = tmp_path_factory.mktemp("study") / "quick"
    study("run", "--quick", "--out", str(out))
    return out


@pytest.fixture(scope="module")
def whole(quick: Path) -> dict[str, Any]:
    """Rows of a family that nothing happened to."""
    rows = Rows(quick / "rows.jsonl").read()
    family = {spec.id: rows[spec.id] for spec in quick_family().specs}
    assert len(family) == 3
    return family


def test_a_kill_in_the_middle_of_a_run_loses_no_finished_one(
    whole: dict[str, Any], process: ProcessPoolExecutor, tmp_path: Path
) -> None:
    path, work = tmp_path / "rows.jsonl", tmp_path / "work"
    with pytest.raises(BrokenProcessPool), one_process() as victim:
        elsewhere(victim, run_and_die, path, work, 2)
    first = path.read_bytes()
    assert [row["fault"] for row in Rows(path).read().values()] == [NONE]
    # The twin is not run again: its log and its snapshot are still there.
    assert elsewhere(process, run_and_count, path, work) == (2, 2)
    assert path.read_bytes().startswith(first)
    assert comparable(Rows(path).read()) == comparable(whole)
    assert elsewhere(process, run_and_count, path, work) == (0, 0)


def test_a_lost_snapshot_is_made_again(whole: dict[str, Any], process: ProcessPoolExecutor, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    twin = next(row for row in whole.values() if row["fault"] == NONE)
    Rows(path).append(twin)
    assert elsewhere(process, run_and_count, path, tmp_path / "work") == (2, 3)
    assert comparable(Rows(path).read()) == comparable(whole)


def test_a_rows_command_gives_its_numbers(whole: dict[str, Any], tmp_path: Path) -> None:
    """Of a run that branched off its twin's snapshot, the whole run."""
    row = next(row for row in whole.values() if row["fault"] == "batch")
    assert row["branched"]
    threads, python, *rest = shlex.split(row["command"])
    assert (threads, python, rest[:2]) == ("OMP_NUM_THREADS=1", "python", ["-m", "launch.train"])
    command = [sys.executable, *rest, "--out", str(tmp_path), "--no-plot", "--no-tensorboard"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    got = read_run(tmp_path)
    assert got.validation[-1]["loss"] == row["validation"]
    means = [sum(got.series("loss")[i : i + BIN]) / BIN for i in range(0, len(got.steps), BIN)]
    assert row["series"]["loss"] == pytest.approx(means, abs=6e-4)  # rounded to 3 digits
    assert got.header["data"]["digest"] == row["data"]


def test_what_is_put_back_is_the_twins(process: ProcessPoolExecutor, tmp_path: Path) -> None:
    spec = Grid.load(QUICK).spec("small", "stdlib", "adamw-999", "plain", "global", "batch", 0)
    row = elsewhere(process, carriers.measure, Grid.load(QUICK), tmp_path, spec)
    assert not list(tmp_path.iterdir())

    def loss_just_after(options: tuple[str, ...], out: Path) -> float:
        """Of the whole run, by the launcher's own validation in the midst of it."""
        last = spec.fault_step + 12 - 1
        validated = dataclasses.replace(spec, options=(*options, "--validate-every", str(last)))
        elsewhere(process, runner.start, validated, out)
        first, *_ = read_run(out).validation
        assert first["step"] == last
        return first["loss"]

    clean = tuple("none" if option == "batch" else option for option in spec.options)
    excess = loss_just_after(spec.options, tmp_path / "faulted") - loss_just_after(clean, tmp_path / "clean")
    assert row["excess"] == pytest.approx(excess, abs=1e-6)
    assert row["excess"] > 0.003
    assert row["without"].keys() == carriers.PARTS.keys()
    assert len({row["excess"], *row["without"].values()}) == 1 + len(carriers.PARTS)

    # All parts are the whole model, but for the embeddings of bytes that the text lacks.
    faulted, whole = (build_model(ModelConfig(), seed).state_dict() for seed in (0, 1))
    got = faulted
    for part in carriers.PARTS:
        got = carriers.put_back(got, whole, part)
    whole["embed.weight"][128:] = faulted["embed.weight"][128:]
    torch.testing.assert_close(got, whole, rtol=0, atol=0)


def test_a_quick_study_from_the_command_line(quick: Path) -> None:
    rows = Rows(quick / "rows.jsonl").read()
    grid = Grid.load(QUICK)
    assert list(rows.keys() ^ {spec.id for family in grid.families() for spec in family.specs}) == []
    assert all(row["validation"] < 5.6 for row in rows.values())
    drawn = {path.name for path in quick.glob("*.png")}
    assert drawn == {f"study-{name}.png" for name in FIGURES}
    assert {row["ranks"] for row in rows.values()} == {1, 2}
    assert not list((quick / "work").glob("*+*"))  # logs and snapshots are gone
    page = (quick / "stability.md").read_text()
    assert "18k parameters" in page


def test_a_finished_study_has_nothing_to_do(quick: Path, process: ProcessPoolExecutor) -> None:
    path = quick / "rows.jsonl"
    before = path.read_bytes()
    said = elsewhere(process, printed, Study(quick=True, out=quick))
    assert f"{len(Rows(path).read())} runs are done, 0 are to do" in said
    assert path.read_bytes() == before


def test_a_row_is_run_again(quick: Path, process: ProcessPoolExecutor) -> None:
    path = quick / "rows.jsonl"
    name = "small/stdlib/adamw-999/plain/adagc-min/grad/0"
    again = elsewhere(process, printed, Again(name, QUICK, path))
    assert ": the same" in again
    assert Rows(path).read()[name]["command"] in again


def printed(command: Study | Again) -> str:
    """What a subcommand of scripts/study.py prints; it must succeed."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert command() == 0
    return text.getvalue()


# ---- results and the page --------------------------------------------------------------------------------------------

QUICK_SETTING = Setting("small", "stdlib", "adamw-999", "plain")


def made_up(policy: str, seed: int, fault: str = NONE, **values: Any) -> dict[str, Any]:
    row = {"size": "small", "corpus": "stdlib", "optimizer": "adamw-999", "condition": "plain"}
    row |= {"policy": policy, "fault": fault, "seed": seed}  # type: ignore[dict-item]
    name = "/".join(str(value) for value in row.values())
    common = {"validation": 2.0, "diverged": False, "spikes": 0, "spike_score": 0.0, "clipped": 0.5, "scale": 0.5}
    more = {"seconds": 1.0, "versions": {}, "series": {}, "recovery": 3, "recovery_of": 31, "validation_over_twin": 0.0}
    return {**row, "id": name, **common, **more, **values}


def results_of(*rows: dict[str, Any]) -> Results:
    return Results(Grid.load(QUICK), {row["id"]: row for row in rows})


def test_prices_floors_and_verdicts_by_hand() -> None:
    got = results_of(
        *(made_up(BASELINE, seed, validation=2.0 + seed) for seed in (0, 1)),
        *(made_up(FLOORS[0], seed, validation=2.0 + seed + 0.001 * (1 + seed)) for seed in (0, 1)),
        *(
            made_up(FLOORS[1], seed, validation=2.0 + seed + 0.001) for seed in (0, 1)
        ),  # always .001: the narrower floor
        *(made_up("adagc-min", seed, validation=2.1 + seed) for seed in (0, 1)),
        *(made_up("adagc-median", seed, validation=2.005 + seed) for seed in (0, 1)),
        *(made_up("zclip", seed, validation=None, diverged=True) for seed in (0, 1)),
    )
    # Differences .001 and .002: mean .0015, standard error .0005, times 12.706.
    assert got.floor(QUICK_SETTING) == pytest.approx(0.0015 + 12.706 * 0.0005)
    assert got.price(QUICK_SETTING, "adagc-min") == (pytest.approx(0.1), pytest.approx(0.0, abs=1e-9), 2)
    verdicts = {policy: got.verdict(QUICK_SETTING, policy) for policy in got.policies(QUICK_SETTING)}
    assert verdicts["adagc-min"] == "worse"
    assert verdicts["adagc-median"] == "worse by less than the noise"  # .005 for every seed
    assert verdicts["zclip"] == "diverged"
    assert "2 of 2 diverged" in tables(got, got)["cells"]
    # The wider floor counts: that of another first batch, here .01 for every seed. Then .003 +- .038 is within the noise.
    got = results_of(
        *(made_up(policy, seed) for policy in (BASELINE, FLOORS[0]) for seed in (0, 1)),
        *(made_up(FLOORS[1], seed, validation=2.01) for seed in (0, 1)),
        *(made_up("zclip", seed, validation=2.0 + 0.006 * seed) for seed in (0, 1)),
        *(made_up("adagc-min", seed, validation=2.01 + 0.006 * seed) for seed in (0, 1)),
    )
    assert got.floor(QUICK_SETTING) == pytest.approx(0.01)
    assert got.verdict(QUICK_SETTING, "zclip") == "within the noise"
    assert got.verdict(QUICK_SETTING, "adagc-min") == "perhaps worse"


def test_excursions_are_compared_on_common_seeds() -> None:
    got = results_of(
        *(made_up(policy, seed) for policy in (BASELINE, "zclip") for seed in (0, 1)),
        *(made_up(BASELINE, seed, "batch", excursion=2.0 + seed) for seed in (0, 1)),
        made_up("zclip", 1, "batch", excursion=0.6, recovery=None),
        made_up("zclip", 0, "grad", excursion=None, diverged=True, validation_over_twin=None),
    )
    assert got.excursion_ratio(QUICK_SETTING, "zclip", "batch") == pytest.approx(0.2)
    assert got.excursion_ratio(QUICK_SETTING, "zclip", "grad") is None
    line = next(line for line in tables(got, got)["summary"].splitlines() if line.startswith("| ZClip |"))
    assert "| 0.20 | 0 of 1 |" in line
    text = tables(got, got)["cells"]
    assert "0.60 / 0.60 | not in 31" in text
    assert "inf / inf" in text
    assert "2.50 / 3.00 | 3 |" in text


def test_guard_tables_by_hand() -> None:
    """The quick grid has no guards; its rules stand in for the candidate, the control and the others."""
    grid = Grid.load(QUICK)
    raw = copy.deepcopy(grid.raw)
    raw["policy"] |= {name: {"title": name, "options": {}} for name in ("recommended", "skipped", "global-median")}
    raw["fault"]["scale"] = {"title": "larger", "options": {}}
    names = ["global", "recommended", "skipped", "global-median"]
    block = {"name": "guards", "parts": ["guards"], "policy": names, "faults": ["batch", "scale"], "seeds": [0, 1]}
    raw["block"].append({**raw["block"][1], **block})
    first = 50

    def made(policy: str, seed: int, fault: str = NONE, **values: Any) -> dict[str, Any]:
        return made_up(policy, seed, fault, command="--steps 100 --fault-step 50", **{"skipped": [], **values})

    rows = [
        *(made(policy, seed) for policy in names for seed in (0, 1)),
        *(made(floor, seed, validation=2.0 + 0.001 * seed) for floor in FLOORS for seed in (0, 1)),
        *(made("global", seed, "batch", excursion=1.0) for seed in (0, 1)),
        made("recommended", 0, "batch", excursion=0.3, skipped=[first - 1, first, first + 1]),
        made("recommended", 1, "batch", excursion=0.5, skipped=[first]),
        made("skipped", 0, "batch", excursion=0.1),
        made("recommended", 0, "scale", excursion=0.0, skipped=[first, first + 9], validation_over_twin=-0.25),
        made("global", 0, "scale", excursion=0.0, validation_over_twin=0.5),
        made("global-median", 0, "batch", excursion=0.5, skipped=[first]),
    ]
    rows[2] |= {"skipped": [7]}  # the candidate's first, without a fault
    by_id = {row["id"]: row for row in rows}
    rules = Results(Grid(raw), by_id)
    assert rules.floor(QUICK_SETTING) is not None
    results = Results(Grid(raw), by_id, guard_tables.PART, floors=rules)
    assert results.floor(QUICK_SETTING) == rules.floor(QUICK_SETTING)
    assert Results(Grid(raw), by_id, guard_tables.PART).floor(QUICK_SETTING) is None
    got = guard_tables.tables(results)
    setting = QUICK_SETTING.title(results.grid)
    assert f"| {setting} | 2 | +0.0000 ± 0.0000 |" in got["guards-clean"]
    assert "| 1, 0 | 0.50% | yes |" in got["guards-clean"]
    # .4 of 1.0, and .3 of the control's .1 on the seed that both have: neither is good enough.
    assert f"| {setting} | 2 | 1.00 | 0.40 | 0.10 | 0.40 | 3.0 | 2, 1 | **no** |" in got["guards-faults"]
    assert "larger" not in got["guards-faults"]
    assert f"| larger | {setting} | 1 | 2 | -0.250 | +0.500 |" in got["guards-lasting"]
    assert "0.40 (1.5)" in got["guards-others"]
    rows[-4] |= {"excursion": 0.15}  # twice the control's .3 / 2
    results = Results(Grid(raw), {row["id"]: row for row in rows}, guard_tables.PART)
    assert "| 2.0 | 2, 1 | yes |" in guard_tables.tables(results)["guards-faults"]


def test_learning_rate_sensitivity_by_hand() -> None:
    raw = copy.deepcopy(Grid.load(QUICK).raw)
    found = {"lr-low": 1e-3, "lr-mid": 1e-2, "lr-high": 1e-1}
    raw["condition"] |= {name: {"title": name, "options": {"lr": lr}} for name, lr in found.items()}
    block = {"name": "rates", "parts": ["rates"], "condition": list(found), "policy": ["global", "zclip"]}
    raw["block"].append({**raw["block"][1], **block, "faults": [], "seeds": [0, 1]})
    losses = {"global": (2.4, 2.0, 2.8), "zclip": (2.1, 2.1, None)}
    rows = [
        {**made_up(policy, seed, condition=condition, validation=loss), "id": f"{policy}{condition}{seed}"}
        for policy, values in losses.items()
        for condition, loss in zip(found, values, strict=True)
        for seed in (0, 1)
    ]
    for row in rows:
        row["id"] = "/".join(str(row[axis]) for axis in (*AXES, "seed"))
    results = Results(Grid(raw), {row["id"]: row for row in rows}, rates.PART)
    got = rates.tables(results)
    assert "| 1e-02 | **2.00** (2.00 to 2.00) | 2.10 (2.10 to 2.10) |" in got["rates-losses"]
    # Best of all 2.0. GlobalGC: .4 + 0 + .8; half of the first decade is within .2, and a quarter of the second. ZClip: .1
    # + .1 + what is left to ln(256) = 5.545; all of the first decade, and .1 of 3.445 of the second.
    assert "| GlobalGC 1.0 | 2 | 0.40 |  | 0.75 |  |" in got["rates-sensitivity"]
    assert "| ZClip | 2 | 1.25 | +0.8484 ± 0.0000 | 1.03 | +0.2790 ± 0.0000 |" in got["rates-sensitivity"]


def test_pasting_needs_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- generated by scripts/study.py: cells -->\nold\n<!-- end -->\nb\n")
    paste({"cells": r"new \1"}, page)
    assert page.read_text() == "a\n<!-- generated by scripts/study.py: cells -->\nnew \\1\n<!-- end -->\nb\n"
    with pytest.raises(ValueError, match="one section 'state' between"):
        paste({"state": ""}, page)


@pytest.mark.pages
def test_the_pages_say_what_the_rows_say(grid: Grid) -> None:
    made = sections(grid, Rows(ROWS).read(), list(Rows(CARRIERS).read().values()))
    assert {ROOT / "docs" / name for name in made} == {PAGE, GUARDS_PAGE}
    for page, content in made.items():
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        for name, section in content.items():
            found = marked(name).search(text)
            assert found is not None, name
            assert found[2] == section, f"{name}: run `python -m scripts.study report`"


@pytest.mark.pages
def test_the_tables_of_synthetic_norms_are_what_the_script_makes() -> None:
    for page, content in synthetic_norms.sections().items():
        for name, section in content.items():
            found = marked(name).search((ROOT / page).read_text(encoding="utf-8"))
            assert found is not None, name
            assert found[2] == section, f"{name}: run `python -m scripts.synthetic_norms`"


@pytest.mark.pages
@pytest.mark.parametrize("page", [PAGE, GUARDS_PAGE, README], ids=["stability", "recommended", "README"])
def test_the_pages_figures_are_there(page: Path) -> None:
    names = re.findall(r"\]\((?:docs/)?images/([^)]+)\)", page.read_text(encoding="utf-8"))
    assert names
    for name in names:
        assert (IMAGES / name).read_bytes().startswith(b"\x89PNG"), name


@pytest.mark.pages
def test_the_readmes_figure_shows_the_rows(grid: Grid) -> None:
    results = Results(grid, Rows(ROWS).read())
    figure = figures.fault_courses(results)
    for axes, fault in zip(figure.axes, results.faults(), strict=True):
        shown = [line for line in axes.get_lines() if len(line.get_ydata()) > 2]  # without the line at 0
        words = " ".join(text.get_text() for text in axes.texts)
        assert len(shown) == len(figures.README_RULES)
        for policy, (label, colour) in figures.README_RULES.items():
            row = next(row for row in results.of(figures.README_SETTING, policy, fault) if row["seed"] == 0)
            line = next(line for line in shown if line.get_color() == colour)
            steps = list(line.get_xdata())
            assert steps == list(range(row["compared_from"], figures.README_STEPS))
            assert list(line.get_ydata()) == row["series"]["excess"][: len(steps)]
            assert max(row["series"]["excess"]) == max(line.get_ydata())  # nothing larger is left out
            largest = results.excursions(figures.README_SETTING, policy, fault).values()
            assert f"{label}: largest {row['excursion']:.2f}\n" in words
            assert f"(mean of {len(largest)} seeds: {sum(largest) / len(largest):.2f})" in words
    figures.plt.close(figure)


@pytest.mark.pages
def test_committed_rows_are_small_and_of_this_grid(grid: Grid) -> None:
    commands = {spec.id: spec.command for family in grid.families() for spec in family.specs}
    rows = Rows(ROWS).read()
    assert ROWS.stat().st_size < 4e6
    assert {name: row["command"] for name, row in rows.items()} == {name: commands[name] for name in rows}


def test_the_recorded_commands_still_make_the_recorded_policies() -> None:
    """The flags may be called otherwise than when the rows were made, but not mean something else."""
    recorded = {row["policy"]: row for row in Rows(ROWS).read().values()}
    assert len(recorded) > 15
    for name, row in recorded.items():
        options = shlex.split(row["command"].split("launch.train ")[1])
        made = parse(options).clip.policy().config()
        # JSON has no infinity.
        wanted = {
            key: math.inf if key == "max_norm" and value is None else value
            for key, value in row["policy_config"].items()
        }
        assert {key: made[key] for key in wanted} == wanted, name
        assert made.keys() - wanted.keys() <= {"scope"}, name


def test_every_command_of_the_grid_is_understood(grid: Grid) -> None:
    families = list(grid.families())
    runner.check(families)
