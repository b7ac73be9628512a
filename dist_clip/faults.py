"""The error for non-finite gradients, the same on every rank that meets it."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from dist_clip.errors import NonFiniteGradError
from dist_clip.groups import distributed
from dist_clip.layout import Layout


def any_rank(flag: Tensor, process_group: Any) -> Tensor:
    """Bool 0-dim: `flag` of any rank of `process_group` (None: all), so that all of them raise or none."""
    if not distributed():
        return flag
    shared = flag.float()
    dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=process_group)
    return shared > 0


def raise_nonfinite(layout: Layout, local: Tensor, process_group: Any) -> NoReturn:
    """Name the tensors with a NaN or Inf gradient and the ranks whose shard has it. Collective over `process_group`."""
    bad = torch.logical_not(torch.isfinite(local)).tolist()
    mine = [tensor.name for tensor, faulty in zip(layout, bad, strict=True) if faulty]
    gathered: list[Any] = [mine]
    ranks = [0]
    if distributed():
        gathered = [None] * dist.get_world_size(process_group)
        dist.all_gather_object(gathered, mine, group=process_group)
        ranks = dist.get_process_group_ranks(process_group if process_group is not None else dist.group.WORLD)
    found: dict[str, list[int]] = {}
    for rank, names in zip(ranks, gathered, strict=True):
        for name in names:
            found.setdefault(name, []).append(rank)
    listed = [f"{name!r} (rank {', '.join(map(str, holders))})" for name, holders in sorted(found.items())]
    more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
    raise NonFiniteGradError(
        f"the gradient is NaN or Inf in {', '.join(listed[:8])}{more}; nothing was clipped and the state is as it was. "
        'nonfinite="skip" or "zero" would let training go on'
    )
