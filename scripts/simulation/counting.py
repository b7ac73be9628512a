"""A log of the collectives that a block of code issues: the operator, its process group and its size in bytes.

Works on any backend: what is logged on real gloo processes can be compared with what is logged on fake ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

Kind = Literal["all_reduce", "all_gather", "all_gather_object"]

_KINDS: dict[str, Kind] = {
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "_allgather_base_": "all_gather",
    "all_gather_into_tensor": "all_gather",
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective call.

    Attributes:
        kind: what it does. "all_gather_object" is the exchange of pickled objects on the host, which torch makes of an
            all-gather of their sizes and one of their bytes.
        ranks: the global ranks of its group, in order.
        bytes: the result's size on each rank: the vector of an all-reduce, all ranks' vectors of an all-gather.
    """

    kind: Kind
    ranks: tuple[int, ...]
    bytes: int

    @property
    def size(self) -> int:
        return len(self.ranks)


class CollectiveLog(TorchDispatchMode):
    """Logs collectives. Subclasses may answer them; see `answer`."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind is DTensor for kind in types):
            return NotImplemented  # DTensor first turns itself into operators on local tensors and collectives
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            group = _group_of(args)
            if group is not None:  # waiting for a collective, or wrapping its result, has no group
                self._log(func, group, args, out)
        return out

    def _log(self, func: Any, group: Any, args: Any, out: Any) -> None:
        name = func._opname
        if name in ("allgather_", "broadcast_", "barrier", "scatter_"):
            return  # inside object exchanges, or how a module is laid out
        if name not in _KINDS:
            raise NotImplementedError(f"the simulation does not know the collective {func}")
        kind = _KINDS[name]
        result = args[0] if func.namespace == "c10d" else out  # the former write into what they are given
        buffers = result if isinstance(result, list) else [result]
        ranks = tuple(dist.get_process_group_ranks(group))
        self.entries.append(Collective(kind, ranks, sum(b.numel() * b.element_size() for b in buffers)))
        if func.namespace == "c10d":
            self.answer(kind, group, buffers[0], args)

    def answer(self, kind: Kind, group: Any, buffer: Tensor, args: Any) -> None:
        """Called after the backend has returned, with the buffer of the result."""

    def log_object(self, mine: Any, group: Any) -> None:
        ranks = tuple(dist.get_process_group_ranks(group))
        self.entries.append(Collective("all_gather_object", ranks, len(pickle.dumps(mine)) * len(ranks)))


@contextlib.contextmanager
def logging_objects(log: CollectiveLog, answer: Any = None) -> Iterator[None]:
    """Also log `all_gather_object`; with `answer`, let it fill the list instead of the real exchange."""
    real = dist.all_gather_object

    def logged(everyone: list[Any], mine: Any, group: Any = None) -> None:
        group = group if group is not None else dist.group.WORLD
        log.log_object(mine, group)
        if answer is None:
            real(everyone, mine, group=group)
        else:
            answer(everyone, mine, group)

    dist.all_gather_object = logged
    try:
        yield
    finally:
        dist.all_gather_object = real


def reduce_op(args: Any) -> str:
    """Name of the reduction among the arguments of a c10d operator: "SUM", "MIN", ..."""
    names = {0: "SUM", 1: "AVG", 2: "PRODUCT", 3: "MIN", 4: "MAX"}
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and arg._type().name() == "ReduceOp":
            return names[arg.op()]
    raise ValueError("this collective reduces nothing")


def _group_of(args: Any) -> Any:
    for arg in args:
        if isinstance(arg, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(arg)
            except RuntimeError:
                continue  # some other object, such as a ReduceOp
        if isinstance(arg, str):
            try:
                return _resolve_process_group(arg)
            except (RuntimeError, ValueError, KeyError):
                continue  # the name of a reduction, such as "sum"
    return None
