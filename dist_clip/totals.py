"""Owns global norms, a domain's each: before the rule, of the result where a policy clips that as well, for the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dist_clip.domains import Domain, Measured
from dist_clip.overlap import Overlap
from dist_clip.policies.base import global_clip_scale
from dist_clip.reduction import PendingSum, PipelineReducer, ReductionPlan
from dist_clip.report import GlobalNorms


class Totals:
    """What a step knows of its domains' global norms, and what it takes to know more.

    Every rank of a stage takes part in every tensor of it, so that global norms follow from the reduced tensor norms;
    only pipeline stages have to ask each other, and ranks whose shards have scales of their own.

    Args:
        counts: bool [n], which tensors this stage counts; one that several stages hold is counted by one of them.
        sum_over_stages: adds a vector over the pipeline stages, if there are any.
        zero: whether non-finite gradients become 0, so that they are in no norm afterwards.
        may_skip: whether a step may turn out to be skipped, which the host does not know.
    """

    def __init__(
        self,
        domains: Sequence[Domain],
        counts: Tensor,
        plan: ReductionPlan | Overlap,
        pipeline: PipelineReducer | None,
        sum_over_stages: Callable[[Tensor], Tensor],
        *,
        zero: bool,
        may_skip: bool,
    ) -> None:
        self._domains = domains
        self._counts = counts
        self._plan = plan
        self._pipeline = pipeline
        self._sum_over_stages = sum_over_stages
        self._zero = zero
        self._may_skip = may_skip
        self._sharded = bool(plan.stages) and any(d.policy.rule_scope == "shard" for d in domains)
        self._pending: PendingSum | None = None

    def finish(self) -> None:
        """Wait for the last step's sum, whether anybody asked for it or not: its buffer must outlive it."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def squares(self, measured: Measured) -> list[Tensor]:
        """Squared global norm of each domain's tensors on this stage, float64 0-dim."""
        assert measured.whole is not None
        squares = self._counted(measured.whole.square())
        return [squares.index_select(0, domain.index).sum() for domain in self._domains]

    def one_scale(self, domain: Domain, total: Tensor | None) -> bool:
        """Whether all tensors of the domain get the same scale this step, on every rank. Known to the host."""
        return domain.policy.rule_scope == "global" or (total is not None and not self._may_skip)

    def clip_result(
        self, measured: Measured, totals: Sequence[Tensor | None], scales: Tensor, uniform: Sequence[Tensor | None]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Clip globally what the rules have scaled, in the domains whose policy asks for it: both kinds of scales again.

        Args:
            totals: each domain's global norm before the rule, where it is known.
            scales: float64 [n].
            uniform: the one scale of each domain that has one and a tensor here.
        """
        thresholds = {k: d.policy.post_max_norm for k, d in enumerate(self._domains)}
        squares: dict[int, Tensor] = {}
        ask = []
        for k, (domain, total, scale) in enumerate(zip(self._domains, totals, uniform, strict=True)):
            if thresholds[k] is None:
                continue
            if not self.one_scale(domain, total):
                ask.append(k)
            elif total is not None and scale is not None:  # None: a stage without a tensor
                squares[k] = (total * scale).square()
        if ask:
            sharded = any(self._domains[k].policy.rule_scope == "shard" for k in ask)
            after = self._clipped_squares(measured, scales, sharded=sharded)
            sums = torch.stack([after.index_select(0, self._domains[k].index).sum() for k in ask])
            squares |= zip(ask, self._sum_over_stages(sums).unbind(), strict=True)
        again = list(uniform)
        for k, square in squares.items():
            threshold, index, scale = thresholds[k], self._domains[k].index, again[k]
            assert threshold is not None
            factor = global_clip_scale(threshold, square.sqrt())
            scales = scales.index_copy(0, index, scales.index_select(0, index) * factor)
            again[k] = None if scale is None else scale * factor
        return scales, again

    def _clipped_squares(self, measured: Measured, scales: Tensor, *, sharded: bool) -> Tensor:
        """The tensors' squared norms after scaling, float64 [n], 0 for those that another stage counts.

        `sharded`: shards of one tensor have scales of their own, so that it takes one more reduction.
        """
        if sharded and self._plan.stages:
            local = torch.where(measured.bad, 0.0, measured.local) if self._zero else measured.local
            squares = self._plan.reduce(local * scales.square())
        else:
            assert measured.whole is not None
            squares = (measured.whole * scales).square()
        return self._counted(squares)

    def _counted(self, squares: Tensor) -> Tensor:
        return torch.where(self._counts, squares, 0.0)

    def report(
        self,
        measured: Measured,
        totals: Sequence[Tensor | None],
        scales: Tensor,
        uniform: Sequence[Tensor | None],
        *,
        asked: bool,
    ) -> GlobalNorms:
        """Global norm of all domains before and after clipping, where known without a collective of their own or `asked`."""
        if not asked and (self._pipeline is not None or self._sharded):
            # Other ranks' scales are not known here, but where a domain has one scale it is the same everywhere.
            pairs = [(total, scale) for total, scale in zip(totals, uniform, strict=True) if total is not None]
            if len(pairs) < len(totals):
                return GlobalNorms(lambda: (None, None), known=False)
            return GlobalNorms(lambda: _together(pairs))
        assert measured.whole is not None
        # A collective, where it takes one, now and not when somebody asks.
        clipped = self._clipped_squares(measured, scales, sharded=True) if self._sharded else None
        whole = measured.whole

        def sums() -> Tensor:
            before = self._counted(whole.square())
            after = self._counted((whole * scales).square()) if clipped is None else clipped
            return torch.stack([before.sum(), after.sum()])

        if self._pipeline is None:
            return GlobalNorms(lambda: _roots(sums()))
        # The optimizer need not wait for the other stages: whoever reads the norm does.
        pending = self._pending = self._pipeline.start(sums())
        return GlobalNorms(lambda: _roots(pending.result()))


def _together(pairs: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Norm of all domains from each one's norm and scale: before clipping, and after it if all scales are known."""
    before = torch.stack([total for total, _ in pairs])
    scales = [scale for _, scale in pairs if scale is not None]
    after = (before * torch.stack(scales)).square().sum().sqrt().float() if len(scales) == len(pairs) else None
    return before.square().sum().sqrt().float(), after


def _roots(sums: Tensor) -> tuple[Tensor, Tensor]:
    before, after = sums.sqrt().float().unbind()
    return before, after
