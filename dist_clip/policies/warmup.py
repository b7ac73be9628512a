"""The warm-up that adaptive rules share: steps of GlobalGC, whose clipped norms the state observes."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from dist_clip.policies.base import Need, Policy, Scope, State, StepInputs, global_clip_scale, observed


class GlobalWarmup(Policy):
    """Base class of rules that clip globally at ``max_norm`` while ``t <= warmup_steps``, and by element after that.

    It is no dataclass, so that each rule declares these fields in its own order.
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
        """Return the scales, float64 [n], and the new state without the slots that only a warm-up records."""
        raise NotImplementedError

    def _observe(self, state: State, clipped_norms: Tensor, t: Tensor) -> State:
        """Return the state after one warm-up observation of the norms after clipping, float64 [n]."""
        raise NotImplementedError


def storable(norms: Tensor) -> Tensor:
    """Return, as bool [n], which norms are neither 0 (nothing observed) nor Inf or NaN in fp32, the states' dtype."""
    return observed(norms.float())
