"""AdaGC, which bounds each element's norm by a moving average of its own clipped norms."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

import torch
from torch import Tensor

from dist_clip.policies.base import Scope, State, observed
from dist_clip.policies.check import check_choice, check_count, check_finite, check_fraction, check_number
from dist_clip.policies.registry import register
from dist_clip.policies.warmup import GlobalWarmup, storable

GammaInit = Literal["min", "median", "mean", "last"]


@register("adagc")
@dataclasses.dataclass(frozen=True)
class AdaGC(GlobalWarmup):
    """Adaptive gradient clipping per tensor.

    Warm-up (``t <= warmup_steps``): GlobalGC at ``max_norm``; ``gamma`` is a statistic of the norms after that scaling.
    After it, with ``n`` the norm of the gradient ``g``: ``h = min(1, lambda_rel * gamma / (n + eps))``, ``g *= h`` and
    ``gamma = beta * gamma + (1 - beta) * min(n, lambda_rel * gamma)``, with the threshold from before the update.
    An element first seen after warm-up starts its gamma at its norm and is not clipped. A norm of zero (no gradient),
    NaN or Inf never enters gamma.

    Args:
        lambda_rel: how far above its average a norm may go, as a ratio; above 0, usually a little above 1.
        beta: decay of the moving average, in [0, 1).
        warmup_steps: steps of GlobalGC before the adaptive rule starts, at least 0.
        max_norm: the warm-up's global threshold (the paper's lambda_abs), above 0.
        scope: "tensor" is the paper's AdaGC; "shard" applies the rule to each rank's piece by itself (AdaGC-Shard, no
            communication after warm-up); "global" applies the rule once, to the global norm (AdaGC-Global).
        gamma_init: the statistic of the warm-up's norms from which gamma starts. "min" is the paper's; with it a dip
            early in training over-clips for thousands of steps, which "median", "mean" and "last" avoid.
        eps: added to the norm in the ratio, at least 0.

    State: ``gamma``, fp32 [n] (0: nothing observed yet); until the host knows that warm-up is over also ``count``,
    int64 [n] (mean), or ``history``, fp32 [warmup_steps, n] (median; NaN: no observation).

    Raises:
        TypeError, ValueError: a hyper-parameter of the wrong type or out of its range.

    Example:
        >>> import dist_clip
        >>> policy = dist_clip.AdaGC(gamma_init="median", warmup_steps=200)

    Reference: arXiv 2502.11034, and its official code lishuai-97/AdaGC.
    """

    lambda_rel: float = 1.04
    beta: float = 0.99
    warmup_steps: int = 100
    max_norm: float = 1.0
    scope: Scope = "tensor"
    gamma_init: GammaInit = "min"
    eps: float = 1e-6

    nan_slots = ("history",)  # NaN marks rows without an observation

    def __post_init__(self) -> None:
        check_finite("AdaGC", "lambda_rel", self.lambda_rel, 0.0, open_low=True)
        check_fraction("AdaGC", "beta", self.beta)
        check_count("AdaGC", "warmup_steps", self.warmup_steps, 0)
        check_number("AdaGC", "max_norm", self.max_norm, 0.0, open_low=True)
        check_choice("AdaGC", "scope", self.scope, get_args(Scope))
        check_choice("AdaGC", "gamma_init", self.gamma_init, get_args(GammaInit))
        check_finite("AdaGC", "eps", self.eps, 0.0)

    def init_state(self, n: int, device: torch.device) -> State:
        state = {"gamma": torch.zeros(n, dtype=torch.float32, device=device)}
        if self.gamma_init == "mean":
            state["count"] = torch.zeros(n, dtype=torch.int64, device=device)
        if self.gamma_init == "median":
            state["history"] = torch.full((self.warmup_steps, n), math.nan, dtype=torch.float32, device=device)
        return state

    def slots_after(self, step: int) -> tuple[str, ...]:
        record = {"mean": ("count",), "median": ("history",)}.get(self.gamma_init, ())
        return ("gamma",) if step >= self.warmup_steps else ("gamma", *record)

    def level(self, state: State) -> Tensor | None:
        return state["gamma"]

    def _after_warmup(self, state: State, norms: Tensor) -> tuple[Tensor, State]:
        gamma = state["gamma"].double()
        known = gamma > 0
        threshold = self.lambda_rel * gamma
        scales = torch.clamp(threshold / (norms + self.eps), max=1.0)
        scales = torch.where(known & (norms != 0), scales, 1.0)
        # An element without a gamma and with a non-finite norm has no threshold, so its gradient stays as it is.
        average = self.beta * gamma + (1 - self.beta) * torch.minimum(norms, threshold)
        updated = torch.where(known, average, norms)
        return scales, {"gamma": torch.where(observed(norms) & storable(updated), updated, gamma).float()}

    def _observe(self, state: State, clipped_norms: Tensor, t: Tensor) -> State:
        seen = observed(clipped_norms) & storable(clipped_norms)
        gamma = state["gamma"].double()
        if self.gamma_init == "min":
            first = gamma == 0
            updated = torch.where(first, clipped_norms, torch.minimum(gamma, clipped_norms))
        elif self.gamma_init == "last":
            updated = clipped_norms
        elif self.gamma_init == "mean":
            count = state["count"] + seen
            updated = gamma + (clipped_norms - gamma) / count.clamp(min=1)
            return {"gamma": torch.where(seen, updated, gamma).float(), "count": count}
        else:
            row = torch.where(seen, clipped_norms, math.nan).float()
            rows = torch.arange(self.warmup_steps, device=row.device).unsqueeze(1)
            history = torch.where(rows == t - 1, row, state["history"])
            return {"gamma": _median(history), "history": history}
        return {"gamma": torch.where(seen, updated, gamma).float()}


def _median(history: Tensor) -> Tensor:
    """Return the median of each column of [k, n] over its non-NaN rows (mean of the middle two); 0 if all are NaN."""
    ordered = history.sort(dim=0).values  # NaN sorts last
    count = torch.logical_not(torch.isnan(ordered)).sum(dim=0, keepdim=True)
    low = ordered.gather(0, ((count - 1) // 2).clamp(min=0))
    high = ordered.gather(0, (count // 2).clamp(max=max(history.shape[0] - 1, 0)))
    return torch.where(count > 0, (low + high) / 2, 0.0).squeeze(0)
