"""Running the grid: families of runs in a few long-lived processes, every finished run on disk before the next begins.

A faulted run branches off its twin's snapshot, which gives the numbers of the whole run (tests/test_launch.py) in its last
steps' time. Everything a family needs while it runs is in a folder of its own; what a killed process left there is used.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from launch.data import Corpus, DataConfig, load_corpus
from launch.metrics import Run, read_run
from launch.parallel import Device, process_group
from launch.train import parse, train
from scripts.stability.grid import AXES, NONE, Family, Grid, Spec
from scripts.stability.row import Recorded, make_row
from scripts.stability.store import Rows

QUIET = ("--no-tensorboard", "--no-plot", "--no-progress", "--tensors-every", "10")
"""How a run is logged here; none of it changes a number."""


def check(families: Sequence[Family]) -> None:
    """Raise, before any of them runs, unless launch/train.py takes the options that every value of every axis brings."""
    seen: set[tuple[str, str]] = set()
    for spec in (spec for family in families for spec in family.specs):
        values = {(axis, getattr(spec, axis)) for axis in AXES}
        if not values <= seen:  # parsing takes a tenth of a second, so not of each run
            seen |= values
            try:
                parse(spec.options)
            except SystemExit:
                raise ValueError(f"launch.train does not take {shlex.join(spec.options)}") from None


def run_all(grid: Grid, families: Sequence[Family], rows: Rows, work: Path, workers: int) -> list[str]:
    """Run what has no row yet. Returns what went wrong, a line for each family."""
    work.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work / "lock", timeout=0):
            return _run_all(grid, families, rows, work, workers)
    except Timeout:
        raise RuntimeError(f"another study is running in {work}; give this one another --work folder") from None


def _run_all(grid: Grid, families: Sequence[Family], rows: Rows, work: Path, workers: int) -> list[str]:
    done = rows.read()
    todo = [family for family in families if any(spec.id not in done for spec in family.specs)]
    check(todo)
    total = sum(remaining(family, done.keys()) for family in families)
    runs = sum(spec.id not in done for family in todo for spec in family.specs)
    print(f"{len(done)} runs are done, {runs} are to do: about {total / workers / 60:.0f} min with {workers} workers")
    failed: list[str] = []
    # spawn: a forked child would share torch's threads and the parent's process group.
    executor = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=quiet_worker)
    shape = "{desc} {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left{postfix}"
    with executor, tqdm(total=round(total), bar_format=shape, dynamic_ncols=True, mininterval=1) as bar:
        futures: dict[Future[int], Family] = {
            executor.submit(run_family, family, grid.raw.get("record", {}), rows.path, work): family for family in todo
        }
        try:
            for future in as_completed(futures):
                family = futures[future]
                try:
                    runs -= future.result()
                except Exception as error:
                    failed.append(f"{family.twin.id}: {error!r}")
                    tqdm.write(failed[-1])
                bar.set_description_str(f"{runs} runs to go")
                bar.set_postfix_str(f", last: {family.twin.id}")
                bar.update(min(remaining(family, done.keys()), bar.total - bar.n))
        except KeyboardInterrupt:
            executor.shutdown(wait=False, cancel_futures=True)
            tqdm.write("stopped: finished runs have their rows, and the same command goes on from there")
            raise
    return failed


def remaining(family: Family, done: object) -> float:
    """Estimated seconds of one core for the runs of a family that have no row."""
    missing = [spec for spec in family.specs if spec.id not in done]  # type: ignore[operator]
    branches = any(spec.fault != NONE for spec in missing)
    again = family.twin.cost if branches and family.twin not in missing and family.twin.ranks == 1 else 0.0
    return again + sum(spec.cost for spec in missing)


def quiet_worker() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """A worker whose parent was killed would work off its whole queue, beside the study that was started next."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


@functools.lru_cache(maxsize=4)
def cached_corpus(data: DataConfig, seq_len: int) -> Corpus:
    return load_corpus(data, seq_len)


@functools.cache
def _device(device: Device) -> torch.device:
    """Join the process group of one that all of this process's runs share."""
    group = process_group(device)
    _kept.append(group)
    return group.__enter__()


_kept: list[object] = []  # a context manager that is collected leaves its context


def run_family(family: Family, record: dict[str, list[str]], path: Path, work: Path) -> int:
    """Run what a family still lacks; returns how many rows that made."""
    rows = Rows(path)
    done = rows.read().keys()
    folder = work / family.twin.id.replace("/", "+")
    made = 0
    for spec, run, twin in runs_of(family, [spec for spec in family.specs if spec.id not in done], folder):
        made += rows.append(make_row(spec, run, twin, Recorded.of(record, spec)))
    shutil.rmtree(folder, ignore_errors=True)
    return made


def runs_of(family: Family, wanted: Sequence[Spec], folder: Path) -> Iterator[tuple[Spec, Run, Run | None]]:
    """Each wanted run with its twin, the twin first. What lies finished in `folder` is not run again."""
    if not wanted:
        return
    snapshot = folder / "snapshot.pt"
    twin_out = folder / NONE
    branches = [spec for spec in wanted if spec.fault != NONE]
    alone = family.twin.ranks == 1
    if not finished(twin_out) or (branches and alone and not snapshot.exists()):
        save = ["--save-at", str(family.twin.fault_step - 1), "--save-to", str(snapshot)] if branches and alone else []
        start(family.twin, twin_out, save)
    twin = read_run(twin_out)
    if family.twin in wanted:
        yield family.twin, twin, None
    for spec in branches:
        out = folder / spec.fault
        start(spec, out, ["--from-snapshot", str(snapshot)] if alone else [])
        yield spec, read_run(out), twin


def finished(out: Path) -> bool:
    if not (out / "log.jsonl").exists():
        return False
    try:
        end = read_run(out).end
    except (ValueError, IndexError):  # killed within a line, or before the first one
        return False
    return end is not None and end["error"] is None


def start(spec: Spec, out: Path, more: Sequence[str] = ()) -> None:
    """One run, in this process if it takes one."""
    options = [*spec.options, "--out", str(out), *QUIET, *more]
    if spec.ranks == 1:
        cfg = parse(options)
        train(cfg, _device(cfg.device), cached_corpus(cfg.data, cfg.model.seq_len))
        return
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(spec.ranks)]
    command = [*launcher, "-m", "launch.train", *options]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{spec.command}\n{done.stderr[-2000:]}")
