"""Owns how things are timed, counted and written down: interleaved repeats, medians, ratios, operators, bytes."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Something to time.

    Attributes:
        run: what is timed.
        prepare: what is done before each run, untimed (putting gradients back that a run has scaled).
    """

    run: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None


@dataclasses.dataclass(frozen=True)
class Timing:
    """Medians over the repeats of one candidate, in milliseconds: elapsed, and CPU time of the calling thread.

    CPU time leaves out what other processes take of the core, so on a busy machine it says more; on an idle one they agree.
    """

    wall_ms: float
    cpu_ms: float


def interleaved(candidates: Mapping[str, Candidate], repeats: int) -> dict[str, Timing]:
    """Time all candidates `repeats` times, one after the other in each round, after one round that does not count.

    Slow spells of the machine then hit all of them alike.
    """
    wall: dict[str, list[float]] = {name: [] for name in candidates}
    cpu: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, candidate in candidates.items():
            candidate.prepare()
            wall_start, cpu_start = time.perf_counter(), time.thread_time()
            candidate.run()
            cpu_end, wall_end = time.thread_time(), time.perf_counter()
            if turn > 0:
                wall[name].append(wall_end - wall_start)
                cpu[name].append(cpu_end - cpu_start)
    return {n: Timing(1e3 * statistics.median(wall[n]), 1e3 * statistics.median(cpu[n])) for n in candidates}


def once(run: Callable[[], Any]) -> Timing:
    """One run: for a first call, which happens once."""
    wall_start, cpu_start = time.perf_counter(), time.thread_time()
    run()
    return Timing(1e3 * (time.perf_counter() - wall_start), 1e3 * (time.thread_time() - cpu_start))


def settle(clip: Callable[[], Any], params: Iterable[Tensor]) -> None:
    """Clip as in the first steps of a training, in which a clipper watches how it is used: weights move between."""
    params = [param.to_local() if isinstance(param, DTensor) else param for param in params]
    for _ in range(10):
        clip()
        with torch.no_grad():
            torch._foreach_mul_(params, 1.0)


def load_average() -> float:
    """Processes that ran or wanted to run, averaged over the last minute."""
    return os.getloadavg()[0]


class OperatorCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators below autograd and DTensor: `operators` that compute or copy (no views), and `collectives`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators = 0
        self.collectives = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor takes it apart, and its parts come by here
        if func.namespace in ("c10d", "_c10d_functional"):
            self.collectives += not func._opname.startswith("wait")
        elif not func.is_view:
            self.operators += 1
        return func(*args, **(kwargs or {}))


def count(run: Callable[[], Any]) -> OperatorCount:
    counted = OperatorCount()
    with counted:
        run()
    return counted


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most bytes that torch's CPU allocator held at once for `run`, beyond what was there before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@dataclasses.dataclass(frozen=True)
class Section:
    """One table.

    Attributes:
        title, about: heading, and what was run, for people.
        columns: keys of the rows in the order of the table, with their headings.
        rows: one a candidate.
        facts: single numbers that belong to the section.
    """

    title: str
    about: str
    columns: dict[str, str]
    rows: list[dict[str, Any]]
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


def ratio_rows(timings: Mapping[str, Timing], reference: str, floor: str | None = None) -> list[dict[str, Any]]:
    """Rows with times and their ratios to the candidate `reference`, and to `floor` if there is one."""
    rows = []
    for name, timing in timings.items():
        row = {
            "name": name,
            "wall_ms": timing.wall_ms,
            "cpu_ms": timing.cpu_ms,
            "wall_ratio": timing.wall_ms / timings[reference].wall_ms,
            "cpu_ratio": timing.cpu_ms / timings[reference].cpu_ms,
        }
        if floor is not None:
            row["floor_ratio"] = timing.cpu_ms / timings[floor].cpu_ms
        rows.append(row)
    return rows


RATIO_COLUMNS = {
    "name": "",
    "wall_ms": "elapsed, ms",
    "cpu_ms": "CPU time, ms",
    "wall_ratio": "ratio, elapsed",
    "cpu_ratio": "ratio, CPU time",
}
FLOOR_COLUMN = {"floor_ratio": "to the read floor, CPU time"}
