"""The decision of a step: runs each policy on its norms, and puts the scales of all policy groups together."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_clip.memory import Memory
from dist_clip.policies.base import State, StepInputs
from dist_clip.step.global_norms import GlobalNorms, Scales, Totals
from dist_clip.step.measure import Measured
from dist_clip.step.nonfinite import NonFiniteMode


def decide(
    measured: Measured, totals: Totals, memory: Memory, global_norms: GlobalNorms, nonfinite: NonFiniteMode
) -> tuple[Scales, list[State]]:
    """Return the scales and the new state of each policy group, and change nothing.

    Collective over the pipeline stages and the norm groups where a policy with ``post_max_norm`` needs it.
    """
    t, steps_done = memory.t + 1, memory.steps_done
    each = torch.ones(len(memory.layout), dtype=torch.float64, device=memory.device)
    one: list[Tensor | None] = []
    states: list[State] = []
    for group, total, weight_total in zip(memory.groups, totals.norms, totals.weight_norms, strict=True):
        norms, weight_norms = measured.elements_of(group), None
        if group.one_element:
            assert total is not None
            norms, weight_norms = total.unsqueeze(0), None if weight_total is None else weight_total.unsqueeze(0)
        elif measured.weight_norms is not None:
            weight_norms = group.select(measured.weight_norms)
        inputs = StepInputs(norms, group.numel, t, steps_done, total, weight_norms)
        scales, new_state = group.policy.step(group.state, inputs)
        each.index_copy_(0, group.index, scales.double().expand(len(group.indices)))
        alike = memory.one_scale(group) and scales.numel() > 0
        one.append(scales.double().unbind()[0] if alike else None)
        states.append(new_state)
    scaled = Scales(nonfinite.clean(each, measured.bad), one)
    return global_norms.clip_result(measured, totals, scaled).unless(totals.skip), states
