"""Checks of the process groups that users pass."""

from __future__ import annotations

from typing import Any

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
    try:
        ranks = dist.get_process_group_ranks(group)
    except (KeyError, ValueError, RuntimeError):
        ranks = []
    if not ranks:
        raise LayoutError(f"rank {rank}: the group passed as {argument}= is not alive (destroyed, or of another world)")
    if rank not in ranks:
        raise LayoutError(f"rank {rank} is not a member of the group passed as {argument}=, whose ranks are {ranks}")
    return group


def stage_of(pp_group: Any) -> int:
    """This rank's pipeline stage: its rank in the pipeline group."""
    return 0 if pp_group is None else dist.get_rank(pp_group)
