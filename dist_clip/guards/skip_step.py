"""SkipStep, which skips steps whose loss or global norm is an outlier of the last steps' (OLMo-core's rule)."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import torch
from torch import Tensor

from dist_clip.guards.base import Guard, GuardInputs, GuardNeed, WhenStuck, check_patience
from dist_clip.guards.registry import register_guard
from dist_clip.policies.base import State
from dist_clip.policies.check import check_count, check_finite

_LEAST_STD = 1e-6
"""Floor of the standard deviation, in means. It keeps rounding from being an outlier of values that are all the same."""


@register_guard("skipstep")
@dataclasses.dataclass(frozen=True)
class SkipStep(Guard):
    """Skips a step whose loss or global norm is more than ``sigma`` standard deviations above the mean of the last ones.

    Windows hold the last ``window`` losses and norms before this step. Once a window has ``max(2, window // 2)`` values,
    a step is taken only if ``x - mean <= sigma * std`` (std unbiased, and at least 1e-6 of the mean). The values of
    skipped steps enter the windows too, so that a lasting rise becomes usual by itself.

    A loss or norm of NaN or Inf skips the step at any time and enters no window; a norm of 0 (no gradients) enters none.

    Args:
        window: how many values to compare with, at least 4.
        sigma: how many standard deviations are an outlier, above 0.
        loss: look at the loss too, which must then be passed on every step: ``clipper.clip_(loss=loss)``. False: look at
            the norm alone.
        max_skips_in_a_row: how many steps in a row may be skipped, at least 1; None: any number.
        when_stuck: what follows then: "step" takes the next step, "raise" raises `StuckError`.

    State: ``norms`` and ``losses``, float64 [window], the last values, the newest last; ``num_norms`` and
    ``num_losses``, int64 0-dim, how many of them there are.

    Raises:
        TypeError, ValueError: a hyper-parameter of the wrong type or out of its range.

    Example:
        >>> import torch, dist_clip
        >>> model = torch.nn.Linear(2, 2)
        >>> clipper = dist_clip.GradClipper(model, dist_clip.LogClip(), guard=dist_clip.SkipStep())
        >>> loss = model(torch.ones(1, 2)).square().mean()
        >>> loss.backward()
        >>> report = clipper.clip_(loss=loss)

    Reference: OLMo-core's ``SkipStepOptimizer`` (OLMo 2 and 3), in Levanter ``skip_bad_steps`` and in MaxText
    ``skip_step_on_spikes``.
    """

    window: int = 128
    sigma: float = 6.0
    loss: bool = True
    max_skips_in_a_row: int | None = None
    when_stuck: WhenStuck = "step"

    def __post_init__(self) -> None:
        check_count("SkipStep", "window", self.window, 4)
        check_finite("SkipStep", "sigma", self.sigma, 0.0, open_low=True)
        if not isinstance(self.loss, bool):
            raise TypeError(f"SkipStep: loss must be a bool, got {self.loss!r}")
        check_patience(self)

    def needs(self) -> Collection[GuardNeed]:
        both: tuple[GuardNeed, ...] = ("global_norm", "loss")
        return both if self.loss else both[:1]

    def init_state(self, n: int, device: torch.device) -> State:
        state: State = {}
        for name in ("norms", "losses") if self.loss else ("norms",):
            state[name] = torch.zeros(self.window, dtype=torch.float64, device=device)
            state[f"num_{name}"] = torch.zeros((), dtype=torch.int64, device=device)
        return state

    def step(self, state: State, inputs: GuardInputs) -> tuple[Tensor, State]:
        assert inputs.global_norm is not None
        skip, new = self._judge(state, "norms", inputs.global_norm, inputs.global_norm > 0)
        if self.loss:
            assert inputs.loss is not None
            loss_skip, losses = self._judge(state, "losses", inputs.loss, torch.ones_like(skip))
            skip, new = torch.logical_or(skip, loss_skip), {**new, **losses}
        return skip, new

    def _judge(self, state: State, name: str, value: Tensor, usable: Tensor) -> tuple[Tensor, State]:
        """Return whether `value` is an outlier, and its window with it, unless it is not `usable` or not finite."""
        past, count = state[name], state[f"num_{name}"]
        finite = torch.isfinite(value)
        number = torch.clamp(count, max=self.window)
        held = torch.arange(self.window, device=past.device) >= self.window - number
        mean = past.sum() / number  # the places that nothing holds yet are 0
        variance = torch.where(held, past - mean, 0.0).square().sum() / (number - 1)
        std = torch.maximum(variance.sqrt(), _LEAST_STD * mean.abs())
        enough = count >= max(2, self.window // 2)
        outlier = torch.logical_and(enough, value - mean > self.sigma * std)
        keep = torch.logical_and(finite, usable)
        pushed = torch.cat([past.narrow(0, 1, self.window - 1), value.reshape(1)])
        return torch.logical_or(torch.logical_not(finite), outlier), {
            name: torch.where(keep, pushed, past),
            f"num_{name}": torch.where(keep, torch.clamp(count + 1, max=self.window), count),
        }
