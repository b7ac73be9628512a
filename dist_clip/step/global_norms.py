"""The global norm of each policy group, computed before clipping and, where the policy or the report asks, after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from dist_clip.memory import Memory
from dist_clip.memory.host_copy import capturing
from dist_clip.policies.base import global_clip_scale, is_nonfinite
from dist_clip.reduction import Channel
from dist_clip.step.measure import Measured
from dist_clip.step.nonfinite import NonFiniteMode
from dist_clip.step.report import ReportedNorms


@dataclasses.dataclass(slots=True)
class Totals:
    """What a step knows of the whole model before clipping.

    Attributes:
        norms: float64 0-dim for each policy group, its global norm; None where nothing asks for it.
        weight_norms: float64 0-dim for each policy group, the norm of its parameters; None unless the group has one
            element and its policy asks.
        nonfinite: bool 0-dim, whether any norm is NaN or Inf: on this rank or, where steps may be skipped, on any.
        skip: bool 0-dim, whether the step is to be skipped; None where no step can be.
        together: float64 0-dim, the norm of all groups together; None where no step can be skipped.
        extra: float64 [j], the sums over the stages of what was sent along; None where no step can be skipped.
    """

    norms: Sequence[Tensor | None]
    weight_norms: Sequence[Tensor | None]
    nonfinite: Tensor
    skip: Tensor | None
    together: Tensor | None = None
    extra: Tensor | None = None


@dataclasses.dataclass(slots=True)
class Scales:
    """What a step multiplies the gradients by.

    Attributes:
        each: float64 [n], the scale of each tensor or shard.
        one: float64 0-dim for each policy group, the scale of all its tensors; None where their scales may differ.
    """

    each: Tensor
    one: Sequence[Tensor | None]

    def unless(self, skip: Tensor | None) -> Scales:
        """Return these scales, or 1 where the step is to be skipped."""
        if skip is None:
            return self
        return Scales(
            torch.where(skip, 1.0, self.each), [None if s is None else torch.where(skip, 1.0, s) for s in self.one]
        )


class GlobalNorms:
    """Computes the global norms of the policy groups.

    Every rank of a pipeline stage takes part in every tensor of the stage, so that global norms follow from the reduced
    tensor norms. Only pipeline stages, and ranks whose shards have their own scales, need to communicate.

    Args:
        counts: bool [n], which tensors this stage counts; one of the stages that hold a tensor counts it.
        may_skip: whether a step may be skipped, which the host does not know.
        every_norm: compute the norm for the report on every step, also where that costs a collective.
    """

    def __init__(
        self,
        memory: Memory,
        channel: Channel,
        counts: Tensor,
        nonfinite: NonFiniteMode,
        *,
        may_skip: bool,
        every_norm: bool,
    ) -> None:
        self._memory, self._channel, self._counts = memory, channel, counts
        self._nonfinite = nonfinite
        self._may_skip, self._every_norm = may_skip, every_norm
        self._sharded_scales = channel.reduces_shards and any(group.per_shard for group in memory.groups)

    def before(self, measured: Measured, overflow: Tensor | None, extra: Tensor | None = None) -> Totals:
        """Compute the global norms that the policies need, the non-finite flag, and whether the step is to be skipped.

        The guards, which decide after it, may skip steps that this does not.

        Collective over the pipeline stages where a group needs its global norm. They exchange one number a group, one
        for the flag, one more for each group whose policy needs the norm of all its parameters, and `extra`.

        Args:
            overflow: bool 0-dim, whether a GradScaler will skip the step on this rank; None without one.
            extra: float64 [j], numbers to add over the stages as well; only where steps may be skipped.
        """
        groups = self._memory.groups
        flag = measured.bad.any()
        if self._may_skip and measured.whole is not None:
            flag = is_nonfinite(measured.whole).any()
        if overflow is not None:
            flag = torch.logical_or(flag, overflow)  # the scaler also looks at excluded gradients
        needs = self._memory.needs()
        nothing: list[Tensor | None] = [None] * len(groups)
        if not any("global_norm" in need for need in needs):
            return Totals(nothing, nothing, flag, None)
        assert measured.whole is not None
        weighed = [k for k, group in enumerate(groups) if group.one_element and "weight_norms" in needs[k]]
        sums = [*self._squares(measured.whole), flag.double()]
        if weighed:
            assert measured.weight_whole is not None
            squares = self._squares(measured.weight_whole)
            sums += [squares[k] for k in weighed]
        vector = torch.stack(sums)
        summed = self._channel.sum_over_stages(vector if extra is None else torch.cat([vector, extra]))
        if extra is not None:
            summed, extra = torch.split(summed, [len(sums), len(extra)])
        each = summed.unbind()
        *squared, flags = each[: len(groups) + 1]
        weight_norms = list(nothing)
        for k, square in zip(weighed, each[len(groups) + 1 :], strict=True):
            weight_norms[k] = square.sqrt()
        norms = [square.sqrt() if "global_norm" in need else None for square, need in zip(squared, needs, strict=True)]
        if not self._may_skip:
            return Totals(norms, weight_norms, flag, None)
        flag = flags > 0
        skip = flag if self._nonfinite.skips else torch.zeros_like(flag)
        return Totals(norms, weight_norms, flag, skip, torch.stack(squared).sum().sqrt(), extra)

    def clip_result(self, measured: Measured, totals: Totals, scales: Scales) -> Scales:
        """Return the scales after a global clip at ``post_max_norm`` in the groups whose policy has one.

        Collective where such a group does not have one scale.
        """
        groups = self._memory.groups
        squares: dict[int, Tensor] = {}
        ask = []
        for k, (group, total, scale) in enumerate(zip(groups, totals.norms, scales.one, strict=True)):
            if group.policy.post_max_norm is None:
                continue
            if not self._memory.one_scale(group):
                ask.append(k)
            elif total is not None and scale is not None:  # None: a stage without a tensor
                squares[k] = (total * scale).square()
        if ask:
            after = self._squares_after(measured, scales, sharded=any(groups[k].per_shard for k in ask))
            sums = torch.stack([groups[k].select(after).sum() for k in ask])
            squares |= zip(ask, self._channel.sum_over_stages(sums).unbind(), strict=True)
        each, one = scales.each, list(scales.one)
        for k, square in squares.items():
            threshold, scale = groups[k].policy.post_max_norm, one[k]
            assert threshold is not None
            factor = global_clip_scale(threshold, square.sqrt())
            each = each.index_copy(0, groups[k].index, groups[k].select(each) * factor)
            one[k] = None if scale is None else scale * factor
        return Scales(each, one)

    def for_report(self, measured: Measured, totals: Totals, scales: Scales) -> ReportedNorms:
        """Return the norm of all groups together before and after clipping.

        They are None where they would cost a collective, unless ``every_norm`` is set, which pays for it here.
        """
        at_once = capturing(self._memory.device)
        if not self._every_norm and (self._channel.has_stages or self._sharded_scales):
            # This rank does not know other ranks' scales, but the scale of a group that has one is the same everywhere.
            pairs = [(norm, one) for norm, one in zip(totals.norms, scales.one, strict=True) if norm is not None]
            if len(pairs) < len(totals.norms):
                return ReportedNorms(lambda: (None, None), known=False)
            return ReportedNorms(lambda: _together(pairs), at_once=at_once)
        assert measured.whole is not None
        # A collective must run now, on all ranks, and not when one rank reads the report.
        clipped = self._squares_after(measured, scales, sharded=True) if self._sharded_scales else None
        whole = measured.whole

        def sums() -> Tensor:
            before = self._counted(whole.square())
            after = self._counted((whole * scales.each).square()) if clipped is None else clipped
            return torch.stack([before.sum(), after.sum()])

        if not self._channel.has_stages:
            return ReportedNorms(lambda: _roots(sums()), at_once=at_once)
        # Only reading the norm waits for the other stages, so that the optimizer step need not.
        pending = self._channel.start_sum_over_stages(sums())
        return ReportedNorms(lambda: _roots(pending.result()), at_once=at_once)

    def _squares(self, norms: Tensor) -> list[Tensor]:
        """Return the squared global norm of each group's tensors on this stage, float64 0-dim, from tensors' norms."""
        squares = self._counted(norms.square())
        return [group.select(squares).sum() for group in self._memory.groups]

    def _squares_after(self, measured: Measured, scales: Scales, *, sharded: bool) -> Tensor:
        """Return the tensors' squared norms after scaling, float64 [n], 0 for those that another stage counts.

        Args:
            sharded: shards of one tensor have their own scales, so that this takes one more reduction.
        """
        if sharded and self._channel.reduces_shards:
            local = self._nonfinite.clean(measured.local, measured.bad)
            return self._counted(self._channel.sum_over_shards(local * scales.each.square())[0])
        assert measured.whole is not None
        return self._counted((measured.whole * scales.each).square())

    def _counted(self, squares: Tensor) -> Tensor:
        return torch.where(self._counts, squares, 0.0)


def _together(pairs: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Return the norm of all groups together, fp32 0-dim, before clipping and, if all scales are known, after it."""
    before = torch.stack([norm for norm, _ in pairs])
    scales = [scale for _, scale in pairs if scale is not None]
    after = (before * torch.stack(scales)).square().sum().sqrt().float() if len(scales) == len(pairs) else None
    return before.square().sum().sqrt().float(), after


def _roots(sums: Tensor) -> tuple[Tensor, Tensor]:
    before, after = sums.sqrt().float().unbind()
    return before, after
