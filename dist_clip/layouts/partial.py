"""The reducer of gradients that autograd leaves Partial, which runs before they are measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, zeros

from dist_clip.layouts.dtensor import MeshGroups, wait
from dist_clip.layouts.layout import LogicalTensor
from dist_clip.layouts.process_groups import gather


class PartialReducer:
    """Reduces the gradients that autograd leaves Partial along replicated dimensions, in packed collectives.

    SequenceParallel layer norms under pure TP and plain DTensor data parallelism leave Partial gradients: the local
    values are addends, not the gradient. An optimizer would reduce them with at least one collective per tensor. Here
    one packed all-reduce per group, dtype and operation does it, and ``param.grad`` becomes the reduced gradient.

    Autograd decides which gradients are Partial, so the reducer learns it: the ranks of each mesh exchange names on the
    host at the first call, whenever parameters were frozen or unfrozen, and at calls 2, 4, 8, ... while some trainable
    tensor has not had a gradient yet. A rank without a gradient takes part in later calls with zeros.

    The reducer holds no reference to the parameters; each call passes them.
    """

    def __init__(self, tensors: Sequence[LogicalTensor]) -> None:
        self._mesh_groups = MeshGroups()
        # A candidate is a parameter that is replicated over more than one rank. FSDP2 reduces what it shards itself.
        self._candidates: dict[str, list[int]] = {}
        self._groups: list[dist.ProcessGroup] = []
        for tensor in tensors:
            param = tensor.param
            if not isinstance(param, DTensor):
                continue
            mesh = param.device_mesh
            dims = [d for d, p in enumerate(param.placements) if p.is_replicate() and mesh.size(d) > 1]
            if dims:
                self._candidates[tensor.name] = dims
                for dim in dims:
                    group = self._mesh_groups.group(mesh, dim)
                    if all(group is not g for g in self._groups):
                        self._groups.append(group)
        self._partial: dict[str, tuple[Any, ...]] = {}  # name -> placements of the gradient
        self._unseen = set(self._candidates)  # no rank has had a gradient of these yet
        self._trainable: set[str] = set()
        self._calls = 0

    @property
    def candidates(self) -> bool:
        """Whether there is any tensor whose gradient might be Partial."""
        return bool(self._candidates)

    def reduce_(self, tensors: Sequence[LogicalTensor]) -> None:
        """Reduce the Partial gradients of `tensors`, those of the construction, and put the result into ``param.grad``.

        Raises:
            RuntimeError: a gradient is Partial with another operation than sum or average.
        """
        if not self._candidates:
            return
        params: dict[str, DTensor] = {t.name: t.param for t in tensors if t.name in self._candidates}  # type: ignore[misc]
        self._calls += 1
        trainable = {name for name, param in params.items() if param.requires_grad}
        power_of_two = self._calls & (self._calls - 1) == 0
        if trainable != self._trainable or (power_of_two and self._unseen & trainable):
            self._trainable = trainable
            self._learn(params)
        batches: dict[tuple[int, str, str], list[tuple[str, int]]] = defaultdict(list)
        for name, placements in self._partial.items():
            param = params[name]
            for dim in self._candidates[name]:
                if placements[dim].is_partial():
                    group = self._mesh_groups.group(param.device_mesh, dim)
                    index = next(i for i, g in enumerate(self._groups) if g is group)
                    dtype = param.dtype if param.grad is None else param.grad.dtype
                    batches[(index, str(dtype), _reduce_op(name, placements[dim]))].append((name, dim))
        for (index, _, op), members in sorted(batches.items(), key=lambda item: item[0]):
            self._reduce_batch(self._groups[index], op, [(params[name], name, dim) for name, dim in members])

    def _learn(self, params: dict[str, DTensor]) -> None:
        """Agree on which gradients are Partial. Collective."""
        found: dict[str, tuple[Any, ...]] = {}
        unseen = set(self._unseen)
        for name, param in params.items():
            grad = param.grad
            if grad is not None:
                unseen.discard(name)
            if isinstance(grad, DTensor) and any(grad.placements[dim].is_partial() for dim in self._candidates[name]):
                found[name] = tuple(grad.placements)
        for group in self._groups:
            for others_unseen, others in gather((unseen, found), group).values():
                unseen &= others_unseen
                for name, placements in others.items():
                    found.setdefault(name, placements)
        self._unseen = unseen
        merged = {**found, **self._partial}
        self._partial = {name: merged[name] for name in self._candidates if name in merged}

    def _reduce_batch(self, group: dist.ProcessGroup, op: str, members: list[tuple[DTensor, str, int]]) -> None:
        pieces = [self._addend(param, name, dim, group) for param, name, dim in members]
        flat = torch.cat(pieces)
        dist.all_reduce(flat, group=group)
        if op == "avg":
            flat /= group.size()
        for (param, _, dim), piece in zip(members, torch.split(flat, [p.numel() for p in pieces]), strict=True):
            grad = param.grad
            if isinstance(grad, DTensor) and grad.placements[dim].is_partial():
                placements = list(grad.placements)
                placements[dim] = Replicate()
                # from_local keeps a reference, and a view would keep the whole buffer alive.
                local = piece.clone().view(grad.to_local().shape)
                param.grad = DTensor.from_local(
                    local, grad.device_mesh, placements, run_check=False, shape=grad.shape, stride=grad.stride()
                )

    def _addend(self, param: DTensor, name: str, dim: int, group: dist.ProcessGroup) -> Tensor:
        """Return this rank's addend of the gradient's sum along `dim`, flat."""
        grad = param.grad
        if isinstance(grad, DTensor) and (grad.placements[dim].is_partial() or dist.get_rank(group) == 0):
            # A gradient that is whole already is sent by one rank only.
            return wait(grad.to_local()).reshape(-1)
        # An addend of zero keeps the collective the same on every rank.
        placements = [Replicate() if p.is_partial() else p for p in self._partial[name]]
        dtype = param.dtype if grad is None else grad.dtype
        return (
            zeros(*param.shape, dtype=dtype, device_mesh=param.device_mesh, placements=placements)
            .to_local()
            .reshape(-1)
        )


def _reduce_op(name: str, placement: Any) -> str:
    op = placement.reduce_op if isinstance(placement, Partial) else type(placement).__name__
    if op not in ("sum", "avg"):
        raise RuntimeError(f"{name!r} has a gradient placed {placement}: only Partial sums and averages can be reduced")
    return op
