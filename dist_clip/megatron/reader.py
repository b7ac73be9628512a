"""The reader of a Megatron-core model and its optimizer, with one logical tensor for each parameter."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dist_clip.construction.agreement import sendable
from dist_clip.errors import LayoutError
from dist_clip.layouts import Layout, LogicalTensor, ShardedBy
from dist_clip.layouts.dtensor import MeshGroups, Spread
from dist_clip.layouts.gradient import REAL
from dist_clip.layouts.process_groups import gather
from dist_clip.layouts.sharded import Division, checked_divisions, division_of, whole_shape
from dist_clip.megatron import compat, marks
from dist_clip.megatron.compat import Groups, Piece
from dist_clip.megatron.names import global_names


@dataclasses.dataclass(frozen=True)
class _Known:
    """What every rank of a pipeline stage must know of a tensor, also if it holds no piece of it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    placement: str
    cut: str
    only_marked: bool


@dataclasses.dataclass(frozen=True)
class _Local:
    """A parameter of this rank's model.

    Attributes:
        split_by: the group that holds its parts; None: it is whole on each rank.
        spread_by: the group over which the optimizer spreads each part.
        mesh: of a DTensor, which tells both by itself: its norm groups and replica ranks.
    """

    known: _Known
    param: nn.Parameter
    split_by: dist.ProcessGroup | None
    spread_by: dist.ProcessGroup | None
    piece: Piece | None
    mesh: Spread | None = None

    @property
    def groups(self) -> tuple[dist.ProcessGroup, ...]:
        if self.mesh is not None:
            return self.mesh.norm_groups
        return tuple(group for group in (self.split_by, self.spread_by) if group is not None)


@dataclasses.dataclass(frozen=True)
class _Split:
    """How a parameter is split: by which group (None: not at all), into what, and who says so."""

    group: dist.ProcessGroup | None
    shape: tuple[int, ...]
    cut: str = ""
    note: str = ""
    only_marked: bool = False


@dataclasses.dataclass(frozen=True)
class _RankTensors:
    """What one rank sends to the others of its pipeline stage: an error, or its tensors and optimizer ranks."""

    error: Exception | None
    tensors: tuple[_Known, ...]
    optimizer_ranks: dict[bool, tuple[int, ...]]
    """Whether expert -> the ranks over which this rank's optimizer is spread."""


class MegatronReader:
    """Reads the layout of model chunks and of the optimizer that steps them.

    Megatron's marks of tensor parallelism are checked against the chunks' sharded state dicts (`marks`).

    Args:
        sharded: as for `GradClipper`. A dimension without a group is split over the tensor's TP group, which is the expert
            TP group for experts.
    """

    def __init__(
        self,
        optimizer: Any,
        chunks: Sequence[nn.Module],
        groups: Groups,
        sharded: Mapping[str, ShardedBy] | None = None,
    ) -> None:
        self._optimizer, self._chunks, self._groups, self._sharded = optimizer, chunks, groups, sharded
        self._meshes = MeshGroups()
        self._described: dict[int, marks.Described] = {}
        self._divisions: Mapping[str, Division] = {}

    def read_layout(self, skip: Callable[[str], bool]) -> Layout:
        """Return the layout without the names for which `skip` is true. Collective over the ranks of the stage.

        Every rank of a stage gets the same names in the same order, including experts of which it holds no piece.

        Raises:
            LayoutError, TypeError, ValueError, ImportError: the error of the first rank that has one, on all ranks.
        """
        local: list[_Local] = []
        error: Exception | None = None
        try:
            self._divisions = checked_divisions(self._sharded)
            self._described = marks.describe(self._chunks, self._groups.dp)
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
        order = _agreed(everyone)
        holders = collections.Counter(known.name for theirs in everyone.values() for known in theirs.tensors)
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
        words = ["expert" if expert else "dense"]
        if piece is not None and isinstance(piece.holder, DTensor):
            return self._on_mesh(name, param, piece, piece.holder, words[0])
        split = self._split(name, param, tp)
        spread_by = dp if spread and dp.size() > 1 else None
        after = []
        if spread_by is not None:
            after.append(f"optimizer over {dp.size()}")
            self._refuse_overlap(name, split.group, tp, dp)
        cut = ", ".join([*words, *([split.cut] if split.cut else []), *after])
        placement = cut
        if split.note:
            placement = ", ".join([*words, f"{split.cut or 'replicated'} ({split.note})", *after])
        known = _Known(name, split.shape, param.dtype, placement, cut, split.only_marked)
        return _Local(known, param, split.group, spread_by, piece)

    def _on_mesh(self, name: str, param: nn.Parameter, piece: Piece, holder: DTensor, kind: str) -> _Local:
        """Return the parameter as Megatron-FSDP's DTensor has it, whose placements include tensor parallelism."""
        if division_of(name, self._divisions) is not None:
            raise LayoutError(
                f"sharded= names {name!r}, which Megatron-FSDP lays out as {holder.placements} over a mesh of "
                f"{tuple(holder.device_mesh.shape)} ranks: leave it out of sharded="
            )
        if holder.dtype not in REAL:
            raise LayoutError(f"{name!r}: Megatron-FSDP steps it in {holder.dtype}, which dist_clip cannot read")
        mesh = self._meshes.spread(name, holder.device_mesh, holder.placements)
        placement = f"{kind}, Megatron-FSDP: {mesh.placement}"
        known = _Known(name, tuple(holder.shape), param.dtype, placement, f"{kind}, {mesh.cut}", False)
        return _Local(known, param, None, None, piece, mesh)

    def _split(self, name: str, param: nn.Parameter, tp: dist.ProcessGroup) -> _Split:
        """Return how the parameter is split: as the user says, else as sharded state dict and mark say."""
        shape = tuple(param.shape)
        verdict = marks.judge(param, self._described.get(id(param)), tp)
        said = division_of(name, self._divisions)
        if said is not None:
            group = tp if said.group is None else said.group
            whole = whole_shape(name, shape, said.dim, group.size())  # checks the dimension
            dim = None if said.dim is None else said.dim % len(shape)
            if group is tp and verdict.dim is not None:
                _refuse_contradiction(name, said, dim, verdict)
            if said.whole or group.size() == 1:
                return _Split(None, shape, note="by sharded=")
            self._refuse_outside(name, group)
            return _Split(group, whole, self._words(group, tp, dim), "by sharded=")
        if verdict.dim is None:
            return _Split(None, shape, note=verdict.note)
        # A scalar has no dimension that could be split.
        whole = whole_shape(name, shape, verdict.dim, tp.size(), "its mark") if shape else shape
        return _Split(tp, whole, self._words(tp, tp, verdict.dim), verdict.note, verdict.only_marked)

    @staticmethod
    def _words(group: dist.ProcessGroup, tp: dist.ProcessGroup, dim: int | None) -> str:
        what = "tensor parallel" if group is tp else "split"
        return f"{what} over {group.size()} {'by stacking' if dim is None else f'along dim {dim}'}"

    def _refuse_outside(self, name: str, group: dist.ProcessGroup) -> None:
        here = {dist.get_rank(), *_ranks(self._groups.stage)}
        outside = sorted(set(_ranks(group)) - here)
        if outside:
            raise LayoutError(
                f"sharded= splits {name!r} over ranks {list(_ranks(group))}, of which {outside} are in another pipeline "
                f"stage; this rank's stage has ranks {sorted(here)}"
            )

    @staticmethod
    def _refuse_overlap(
        name: str, group: dist.ProcessGroup | None, tp: dist.ProcessGroup, dp: dist.ProcessGroup
    ) -> None:
        if group is None or group is tp:
            return
        common = sorted(set(_ranks(group)) & set(_ranks(dp)))
        if len(common) > 1:
            raise LayoutError(
                f"sharded= splits {name!r} over ranks {list(_ranks(group))}, but the optimizer already divides it among "
                f"ranks {list(_ranks(dp))}, which hold copies"
            )

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
            "cut": known.cut,
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
            marked_groups=(local.split_by,) if known.only_marked and local.split_by is not None else (),
            **common,
        )

    def _replica_ranks(self, local: _Local, everyone: dict[int, _RankTensors]) -> frozenset[int]:
        """Return the ranks that together hold this rank's copy.

        They are this rank's tensor-parallel peers or, if the optimizer is spread, the ranks over which each peer's is.
        """
        if local.mesh is not None:
            return local.mesh.replica_ranks
        peers = (dist.get_rank(),) if local.split_by is None else _ranks(local.split_by)
        if local.spread_by is None:
            return frozenset(peers)
        expert = compat.is_expert_parallel(local.param)
        return frozenset(rank for peer in peers for rank in everyone[peer].optimizer_ranks[expert])

    def _device(self) -> torch.device:
        return next((p.device for chunk in self._chunks for p in chunk.parameters()), torch.device("cpu"))


def _refuse_contradiction(name: str, said: Division, dim: int | None, verdict: marks.Verdict) -> None:
    """Refuse what contradicts the sharded state dict, or another dimension than the mark's."""
    if verdict.only_marked if said.whole else dim in (None, verdict.dim):
        return
    source = "its mark" if verdict.only_marked else "the model's sharded_state_dict"
    raise LayoutError(
        f"sharded= says of {name!r}: {said.describe()}. But {source} says that it is cut along dim {verdict.dim}: leave it "
        f"out of sharded=, or correct {source}"
    )


def _agreed(everyone: Mapping[int, _RankTensors]) -> dict[str, _Known]:
    """Return each tensor once, in order. Where only some ranks rely on a mark, all are taken to.

    Raises:
        LayoutError: ranks differ about a tensor. The same on every rank.
    """
    order: dict[str, _Known] = {}
    first: dict[str, int] = {}
    for rank, theirs in everyone.items():
        for known in theirs.tensors:
            held = order.setdefault(known.name, known)
            other = first.setdefault(known.name, rank)
            if (held.shape, held.cut) != (known.shape, known.cut):
                raise LayoutError(
                    f"rank {rank} has {known.name!r} {list(known.shape)} as {known.placement}, but rank {other} has it "
                    f"{list(held.shape)} as {held.placement}: are their marks or modules different? sharded= says it by hand"
                )
            if known.only_marked and not held.only_marked:
                order[known.name] = dataclasses.replace(held, only_marked=True)
    return order


def _nothing() -> None:
    """Return None, as this rank holds nothing of a tensor that another rank's optimizer steps."""
    return None


def _ranks(group: dist.ProcessGroup | None) -> tuple[int, ...]:
    return () if group is None else tuple(dist.get_process_group_ranks(group))
