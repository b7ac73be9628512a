"""The decision of a step in one launch a policy group, for the policies that have a kernel, where nothing comes between."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from dist_clip.guards import Guard, MedianGuard
from dist_clip.kernels import Kernels, rules
from dist_clip.layouts.process_groups import current_rank
from dist_clip.memory import Memory, PolicyGroup
from dist_clip.memory.host_copy import capturing
from dist_clip.memory.memory import GuardMemory
from dist_clip.policies import AdaGC, GlobalNorm, LogClip, Policy, ZClip
from dist_clip.reduction import Channel
from dist_clip.step.measure import Meter
from dist_clip.step.one_launch_trial import is_fake, try_decide, try_guard
from dist_clip.step.report import ReportedNorms


@dataclasses.dataclass(frozen=True)
class Decided:
    """What one step comes to.

    Attributes:
        norms, scales: fp32 [n], of the report.
        nonfinite, skip: bool 0-dim, of the report.
        global_norms: of the report.
    """

    norms: Tensor
    scales: Tensor
    nonfinite: Tensor
    skip: Tensor
    global_norms: ReportedNorms


@dataclasses.dataclass(frozen=True)
class _Rule:
    """What a kernel knows as a policy: its number, the state's slots and the parameters, in the kernel's order."""

    number: int
    slots: tuple[str, ...]
    parameters: Callable[..., tuple[float, ...]]


def _zclip(policy: ZClip) -> tuple[float, ...]:
    return (
        policy.alpha,
        policy.z_thresh,
        policy.warmup_steps,
        policy.mode == "percentile",
        policy.clip_option == "mean",
        policy.clip_factor,
        -1.0 if policy.max_norm is None else policy.max_norm,
        policy.skip_update_on_spike,
        policy.eps,
    )


# By the class itself: a subclass may have another rule.
_RULES: dict[type[Policy], _Rule] = {
    GlobalNorm: _Rule(rules.GLOBAL_NORM, (), lambda policy: (policy.max_norm,)),
    AdaGC: _Rule(rules.ADAGC, ("gamma",), lambda policy: (policy.lambda_rel, policy.beta, policy.eps)),
    LogClip: _Rule(
        rules.LOGCLIP,
        ("level", "count", "streak"),
        lambda policy: (policy.ratio, policy.power, policy.rate, policy.patience),
    ),
    ZClip: _Rule(rules.ZCLIP, ("mean", "var", "count"), _zclip),
}


_GUARD_SLOTS = (
    "level", "peak", "earlier", "observations", "drift", "scatter", "moves", "clock", "lows", "spent"
)  # fmt: skip


def _outputs(n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return memory for the norms, the scales before they are rounded and after it, and whether any norm is non-finite."""
    norms, scales = torch.empty((2, n), dtype=torch.float32, device=device).unbind()
    exact = torch.empty(n, dtype=torch.float64, device=device)
    return norms, exact, scales, torch.empty((), dtype=torch.bool, device=device)


def _constants_of_guard(guard: Guard) -> dict[str, float]:
    assert isinstance(guard, MedianGuard)
    return {
        "THRESHOLD": guard.threshold,
        "LOG_THRESHOLD": math.log(guard.threshold),
        "DEVIATIONS": guard.deviations,
        "RATE": guard.rate,
        "WARMUP": guard.warmup_steps,
        "WINDOW": guard.window,
        "MOST": guard.max_skips_in_a_row,
    }


class OneLaunch:
    """Decides steps with the kernels' `decide`, which does what `decide` of this package does with dozens of operators.

    It serves steps after a global warm-up, where every policy has a kernel and no collective falls between the norms and
    the scales, and where nothing becomes zero and nothing but a `MedianGuard` skips a step. The guard is one more launch.

    Attributes:
        never: bool 0-dim, False: what a report says of skipping where no step can be skipped.

    Args:
        plain: whether the options leave steps alone: a NaN propagates, no scaler, no global norm to be reduced for the
            report alone.
    """

    def __init__(self, memory: Memory, channel: Channel, meter: Meter, kernels: Kernels, *, plain: bool) -> None:
        self._memory, self._channel, self._meter, self._kernels = memory, channel, meter, kernels
        known = all(type(group.policy) in _RULES for group in memory.groups)
        self._possible = plain and known and kernels.decide is not None and bool(len(memory.layout))
        self._constants = [self._constants_of(k) for k in range(len(memory.groups))] if known else []
        self.never = torch.zeros((), dtype=torch.bool, device=memory.device)
        self._sharded_scales = channel.reduces_shards and any(group.per_shard for group in memory.groups)
        self._guard: GuardMemory | None = None
        self._guard_constants: dict[str, float] = {}
        if memory.guards:
            self._guard, *others = memory.guards
            self._possible = self._possible and not others and self._can_guard(self._guard.guard)
            if self._possible:
                self._guard_constants = _constants_of_guard(self._guard.guard)

        if self._possible and not kernels.trusted and not is_fake(memory.device):
            self._possible = self._works()

    def _works(self) -> bool:
        """Try the kernels on this device, and warn if they do not work. Syncs."""
        try:
            for group, constants in zip(self._memory.groups, self._constants, strict=True):
                try_decide(self._kernels, group, _RULES[type(group.policy)].slots, constants)
            if self._guard is not None:
                try_guard(self._kernels, self._guard, _GUARD_SLOTS, self._guard_constants)
        except Exception as error:  # Triton and the driver raise many classes
            warnings.warn(
                f"rank {current_rank()}: the kernel that decides a step does not work on {self._memory.device} ({error}): "
                "torch's operators decide, which is slower and as right",
                stacklevel=4,
            )
            return False
        return True

    def _constants_of(self, k: int) -> dict[str, float]:
        groups = self._memory.groups
        policy, rule = groups[k].policy, _RULES[type(groups[k].policy)]
        return rules.constants(
            rule.number,
            rule.parameters(policy),
            one=groups[k].one_element,
            post_max_norm=policy.post_max_norm,
            skips=bool(self._memory.guards),
            first=k == 0,
            last=k == len(groups) - 1,
        )

    def _can_guard(self, guard: Guard) -> bool:
        return (
            type(guard) is MedianGuard
            and guard.when_stuck == "step"
            and self._kernels.median_guard is not None
            and all(group.policy.guarded for group in self._memory.groups)
            and not self._channel.has_stages
            and not self._sharded_scales
        )

    def serves(self, grads: list[Tensor | None], *, all_early: bool = False) -> bool:
        """Whether it can decide the next step, of these gradients, which the kernels have read. The same on every rank.

        Args:
            all_early: there are gradients, and all are clipped already.
        """
        return self._is_on and (all_early or self._kernels.is_whole(grads))

    @property
    def _is_on(self) -> bool:
        return self._possible and all(map(self._is_ready, self._memory.groups))

    def _is_ready(self, group: PolicyGroup) -> bool:
        policy = group.policy
        if isinstance(policy, (AdaGC, LogClip)) and self._memory.steps_done < policy.warmup_steps:
            return False
        if len(group.state) != len(_RULES[type(policy)].slots):  # the record of a warm-up
            return False
        needs_all = group.one_element or policy.post_max_norm is not None
        alone = not self._channel.has_stages and not (group.per_shard and self._channel.reduces_shards)
        return alone or not needs_all

    def decide(self, squares: Tensor) -> Decided:
        """Decide the step, and count it: states and step count are the new ones after it.

        Collective where norms are reduced.

        Args:
            squares: float64 [n], the squared norms of this rank's shards.
        """
        memory, n = self._memory, len(squares)
        whole = self._channel.sum_over_shards(squares, memory.shared_states())[0] if self._meter.reduces() else squares
        norms, exact, scales, nonfinite = _outputs(n, squares.device)
        skip = self.never
        if self._guard is not None:
            skip = torch.empty((), dtype=torch.bool, device=squares.device)
            self._run_guard(self._guard, whole, skip)
        assert self._kernels.decide is not None
        out = (memory.t, norms, exact, scales, nonfinite, skip)
        for group, constants in zip(memory.groups, self._constants, strict=True):
            state = [group.state[slot] for slot in _RULES[type(group.policy)].slots]
            self._kernels.decide(squares if group.per_shard else whole, group.index, state, out, constants)
        memory.calls += 1
        return Decided(norms, scales, nonfinite, skip, self._global_norms(whole, exact))

    def _run_guard(self, memory: GuardMemory, squares: Tensor, skip: Tensor) -> None:
        assert self._kernels.median_guard is not None
        state = [memory.state[slot] for slot in _GUARD_SLOTS]
        self._kernels.median_guard(squares, [*state, memory.skips_in_a_row], self._guard_constants, skip)

    def scales_of(self, k: int, squares: Tensor, columns: Tensor) -> Tensor | None:
        """Return the scales, float64 [m], that the next step has for some tensors of group `k`, and change nothing.

        None where the step is not decided in one launch. The group must look at each tensor alone.

        Args:
            squares: float64 [m], squared norms of these tensors.
            columns: int64 [m], their places in the group.
        """
        if not self._is_on:
            return None
        assert self._kernels.decide is not None
        group, m, device = self._memory.groups[k], len(squares), squares.device
        norms, exact, scales, nonfinite = _outputs(m, device)
        state = [group.state[slot].index_select(0, columns) for slot in _RULES[type(group.policy)].slots]
        out = (self._memory.t.clone(), norms, exact, scales, nonfinite, self.never)  # of which only `exact` is of use
        self._kernels.decide(squares, torch.arange(m, device=device), state, out, self._constants[k])
        return exact

    def _global_norms(self, squares: Tensor, scales: Tensor) -> ReportedNorms:
        if self._channel.has_stages or self._sharded_scales:
            return ReportedNorms(lambda: (None, None), known=False)

        def find() -> tuple[Tensor, Tensor]:
            before = squares.sqrt()
            sums = torch.stack([before.square().sum(), (before * scales).square().sum()])
            first, second = sums.sqrt().float().unbind()
            return first, second

        return ReportedNorms(find, at_once=capturing(self._memory.device))
