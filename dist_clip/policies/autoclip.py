"""AutoClip, which clips at a percentile of the norms that it has seen."""

from __future__ import annotations

import dataclasses
import math
from typing import get_args

import torch
from torch import Tensor

from dist_clip.policies.base import Policy, Scope, State, StepInputs, observed
from dist_clip.policies.check import check_choice, check_count, check_number
from dist_clip.policies.registry import register


@register("autoclip")
@dataclasses.dataclass(frozen=True)
class AutoClip(Policy):
    """Clipping at a percentile of the past global norms, this step's included.

    With ``c`` the percentile of the last ``history`` norms ``N``, this one among them: where ``N > c``,
    ``g *= c / (N + 1e-6)``. The percentile lies between two norms where it falls between them, as ``numpy.percentile``
    has it. So the first step is not clipped, and the usual step is: at the default, nine of ten.
    A norm of zero (no gradients), NaN or Inf never enters the history.

    The paper keeps all norms, and a state of fixed size cannot. Of 10,000 norms the 10th percentile is known to within
    .3 percentiles (one standard deviation), so that more of them would change little. A run of fewer steps is the
    paper's rule exactly.

    The history takes 8 bytes a norm, 80 KB at the default. With scope "tensor" or "shard" each tensor has one, which is
    sorted on every step: choose ``history=1000`` or less there.

    Args:
        percentile: the percentile to clip at, from 0 (the smallest norm) to 100 (the largest).
        history: how many norms to keep, at least 1. The oldest is dropped for the newest.
        scope: "global" is the paper's; "tensor" and "shard" apply the rule to each tensor, or to each rank's piece, by
            itself, and never need the global norm.

    State: ``norms``, float64 [history, n], of which row ``k % history`` is norm number ``k``, from 0; ``count``, int64
    [n], how many norms there were.

    Raises:
        TypeError, ValueError: a hyper-parameter of the wrong type or out of its range.

    Example:
        >>> import dist_clip
        >>> policy = dist_clip.AutoClip(percentile=50.0, history=1000)

    Reference: arXiv 2007.14469, and its official code pseeth/autoclip.
    """

    percentile: float = 10.0
    history: int = 10_000
    scope: Scope = "global"

    def __post_init__(self) -> None:
        check_number("AutoClip", "percentile", self.percentile, 0.0, 100.0)
        check_count("AutoClip", "history", self.history, 1)
        check_choice("AutoClip", "scope", self.scope, get_args(Scope))

    def init_state(self, n: int, device: torch.device) -> State:
        return {
            "norms": torch.zeros((self.history, n), dtype=torch.float64, device=device),
            "count": torch.zeros(n, dtype=torch.int64, device=device),
        }

    def step(self, state: State, inputs: StepInputs) -> tuple[Tensor, State]:
        norms = inputs.norms
        seen = observed(norms)
        rows = torch.arange(self.history, device=norms.device).unsqueeze(1)
        here = torch.logical_and(rows == torch.remainder(state["count"], self.history), seen)
        history = torch.where(here, norms, state["norms"])
        count = state["count"] + seen
        held = torch.clamp(count, max=self.history)
        # Inf fills the places that nothing holds yet, because it is sorted last.
        ordered = torch.where(rows < held, history, math.inf).sort(dim=0).values
        place = (held - 1).clamp(min=0).unsqueeze(0).double() * (self.percentile / 100)
        low = ordered.gather(0, place.floor().long())
        high = ordered.gather(0, place.ceil().long())
        between = place - place.floor()
        threshold = torch.where(between > 0, low + (high - low) * between, low).squeeze(0)
        # Without a history there is no threshold, so the gradient stays as it is. A NaN norm is within no threshold.
        within = torch.logical_or(held == 0, norms <= threshold)
        return torch.where(within, 1.0, threshold / (norms + 1e-6)), {"norms": history, "count": count}
