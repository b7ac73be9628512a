"""What a monitor collects on the device, a row of numbers a step, and what the ranks exchange every few steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_clip.clipper import GradClipper
from dist_clip.layouts.process_groups import current_rank, device_of, distributed, gather
from dist_clip.memory.snapshot import shard_of
from dist_clip.step import ClipReport

HEAD = ("loss", "has_loss", "nonfinite", "has_report", "skip", "t")
"""The numbers that a row begins with. After them: norms, scales, and the levels before the step."""

_SHARED = 3
"""How many of them are added over the ranks."""


@dataclasses.dataclass(frozen=True)
class Source:
    """What the rows of one rank hold.

    Attributes:
        rank: the rank.
        names: FQN of each tensor.
        shards: which shard of it the rank measures; "" for whole tensors.
        levels: (policy group, numbers of its tensors), for each group whose policy remembers a usual norm.
        slots: (name, numbers of the tensors) of each slot of a policy's state that has one number a tensor.
    """

    rank: int
    names: tuple[str, ...] = ()
    shards: tuple[str, ...] = ()
    levels: tuple[tuple[int, tuple[int, ...]], ...] = ()
    slots: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return len(HEAD) + 2 * len(self.names) + sum(len(indices) for _, indices in self.levels)

    @property
    def state_width(self) -> int:
        """Numbers in a copy of the state."""
        return sum(len(indices) for _, indices in self.slots)


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of a number among those that follow the rows."""

    index: int


@dataclasses.dataclass(frozen=True)
class Window:
    """What the rows of some steps say beside their numbers.

    Attributes:
        steps: number of each step.
        scalars: what else was given at each, {name: number, or its place}.
        tables: at which of the steps, by index, the state was copied.
    """

    steps: list[int]
    scalars: list[dict[str, Any]]
    tables: list[int]


class Collector:
    """Makes the rows of this rank, and brings those of all ranks to the first one. Nothing here syncs the host.

    Construction is collective, and so is `bring_together`.

    Args:
        clipper: the clipper; None where something else clips.
        last_rank: the rows go to the last rank, which is what "first" means here then.

    Attributes:
        layout: the clipper's layout that the rows are of.
        first: whether this is the rank that the rows go to.
        sources: on the first rank: whose rows arrive there, in their order.
    """

    def __init__(self, clipper: GradClipper | None, *, last_rank: bool = False) -> None:
        self._clipper = clipper
        self.layout = None if clipper is None else clipper.layout
        options = None if clipper is None else clipper._options
        self._process_group = None if options is None else options.process_group
        self.device = device_of(None) if clipper is None else clipper.memory.device
        if clipper is None and distributed():
            self.device = device_of(dist.distributed_c10d._get_default_group())
        self._zero = torch.zeros(1, device=self.device)
        self._one = torch.ones(1, device=self.device)
        self._nan = torch.full((1,), torch.nan, device=self.device)
        self._nothing = torch.zeros(0, device=self.device)
        self._slots: list[tuple[int, str]] = []
        self._level_groups: list[int] = []
        self._source = self._own_source()
        self._levels = self._read_levels()
        self.sources = [self._source]
        self.first, self._group = True, None
        if distributed():
            group = self._process_group or dist.distributed_c10d._get_default_group()
            self._first_rank = dist.get_process_group_ranks(group)[-1 if last_rank else 0]
            self.first = current_rank() == self._first_rank
            self._group = self._senders(group, None if options is None else options.pp_group)
        if self._group is not None:
            self.sources = list(gather(self._source, self._group).values())

    def _senders(self, group: dist.ProcessGroup, pp_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
        """Return the ranks that know something the first rank does not, with it; None if this rank knows nothing more."""
        if self._clipper is not None and any(held.per_shard for held in self._clipper.memory.groups):
            return group
        if pp_group is None or pp_group.size() == 1:
            return None
        return pp_group if self._first_rank in dist.get_process_group_ranks(pp_group) else None

    def _own_source(self) -> Source:
        if self._clipper is None:
            return Source(current_rank())
        memory = self._clipper.memory
        shards, levels, slots = [""] * len(memory.layout), [], []
        for k, group in enumerate(memory.groups):
            for i in group.indices if group.per_shard else ():
                shards[i] = shard_of(memory.layout.tensors[i])
            if group.one_element or not group.indices:
                continue
            if group.policy.level(group.state) is not None:
                levels.append((k, group.indices))
                self._level_groups.append(k)
            for name, value in group.state.items():
                if value.shape == (len(group.indices),):
                    slots.append((name, group.indices))
                    self._slots.append((k, name))
        return Source(current_rank(), memory.layout.names, tuple(shards), tuple(levels), tuple(slots))

    def _read_levels(self) -> Tensor:
        """Return a copy of the levels, fp32."""
        if self._clipper is None or not self._level_groups:
            return self._nothing
        groups = [self._clipper.memory.groups[k] for k in self._level_groups]
        # cat copies, which is needed here, as the state changes in place.
        return torch.cat([level.float() for group in groups if (level := group.policy.level(group.state)) is not None])

    def row(self, loss: Tensor | None, report: ClipReport | None) -> Tensor:
        """Return the numbers of one step, fp32 [width], after the clip. `loss` is a 0-dim tensor on the device.

        The global norms are not among them: those of the tensors are, on the first rank of the whole model.
        """
        no, yes = self._zero, self._one
        head = [no, no] if loss is None else [loss.reshape(1), yes]
        if report is None or self._clipper is None:
            n = len(self._source.names)
            return torch.cat([*head, no.expand(len(HEAD) - 2), no.expand(n), yes.expand(n), self._levels]).float()
        parts = [
            report.nonfinite.reshape(1),
            yes,
            report.skip.reshape(1),
            self._clipper.memory.t.reshape(1),
            report.tensor_norms,
            report.scales,
            self._levels,
        ]
        row = torch.cat([*head, *parts]).float()
        self._levels = self._read_levels()
        return row

    def state(self) -> Tensor:
        """Return a copy of what the policies remember, a number for each tensor and slot, fp32 [state_width]."""
        if self._clipper is None or not self._slots:
            return self._nothing
        groups = self._clipper.memory.groups
        values = []
        for k, name in self._slots:
            kept = groups[k].state.get(name)  # a slot goes when the warm-up is over that recorded it
            values.append(self._nan.expand(len(groups[k].indices)) if kept is None else kept)
        return torch.cat(values).float()

    def bring_together(self, rows: Sequence[Tensor], states: Sequence[Tensor], more: Sequence[Tensor]) -> Tensor:
        """Return, on the first rank, one vector of what all sources collected, followed by `more`. Collective."""
        stacked = torch.stack(list(rows))
        if distributed():
            shared, own = torch.split(stacked, [_SHARED, stacked.shape[1] - _SHARED], dim=1)
            shared = shared.contiguous()
            dist.all_reduce(shared, group=self._process_group)
            stacked = torch.cat([shared, own], dim=1)
        mine = torch.cat([stacked.reshape(-1), *states])
        if self._group is not None:
            # A gather takes equal sizes, but stages may have more tensors or fewer.
            size = max(length(source, len(rows), len(states)) for source in self.sources)
            padded = torch.cat([mine, self._zero.expand(size - len(mine))])
            parts = [torch.empty_like(padded) for _ in self.sources] if self.first else None
            dist.gather(padded, parts, dst=self._first_rank, group=self._group)
            mine = padded if parts is None else torch.cat(parts)
        return torch.cat([mine, *(value.reshape(1).float() for value in more)]) if self.first else mine


def length(source: Source, rows: int, states: int) -> int:
    """Return how many numbers a source sends for so many rows and copies of its state."""
    return rows * source.width + states * source.state_width
