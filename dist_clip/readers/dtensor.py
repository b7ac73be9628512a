"""DTensor parameters: FSDP2, HSDP, tensor and expert parallelism, and gradients that are still Partial."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Partial, Replicate, zeros

from dist_clip.errors import LayoutError
from dist_clip.groups import current_device
from dist_clip.layout import LogicalTensor


@dataclasses.dataclass(frozen=True)
class _Spread:
    """What tensors with one mesh and one placement have in common; the fields are those of `LogicalTensor`."""

    norm_groups: tuple[dist.ProcessGroup, ...]
    component: frozenset[int]
    mesh_ranks: frozenset[int]
    device: torch.device
    placement: str


class MeshGroups:
    """Process groups and copies of device meshes, looked up once a mesh and placement and not once a tensor."""

    def __init__(self) -> None:
        self._groups: dict[tuple[int, int], dist.ProcessGroup] = {}
        self._components: dict[tuple[int, tuple[int, ...]], frozenset[int]] = {}
        self._spreads: dict[tuple[int, tuple[Any, ...]], _Spread] = {}
        self._meshes: list[Any] = []  # keeps the ids above valid

    def group(self, mesh: Any, dim: int) -> dist.ProcessGroup:
        key = (id(mesh), dim)
        if key not in self._groups:
            self._meshes.append(mesh)
            self._groups[key] = mesh.get_group(dim)
        return self._groups[key]

    def component(self, mesh: Any, sharded: tuple[int, ...]) -> frozenset[int]:
        """Global ranks that differ from this one only along the mesh dims `sharded`."""
        key = (id(mesh), sharded)
        if key not in self._components:
            self._meshes.append(mesh)
            coordinate = mesh.get_coordinate()
            index = tuple(slice(None) if dim in sharded else coordinate[dim] for dim in range(mesh.ndim))
            self._components[key] = frozenset(mesh.mesh[index].flatten().tolist())
        return self._components[key]

    def spread(self, name: str, mesh: Any, placements: tuple[Any, ...]) -> _Spread:
        """How a parameter with these placements lies on the mesh; `name` is for errors."""
        key = (id(mesh), placements)
        if key not in self._spreads:
            self._meshes.append(mesh)
            self._spreads[key] = _spread(name, mesh, placements, self)
        return self._spreads[key]


def read_dtensor(name: str, param: DTensor, groups: MeshGroups) -> LogicalTensor:
    """The logical tensor of a DTensor parameter: one norm group per mesh dim along which it is sharded."""
    spread = groups.spread(name, param.device_mesh, param.placements)
    return LogicalTensor(
        name=name,
        shape=tuple(param.shape),
        dtype=param.dtype,
        param=param,
        shard_numel=param.to_local().numel(),
        norm_groups=spread.norm_groups,
        component=spread.component,
        mesh_ranks=spread.mesh_ranks,
        read=_reader(name, param),
        device=spread.device,
        placement=spread.placement,
    )


def _spread(name: str, mesh: Any, placements: tuple[Any, ...], groups: MeshGroups) -> _Spread:
    if mesh.get_coordinate() is None:
        raise LayoutError(
            f"rank {dist.get_rank()}: {name!r} lives on a device mesh of ranks {mesh.mesh.flatten().tolist()}, to which "
            "this rank does not belong; leave it out of what this rank passes"
        )
    sharded = []
    for dim, placement in enumerate(placements):
        if _is_sharding(placement):
            if mesh.size(dim) > 1:
                sharded.append(dim)
        elif not placement.is_replicate():
            raise LayoutError(
                f"rank {dist.get_rank()}: parameter {name!r} has placement {placement} on mesh dim {dim}; its norm is only "
                "defined for Shard, _StridedShard and Replicate parameters: redistribute it first"
            )
    try:
        norm_groups = tuple(groups.group(mesh, dim) for dim in sharded)
    except (RuntimeError, ValueError, KeyError) as error:
        raise LayoutError(
            f"rank {dist.get_rank()}: the process group over which {name!r} is sharded cannot be used, was it destroyed? "
            f"({error})"
        ) from error
    sizes = [group.size() for group in norm_groups]
    return _Spread(
        norm_groups=norm_groups,
        component=groups.component(mesh, tuple(sharded)),
        mesh_ranks=groups.component(mesh, tuple(range(mesh.ndim))),
        # A CPU-offloaded shard is measured on the CPU, but a mesh of accelerators reduces on accelerators.
        device=current_device(mesh.device_type),
        placement=f"{placements} on a mesh {tuple(mesh.shape)}, norm groups of {sizes}",
    )


def _is_sharding(placement: Any) -> bool:
    # _StridedShard (TP under FSDP2) answers False to is_shard() in some versions.
    return placement.is_shard() or type(placement).__name__ == "_StridedShard"


def _reader(name: str, param: DTensor) -> Callable[[], Tensor | None]:
    placements = param.placements

    def read() -> Tensor | None:
        grad = param.grad
        if grad is None:
            return None
        if not isinstance(grad, DTensor):
            raise RuntimeError(
                f"{name!r} is a DTensor but its gradient is a {type(grad).__name__}; assign a DTensor gradient with the "
                "parameter's placements"
            )
        if grad.placements != placements:
            # Bring the gradient to where the optimizer needs it anyway. What is Partial along a replicated dimension was
            # reduced before, packed; what is left is for DTensor to do, tensor by tensor: a Partial gradient of a parameter
            # that plain DTensor (not FSDP2) shards, or a gradient that is whole.
            grad = param.grad = grad.redistribute(param.device_mesh, placements)
        return wait(grad.to_local())

    return read


def wait(local: Tensor) -> Tensor:
    """The tensor behind a collective that may still be under way: in-place work must reach the real storage."""
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


class PartialReducer:
    """Reduces the gradients that autograd leaves Partial along replicated dimensions, all of one group in one collective.

    SequenceParallel layer norms under pure TP and plain DTensor data parallelism leave Partial gradients: the local
    values are addends, not the gradient. Any optimizer would reduce them, one collective (or several) per tensor; here
    one packed all-reduce per group and dtype does it, and ``param.grad`` becomes the reduced gradient.

    Which gradients are Partial is decided by autograd, so it is learned: the ranks of each mesh exchange names, on the
    host, at the first call and, while some trainable tensor has not had a gradient yet, at calls 2, 4, 8, ...; also
    when parameters were frozen or unfrozen. Later a rank without a gradient still takes part, with zeros.

    Holds no reference to the parameters, which are handed in with each call.
    """

    def __init__(self, tensors: Sequence[LogicalTensor]) -> None:
        self._mesh_groups = MeshGroups()
        # FSDP2 reduces its own parameters; here a candidate is whatever is replicated over more than one rank.
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

    def reduce_(self, tensors: Sequence[LogicalTensor]) -> None:
        """Make the gradients of `tensors` (those of the construction) whole along replicated dims, in ``param.grad``."""
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
            gathered: list[Any] = [None] * group.size()
            dist.all_gather_object(gathered, (unseen, found), group=group)
            for others_unseen, others in gathered:
                unseen &= others_unseen
                for name, placements in others.items():
                    found.setdefault(name, placements)
        self._unseen = unseen
        merged = {**found, **self._partial}
        self._partial = {name: merged[name] for name in self._candidates if name in merged}

    def _reduce_batch(self, group: Any, op: str, members: list[tuple[DTensor, str, int]]) -> None:
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
                # from_local keeps a reference: each gradient gets memory of its own, not a view that pins the buffer.
                local = piece.clone().view(grad.to_local().shape)
                param.grad = DTensor.from_local(
                    local, grad.device_mesh, placements, run_check=False, shape=grad.shape, stride=grad.stride()
                )

    def _addend(self, param: DTensor, name: str, dim: int, group: Any) -> Tensor:
        """This rank's share of the gradient's sum along `dim`, flat."""
        grad = param.grad
        if isinstance(grad, DTensor) and (grad.placements[dim].is_partial() or dist.get_rank(group) == 0):
            # A gradient that is whole already counts once.
            return wait(grad.to_local()).reshape(-1)
        # No gradient here: an addend of zero keeps the collective the same on every rank.
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
