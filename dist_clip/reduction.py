"""The reduction plan: from a layout to the fewest collectives, and running them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dist_clip.layout import Layout, group_label

# torch 2.13 renamed it and warns about the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

Collective = Literal["all_reduce", "all_gather"]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One packed collective: the power sums of `indices` over `group`, at depth `level` (equal levels run at once).

    `index` is `indices` on the device (None where they are all tensors), sent there once: the copy is a host sync.
    """

    group: Any
    indices: tuple[int, ...]
    collective: Collective
    level: int
    index: Tensor | None

    def take(self, vector: Tensor) -> Tensor:
        return vector.clone() if self.index is None else vector.index_select(0, self.index)

    def put(self, vector: Tensor, values: Tensor) -> Tensor:
        return values if self.index is None else vector.index_copy_(0, self.index, values)


class ReductionPlan:
    """Adds up the shards' power sums so that every rank ends with those of its logical tensors.

    One packed float64 vector travels per distinct group, whatever the number of tensors: the index is fixed at
    construction and a rank without a gradient sends zeros, so ranks agree on length and order whatever their gradients.

    Bitwise agreement. A collective gives all its ranks the same bits. Where copies of a tensor are reduced in several
    instances of a group (HSDP replicas; the tp groups of different dp ranks), each instance could add in an order of its
    own, and replicas would drift apart by an ulp a step: there the addends are gathered and added in rank order.
    Where the norm groups of the tensors together span `process_group` (TP + FSDP, EP + FSDP), one all-reduce over it
    replaces the chain, each tensor sent by the copy that `process_group`'s first rank belongs to.

    Args:
        layout: the logical tensors.
        process_group: a group all of whose ranks have this very layout, if one is known (it must have been checked).
        copies_among: number of ranks that may hold copies of this rank's tensors (world size over pipeline stages).
    """

    def __init__(self, layout: Layout, *, process_group: Any = None, copies_among: int) -> None:
        self.n = len(layout)
        self.union: Any = None
        self.stages: list[Stage] = []
        groups: list[Any] = []
        members: dict[int, list[int]] = {}
        for i, tensor in enumerate(layout):
            for group in tensor.norm_groups:
                position = _position(group, groups)
                members.setdefault(position, []).append(i)
        if not groups:
            return
        spanned = {len(t.component) for t in layout if t.norm_groups}
        if process_group is not None and len(groups) > 1 and process_group.size() in spanned:
            self._plan_union(layout, process_group)
        else:
            self._plan_chain(layout, groups, members, copies_among)

    def _plan_union(self, layout: Layout, process_group: Any) -> None:
        first = dist.get_process_group_ranks(process_group)[0]
        indices = tuple(i for i, t in enumerate(layout) if t.norm_groups)
        self.union = process_group
        self.stages = [Stage(process_group, indices, "all_reduce", 0, _index(indices, len(layout), layout.device))]
        self._sends = torch.tensor([first in layout.tensors[i].component for i in indices], device=layout.device)

    def _plan_chain(self, layout: Layout, groups: list[Any], members: dict[int, list[int]], copies_among: int) -> None:
        # Large groups first: they may use an all-reduce, while the later ones of a chain repeat the same addition in
        # several instances and have to gather.
        order = sorted(range(len(groups)), key=lambda k: (-groups[k].size(), k))
        level = dict.fromkeys(order, 0)
        tensor_groups = [[_position(g, groups) for g in t.norm_groups] for t in layout]
        for rank_in_order, k in enumerate(order):
            earlier = set(order[:rank_in_order])
            before = {h for ks in tensor_groups if k in ks for h in ks if h in earlier}
            level[k] = 1 + max(level[h] for h in before) if before else 0
        for k in order:
            alone = all(
                groups[k].size() * _later(layout.tensors[i], groups, k, order) >= copies_among for i in members[k]
            )
            collective: Collective = "all_reduce" if level[k] == 0 and alone else "all_gather"
            index = _index(members[k], len(layout), layout.device)
            self.stages.append(Stage(groups[k], tuple(members[k]), collective, level[k], index))
        self.stages.sort(key=lambda stage: stage.level)

    def reduce(self, sums: Tensor, p: float = 2.0) -> Tensor:
        """Add (for ``p = inf``: take the largest of) the shards' power sums, float64 [n]; returns a new [n]."""
        if not self.stages:
            return sums
        out = sums.clone()
        for level in range(self.stages[-1].level + 1):
            running = [self._launch(stage, out, p) for stage in self.stages if stage.level == level]
            for stage, buffer, work in running:
                work.wait()
                if buffer.numel() > len(stage.indices):
                    rows = buffer.view(stage.group.size(), len(stage.indices))
                    buffer = rows.amax(dim=0) if math.isinf(p) else rows.sum(dim=0)
                out = stage.put(out, buffer)
        return out

    def _launch(self, stage: Stage, sums: Tensor, p: float) -> tuple[Stage, Tensor, Any]:
        packed = stage.take(sums)
        if stage.collective == "all_gather" or math.isinf(p):
            # A maximum is gathered too: some libraries' MAX loses a NaN (gloo's does), amax does not.
            gathered = packed.new_empty(stage.group.size() * packed.numel())
            return stage, gathered, _all_gather(gathered, packed, group=stage.group, async_op=True)
        if self.union is not None:
            # where, not a product: a silent copy's NaN must not be multiplied in (its own copy sends it anyway).
            packed = torch.where(self._sends, packed, 0.0)
        return stage, packed, dist.all_reduce(packed, group=stage.group, async_op=True)

    def describe(self, index: int) -> str:
        """How tensor `index` is reduced, for people."""
        steps = [f"{s.collective} {group_label(s.group)}" for s in self.stages if index in s.indices]
        return " -> ".join(steps) or "none"


class PipelineReducer:
    """Adds per-stage scalars across pipeline stages: one gather of a few numbers, added in stage order.

    Gathered rather than reduced because every data- or tensor-parallel column of the pipeline has a group of its own
    and all of them must come to the same bits.
    """

    def __init__(self, pp_group: Any) -> None:
        self.group = pp_group

    def sum(self, values: Tensor, p: float = 2.0) -> Tensor:
        """float64 [k] on each stage -> their sum (maximum for ``p = inf``) over the stages."""
        gathered = values.new_empty(self.group.size() * values.numel())
        _all_gather(gathered, values.contiguous(), group=self.group)
        rows = gathered.view(self.group.size(), values.numel())
        return rows.amax(dim=0) if math.isinf(p) else rows.sum(dim=0)


def _position(group: Any, groups: list[Any]) -> int:
    """Index of `group` by identity, appended where it is new (two equal meshes may own different groups)."""
    for k, known in enumerate(groups):
        if known is group:
            return k
    groups.append(group)
    return len(groups) - 1


def _later(tensor: Any, groups: list[Any], k: int, order: list[int]) -> int:
    """Product of the sizes of the groups that reduce `tensor` after group `k`."""
    after = order[order.index(k) + 1 :]
    return math.prod(groups[h].size() for h in after if any(groups[h] is g for g in tensor.norm_groups)) or 1


def _index(indices: Sequence[int], n: int, device: torch.device) -> Tensor | None:
    return None if len(indices) == n else torch.tensor(indices, device=device)
