"""Owns a log of the collectives that a block of code issues, with the process group of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Collective:
    name: str
    ranks: tuple[int, ...]


class CollectiveLog(TorchDispatchMode):
    """What CommDebugMode counts, plus which group each collective ran over."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            ranks = _ranks_of(args)
            if ranks is not None:  # waiting for a collective, or wrapping its result, has no group
                self.entries.append(Collective(func._opname, ranks))
        return func(*args, **(kwargs or {}))


def _ranks_of(args: Any) -> tuple[int, ...] | None:
    for arg in args:
        if isinstance(arg, torch.ScriptObject):
            try:
                group = dist.ProcessGroup.unbox(arg)
            except RuntimeError:
                continue  # some other object, such as a ReduceOp
            return tuple(dist.get_process_group_ranks(group))
        if isinstance(arg, str):
            try:
                return tuple(dist.get_process_group_ranks(_resolve_process_group(arg)))
            except (RuntimeError, ValueError, KeyError):
                continue  # the name of a reduction, such as "sum"
    return None
