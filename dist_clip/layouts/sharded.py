"""The `sharded` argument, by which users say how a tensor is split where nothing else says so, or says it wrongly."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dist_clip.errors import LayoutError
from dist_clip.layouts.process_groups import checked_group

ShardedBy: TypeAlias = "int | dist.ProcessGroup | DeviceMesh | tuple[int, dist.ProcessGroup | DeviceMesh] | None"
"""What `sharded` may give for a pattern; `resolve` says what each means."""

_MEANINGS = (
    "an int (split along that dimension), a process group or 1-D device mesh (its ranks hold different tensors, parts of "
    "one), (dimension, group), or None (replicated)"
)


def resolve(
    value: Any, default_group: dist.ProcessGroup | None, pattern: str = "..."
) -> tuple[int | None, dist.ProcessGroup | None]:
    """Return (dimension, group) that `value` stands for.

    The dimension is None where the ranks' tensors are stacked and become a first dimension of the whole. The group is
    None for a replicated tensor.

    Args:
        value: a `ShardedBy`.
        default_group: the group over which a dimension without a group is split.
        pattern: the pattern that `value` was passed for, for the errors.

    Raises:
        TypeError: `value` is no `ShardedBy`; the message says what may be passed.
        LayoutError: the group is not alive or this rank is not a member, or an int was passed and there is no
            `default_group`.

    Example:
        >>> resolve(None, None)
        (None, None)
    """
    dim, group = value if isinstance(value, tuple) and len(value) == 2 else (None, value)
    if isinstance(value, tuple) and not (_is_dim(dim) and _is_group(group)):
        raise TypeError(f"sharded={{{pattern!r}: {value!r}}}: expected {_MEANINGS}")
    if group is None:
        return None, None
    if _is_group(group):
        return dim, checked_group(group, "sharded")
    if not _is_dim(group):
        raise TypeError(f"sharded={{{pattern!r}: {value!r}}}: expected {_MEANINGS}")
    if default_group is None:
        raise LayoutError(
            f"sharded={{{pattern!r}: {group}}}: there is no group over which tensors are split here; pass ({group}, group)"
        )
    return group, default_group


def whole_shape(
    name: str, shape: Sequence[int], dim: int | None, pieces: int, source: str = "sharded="
) -> tuple[int | None, tuple[int, ...]]:
    """Return (dimension, not negative; shape of the whole) of a tensor whose part of `shape` is one of `pieces`.

    Args:
        source: who says so, for the error.

    Raises:
        LayoutError: `dim` is out of range.

    Example:
        >>> whole_shape("weight", (4, 8), -1, 2)
        (1, (4, 16))
        >>> whole_shape("weight", (4, 8), None, 2)
        (None, (2, 4, 8))
    """
    if dim is None:
        return None, (pieces, *shape)
    if not -len(shape) <= dim < len(shape):
        raise LayoutError(
            f"{source} splits {name!r} along dimension {dim}, but it has {len(shape)} dimensions: its shape is {list(shape)}"
        )
    dim %= len(shape)
    return dim, tuple(n * pieces if i == dim else n for i, n in enumerate(shape))


class ShardedByHand:
    """The `sharded` argument, with a record of the patterns that matched.

    Args:
        sharded: patterns of names to `ShardedBy`; None for no patterns.

    Raises:
        TypeError: it is no mapping from strings.

    Example:
        >>> by_hand = ShardedByHand({"*.sink": 0})
        >>> by_hand.find("layer.sink"), by_hand.find("layer.weight"), by_hand.matched
        (('*.sink', 0), None, {'*.sink'})
    """

    def __init__(self, sharded: Mapping[str, ShardedBy] | None) -> None:
        if sharded is not None and not (
            isinstance(sharded, Mapping) and all(isinstance(pattern, str) for pattern in sharded)
        ):
            raise TypeError(f"sharded must map patterns of names to {_MEANINGS}, got {sharded!r}")
        self.patterns: Mapping[str, ShardedBy] = sharded or {}
        self.matched: set[str] = set()

    def find(self, name: str) -> tuple[str, ShardedBy] | None:
        """Return (pattern, value) of the first pattern that matches `name`, and record all that do."""
        hits = [pattern for pattern in self.patterns if fnmatch.fnmatchcase(name, pattern)]
        self.matched.update(hits)
        return (hits[0], self.patterns[hits[0]]) if hits else None


def _is_dim(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and not _is_group(value)


def _is_group(value: object) -> bool:
    # What new_group returns on the ranks that it leaves out is a number in some versions of torch.
    return isinstance(value, (dist.ProcessGroup, DeviceMesh)) or value is dist.GroupMember.NON_GROUP_MEMBER
