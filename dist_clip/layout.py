"""The layout: which logical tensors this rank takes part in, its shard of each, and the ranks that hold the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class LogicalTensor:
    """One parameter as the model's author wrote it, and this rank's part in it.

    Attributes:
        name: fully qualified name, the same on every rank and under every layout.
        shape: shape of the whole tensor.
        param: where the gradient is found, as ``param.grad``.
        norm_groups: the process groups over which squared norms of shards are added; empty for a whole tensor.
        component: global ranks that together hold one copy of the tensor, this rank's copy (product of the norm groups).
        read: returns this rank's shard of the gradient, or None where there is no gradient.
        device: where this tensor's share of the reduction is computed.
        placement: how the tensor is laid out, for people and for comparing ranks.
    """

    name: str
    shape: tuple[int, ...]
    param: Tensor
    norm_groups: tuple[dist.ProcessGroup, ...]
    component: frozenset[int]
    read: Callable[[], Tensor | None]
    device: torch.device
    placement: str

    def describe(self) -> str:
        """What must be the same on every rank that takes part in this tensor."""
        sizes = [group.size() for group in self.norm_groups]
        return f"{self.name} {list(self.shape)} {self.param.dtype} {self.placement} norm groups of {sizes}"


@dataclasses.dataclass(frozen=True)
class Layout:
    """The ordered logical tensors of this rank. Every rank of a pipeline stage has the same names in the same order."""

    tensors: tuple[LogicalTensor, ...]

    def __len__(self) -> int:
        return len(self.tensors)

    def __iter__(self) -> Iterator[LogicalTensor]:
        return iter(self.tensors)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.tensors)

    @property
    def device(self) -> torch.device:
        """Where norms, scales and state live: an accelerator if any tensor needs one."""
        return next((t.device for t in self.tensors if t.device.type != "cpu"), torch.device("cpu"))

    def describe(self) -> list[str]:
        return [t.describe() for t in self.tensors]


def group_label(group: Any) -> str:
    """Short name of a process group for tables and errors."""
    ranks = dist.get_process_group_ranks(group)
    shown = ",".join(map(str, ranks)) if len(ranks) <= 4 else f"{ranks[0]},{ranks[1]},..,{ranks[-1]}"
    return f"{group.group_name}[{shown}]"
