"""Process groups: checks of those that users pass, exchanges over them, and the devices that they communicate from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dist_clip.errors import LayoutError

_T = TypeVar("_T")


def distributed() -> bool:
    """Return whether there are other ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def current_rank() -> int:
    """Return this process's global rank; 0 without torch.distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def group_size(group: dist.ProcessGroup | None) -> int:
    """Return the number of ranks of `group` (None: all ranks); 1 without torch.distributed."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def gather(value: _T, group: dist.ProcessGroup | None) -> dict[int, _T]:
    """Return what each rank of `group` (None: all ranks) passed, by global rank. Collective; `value` is pickled."""
    if group_size(group) == 1:
        return {current_rank(): value}
    group = group if group is not None else dist.group.WORLD
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return dict(zip(dist.get_process_group_ranks(group), gathered, strict=True))


def any_rank(flag: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return, as bool 0-dim, whether `flag` is set on any rank of `group` (None: all ranks). Collective."""
    if not distributed():
        return flag
    shared = flag.float()
    dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=group)
    return shared > 0


def checked_group(group: Any, argument: str) -> dist.ProcessGroup | None:
    """Return `group`, or the group of a 1-D device mesh, if it is alive and this rank is a member; None for None.

    Args:
        argument: the name of the argument, for the error.

    Raises:
        LayoutError: it is neither a group nor a 1-D mesh, it is not alive, or this rank is not a member.
    """
    if group is None:
        return None
    if not dist.is_available() or not dist.is_initialized():
        raise LayoutError(
            f"{argument}= was passed but torch.distributed is not initialized (call init_process_group first)"
        )
    rank = dist.get_rank()
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            names: tuple[object, ...] = group.mesh_dim_names or tuple(range(group.ndim))
            raise LayoutError(
                f"{argument}= must be a process group or a device mesh of one dimension, got a mesh of {group.ndim} "
                f"({', '.join(map(str, names))}): pass one of its dimensions, as in mesh[{names[0]!r}]"
            )
        if group.get_coordinate() is None:
            raise LayoutError(f"rank {rank} is not a member of the mesh passed as {argument}=")
        group = group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise LayoutError(f"rank {rank} is not a member of the group passed as {argument}=")
    if not isinstance(group, dist.ProcessGroup):
        raise LayoutError(
            f"{argument}= must be a ProcessGroup (mesh.get_group(dim)) or a DeviceMesh of one dimension, got "
            f"{type(group).__name__}: {group!r}"
        )
    if not group_alive(group):
        raise LayoutError(f"rank {rank}: the group passed as {argument}= is not alive (destroyed, or of another world)")
    ranks = dist.get_process_group_ranks(group)
    if rank not in ranks:
        raise LayoutError(f"rank {rank} is not a member of the group passed as {argument}=, whose ranks are {ranks}")
    return group


def group_alive(group: dist.ProcessGroup) -> bool:
    """Return whether the group still exists: neither destroyed nor of an earlier init_process_group."""
    try:
        return bool(dist.get_process_group_ranks(group))
    except (KeyError, ValueError, RuntimeError):
        return False


def group_label(group: dist.ProcessGroup) -> str:
    """Return a short name of a process group for tables and errors."""
    ranks = dist.get_process_group_ranks(group)
    shown = ",".join(map(str, ranks)) if len(ranks) <= 4 else f"{ranks[0]},{ranks[1]},..,{ranks[-1]}"
    return f"{group.group_name}[{shown}]"


def name_ranks(ranks: Sequence[int], most: int | None = None) -> str:
    """Return "rank 3" or "ranks 0, 1, 5"; of more than `most` ranks the first and the last."""
    if most is None or len(ranks) <= most:
        shown = ", ".join(map(str, ranks))
    else:
        shown = f"{', '.join(map(str, ranks[: most - 1]))}, ..., {ranks[-1]}"
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def stage_of(pp_group: dist.ProcessGroup | None) -> int:
    """Return this rank's pipeline stage, which is its rank in the pipeline group; 0 without one."""
    return 0 if pp_group is None else dist.get_rank(pp_group)


def current_device(device_type: str) -> torch.device:
    """Return this process's device of that type."""
    if device_type == "cpu":
        return torch.device("cpu")
    return torch.device(device_type, torch.get_device_module(device_type).current_device())


def device_of(group: dist.ProcessGroup | None) -> torch.device:
    """Return a device that `group` can communicate from: an accelerator's where it has one, else the CPU."""
    types = [device.type for device in group._device_types] if group is not None else []
    # gloo lists CUDA also on machines without it.
    present = (kind for kind in types if kind != "cpu" and torch.get_device_module(kind).is_available())
    return current_device(next(present, "cpu"))
