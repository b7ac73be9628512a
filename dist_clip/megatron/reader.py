"""The reader of a Megatron-core model and its optimizer, with one logical tensor for each parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_clip.construction.agreement import sendable
from dist_clip.errors import LayoutError
from dist_clip.layouts import Layout, LogicalTensor
from dist_clip.layouts.process_groups import gather
from dist_clip.megatron import compat
from dist_clip.megatron.compat import Groups, Piece
from dist_clip.megatron.names import global_names


@dataclasses.dataclass(frozen=True)
class _Known:
    """What every rank of a pipeline stage must know of a tensor, also if it holds no piece of it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    placement: str


@dataclasses.dataclass(frozen=True)
class _Local:
    """A parameter of this rank's model."""

    known: _Known
    param: nn.Parameter
    groups: tuple[Any, ...]
    piece: Piece | None


@dataclasses.dataclass(frozen=True)
class _RankTensors:
    """What one rank sends to the others of its pipeline stage: an error, or its tensors and optimizer ranks."""

    error: Exception | None
    tensors: tuple[_Known, ...]
    optimizer_ranks: dict[bool, tuple[int, ...]]
    """Whether expert -> the ranks over which this rank's optimizer is spread."""


class MegatronReader:
    """Reads the layout of model chunks and of the optimizer that steps them."""

    def __init__(self, optimizer: Any, chunks: Sequence[nn.Module], groups: Groups) -> None:
        self._optimizer, self._chunks, self._groups = optimizer, chunks, groups

    def read_layout(self, skip: Callable[[str], bool]) -> Layout:
        """Return the layout without the names for which `skip` is true. Collective over the ranks of the stage.

        Every rank of a stage gets the same names in the same order, including experts of which it holds no piece.

        Raises:
            LayoutError, TypeError, ValueError, ImportError: the error of the first rank that has one, on all ranks.
        """
        local: list[_Local] = []
        error: Exception | None = None
        try:
            local = [entry for entry in self._local_tensors() if not skip(entry.known.name)]
        except Exception as failure:  # any error at all, because the other ranks wait for this one
            error = sendable(failure)
        mine = _RankTensors(
            error=error,
            tensors=tuple(entry.known for entry in local),
            optimizer_ranks={False: _ranks(self._groups.dp), True: _ranks(self._groups.expt_dp)},
        )
        everyone = self._exchange(mine)
        for rank, theirs in everyone.items():
            if theirs.error is not None:
                raise type(theirs.error)(f"rank {rank}: {theirs.error}") from error
        by_name = {entry.known.name: entry for entry in local}
        order: dict[str, _Known] = {}
        holders: dict[str, int] = {}
        for theirs in everyone.values():
            for known in theirs.tensors:
                order.setdefault(known.name, known)
                holders[known.name] = holders.get(known.name, 0) + 1
        tensors = [
            self._logical(known, by_name.get(name), everyone, holders[name] == len(everyone))
            for name, known in order.items()
        ]
        return Layout(tuple(tensors), stage_group=self._groups.stage if len(everyone) > 1 else None)

    def _exchange(self, mine: _RankTensors) -> dict[int, _RankTensors]:
        stage = self._groups.stage
        return {dist.get_rank(): mine} if stage is None else gather(mine, stage)

    def _local_tensors(self) -> list[_Local]:
        """Return the trainable parameters of this rank's chunks, with their pieces in its optimizers."""
        leaves = compat.leaves(self._optimizer)
        found: dict[int, tuple[Piece, bool]] = {}
        for leaf in leaves:
            for each in compat.pieces(leaf.optimizer):
                if id(each.param) in found:
                    raise LayoutError(f"a parameter of shape {list(each.param.shape)} is stepped by two optimizers")
                found[id(each.param)] = (each, leaf.spread)
        any_spread = any(leaf.spread for leaf in leaves)
        out: list[_Local] = []
        taken: dict[str, Tensor] = {}
        for name, module, param in global_names(self._chunks, self._groups.ep):
            compat.refuse_unknown(name, module, param, self._groups)
            if name in taken:
                raise LayoutError(f"{name!r} names two parameters: were chunks of other pipeline ranks passed?")
            taken[name] = param
            piece: Piece | None
            piece, spread = found.pop(id(param), (None, any_spread))
            if piece is None and not spread:
                raise LayoutError(
                    f"{name!r} is trainable but no optimizer steps it: pass the model chunks that the optimizer was made "
                    "from"
                )
            out.append(self._local(name, param, piece, spread))
        if found:
            shapes = [list(each.param.shape) for each, _ in found.values()]
            raise LayoutError(
                f"the optimizer steps {len(found)} parameters that belong to none of the {len(self._chunks)} model chunks "
                f"(shapes {shapes[:3]}...): they would not be clipped. Pass all chunks that the optimizer was made from"
            )
        return out

    def _local(self, name: str, param: nn.Parameter, piece: Piece | None, spread: bool) -> _Local:
        expert = compat.is_expert_parallel(param)
        tp = self._groups.expt_tp if expert else self._groups.tp
        dp = self._groups.expt_dp if expert else self._groups.dp
        if tp is None or dp is None:
            raise LayoutError(f"{name!r}: Megatron has no tensor- or data-parallel group for it; pass pg_collection=")
        shape = list(param.shape)
        groups, words = [], ["expert" if expert else "dense"]
        if compat.is_tensor_parallel(param) and tp.size() > 1:
            dim = compat.partition_dim(param)
            if shape:
                shape[dim] *= tp.size()
            groups.append(tp)
            words.append(f"tensor parallel over {tp.size()} along dim {dim}")
        if spread and dp.size() > 1:
            groups.append(dp)
            words.append(f"optimizer over {dp.size()}")
        known = _Known(name, tuple(shape), param.dtype, ", ".join(words))
        return _Local(known, param, tuple(groups), piece)

    def _logical(
        self, known: _Known, local: _Local | None, everyone: dict[int, _RankTensors], everywhere: bool
    ) -> LogicalTensor:
        common: dict[str, Any] = {
            "name": known.name,
            "shape": known.shape,
            "dtype": known.dtype,
            "mesh_ranks": frozenset(everyone),
            "device": self._device(),
            "placement": known.placement,
            "everywhere": everywhere,
        }
        if local is None:
            return LogicalTensor(param=None, shard_numel=0, norm_groups=(), replica_ranks=frozenset(), **common)
        piece = local.piece
        return LogicalTensor(
            param=local.param,
            shard_numel=0 if piece is None else piece.stop - piece.start,
            norm_groups=local.groups,
            replica_ranks=self._replica_ranks(local, everyone),
            grad=_nothing if piece is None else piece.grad,
            weight=_nothing if piece is None else piece.weight,
            **common,
        )

    def _replica_ranks(self, local: _Local, everyone: dict[int, _RankTensors]) -> frozenset[int]:
        """Return the ranks that together hold this rank's copy.

        They are this rank's tensor-parallel peers or, if the optimizer is spread, the ranks over which each peer's is.
        """
        expert = compat.is_expert_parallel(local.param)
        tp = self._groups.expt_tp if expert else self._groups.tp
        peers = _ranks(tp) if any(group is tp for group in local.groups) else (dist.get_rank(),)
        dp = self._groups.expt_dp if expert else self._groups.dp
        if all(group is not dp for group in local.groups):
            return frozenset(peers)
        return frozenset(rank for peer in peers for rank in everyone[peer].optimizer_ranks[expert])

    def _device(self) -> torch.device:
        return next((p.device for chunk in self._chunks for p in chunk.parameters()), torch.device("cpu"))


def _nothing() -> None:
    """Return None, as this rank holds nothing of a tensor that another rank's optimizer steps."""
    return None


def _ranks(group: dist.ProcessGroup | None) -> tuple[int, ...]:
    return () if group is None else tuple(dist.get_process_group_ranks(group))
