"""SkipAbove, which skips steps whose global norm is above a fixed threshold."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from torch import Tensor

from dist_clip.guards.base import Guard, GuardInputs, GuardNeed, WhenStuck, check_patience
from dist_clip.guards.registry import register_guard
from dist_clip.policies.base import State
from dist_clip.policies.check import check_finite


@register_guard("skipabove")
@dataclasses.dataclass(frozen=True)
class SkipAbove(Guard):
    """Skips a step whose global norm exceeds a fixed threshold. You must know your usual norms, and there is no state.

    A norm of NaN is left to ``GradClipper(nonfinite=)``; Inf is above every threshold.

    Args:
        max_norm: the threshold, above 0 and finite.
        max_skips_in_a_row: how many steps in a row may be skipped, at least 1; None: any number.
        when_stuck: what follows then: "step" takes the next step, "raise" raises `StuckError`.

    Raises:
        TypeError, ValueError: a hyper-parameter of the wrong type or out of its range.

    Example:
        >>> import torch, dist_clip
        >>> model = torch.nn.Linear(2, 2)
        >>> clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(1.0), guard=dist_clip.SkipAbove(10.0))

    Reference: Megatron's ``grad_norm_skip_threshold``.
    """

    max_norm: float
    max_skips_in_a_row: int | None = None
    when_stuck: WhenStuck = "step"

    def __post_init__(self) -> None:
        check_finite("SkipAbove", "max_norm", self.max_norm, 0.0, open_low=True)
        check_patience(self)

    def needs(self) -> Collection[GuardNeed]:
        needs: tuple[GuardNeed, ...] = ("global_norm",)
        return needs

    def step(self, state: State, inputs: GuardInputs) -> tuple[Tensor, State]:
        assert inputs.global_norm is not None
        return inputs.global_norm > self.max_norm, state
