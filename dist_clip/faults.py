"""The error for non-finite gradients, the same on every rank that meets it."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from dist_clip.errors import NonFiniteGradError
from dist_clip.layout import Layout


def raise_nonfinite(layout: Layout, local: Tensor, norms: Tensor, pp_group: Any) -> NoReturn:
    """Name the tensors with a NaN or Inf gradient and the ranks whose shard has it.

    Collective over the norm groups of the faulty tensors, then over the pipeline: all of their ranks know by now that
    they are here, because they share the reduced norms and the flag.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    found: dict[str, set[int]] = {}
    groups: list[Any] = []
    faulty = (~torch.isfinite(norms)).tolist()
    for tensor, bad_norm, bad_shard in zip(layout, faulty, (~torch.isfinite(local)).tolist(), strict=True):
        if bad_shard:
            found.setdefault(tensor.name, set()).add(rank)
        if bad_norm:
            groups.extend(g for g in tensor.norm_groups if all(g is not known for known in groups))
    for group in [*groups, *([pp_group] if pp_group is not None else [])]:
        gathered: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, found, group=group)
        for other in gathered:
            for name, ranks in other.items():
                found.setdefault(name, set()).update(ranks)
    listed = [f"{name!r} (rank {', '.join(map(str, sorted(ranks)))})" for name, ranks in sorted(found.items())]
    more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
    raise NonFiniteGradError(
        f"the gradient is NaN or Inf in {', '.join(listed[:8])}{more}; nothing was clipped and the state is as it was. "
        'nonfinite="skip" or "zero" would let training go on'
    )
