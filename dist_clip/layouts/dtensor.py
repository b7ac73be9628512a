"""The reader of DTensor parameters: FSDP2, HSDP, tensor and expert parallelism."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor

from dist_clip.errors import LayoutError
from dist_clip.layouts.gradient import real, usable
from dist_clip.layouts.layout import LogicalTensor
from dist_clip.layouts.process_groups import current_device


@dataclasses.dataclass(frozen=True)
class Spread:
    """The fields of `LogicalTensor` that all tensors with one mesh and one placement share."""

    norm_groups: tuple[dist.ProcessGroup, ...]
    replica_ranks: frozenset[int]
    mesh_ranks: frozenset[int]
    device_type: str
    placement: str
    cut: str

    @functools.cached_property
    def device(self) -> torch.device:
        """The mesh's device, not the shard's: a CPU-offloaded shard is reduced on the accelerators of its mesh."""
        return current_device(self.device_type)


class MeshGroups:
    """Process groups and replica ranks of device meshes, kept because looking them up once a tensor is slow."""

    def __init__(self) -> None:
        self._groups: dict[tuple[int, int], dist.ProcessGroup] = {}
        self._replica_ranks: dict[tuple[int, tuple[int, ...]], frozenset[int]] = {}
        self._spreads: dict[tuple[int, tuple[Any, ...]], Spread] = {}
        self._meshes: list[Any] = []  # keeps the ids above valid

    def group(self, mesh: Any, dim: int) -> dist.ProcessGroup:
        key = (id(mesh), dim)
        if key not in self._groups:
            self._meshes.append(mesh)
            self._groups[key] = mesh.get_group(dim)
        return self._groups[key]

    def replica_ranks(self, mesh: Any, sharded: tuple[int, ...]) -> frozenset[int]:
        """Return the global ranks that differ from this one only along the mesh dims `sharded`."""
        key = (id(mesh), sharded)
        if key not in self._replica_ranks:
            self._meshes.append(mesh)
            coordinate = mesh.get_coordinate()
            index = tuple(slice(None) if dim in sharded else coordinate[dim] for dim in range(mesh.ndim))
            self._replica_ranks[key] = frozenset(mesh.mesh[index].flatten().tolist())
        return self._replica_ranks[key]

    def spread(self, name: str, mesh: Any, placements: tuple[Any, ...]) -> Spread:
        """Return how a parameter with these placements lies on the mesh; `name` is for errors."""
        key = (id(mesh), placements)
        if key not in self._spreads:
            self._meshes.append(mesh)
            self._spreads[key] = _spread(name, mesh, placements, self)
        return self._spreads[key]


def read_dtensor(name: str, param: DTensor, groups: MeshGroups) -> LogicalTensor:
    """Return the logical tensor of a DTensor parameter, with one norm group per mesh dim along which it is sharded.

    Raises:
        LayoutError: this rank is not on the mesh, the placement is neither sharded nor replicated, or a process group
            of the mesh cannot be used.
    """
    spread = groups.spread(name, param.device_mesh, param.placements)
    return LogicalTensor(
        name=name,
        shape=tuple(param.shape),
        dtype=param.dtype,
        param=param,
        shard_numel=param.to_local().numel(),
        norm_groups=spread.norm_groups,
        replica_ranks=spread.replica_ranks,
        mesh_ranks=spread.mesh_ranks,
        grad=_grad_reader(name, param),
        weight=lambda: real(wait(param.to_local().detach())),
        device=spread.device,
        placement=spread.placement,
        cut=spread.cut,
        own_grad=gradient_attribute(param) == "grad",
    )


def _spread(name: str, mesh: Any, placements: tuple[Any, ...], groups: MeshGroups) -> Spread:
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
    return Spread(
        norm_groups=norm_groups,
        replica_ranks=groups.replica_ranks(mesh, tuple(sharded)),
        mesh_ranks=groups.replica_ranks(mesh, tuple(range(mesh.ndim))),
        device_type=mesh.device_type,
        placement=f"{placements} on a mesh {tuple(mesh.shape)}, norm groups of {sizes}",
        cut=f"{tuple(placements[dim] for dim in sharded)} over {sizes}" if sharded else "whole",
    )


def _is_sharding(placement: Any) -> bool:
    # _StridedShard (TP under FSDP2) answers False to is_shard() in some versions.
    return placement.is_shard() or type(placement).__name__ == "_StridedShard"


def gradient_attribute(param: Tensor) -> str:
    """Return the attribute that is the gradient: "decoupled_grad" where Megatron-FSDP is told to make it that one."""
    buffer = getattr(getattr(param, "_megatron_fsdp_model", None), "param_and_grad_buffer", None)
    marks = ("use_decoupled_grad", "use_precision_aware_optimizer")  # from megatron-core 0.17 on, and before
    return "decoupled_grad" if any(getattr(buffer, mark, False) for mark in marks) else "grad"


def _grad_reader(name: str, param: DTensor) -> Callable[[], Tensor | None]:
    placements, attribute = param.placements, gradient_attribute(param)

    def read() -> Tensor | None:
        grad = getattr(param, attribute, None)
        if grad is None:
            return None
        if not isinstance(grad, DTensor):
            raise RuntimeError(
                f"{name!r} is a DTensor but its gradient is a {type(grad).__name__}; assign a DTensor gradient with the "
                "parameter's placements"
            )
        if grad.placements != placements:
            # The optimizer needs the parameter's placements anyway. PartialReducer has already reduced what was Partial
            # along a replicated dimension, packed. DTensor redistributes the rest tensor by tensor: a Partial gradient
            # of a parameter that plain DTensor (not FSDP2) shards, or a gradient that is whole.
            grad = grad.redistribute(param.device_mesh, placements)
            setattr(param, attribute, grad)
        return usable(name, wait(grad.to_local()), put)

    def put(local: Tensor) -> None:
        grad = DTensor.from_local(
            local, param.device_mesh, placements, run_check=False, shape=param.shape, stride=param.stride()
        )
        setattr(param, attribute, grad)

    return read


def wait(local: Tensor) -> Tensor:
    """Return the tensor behind a collective that may still be under way, so that in-place work reaches its storage."""
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local
