"""The check at construction that the reduction counts every element of every tensor exactly once."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist

from dist_clip.errors import LayoutError
from dist_clip.layouts.layout import Layout
from dist_clip.layouts.process_groups import any_rank, distributed, gather
from dist_clip.reduction import ReductionPlan


@dataclasses.dataclass(frozen=True)
class _Miscount:
    name: str
    found: int
    expected: int


def check_coverage(layout: Layout, plan: ReductionPlan, process_group: dist.ProcessGroup | None) -> None:
    """Reduce the shards' numbers of elements like squared norms, and check that they add up to those of the tensors.

    Whatever would make a norm silently wrong (a shard missed or counted twice, the wrong process group) gives a wrong
    number of elements here. Collective over the norm groups and `process_group`.

    Raises:
        LayoutError: a tensor is not covered. The same on every rank, naming the first such tensor and both numbers.
    """
    if not distributed():
        return
    counts = torch.tensor([t.shard_numel for t in layout], dtype=torch.float64, device=layout.device)
    found = plan.reduce(counts).tolist()
    wrong = [
        _Miscount(tensor.name, int(count), tensor.numel)
        for tensor, count in zip(layout, found, strict=True)
        if count != tensor.numel
    ]
    flag = any_rank(torch.tensor(bool(wrong), device=layout.device or torch.device("cpu")), process_group)
    if not bool(flag):
        return
    for rank, miscounts in gather(wrong, process_group).items():
        if miscounts:
            first = miscounts[0]
            raise LayoutError(
                f"on rank {rank}, {len(miscounts)} tensors are not covered by the shards that would be added up: "
                f"{first.name!r} has {first.expected} elements, of which the ranks of its norm groups hold {first.found}. "
                "Were the parameters resharded or replaced, or does a rank lack some of them?"
            )
