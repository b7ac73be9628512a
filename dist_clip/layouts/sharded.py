"""`sharded=`: what the user says of how tensors are divided, where no framework says it or its mark is wrong."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import TypeAlias

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dist_clip.errors import LayoutError
from dist_clip.layouts.layout import Layout, LogicalTensor
from dist_clip.layouts.process_groups import checked_group, current_rank, gather

Group: TypeAlias = dist.ProcessGroup | DeviceMesh
ShardedBy: TypeAlias = int | Group | tuple[int, Group] | None
"""A dimension, a process group or 1-D mesh, both, or None for a tensor that is replicated."""


@dataclasses.dataclass(frozen=True)
class Division:
    """How the user says that a tensor is divided.

    Attributes:
        dim: the dimension along which it is cut; None: the ranks' tensors are stacked along a new first one.
        group: the ranks that hold its parts; None: those that the layout's reader chooses.
        whole: it is not divided at all.
    """

    dim: int | None = None
    group: dist.ProcessGroup | None = None
    whole: bool = False

    def describe(self) -> str:
        """Return a description, the same on every rank."""
        if self.whole:
            return "replicated"
        over = "" if self.group is None else f" over {self.group.size()}"
        return f"{'stacked' if self.dim is None else f'dim {self.dim}'}{over}"


def whole_shape(
    name: str, local: tuple[int, ...], dim: int | None, parts: int, source: str = "sharded="
) -> tuple[int, ...]:
    """Return the shape of the whole tensor, of which each of `parts` ranks holds a part of shape `local`.

    Args:
        dim: the dimension along which it is cut; None: the parts are stacked along a new first one.
        source: who says so, for the error.

    Raises:
        LayoutError: `dim` is out of range.

    Example:
        >>> whole_shape("weight", (4, 8), -1, 2), whole_shape("weight", (4, 8), None, 2)
        ((4, 16), (2, 4, 8))
    """
    if dim is None:
        return (parts, *local)
    if not -len(local) <= dim < len(local):
        raise LayoutError(
            f"rank {current_rank()}: {source} says that {name!r} is cut along dim {dim}, but its shape is {list(local)}"
        )
    dim %= len(local)
    return (*local[:dim], local[dim] * parts, *local[dim + 1 :])


def checked_divisions(sharded: Mapping[str, ShardedBy] | None) -> dict[str, Division]:
    """Return {pattern: division}, checked.

    Raises:
        LayoutError: a group that this rank does not belong to, or that is not alive.
        TypeError: `sharded` is no mapping, or a value is none of what `ShardedBy` allows.
    """
    if sharded is None:
        return {}
    if not isinstance(sharded, Mapping):
        raise TypeError(f"sharded must be a mapping {{pattern: dim or process group}}, got {sharded!r}")
    return {_pattern(pattern): _division(pattern, value) for pattern, value in sharded.items()}


def _pattern(pattern: object) -> str:
    if not isinstance(pattern, str):
        raise TypeError(f"sharded= maps FQN patterns, which are strings, got {pattern!r}")
    return pattern


def _division(pattern: object, value: object) -> Division:
    if value is None:
        return Division(whole=True)
    if isinstance(value, tuple) and len(value) == 2:
        dim, group = value
        fits = _is_dim(dim) and _is_group(group)
    else:
        dim, group = (value, None) if _is_dim(value) else (None, value)
        fits = group is None or _is_group(group)
    if not fits:
        raise TypeError(
            f"sharded={{{pattern!r}: ...}} must be a dimension, a process group or 1-D device mesh, a pair (dimension, "
            f"group), or None for a replicated tensor, got {value!r}"
        )
    return Division(dim, checked_group(group, f"sharded={{{pattern!r}: ...}}"))


def _is_dim(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value is not dist.GroupMember.NON_GROUP_MEMBER


def _is_group(value: object) -> bool:
    return isinstance(value, (dist.ProcessGroup, DeviceMesh)) or value is dist.GroupMember.NON_GROUP_MEMBER


def division_of(name: str, divisions: Mapping[str, Division]) -> Division | None:
    """Return the division of the first pattern that matches `name`; None: the user says nothing of it."""
    return next((division for pattern, division in divisions.items() if fnmatch.fnmatchcase(name, pattern)), None)


def divide(layout: Layout, divisions: Mapping[str, Division], default: dist.ProcessGroup | None) -> Layout:
    """Return the layout with what the user says of it. The ranks that hold a copy are not complete yet: see `join`.

    Args:
        default: the group of a division that names none; None: it must name one.

    Raises:
        LayoutError: a dimension out of range, no group, or a tensor that its framework divides over that group.
    """
    if not divisions:
        return layout
    tensors = [_divided(tensor, division_of(tensor.name, divisions), default) for tensor in layout]
    return dataclasses.replace(layout, tensors=tuple(tensors))


def _divided(tensor: LogicalTensor, said: Division | None, default: dist.ProcessGroup | None) -> LogicalTensor:
    if said is None or (said.whole and not tensor.norm_groups):
        return tensor
    rank, name = current_rank(), tensor.name
    if said.whole:
        raise LayoutError(
            f"rank {rank}: sharded= says that {name!r} is replicated, but it is laid out as {tensor.placement}: leave it out"
        )
    group = said.group or default
    if group is None:
        raise LayoutError(
            f"rank {rank}: sharded={{...: {said.dim}}} names no group for {name!r}, and there are pipeline stages or no "
            "process group at all: pass (dim, group)"
        )
    ranks = frozenset(dist.get_process_group_ranks(group))
    if any(ranks & set(dist.get_process_group_ranks(known)) - {rank} for known in tensor.norm_groups):
        raise LayoutError(
            f"rank {rank}: sharded= says that {name!r} is divided over ranks {sorted(ranks)}, over which it is divided "
            f"already ({tensor.placement}): leave it out"
        )
    if group.size() == 1:
        return tensor
    return dataclasses.replace(
        tensor,
        shape=whole_shape(name, tensor.shape, said.dim, group.size()),
        norm_groups=(*tensor.norm_groups, group),
        replica_ranks=ranks | tensor.replica_ranks,
        mesh_ranks=ranks | tensor.mesh_ranks,
        placement=f"{tensor.placement}, divided by hand ({said.describe()})",
        cut=f"{tensor.cut or tensor.placement}, {said.describe()} of {group.size()}",
    )


def join(layout: Layout, divisions: Mapping[str, Division], process_group: dist.ProcessGroup | None) -> Layout:
    """Return the layout with all ranks of a copy, also where a framework divides what the user divides further.

    Collective over `process_group` if there are divisions.
    """
    if not divisions:
        return layout
    said = [t for t in layout if division_of(t.name, divisions) is not None and len(t.norm_groups) > 1]
    everyone = gather({tensor.name: tensor.replica_ranks for tensor in said}, process_group)
    joined = {}
    for tensor in said:
        ranks = tensor.replica_ranks
        while True:
            wider = ranks.union(*(everyone[rank].get(tensor.name, frozenset()) for rank in ranks if rank in everyone))
            if wider == ranks:
                break
            ranks = wider
        joined[tensor.name] = dataclasses.replace(tensor, replica_ranks=ranks)
    return dataclasses.replace(layout, tensors=tuple(joined.get(tensor.name, tensor) for tensor in layout))
