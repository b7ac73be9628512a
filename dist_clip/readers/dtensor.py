"""DTensor parameters: FSDP2, HSDP, tensor and expert parallelism, and gradients that are still Partial."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from dist_clip.errors import LayoutError
from dist_clip.layout import LogicalTensor


class MeshGroups:
    """Process groups and copies of device meshes, looked up once a mesh and not once a tensor."""

    def __init__(self) -> None:
        self._groups: dict[tuple[int, int], dist.ProcessGroup] = {}
        self._components: dict[tuple[int, tuple[int, ...]], frozenset[int]] = {}
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


def read_dtensor(name: str, param: DTensor, groups: MeshGroups) -> LogicalTensor:
    """The logical tensor of a DTensor parameter: one norm group per mesh dim along which it is sharded."""
    mesh = param.device_mesh
    if mesh.get_coordinate() is None:
        raise LayoutError(
            f"rank {dist.get_rank()}: {name!r} lives on a device mesh of ranks {mesh.mesh.flatten().tolist()}, to which "
            "this rank does not belong; leave it out of what this rank passes"
        )
    sharded = []
    for dim, placement in enumerate(param.placements):
        if _is_sharding(placement):
            if mesh.size(dim) > 1:
                sharded.append(dim)
        elif not placement.is_replicate():
            raise LayoutError(
                f"rank {dist.get_rank()}: parameter {name!r} has placement {placement} on mesh dim {dim}; its norm is only "
                "defined for Shard, _StridedShard and Replicate parameters: redistribute it first"
            )
    device_type = mesh.device_type
    try:
        norm_groups = tuple(groups.group(mesh, dim) for dim in sharded)
    except (RuntimeError, ValueError, KeyError) as error:
        raise LayoutError(
            f"rank {dist.get_rank()}: the process group over which {name!r} is sharded cannot be used, was it destroyed? "
            f"({error})"
        ) from error
    return LogicalTensor(
        name=name,
        shape=tuple(param.shape),
        param=param,
        norm_groups=norm_groups,
        component=groups.component(mesh, tuple(sharded)),
        read=_reader(name, param),
        # A CPU-offloaded shard is measured on the CPU, but a mesh of accelerators reduces on accelerators.
        device=torch.device(device_type, _current_device(device_type)) if device_type != "cpu" else torch.device("cpu"),
        placement=f"{param.placements} on a mesh {tuple(mesh.shape)}",
    )


def _is_sharding(placement: Any) -> bool:
    # _StridedShard (TP under FSDP2) answers False to is_shard() in some versions.
    return placement.is_shard() or type(placement).__name__ == "_StridedShard"


def _current_device(device_type: str) -> int:
    return torch.get_device_module(device_type).current_device()


def _reader(name: str, param: DTensor) -> Callable[[], Tensor | None]:
    def read() -> Tensor | None:
        grad = param.grad
        if grad is None:
            return None
        if not isinstance(grad, DTensor):
            raise RuntimeError(
                f"{name!r} is a DTensor but its gradient is a {type(grad).__name__}; assign a DTensor gradient with the "
                "parameter's placements"
            )
        if grad.placements != param.placements:
            # Not Partial (those were reduced before): bring the gradient to where the optimizer needs it anyway.
            grad = param.grad = grad.redistribute(param.device_mesh, param.placements)
        return wait(grad.to_local())

    return read


def wait(local: Tensor) -> Tensor:
    """The tensor behind a collective that may still be under way: in-place work must reach the real storage."""
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


class PartialReducer:
    """Reduces the gradients that autograd leaves Partial, all of one group in one collective.

    SequenceParallel layer norms under pure TP and plain DTensor data parallelism leave Partial gradients: the local
    values are addends, not the gradient. Any optimizer would reduce them, one collective (or several) per tensor; here
    one packed all-reduce per group and dtype does it, and ``param.grad`` becomes the reduced gradient.

    Which gradients are Partial is decided by autograd, so it is learned from the first step that has gradients: the
    ranks of each mesh exchange their names once. Later a rank without a gradient still takes part, with zeros.
    """

    def __init__(self, tensors: Sequence[LogicalTensor]) -> None:
        groups = MeshGroups()
        # FSDP2 reduces its own parameters; here a candidate is whatever is replicated over more than one rank.
        self._candidates: dict[str, tuple[DTensor, list[int]]] = {}
        self._groups: list[dist.ProcessGroup] = []
        for tensor in tensors:
            param = tensor.param
            if not isinstance(param, DTensor):
                continue
            mesh = param.device_mesh
            dims = [d for d, p in enumerate(param.placements) if p.is_replicate() and mesh.size(d) > 1]
            if dims:
                self._candidates[tensor.name] = (param, dims)
                for dim in dims:
                    if all(groups.group(mesh, dim) is not g for g in self._groups):
                        self._groups.append(groups.group(mesh, dim))
        self._mesh_groups = groups
        self._learned = False
        self._partial: dict[str, dict[int, str]] = {}  # name -> mesh dim -> reduce op

    def learn(self) -> None:
        """Agree on which gradients are Partial. Collective, until a step had gradients on some rank."""
        found: dict[str, dict[int, str]] = {}
        any_grad = False
        for name, (param, _dims) in self._candidates.items():
            grad = param.grad
            any_grad = any_grad or grad is not None
            if isinstance(grad, DTensor):
                partial = {d: _reduce_op(name, p) for d, p in enumerate(grad.placements) if p.is_partial()}
                if partial:
                    found[name] = partial
        for group in self._groups:
            gathered: list[Any] = [None] * group.size()
            dist.all_gather_object(gathered, (any_grad, found), group=group)
            for other_any, other in gathered:
                any_grad = any_grad or other_any
                for name, partial in other.items():
                    found.setdefault(name, {}).update(partial)
        self._partial = {name: found[name] for name in self._candidates if name in found}
        self._learned = any_grad

    def reduce_(self) -> None:
        """Make every Partial gradient whole, in place of ``param.grad``."""
        if not self._candidates:
            return
        if not self._learned:
            self.learn()
        batches: dict[tuple[int, torch.dtype, str], list[tuple[str, DTensor, int]]] = defaultdict(list)
        for name, partial in self._partial.items():
            param, _ = self._candidates[name]
            for dim, op in partial.items():
                group = self._mesh_groups.group(param.device_mesh, dim)
                index = next(i for i, g in enumerate(self._groups) if g is group)
                grad = param.grad
                batches[(index, param.dtype if grad is None else grad.dtype, op)].append((name, param, dim))
        for (index, dtype, op), members in sorted(batches.items(), key=lambda item: (item[0][0], str(item[0][1:]))):
            self._reduce_batch(self._groups[index], dtype, op, members)

    def _reduce_batch(self, group: Any, dtype: torch.dtype, op: str, members: list[tuple[str, DTensor, int]]) -> None:
        pieces: list[Tensor] = []
        for _name, param, dim in members:
            grad = param.grad
            if isinstance(grad, DTensor) and grad.placements[dim].is_partial():
                pieces.append(wait(grad.to_local()).reshape(-1))
            else:
                # No gradient here: an addend of zero keeps the collective the same on every rank. A gradient that is
                # already whole counts once.
                local = param.to_local()
                whole = isinstance(grad, DTensor) and dist.get_rank(group) == 0
                pieces.append((wait(grad.to_local()) if whole else torch.zeros_like(local)).reshape(-1))  # type: ignore[union-attr]
        flat = torch.cat(pieces)
        dist.all_reduce(flat, group=group)
        if op == "avg":
            flat /= group.size()
        for (_name, param, dim), piece in zip(members, torch.split(flat, [p.numel() for p in pieces]), strict=True):
            grad = param.grad
            if isinstance(grad, DTensor) and grad.placements[dim].is_partial():
                placements = list(grad.placements)
                placements[dim] = Replicate()
                # from_local keeps a reference: each gradient gets memory of its own, not a view that pins the buffer.
                local = piece.clone().view(grad.to_local().shape)
                param.grad = DTensor.from_local(
                    local, grad.device_mesh, placements, run_check=False, shape=grad.shape, stride=grad.stride()
                )


def _reduce_op(name: str, placement: Any) -> str:
    op = placement.reduce_op if isinstance(placement, Partial) else type(placement).__name__
    if op not in ("sum", "avg"):
        raise RuntimeError(f"{name!r} has a gradient placed {placement}: only Partial sums and averages can be reduced")
    return op
