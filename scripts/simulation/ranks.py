"""One rank of a large job, in one process: torch's fake process group, whose collectives are given true answers.

The "fake" backend returns at once and leaves buffers as they are. A clipper would then find, at construction, that the
shards do not add up. So each collective is answered here with what it would give if all ranks existed. That is known
without them: every element of every gradient is 1, so a packed squared norm is a number of elements, and a rank's
number of elements follows from its coordinates. What this rank itself sends is checked against the same formula: a
plan that packed the wrong tensors, or reduced them over the wrong group, would be an error here.

dist_clip runs as it is, the kernels apart: those of this module know that the gradients are ones and read no memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from dist_clip.construction.agreement import RankConfig
from dist_clip.kernels import Kernels
from scripts.simulation.counting import Collective, CollectiveLog, Kind, logging_objects, reduce_op
from scripts.simulation.layouts import PP, Degrees, Meshes, Split, splits
from scripts.simulation.shapes import ModelShape


def power_sums_of_ones(
    shards: Sequence[Tensor | None], p: float, device: torch.device, foreach: bool | None = None
) -> Tensor:
    """As `dist_clip.kernels.torch_kernels.power_sums`, for gradients of ones."""
    counts = [0 if shard is None else shard.numel() for shard in shards]
    return torch.tensor(counts, dtype=torch.float64, device=device)


def scale_nothing(*args: Any, **kwargs: Any) -> None:
    """Scaling is local and sends nothing."""


ONES = Kernels("ones", "the simulation's gradients are ones", power_sums_of_ones, scale_nothing, scale_nothing)


@contextlib.contextmanager
def fake_world(rank: int, ranks: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


class AnsweringLog(CollectiveLog):
    """Logs the collectives of a clipper on a fake rank, and answers them.

    Args:
        meshes: of this rank.
        model: laid out on them.
    """

    def __init__(self, meshes: Meshes, model: ModelShape) -> None:
        super().__init__()
        self.meshes = meshes
        self.model = model
        self.degrees: Degrees = meshes.degrees
        self.coordinates = meshes.coordinates
        self.stage = model.stage(self.coordinates.get(PP, 0), self.degrees.pp)
        self.splits: list[dict[str, Split]] = [
            {split.mesh_dim: split for split in splits(tensor, self.degrees)} for tensor in self.stage
        ]
        self.groups = meshes.groups
        self.width = 1
        """How many numbers of each tensor travel: 2 where a policy looks at the parameters, which are ones as well."""
        self.done: set[str] = set()
        """Mesh dimensions over which the squared norms under way have been added."""

    @contextlib.contextmanager
    def logged(self) -> Iterator[list[Collective]]:
        """The collectives of the block: one construction, or one step."""
        self.entries = []
        self.done.clear()
        with self, logging_objects(self, self.answer_object):
            yield self.entries

    def norms(self, *, whole: bool) -> Tensor:
        """Norms of this stage's tensors, or of this rank's shards of them: of ones, float32 [n]."""
        done = {dim for by_dim in self.splits for dim in by_dim} if whole else set()
        return self._elements(list(range(len(self.stage))), done).sqrt().float()

    # ---- objects: announcements of layouts

    def answer_object(self, everyone: list[Any], mine: Any, group: Any) -> None:
        """What the ranks of `group` would say. Ranks of one stage say the same; stages announce their own tensors."""
        if group.group_name == self.pp_name and isinstance(mine, RankConfig):
            for stage in range(self.degrees.pp):
                tensors = self.model.stage(stage, self.degrees.pp)
                everyone[stage] = dataclasses.replace(
                    mine,
                    stage=stage,
                    # Compared among the ranks of one stage only.
                    tensors=mine.tensors if stage == mine.stage else tuple(t.name for t in tensors),
                    names=tuple(t.name for t in tensors),
                    shapes=tuple(t.shape for t in tensors),
                    numbers=(0,) * len(tensors),  # one policy for all
                )
            return
        everyone[:] = [mine] * len(everyone)

    @property
    def pp_name(self) -> str | None:
        return None if self.meshes.pp_group is None else self.meshes.pp_group.group_name

    # ---- tensors: packed squared norms, which are numbers of elements

    def answer(self, kind: Kind, group: Any, buffer: Tensor, args: Any) -> None:
        if group.group_name == self.pp_name:
            self._answer_stages(group, buffer)
        elif kind == "all_reduce":
            self._answer_all_reduce(group, buffer, reduce_op(args))
        else:
            self._answer_all_gather(group, buffer, args[1])

    def _answer_stages(self, group: Any, buffer: Tensor) -> None:
        """The gather of each stage's squared norm, and of its flag for non-finite norms where it is sent along."""
        rows = buffer.view(self.degrees.pp, -1)
        rows.zero_()
        for stage in range(self.degrees.pp):
            rows[stage, 0] = float(sum(t.numel for t in self.model.stage(stage, self.degrees.pp)))

    def _answer_all_reduce(self, group: Any, buffer: Tensor, op: str) -> None:
        if op == "MAX":
            return  # a flag, the same on all ranks: this rank's own
        if op == "MIN":
            self._answer_lowest(group, buffer)
            return
        columns = buffer.view(-1, self.width)
        members, dims = self._members(group, len(columns))
        before = self._elements(members, self.done)
        for sent in columns.unbind(1):
            self._check_sent(sent, before, group, silent=[self._spans_stage(group)] * len(members))
        self.done |= dims
        columns.copy_(self._elements(members, self.done).unsqueeze(1))

    def _answer_lowest(self, group: Any, buffer: Tensor) -> None:
        """Which copy speaks for a tensor: the one that the lowest rank has a part in."""
        ranks = dist.get_process_group_ranks(group)
        if self._spans_stage(group):  # its first rank holds a piece of a copy of each
            buffer.fill_(ranks[0])
        else:  # the same copy seen from the group's first rank; 0 where it is not asked
            buffer.copy_(torch.where(buffer > 0, buffer - (dist.get_rank() - ranks[0]), buffer))

    def _answer_all_gather(self, group: Any, buffer: Tensor, sent: Tensor) -> None:
        columns = sent.view(-1, self.width)
        members, dims = self._members(group, len(columns))
        (dim,) = dims
        # What this dimension does not split it spreads: its first rank sends the number, the others 0.
        spread = [dim not in self.splits[i] for i in members]
        for column in columns.unbind(1):
            self._check_sent(column, self._elements(members, self.done), group, silent=spread)
        others = self._elements(members, self.done | {dim})  # times a peer's share along this dimension
        length = np.array([self.splits[i][dim].length if not s else 1 for i, s in zip(members, spread, strict=True)])
        parts = np.array(
            [
                [self.splits[i][dim].chunk(c) if not s else float(c == 0) for i, s in zip(members, spread, strict=True)]
                for c in range(group.size())
            ]
        )
        answers = torch.from_numpy(others.numpy() / length * parts)
        buffer.view(group.size(), -1, self.width).copy_(answers.unsqueeze(2))
        # The adding-up is the clipper's; from its next collective on, this dimension is done.
        self.done.add(dim)

    def _spans_stage(self, group: Any) -> bool:
        return group.size() == dist.get_world_size() // self.degrees.pp

    def _members(self, group: Any, length: int) -> tuple[list[int], set[str]]:
        """The tensors that `length` numbers over `group` are of, in order, and the mesh dimensions that this completes."""
        everything = list(range(len(self.splits)))
        if self._spans_stage(group):  # all of a tensor's shards at once, and one copy's norm of a whole one
            members, dims = everything, {dim for by_dim in self.splits for dim in by_dim}
        else:
            dim = self.groups[group.group_name]
            split = [i for i, by_dim in enumerate(self.splits) if by_dim]
            own = [i for i in split if dim in self.splits[i]]
            # What it does not split it may spread: whole tensors, or all.
            whole = [i for i in everything if not self.splits[i]]
            members = next((m for m in (own, sorted(own + whole), split) if len(m) == length), everything)
            dims = {dim}
        if length != len(members):
            raise AssertionError(f"{length} numbers travel over {group.group_name}, expected {len(members)}")
        return members, dims

    def _elements(self, members: list[int], done: set[str]) -> Tensor:
        """Number of elements that this rank knows of after the reductions over `done`, float64 [members]."""
        counts = []
        for i in members:
            count = self.stage[i].numel
            for dim, split in self.splits[i].items():
                if dim not in done:
                    count = count // split.length * split.chunk(self.coordinates[dim])
            counts.append(float(count))
        return torch.tensor(counts, dtype=torch.float64)

    def _check_sent(self, sent: Tensor, expected: Tensor, group: Any, *, silent: list[bool]) -> None:
        """`silent`: of which tensors one copy speaks and the others send 0."""
        fine = torch.isclose(sent, expected, rtol=1e-9) | (torch.tensor(silent) & (sent == 0))
        if not bool(fine.all()):
            first = int((~fine).nonzero()[0])
            raise AssertionError(
                f"over {group.group_name} this rank sends {sent[first]} for tensor {first} of the packed vector, "
                f"expected {expected[first]}"
            )
