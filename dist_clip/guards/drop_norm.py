"""DropNorm, which skips steps whose global norm is far above its moving average (AXLearn's rule)."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Literal, get_args

import torch
from torch import Tensor

from dist_clip.guards.base import Guard, GuardInputs, GuardNeed, WhenStuck, check_patience
from dist_clip.guards.registry import register_guard
from dist_clip.policies.base import State
from dist_clip.policies.check import check_choice, check_count, check_finite, check_fraction

Variant = Literal["mean", "std"]


@register_guard("dropnorm")
@dataclasses.dataclass(frozen=True)
class DropNorm(Guard):
    """Skips a step whose global norm N is far above the moving average of the norms of the steps that were taken.

    ``m`` and ``q`` are moving averages of N and of its square, with the decay ``decay`` and the correction of their bias.
    "mean" skips if ``N >= factor * m``; "std" skips if ``N >= m + factor * sqrt(q - m^2)``, once ``min_steps`` norms are
    counted. A norm of NaN or Inf skips the step at any time. The averages follow steps that this guard lets pass, and of
    these not a norm of 0 (no gradients).

    Since skipped steps leave the averages alone, the published rule never steps again after a lasting rise. Here the step
    after ``max_skips_in_a_row`` skips is taken, and the averages start afresh with its norm.

    Args:
        variant: "mean" or "std".
        factor: how far above the average is too far, in averages (above 1) or in standard deviations (above 0).
        decay: decay of the averages, in [0, 1).
        min_steps: for "std": norms to count before the first step may be skipped, at least 2.
        max_skips_in_a_row: how many steps in a row may be skipped, at least 1; None: any number, as published.
        when_stuck: what follows then: "step" takes the next step, "raise" raises `StuckError`.

    State: ``mean`` and ``mean_square``, float64 0-dim, before the correction of their bias; ``count``, int64 0-dim.

    Raises:
        TypeError, ValueError: a hyper-parameter of the wrong type or out of its range.

    Example:
        >>> import torch, dist_clip
        >>> model = torch.nn.Linear(2, 2)
        >>> clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(1.0), guard=dist_clip.DropNorm(factor=20.0))

    Reference: AXLearn's ``skip_and_clip_by_global_norm`` with ``drop_norm_by_grad_norm_ema`` ("mean"; of its multipliers
    20, 40 and 100 the smallest decides) and ``drop_norm_by_grad_norm_stddev`` ("std").
    """

    variant: Variant = "mean"
    factor: float = 20.0
    decay: float = 0.99
    min_steps: int = 500
    max_skips_in_a_row: int | None = 50
    when_stuck: WhenStuck = "step"

    def __post_init__(self) -> None:
        check_choice("DropNorm", "variant", self.variant, get_args(Variant))
        check_finite("DropNorm", "factor", self.factor, 1.0 if self.variant == "mean" else 0.0, open_low=True)
        check_fraction("DropNorm", "decay", self.decay)
        check_count("DropNorm", "min_steps", self.min_steps, 2)
        check_patience(self)

    def needs(self) -> Collection[GuardNeed]:
        needs: tuple[GuardNeed, ...] = ("global_norm",)
        return needs

    def init_state(self, n: int, device: torch.device) -> State:
        return {
            "mean": torch.zeros((), dtype=torch.float64, device=device),
            "mean_square": torch.zeros((), dtype=torch.float64, device=device),
            "count": torch.zeros((), dtype=torch.int64, device=device),
        }

    def step(self, state: State, inputs: GuardInputs) -> tuple[Tensor, State]:
        norm, count = inputs.global_norm, state["count"]
        assert norm is not None
        counted = 1 - torch.exp(count.double() * _log(self.decay))  # the weight of all norms so far; 0 before the first
        mean, mean_square = state["mean"] / counted, state["mean_square"] / counted
        if self.variant == "mean":
            high = torch.logical_and(norm >= self.factor * mean, count > 0)
        else:
            std = torch.clamp(mean_square - mean.square(), min=0.0).sqrt()
            high = torch.logical_and(norm >= mean + self.factor * std, count >= self.min_steps)
        finite = torch.isfinite(norm.square())  # what the state stores
        skip = torch.logical_or(torch.logical_not(finite), high)
        afresh = torch.logical_and(high, self.overdue(inputs))
        follows = torch.logical_and(
            torch.logical_and(finite, norm > 0), torch.logical_or(torch.logical_not(high), afresh)
        )
        new = {}
        for name, value in (("mean", norm), ("mean_square", norm.square())):
            old = torch.where(afresh, 0.0, state[name])
            new[name] = torch.where(follows, self.decay * old + (1 - self.decay) * value, state[name])
        new["count"] = torch.where(follows, torch.where(afresh, 0, count) + 1, count)
        return skip, new


def _log(decay: float) -> float:
    return float(torch.log(torch.tensor(decay, dtype=torch.float64))) if decay > 0 else -1e4
