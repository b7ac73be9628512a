"""The reduction plan, which turns a layout into the fewest collectives and runs them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dist_clip.layouts.layout import Layout
from dist_clip.layouts.process_groups import group_label

# torch 2.13 renamed this function and warns about the old name.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

CollectiveKind = Literal["all_reduce", "all_gather"]

GATHER_LIMIT = 16
"""Number of ranks up to which a gather is assumed to be as fast as an all-reduce.

docs/simulation.md shows that it is slower above 16 ranks of 2 nodes.
"""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One packed collective.

    Attributes:
        group: the process group.
        indices: the tensors, by number in the layout, whose power sums are reduced.
        kind: how they are reduced.
        level: depth in the chain; collectives of one level run at the same time.
        index: `indices` on the device, kept there because sending them syncs the host; None if they are all tensors.
        sends: bool [len(indices)], whether this rank sends its value of the tensor; None: every rank sends all.
    """

    group: dist.ProcessGroup
    indices: tuple[int, ...]
    kind: CollectiveKind
    level: int
    index: Tensor | None
    sends: Tensor | None = None

    def kind_for(self, p: float) -> CollectiveKind:
        # A maximum is always gathered, because the MAX of some libraries (gloo) loses a NaN and amax does not.
        return "all_gather" if math.isinf(p) else self.kind

    def take(self, sums: Tensor) -> Tensor:
        """Return the entries of `sums`, [n] or [n, k], that this rank sends, flat."""
        packed = sums.clone() if self.index is None else sums.index_select(0, self.index)
        if self.sends is not None:
            # Not a product, which would send the NaN of a copy that another rank sends.
            packed = torch.where(self.sends if sums.dim() == 1 else self.sends.unsqueeze(1), packed, 0.0)
        return packed.flatten()

    def put(self, sums: Tensor, values: Tensor) -> Tensor:
        """Return `sums` with the reduced values, packed as by `take`, in their places. May change `sums`."""
        values = values.view(len(self.indices), *sums.shape[1:])
        return values if self.index is None else sums.index_copy_(0, self.index, values)


class ReductionPlan:
    """Adds up the shards' power sums, so that every rank gets those of its logical tensors.

    One packed float64 vector travels per distinct group, whatever the number of tensors. The index is fixed at
    construction, and a rank without a gradient sends zeros, so that ranks always agree on length and order.

    Bitwise agreement. A collective gives all its ranks the same bits. But copies of a tensor may be reduced in several
    instances of a group (HSDP replicas; the tp groups of different dp ranks; the fsdp groups of two pipeline stages
    that share a tied tensor). Each instance could add in its own order, and replicas would drift apart by an ulp a
    step. There the addends are gathered and added in rank order.

    Large groups. The time of a gather grows with the group, that of an all-reduce with its logarithm. Where a tensor's
    copies lie along another group of the chain (tensors that TP + FSDP2 shards over FSDP only), each instance
    all-reduces, and one instance's sum is then spread over that other group, in the gather that runs there anyway.

    Copies. The gradients of a tensor's copies may differ by rounding, as kernels need not be deterministic. Where a vector
    travels anyway, the copy with the lowest rank sends its sum for all, also that of a whole tensor, so that all scale by
    the same bits.

    One union instead of a chain. One all-reduce over `process_group` replaces the chain in three cases: several groups
    are involved and one tensor's copy spans all ranks of `process_group` (TP + FSDP, EP + FSDP, the latter also inside
    pipeline stages); ranks take part in tensors of which they hold no piece (Megatron's experts); a group of more than
    `GATHER_LIMIT` ranks would have to gather (HSDP). Of each tensor's copies, the one with the lowest rank sends.

    Construction is collective over `process_group` and the norm groups.

    Args:
        layout: the logical tensors, with one group for the same ranks (`merge_groups`).
        process_group: a group all of whose ranks have this layout, if one is known; the caller must have checked it.
            None: a norm group that spans all tensors, if there is one.
        copies_among: number of ranks that may hold copies of this rank's tensors (world size over pipeline stages).
        shared: names of tensors of which ranks outside `process_group` or its pipeline stage hold copies (tied
            tensors).
        meet: use one union wherever there is anything to reduce, so that all ranks of `process_group` take part in it.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        process_group: dist.ProcessGroup | None = None,
        copies_among: int,
        shared: Collection[str] = (),
        meet: bool = False,
    ) -> None:
        self.collectives: list[Collective] = []
        groups: list[dist.ProcessGroup] = []
        members: dict[int, list[int]] = {}
        for i, tensor in enumerate(layout):
            for group in tensor.norm_groups:
                members.setdefault(_position(group, groups), []).append(i)
        if process_group is None:
            process_group = _spanning(layout, groups, copies_among)
        if process_group is not None and ((meet and groups) or _union_is_better(layout, groups, process_group)):
            self._plan_union(layout, process_group, shared)
        elif groups:
            chain = _Chain(layout, groups, members, copies_among, shared)
            if process_group is not None and chain.largest_gather > GATHER_LIMIT:
                self._plan_union(layout, process_group, shared)
            else:
                self.collectives = chain.collectives()
        self._carriers = _carriers(self.collectives, copies_among)

    @property
    def carries(self) -> bool:
        """Whether a number of each rank can be added over all ranks of the pipeline stage on the way, by `reduce_with`."""
        return self._carriers is not None

    def _plan_union(self, layout: Layout, group: dist.ProcessGroup, shared: Collection[str]) -> None:
        device = layout.device
        indices = list(range(len(layout)))
        # The copy with the lowest rank sends. It takes a collective to find it, because a rank does not know the copies
        # of a tensor of which it holds no piece.
        sends = _lowest_sends([min(layout.tensors[i].replica_ranks, default=math.inf) for i in indices], group, device)
        # Tensors that other stages hold as well must be added in rank order; see the class's docstring.
        for kind, chosen in (("all_reduce", False), ("all_gather", True)):
            part = [k for k, i in enumerate(indices) if (layout.names[i] in shared) is chosen]
            if part:
                self.collectives.append(
                    Collective(
                        group=group,
                        indices=tuple(indices[k] for k in part),
                        kind=kind,  # type: ignore[arg-type]
                        level=0,
                        index=_index([indices[k] for k in part], len(layout), device),
                        sends=sends if len(part) == len(indices) else sends[torch.tensor(part, device=device)],
                    )
                )

    def reduce(self, sums: Tensor, p: float = 2.0) -> Tensor:
        """Return the sums (``p = inf``: the maxima) of the shards' power sums, float64 [n] or [n, k]. Collective."""
        return self.reduce_with(sums, None, p)[0]

    def reduce_with(
        self, sums: Tensor, extra: Tensor | None, p: float = 2.0, carried: Tensor | None = None
    ) -> tuple[Tensor, list[tuple[dist.ProcessGroup, Tensor]], Tensor | None]:
        """Reduce like `reduce`, with `extra`, float64 [j], at the end of every packed vector.

        Args:
            carried: float64 [k], other numbers of this rank, to be added over the ranks of the pipeline stage. They travel
                with one collective a level, which must be possible (`carries`).

        Returns:
            The reduced sums, (group, sums of `extra` over it) for every collective, and the sums of `carried`.
        """
        extra_sums: list[tuple[dist.ProcessGroup, Tensor]] = []
        out = sums.clone() if self.collectives else sums
        levels = self.collectives[-1].level + 1 if self.collectives else 0
        for level in range(levels):
            running = [
                _launch(c, out, p, _joined(extra, carried if self._is_carrier(c) else None))
                for c in self.collectives
                if c.level == level
            ]
            for collective, buffer, work in running:
                work.wait()
                gathered = collective.kind_for(p) == "all_gather"
                values = add_up(buffer, collective.group.size(), p) if gathered else buffer
                if carried is not None and self._is_carrier(collective):
                    values, carried = torch.split(values, [len(values) - len(carried), len(carried)])
                if extra is not None:
                    values, theirs = torch.split(values, [len(values) - len(extra), len(extra)])
                    extra_sums.append((collective.group, theirs))
                out = collective.put(out, values)
        return out, extra_sums, carried

    def _is_carrier(self, collective: Collective) -> bool:
        return any(collective is carrier for carrier in self._carriers or ())

    def describe(self, index: int) -> str:
        """Return a description of how tensor `index` is reduced, for ``explain()``."""
        steps = [f"{c.kind} {group_label(c.group)}" for c in self.collectives if index in c.indices]
        return " -> ".join(steps) or "none"


class _Chain:
    """One reduction for each 1-D group, one after the other where a tensor is split over several groups.

    Large groups come first, because they may use an all-reduce, while the later ones repeat the same addition in
    several instances and have to gather.
    """

    def __init__(
        self,
        layout: Layout,
        groups: list[dist.ProcessGroup],
        members: dict[int, list[int]],
        copies_among: int,
        shared: Collection[str],
    ) -> None:
        self._layout, self._groups, self._members = layout, groups, members
        self._copies_among = copies_among
        self._order = sorted(range(len(groups)), key=lambda k: (-groups[k].size(), k))
        self._level = dict.fromkeys(self._order, 0)
        self._tensor_groups = [[_position(g, groups) for g in t.norm_groups] for t in layout]
        for rank_in_order, k in enumerate(self._order):
            earlier = set(self._order[:rank_in_order])
            before = {h for ks in self._tensor_groups if k in ks for h in ks if h in earlier}
            self._level[k] = 1 + max(self._level[h] for h in before) if before else 0
        self._spread: dict[int, list[int]] = {k: [] for k in self._order}
        self._kind = {k: self._choose(k, any(layout.names[i] in shared for i in members[k])) for k in self._order}
        self._spread[self._order[0]] += [i for i, t in enumerate(layout) if not t.norm_groups and t.everywhere]

    def _choose(self, k: int, shared: bool) -> CollectiveKind:
        if self._level[k] > 0 or shared:
            return "all_gather"
        homes = {i: self._home(i, k) for i in self._members[k] if self._ranks_after(i, k) < self._copies_among}
        if None in homes.values():
            return "all_gather"
        for i, home in homes.items():
            assert home is not None
            self._spread[home].append(i)
        return "all_reduce"

    def _ranks_after(self, i: int, k: int) -> int:
        """Return the number of ranks over which group `k` and those after it reduce tensor `i`."""
        after = self._order[self._order.index(k) :]
        return math.prod(self._groups[h].size() for h in after if h in self._tensor_groups[i])

    def _home(self, i: int, k: int) -> int | None:
        """Return a group that gathers later anyway, along which all copies of tensor `i` outside `k` lie, or None."""
        latest = max(self._level[h] for h in self._tensor_groups[i])
        replica_ranks = self._layout.tensors[i].replica_ranks
        for h in self._order:
            if self._level[h] <= latest or self._ranks_after(i, k) * self._groups[h].size() < self._copies_among:
                continue
            if len(replica_ranks.intersection(dist.get_process_group_ranks(self._groups[h]))) == 1:
                return h
        return None

    @property
    def largest_gather(self) -> int:
        """Number of ranks of the largest group that would have to gather."""
        return max((self._groups[k].size() for k in self._order if self._kind[k] == "all_gather"), default=0)

    def collectives(self) -> list[Collective]:
        """Return the collectives, by level. Collective over the groups that spread sums."""
        device = self._layout.device
        collectives = []
        for k in self._order:
            spread = set(self._spread[k])
            indices = sorted([*self._members[k], *spread])
            sends = None
            if spread:
                # One rank sends each sum that the group spreads; all ranks send what the group adds up.
                lowest = [min(self._layout.tensors[i].replica_ranks) if i in spread else 0 for i in indices]
                sends = _lowest_sends(lowest, self._groups[k], device)
            index = _index(indices, len(self._layout), device)
            collectives.append(Collective(self._groups[k], tuple(indices), self._kind[k], self._level[k], index, sends))
        return sorted(collectives, key=lambda collective: collective.level)


def _carriers(collectives: Sequence[Collective], copies_among: int) -> list[Collective] | None:
    """Return collectives of different levels that add over all `copies_among` ranks of the stage, each rank once, or None.

    The first needs no collective before it, and each that follows adds over ranks that the others have not added up.
    """
    chosen: list[Collective] = []
    ranks: set[int] = set()
    for collective in collectives:
        theirs = set(dist.get_process_group_ranks(collective.group))
        if all(collective.level != other.level for other in chosen) and len(ranks & theirs) <= 1:
            chosen.append(collective)
            ranks |= theirs
    return chosen if math.prod(c.group.size() for c in chosen) == copies_among else None


def _joined(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return second if first is None else first if second is None else torch.cat([first, second])


def _launch(
    collective: Collective, sums: Tensor, p: float, extra: Tensor | None
) -> tuple[Collective, Tensor, dist.Work]:
    packed = collective.take(sums)
    if extra is not None:
        packed = torch.cat([packed, extra])
    group = collective.group
    if collective.kind_for(p) == "all_gather":
        gathered = packed.new_empty(group.size() * packed.numel())
        return collective, gathered, all_gather(gathered, packed, group=group, async_op=True)
    return collective, packed, dist.all_reduce(packed, group=group, async_op=True)


def add_up(gathered: Tensor, size: int, p: float) -> Tensor:
    """Return the ranks' vectors added in rank order, for the same bits on all ranks (``p = inf``: their maxima)."""
    rows = gathered.view(size, -1)
    return rows.amax(dim=0) if math.isinf(p) else rows.sum(dim=0)


def _spanning(layout: Layout, groups: Sequence[dist.ProcessGroup], copies_among: int) -> dist.ProcessGroup | None:
    """Return a norm group of all ranks that may hold a piece or a copy of any tensor, or None.

    FSDP's group is one if the experts' groups lie inside it.
    """
    for group in groups:
        ranks = frozenset(dist.get_process_group_ranks(group))
        if len(ranks) >= copies_among and all(tensor.mesh_ranks <= ranks for tensor in layout):
            return group
    return None


def _union_is_better(layout: Layout, groups: Sequence[dist.ProcessGroup], process_group: dist.ProcessGroup) -> bool:
    ranks = frozenset(dist.get_process_group_ranks(process_group))
    if any(not t.everywhere for t in layout):
        return True
    if len(groups) < 2:
        return False
    return process_group is layout.stage_group or any(t.replica_ranks == ranks for t in layout)


def _position(group: dist.ProcessGroup, groups: list[dist.ProcessGroup]) -> int:
    """Return the index of `group`, appended if new; by identity, because equal groups are merged."""
    for k, known in enumerate(groups):
        if known is group:
            return k
    groups.append(group)
    return len(groups) - 1


def _lowest_sends(lowest: Sequence[float], group: dist.ProcessGroup, device: torch.device | None) -> Tensor:
    """Return, as bool [k], whether this rank's copy of each tensor has the lowest of the `lowest` ranks in `group`."""
    mine = torch.tensor(lowest, dtype=torch.float64, device=device)
    minimum = mine.clone()
    dist.all_reduce(minimum, op=dist.ReduceOp.MIN, group=group)
    return mine == minimum


def _index(indices: Sequence[int], n: int, device: torch.device | None) -> Tensor | None:
    return None if len(indices) == n else torch.tensor(indices, device=device)
