"""The beginning that adaptive rules share: GlobalGC for a number of steps, while the state observes what it lets through."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from dist_clip.policies.base import Need, Policy, Scope, State, StepInputs, global_clip_scale, observed


class GlobalWarmup(Policy):
    """A rule that clips globally at ``max_norm`` while ``t <= warmup_steps``, and elementwise on its own after that.

    No dataclass: the rules declare these as fields of their own, in the order that is theirs.
    """

    warmup_steps: int
    max_norm: float
    scope: Scope

    def needs(self, step: int) -> Collection[Need]:
        needs: tuple[Need, ...] = ("global_norm",)
        return needs if step <= self.warmup_steps else ()

    def one_scale(self, step: int) -> bool:
        return step <= self.warmup_steps

    def step(self, state: State, inputs: StepInputs) -> tuple[Tensor, State]:
        steady_scales, steady = self._after_warmup(state, inputs.norms)
        if inputs.steps_done >= self.warmup_steps:  # the host knows that warm-up is over, and with it the record
            return steady_scales, steady
        assert inputs.global_norm is not None
        in_warmup = inputs.t <= self.warmup_steps
        warm_scales = global_clip_scale(self.max_norm, inputs.global_norm).expand(inputs.norms.shape)
        warm = self._observe(state, inputs.norms * warm_scales, inputs.t)
        new = {name: torch.where(in_warmup, value, steady.get(name, state[name])) for name, value in warm.items()}
        return torch.where(in_warmup, warm_scales, steady_scales), new

    def _after_warmup(self, state: State, norms: Tensor) -> tuple[Tensor, State]:
        """Scales, float64 [n], and the state, without what only a warm-up records."""
        raise NotImplementedError

    def _observe(self, state: State, clipped_norms: Tensor, t: Tensor) -> State:
        """The state after one warm-up observation of the norms after clipping, float64 [n]."""
        raise NotImplementedError


def storable(norms: Tensor) -> Tensor:
    """Bool: norms that fp32, the states' dtype, can tell from 0 (nothing observed) and from Inf."""
    return observed(norms.float())
