"""The channel to other ranks: all collectives of a step, over the shards of a tensor and over the pipeline stages."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from dist_clip.layouts.process_groups import any_rank, distributed
from dist_clip.reduction.desync import DesyncDetector
from dist_clip.reduction.pipeline import PendingSum, PipelineReducer
from dist_clip.reduction.plan import ReductionPlan


class Channel:
    """Reduces what a step measures. Every rank must call the same methods in the same order.

    Args:
        plan: reduces over the norm groups.
        pp_group: the group across pipeline stages; None without it.
        process_group: all ranks that train the model; None: all ranks.
        detector: finds ranks that are out of step; None: do not check.
    """

    def __init__(
        self,
        plan: ReductionPlan,
        pp_group: dist.ProcessGroup | None,
        process_group: dist.ProcessGroup | None,
        detector: DesyncDetector | None,
    ) -> None:
        self.plan = plan
        self.pp_group = pp_group
        self._pipeline = PipelineReducer(pp_group) if pp_group is not None and pp_group.size() > 1 else None
        self._process_group = process_group
        self._detector = detector
        self._pending: PendingSum | None = None

    @property
    def reduces_shards(self) -> bool:
        """Whether any tensor is divided among ranks."""
        return bool(self.plan.collectives)

    @property
    def has_stages(self) -> bool:
        """Whether there are several pipeline stages."""
        return self._pipeline is not None

    def begin(self) -> None:
        """Begin a step.

        Raises:
            DesyncError: the detector found ranks out of step in the step before.
        """
        if self._detector is not None:
            self._detector.raise_if_found()
        # The last step's sum may still be under way, also if nothing has read it, and its buffer must outlive it.
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    @property
    def carries(self) -> bool:
        """Whether `sum_over_shards` can add numbers of the ranks over all ranks of the pipeline stage."""
        return self.plan.carries

    def sum_over_shards(
        self, squares: Tensor, states: list[Tensor] | None = None, carried: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the sums of the shards' squares, float64 [n] or [n, k], over each tensor's norm groups. Collective.

        Args:
            states: tensors that must be the same on all ranks of the pipeline stage; None: do not check.
            carried: float64 [j], numbers of this rank whose sums over the ranks of the pipeline stage are returned as
                well; only if the channel `carries` them.

        Raises:
            DesyncError: on the CPU: ranks are out of step.
        """
        if self._detector is None or states is None or not self.reduces_shards:
            added, _, carried = self.plan.reduce_with(squares, None, carried=carried)
            return added, carried
        numbers = self._detector.numbers(states)
        added, sums, carried = self.plan.reduce_with(squares, numbers, carried=carried)
        self._detector.check(numbers, sums)
        return added, carried

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Return the sums of float64 [k] over all ranks that train the model. Collective."""
        if distributed():
            values = values.clone()
            dist.all_reduce(values, group=self._process_group)
        return values

    def sum_over_stages(self, values: Tensor) -> Tensor:
        """Return the sums of float64 [k] over the pipeline stages. Collective.

        Raises:
            DesyncError: on the CPU: ranks are out of step.
        """
        if self._pipeline is None:
            return values
        if self._detector is None:
            return self._pipeline.sum(values)
        numbers = self._detector.numbers()  # without states, which differ between stages
        added, theirs = torch.split(self._pipeline.sum(torch.cat([values, numbers])), [len(values), len(numbers)])
        self._detector.check(numbers, [(self._pipeline.group, theirs)])
        return added

    def start_sum_over_stages(self, values: Tensor) -> PendingSum:
        """Start to add float64 [k] over the pipeline stages; `begin` of the next step waits for it at the latest."""
        assert self._pipeline is not None
        self._pending = self._pipeline.start(values)
        return self._pending

    def any_rank(self, flag: Tensor) -> Tensor:
        """Return, as bool 0-dim, whether `flag` is set on any rank that trains the model. Collective."""
        return any_rank(flag, self._process_group)

    def clipped(self) -> None:
        """Record that the gradients are clipped now."""
        if self._detector is not None:
            self._detector.clipped()
