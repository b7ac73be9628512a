"""The layout: the logical tensors that this rank takes part in, its shard of each, and the ranks that hold the rest."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor


def _nothing() -> Tensor | None:
    return None


@dataclasses.dataclass(frozen=True)
class LogicalTensor:
    """One parameter as the model's author wrote it, and this rank's part in it.

    Attributes:
        name: fully qualified name, the same on every rank and under every layout.
        shape: shape of the whole tensor.
        dtype: dtype of the parameter.
        param: the parameter whose gradient is clipped; None where this rank holds no piece of the tensor.
        shard_numel: number of elements of this rank's shard.
        norm_groups: the process groups over which squared norms of shards are added; empty for a whole tensor.
        replica_ranks: global ranks that together hold this rank's copy of the tensor (product of the norm groups);
            empty where this rank holds none.
        mesh_ranks: global ranks of the device mesh or groups that the tensor is laid out over.
        grad: returns this rank's shard of the gradient, or None where there is no gradient.
        weight: returns this rank's shard of the parameter itself, or None where this rank holds none.
        device: where this tensor's share of the reduction is computed.
        placement: a description of how the tensor is laid out, the same on every rank that takes part in it.
        cut: what decides which elements each shard has, whatever mesh is around it: shards of the same cut are the same.
            None: `placement` says so.
        everywhere: whether every rank of the pipeline stage holds a piece of one of its copies.
        marked_groups: the norm groups for which only a framework's mark vouches.
        own_grad: whether the shard of the gradient is ``param.grad`` itself, or its local tensor if that is a DTensor of the
            parameter's placements.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    param: Tensor | None
    shard_numel: int
    norm_groups: tuple[dist.ProcessGroup, ...]
    replica_ranks: frozenset[int]
    mesh_ranks: frozenset[int]
    device: torch.device
    placement: str
    grad: Callable[[], Tensor | None] = _nothing
    weight: Callable[[], Tensor | None] = _nothing
    everywhere: bool = True
    cut: str | None = None
    marked_groups: tuple[dist.ProcessGroup, ...] = ()
    own_grad: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def describe(self) -> str:
        """Return a description of the tensor, which must be the same on every rank that takes part in it."""
        return f"{self.name} {list(self.shape)} {self.dtype} {self.placement}"


@dataclasses.dataclass(frozen=True)
class Layout:
    """The ordered logical tensors of this rank. Every rank of a pipeline stage has the same names in the same order.

    Attributes:
        tensors: the logical tensors, including those of which this rank holds no piece.
        stage_group: a process group of all ranks of this pipeline stage, or None. One all-reduce over it may replace
            several reductions over smaller groups.
    """

    tensors: tuple[LogicalTensor, ...]
    stage_group: dist.ProcessGroup | None = None

    def __len__(self) -> int:
        return len(self.tensors)

    def __iter__(self) -> Iterator[LogicalTensor]:
        return iter(self.tensors)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.tensors)

    @property
    def device(self) -> torch.device | None:
        """Where norms, scales and state live: an accelerator if any tensor needs one; None without tensors."""
        devices = [t.device for t in self.tensors]
        return next((device for device in devices if device.type != "cpu"), devices[0] if devices else None)


def merge_groups(layout: Layout) -> Layout:
    """Return the layout with one process group for the same ranks and backend.

    Two device meshes over the same ranks may own different groups or share one, and torch need not do the same on all
    ranks. Whatever orders groups by their first appearance would then differ between ranks.
    """
    first: dict[tuple[object, ...], dist.ProcessGroup] = {}
    known: dict[int, dist.ProcessGroup] = {}  # by id, because ranks are slow to compare

    def one(group: dist.ProcessGroup) -> dist.ProcessGroup:
        if id(group) not in known:
            key = (*dist.get_process_group_ranks(group), str(dist.get_backend_config(group)))
            known[id(group)] = first.setdefault(key, group)
        return known[id(group)]

    def merged(groups: tuple[dist.ProcessGroup, ...]) -> tuple[dist.ProcessGroup, ...]:
        return tuple(map(one, groups))

    tensors = [
        dataclasses.replace(t, norm_groups=merged(t.norm_groups), marked_groups=merged(t.marked_groups)) for t in layout
    ]
    return dataclasses.replace(layout, tensors=tuple(tensors))


@runtime_checkable
class LayoutReader(Protocol):
    """A framework's own reader of the layout, which can be passed to `GradClipper` in place of a model."""

    def read_layout(self, skip: Callable[[str], bool]) -> Layout:
        """Return the layout without the names for which `skip` is true. Raises on all ranks of a stage or on none."""
