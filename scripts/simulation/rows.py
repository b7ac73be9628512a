"""One line of the results: what one schedule sends in one step under one layout, and how long that would take."""

from __future__ import annotations

import collections
import dataclasses
import multiprocessing
from collections.abc import Sequence

import torch._dynamo  # noqa: F401  (DTensor imports it when first used, which takes seconds: once here, not in each process)

from scripts.simulation.layouts import Degrees
from scripts.simulation.network import Network
from scripts.simulation.schedules import MODES, Step, simulate_rank
from scripts.simulation.shapes import ModelShape


@dataclasses.dataclass(frozen=True)
class Call:
    """A collective, and how often it is made: `over` names the mesh dimensions of its group, on `nodes` nodes; `bytes` and
    predicted `us` are of one."""

    kind: str
    over: str
    group: int
    nodes: int
    bytes: int
    times: int
    us: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One step of one rank. `exposed_us` = `network_us`, all collectives one after the other, + `sync_us`."""

    schedule: str
    phase: str
    basis: str
    calls: tuple[Call, ...]
    host_syncs: int
    spans_stages: bool
    network_us: float
    sync_us: float
    note: str

    @property
    def exposed_us(self) -> float:
        return self.network_us + self.sync_us

    @property
    def collectives(self) -> int:
        return sum(call.times for call in self.calls)

    @property
    def bytes(self) -> int:
        return sum(call.times * call.bytes for call in self.calls)

    @property
    def largest(self) -> Call | None:
        return max(self.calls, key=lambda call: call.group, default=None)

    @property
    def kinds(self) -> tuple[tuple[str, str, int], ...]:
        """What is called over what, without bytes: the same on all ranks of a kind."""
        return tuple(sorted((call.kind, call.over, call.times) for call in self.calls))


def make_row(step: Step, network: Network, names: dict[tuple[int, ...], str]) -> Row:
    counted = collections.Counter(step.entries)
    calls = []
    for entry, times in counted.items():
        nodes = network.nodes(entry.ranks)
        # Objects travel at construction only: counted, not timed (pickling and the host's own network are what they cost).
        us = (
            0.0
            if entry.kind == "all_gather_object"
            else network.collective_us(entry.kind, entry.size, nodes, entry.bytes)
        )
        over = names.get(entry.ranks, "?")
        calls.append(Call(entry.kind, over, entry.size, nodes, entry.bytes, times, us))
    return Row(
        schedule=step.schedule,
        phase=step.phase,
        basis=step.basis,
        calls=tuple(calls),
        host_syncs=step.host_syncs,
        spans_stages=step.spans_stages,
        network_us=sum(call.us * call.times for call in calls),
        sync_us=step.host_syncs * network.parameters["host"]["sync_us"],
        note=step.note,
    )


@dataclasses.dataclass(frozen=True)
class Cell:
    """One layout: the rows of the position whose predicted time is the largest, and whether the positions are alike.

    `alike`: every schedule's collectives are the same at all simulated positions, bytes and the official AdaGC's number of
    tensors apart (stages hold different numbers of tensors).
    """

    positions: tuple[int, ...]
    rows: tuple[Row, ...]
    alike: bool


def simulate(
    model: ModelShape,
    degrees: Degrees,
    network: Network,
    *,
    positions: Sequence[int] | None = None,
    policies: Sequence[str] = tuple(MODES),
    torch_too: bool = True,
) -> Cell:
    """Simulate some ranks, each in a process of its own: of the first, of a middle and of the last stage."""
    n = degrees.ranks
    chosen = tuple(positions) if positions is not None else tuple(sorted({0, n // 2 + n // 8, n - 1}))
    found = [_in_a_process(model, degrees, rank, network, tuple(policies), torch_too) for rank in chosen]
    rows = tuple(max(same, key=lambda row: row.exposed_us) for same in zip(*found, strict=True))
    alike = all(
        len({row.kinds for row in same}) == 1
        for same in zip(*found, strict=True)
        if same[0].schedule != "AdaGC, official"
    )
    return Cell(chosen, rows, alike)


def _in_a_process(
    model: ModelShape, degrees: Degrees, rank: int, network: Network, policies: tuple[str, ...], torch_too: bool
) -> tuple[Row, ...]:
    # DTensor keeps what it has worked out for a mesh, process groups included, for the life of the process: a second world
    # in it would be given the first one's groups.
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_rank_rows, (model, degrees, rank, network, policies, torch_too))


def _rank_rows(
    model: ModelShape, degrees: Degrees, rank: int, network: Network, policies: tuple[str, ...], torch_too: bool
) -> tuple[Row, ...]:
    steps, names = simulate_rank(model, degrees, rank, policies, torch_too)
    return tuple(make_row(step, network, names) for step in steps)
