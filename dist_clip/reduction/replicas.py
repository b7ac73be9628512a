"""The comparison of replicas: what the layout takes for copies of one tensor must have gradients of the same norm.

A framework's marks can be wrong. Where ranks hold other tensors under one name, or parts of one tensor that nothing
marks as parts, each rank would find a norm of its own and clip by it. So each copy is measured by itself at a few clips,
and the norms are compared over all ranks that train the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dist_clip.errors import LayoutError
from dist_clip.layouts.layout import Layout
from dist_clip.layouts.process_groups import any_rank, gather, group_size, name_ranks
from dist_clip.memory.host_copy import capturing

TOLERANCE = 1e-3
"""Relative difference of two copies' norms that no rounding explains; `tolerance_of` adds what one of few elements does."""

_SHOWN = 8
"""Ranks that an error names one by one."""

_EXACT = 1e-12
"""Relative difference that the order of additions in float64 makes."""

_SAME = 1e-6
"""Relative difference below which the norms of two shards are taken for equal."""


@dataclasses.dataclass
class Rounding:
    """Differences between copies that rounding explains, as by kernels that are not deterministic.

    Attributes:
        clip: number of the last clip at which copies were compared; 0 before the first.
        names: the tensors whose copies differed.
        worst: the largest relative difference of two norms.
        where: the tensor of that difference.
    """

    clip: int = 0
    names: set[str] = dataclasses.field(default_factory=set)
    worst: float = 0.0
    where: str = ""


class ReplicaCheck:
    """Compares the norms of copies at the clips 1, 2, 4, 8, and so on. Construction is collective over `process_group`.

    Args:
        layout: the logical tensors of this rank.
        names: names of all tensors of the model, other pipeline stages' included, the same on every rank.
        process_group: all ranks that train the model; None: all ranks.
        device: where norms live.
        copies_among: number of ranks that may hold copies of this rank's tensors (world size over pipeline stages).
        shared: names of tensors that other pipeline stages hold as well.
        enabled: whether to compare at all, the same on every rank.
    """

    def __init__(
        self,
        layout: Layout,
        names: Iterable[str],
        process_group: dist.ProcessGroup | None,
        device: torch.device,
        *,
        copies_among: int,
        shared: Collection[str],
        enabled: bool,
    ) -> None:
        self._layout, self._process_group = layout, process_group
        self._names = sorted(set(names))
        self._clips = 0
        self._marked = any(tensor.marked_groups for tensor in layout)
        self.rounding = Rounding()
        self.enabled = enabled
        # A tensor has one copy if its ranks are all that may hold it.
        copies = self._marked or any(
            len(tensor.replica_ranks) not in (0, copies_among) or tensor.name in shared for tensor in layout
        )
        self.needed = (
            enabled
            and group_size(process_group) > 1
            and bool(any_rank(torch.tensor(copies, device=device), process_group))
        )

    def check(self, squares: Tensor, weight_squares: Callable[[], Tensor]) -> None:
        """Compare copies, if it is their turn: then collective over the norm groups and `process_group`, with a host sync.

        Args:
            squares: float64 [n], squared norms of this rank's shards of the gradients.
            weight_squares: returns those of the parameters; called only where a mark alone says that a tensor is split.

        Raises:
            LayoutError: copies differ by more than rounding, or the shards of a tensor look like copies. The same on
                every rank.
        """
        if not self.needed:
            return
        self._clips += 1
        # A graph cannot hold what the host must read. The clips before the capture were compared.
        if self._clips & (self._clips - 1) or capturing(squares.device):
            return
        columns = [squares, weight_squares()] if self._marked else [squares]
        sums, alike = self._per_copy(torch.stack(columns, dim=1))
        norms = sums[:, 0].sqrt()
        held = torch.tensor(
            [bool(tensor.replica_ranks) for tensor in self._layout], dtype=torch.bool, device=norms.device
        )
        known = held & torch.isfinite(norms)
        tolerances = [tolerance_of(tensor.dtype, tensor.numel) for tensor in self._layout]
        mine = torch.stack([norms, -norms, alike, torch.tensor(tolerances).to(norms)], dim=1)
        most = norms.new_full((len(self._names), 4), -torch.inf)
        position = {name: i for i, name in enumerate(self._names)}
        places = torch.tensor([position[name] for name in self._layout.names], dtype=torch.int64, device=norms.device)
        most[places] = torch.where(known.unsqueeze(1), mine, -torch.inf)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self._process_group)
        self._judge(
            most.cpu(), dict(zip(self._layout.names, torch.where(known, norms, torch.nan).tolist(), strict=True))
        )

    def _per_copy(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums, float64 [n, k], over the ranks that hold one copy, and which tensors' shards are alike, [n].

        The groups that nothing but a mark vouches for come last, so that what is compared along them is whole otherwise.
        """
        alike = torch.zeros_like(sums[:, 0])
        for marked in (False, True):
            chains = [
                [group for group in tensor.norm_groups if any(group is mark for mark in tensor.marked_groups) is marked]
                for tensor in self._layout
            ]
            # All first groups, then all second ones: the same order on all ranks, whatever groups other tensors have.
            for place in range(max(map(len, chains), default=0)):
                groups: dict[int, tuple[dist.ProcessGroup, list[int]]] = {}
                for i, chain in enumerate(chains):
                    if place < len(chain):
                        groups.setdefault(id(chain[place]), (chain[place], []))[1].append(i)
                for group, members in groups.values():
                    index = torch.tensor(members, device=sums.device)
                    packed = sums[index]
                    if marked:
                        alike[index] = torch.maximum(alike[index], _all_alike(packed, group))
                    dist.all_reduce(packed, group=group)
                    sums[index] = packed
        return sums, alike

    def _judge(self, most: Tensor, mine: dict[str, float]) -> None:
        highest, lowest = most[:, 0], -most[:, 1]
        spread = torch.where(highest > 0, (highest - lowest) / highest, 0.0)  # 0: no rank has a finite norm above 0
        self.rounding.clip = self._clips
        for i in (spread > _EXACT).nonzero().flatten().tolist():
            self.rounding.names.add(self._names[i])
            if spread[i] > self.rounding.worst:
                self.rounding.worst, self.rounding.where = float(spread[i]), self._names[i]
        apart = [self._names[i] for i in ((spread > most[:, 3]) & (highest > 0)).nonzero().flatten().tolist()]
        alike = [self._names[i] for i in (most[:, 2] > 0).nonzero().flatten().tolist()]
        if apart:
            theirs = gather({name: mine[name] for name in apart if name in mine}, self._process_group)
            raise LayoutError(_apart(apart, theirs))
        if alike:
            raise LayoutError(_alike(alike))

    def describe(self) -> str:
        """Return one line for ``explain()``."""
        if not self.enabled:
            return "replicas: not compared (check_replicas=False)"
        if not self.needed:
            return "replicas: none, each tensor has one copy"
        if not self.rounding.clip:
            return "replicas: compared by their norms at clips 1, 2, 4, 8, ...; not yet"
        found = self.rounding
        result = (
            f"{len(found.names)} tensors differed by rounding, at most by {found.worst:.1e} ({found.where!r})"
            if found.names
            else "all the same"
        )
        return f"replicas: compared by their norms at clips 1, 2, 4, 8, ...; up to clip {found.clip} {result}"


def tolerance_of(dtype: torch.dtype, numel: int) -> float:
    """Return the relative difference of norms from which copies are no copies: that of few bf16 elements is larger."""
    return TOLERANCE + 2 * torch.finfo(dtype).eps / max(numel, 1) ** 0.5


def _all_alike(packed: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return 1 where all values, [m, k], of a row are the same on the ranks of `group`, and its first is not 0; else 0."""
    extremes = torch.cat([packed, -packed], dim=1)
    extremes = torch.where(torch.isfinite(extremes), extremes, torch.inf)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    highest, negated = extremes.chunk(2, dim=1)
    same = ((highest + negated).abs() <= _SAME * highest.abs()).all(dim=1)
    return (same & (highest[:, 0] > 0) & torch.isfinite(highest).all(dim=1)).to(packed.dtype)


def _apart(names: Sequence[str], everyone: dict[int, dict[str, float]]) -> str:
    first = names[0]
    held = {
        rank: theirs[first] for rank, theirs in everyone.items() if first in theirs and theirs[first] == theirs[first]
    }
    low, high = min(held, key=held.__getitem__), max(held, key=held.__getitem__)
    middle = (held[low] + held[high]) / 2
    sides = [[rank for rank in held if (held[rank] >= middle) is above] for above in (False, True)]
    others = f" (and {len(names) - 1} more tensors differ, such as {names[1]!r})" if len(names) > 1 else ""
    return (
        f"{first!r} should be one tensor with copies on {name_ranks(sorted(held), _SHOWN)}, but the norms of its gradient "
        f"differ: {held[low]:.7g} on {name_ranks(sides[0], _SHOWN)}, {held[high]:.7g} on {name_ranks(sides[1], _SHOWN)}"
        f"{others}. If the ranks hold parts of one tensor, or tensors of their own "
        f"(experts), say so: sharded={{{first!r}: dim or process group}}. If it is "
        "replicated, average its gradient over the ranks before clip_(). If the ranks train apart on purpose (local SGD), "
        "pass the process_group= of those that share gradients, or check_replicas=False"
    )


def _alike(names: Sequence[str]) -> str:
    first = names[0]
    others = f" (and {len(names) - 1} more tensors, such as {names[1]!r})" if len(names) > 1 else ""
    return (
        f"{first!r} is marked as split over the tensor-parallel ranks, but its weights and its gradient have the same norm "
        f"on all of them{others}: it seems to be replicated, and would be counted once for each rank. Pass "
        f"sharded={{{first!r}: None}} if it is replicated, or sharded={{{first!r}: dim}} if it is split along that dim"
    )
