"""Process groups that users pass: checked, and what they can communicate from."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from dist_clip.errors import LayoutError


def checked_group(group: Any, argument: str) -> Any:
    """`group` if it is a live process group of which this rank is a member, else a `LayoutError` that says what it is."""
    if group is None:
        return None
    if not dist.is_available() or not dist.is_initialized():
        raise LayoutError(
            f"{argument}= was passed but torch.distributed is not initialized (call init_process_group first)"
        )
    rank = dist.get_rank()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise LayoutError(f"rank {rank} is not a member of the group passed as {argument}=")
    if not isinstance(group, dist.ProcessGroup):
        raise LayoutError(
            f"{argument}= must be a ProcessGroup (mesh.get_group(dim)), got {type(group).__name__}: {group!r}"
        )
    if not group_alive(group):
        raise LayoutError(f"rank {rank}: the group passed as {argument}= is not alive (destroyed, or of another world)")
    ranks = dist.get_process_group_ranks(group)
    if rank not in ranks:
        raise LayoutError(f"rank {rank} is not a member of the group passed as {argument}=, whose ranks are {ranks}")
    return group


def distributed() -> bool:
    """Whether there are other ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def group_alive(group: Any) -> bool:
    """Whether the group still exists: not destroyed, nor of an earlier init_process_group."""
    try:
        return bool(dist.get_process_group_ranks(group))
    except (KeyError, ValueError, RuntimeError):
        return False


def stage_of(pp_group: Any) -> int:
    """This rank's pipeline stage: its rank in the pipeline group."""
    return 0 if pp_group is None else dist.get_rank(pp_group)


def current_device(device_type: str) -> torch.device:
    """This process's device of that type."""
    if device_type == "cpu":
        return torch.device("cpu")
    return torch.device(device_type, torch.get_device_module(device_type).current_device())


def device_of(group: Any) -> torch.device:
    """A device that `group` can communicate from: an accelerator's where it has one, else the CPU."""
    types = [device.type for device in group._device_types] if group is not None else []
    # gloo names CUDA as well, whether or not there is any.
    present = (kind for kind in types if kind != "cpu" and torch.get_device_module(kind).is_available())
    return current_device(next(present, "cpu"))
