"""Sums over pipeline stages, in stage order."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from dist_clip.reduction.plan import add_up, all_gather


class PendingSum:
    """A sum over pipeline stages that is under way."""

    def __init__(self, gathered: Tensor, work: dist.Work, size: int, p: float) -> None:
        self._gathered, self._work, self._size, self._p = gathered, work, size, p
        self._sum: Tensor | None = None

    def result(self) -> Tensor:
        """Return the sum, float64 [k]. Waits for it, on accelerators on the device's stream and not on the host."""
        if self._sum is None:
            self._work.wait()
            self._sum = add_up(self._gathered, self._size, self._p)
        return self._sum


class PipelineReducer:
    """Adds a few numbers of each pipeline stage over the stages, by one gather and additions in stage order.

    It gathers and does not all-reduce, because every data- or tensor-parallel column of the pipeline has its own group,
    and all of them must get the same bits.
    """

    def __init__(self, pp_group: dist.ProcessGroup) -> None:
        self.group = pp_group

    def start(self, values: Tensor, p: float = 2.0) -> PendingSum:
        """Start to add float64 [k] of each stage (for ``p = inf``: to find the maximum over the stages). Collective."""
        gathered = values.new_empty(self.group.size() * values.numel())
        work = all_gather(gathered, values.contiguous(), group=self.group, async_op=True)
        return PendingSum(gathered, work, self.group.size(), p)

    def sum(self, values: Tensor, p: float = 2.0) -> Tensor:
        return self.start(values, p).result()
