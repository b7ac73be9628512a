"""LogClip, which bounds each element's norm by its own level, tracked in the log domain by moves of bounded size."""

from __future__ import annotations

import dataclasses
from typing import get_args

import torch
from torch import Tensor

from dist_clip.policies.base import Scope, State
from dist_clip.policies.check import check_choice, check_count, check_finite, check_number
from dist_clip.policies.registry import register
from dist_clip.policies.warmup import GlobalWarmup, storable


@register("logclip")
@dataclasses.dataclass(frozen=True)
class LogClip(GlobalWarmup):
    """Clipping per tensor to a multiple of the tensor's usual norm, its level, a geometric moving average.

    Warm-up (``t <= warmup_steps``): GlobalGC at ``max_norm``. With ``x`` the norm after that scaling, the first ``x``
    is the level, and each later one moves it: ``level *= clamp(x / level, 1 / warmup_ratio, warmup_ratio) ** k``. After
    it, with ``r = n / level``: ``scale = min(1, ratio / r) ** power`` and ``level *= clamp(r, 1 / ratio, ratio) ** k``,
    so that the level moves by at most ``ratio ** k`` a step. In both, ``k = max(rate, 1 / observations)`` of the
    element: a geometric mean of its first norms, then a moving average.

    An element that is clipped for more than ``patience`` consecutive steps has changed for good. At the j-th such step,
    ``level *= r ** min(1, j * rate)``, without a bound, until it is no longer clipped.
    An element first seen after warm-up starts its level at its norm and is not clipped. A norm of zero (no gradient),
    NaN or Inf is no observation: it leaves the state as it was.

    Args:
        ratio: how far above its level a norm may go, above 1.
        power: how hard a norm above that is scaled down, above 0: 1 scales it to the threshold ``ratio * level``, more
            to below the threshold (a norm ``r`` times its level to ``ratio * (ratio / r) ** (power - 1)`` times it).
        rate: share of the log of a norm's ratio that the level moves by, in (0, 1].
        warmup_steps: steps of GlobalGC before the rule starts, at least 0.
        max_norm: the warm-up's global threshold, above 0.
        scope: "tensor", "shard" (the rule applied to each rank's piece by itself; no communication after warm-up) or
            "global" (the rule applied once, to the global norm).
        warmup_ratio: the bound of one warm-up observation, in levels, above 1.
        patience: consecutive steps that an element may be clipped before its level follows without a bound, at least 0.
            The level does not follow a fault that lasts no longer than this.
        post_max_norm: clip the result globally at this norm, above 0; see `Policy.post_max_norm` for what it costs.
            None: do not.

    State: ``level``, fp32 [n] (0: nothing observed yet); ``count``, int32 [n], number of observations; ``streak``,
    int32 [n], number of consecutive steps, up to the last, at which the element was clipped.

    Raises:
        TypeError, ValueError: a hyper-parameter of the wrong type or out of its range.

    Example:
        >>> import dist_clip
        >>> policy = dist_clip.LogClip(ratio=3.0, post_max_norm=1.0)

    Reference: a rule of this library; docs/algorithms.md derives what its constants guarantee.
    """

    ratio: float = 2.0
    power: float = 2.0
    rate: float = 0.03
    warmup_steps: int = 100
    max_norm: float = 1.0
    scope: Scope = "tensor"
    warmup_ratio: float = 100.0
    patience: int = 50
    post_max_norm: float | None = None

    def __post_init__(self) -> None:
        for name in ("ratio", "warmup_ratio"):
            check_finite("LogClip", name, getattr(self, name), 1.0, open_low=True)
        check_finite("LogClip", "power", self.power, 0.0, open_low=True)
        check_number("LogClip", "rate", self.rate, 0.0, 1.0, open_low=True)
        for name in ("warmup_steps", "patience"):
            check_count("LogClip", name, getattr(self, name), 0)
        check_number("LogClip", "max_norm", self.max_norm, 0.0, open_low=True)
        check_choice("LogClip", "scope", self.scope, get_args(Scope))
        if self.post_max_norm is not None:
            check_number("LogClip", "post_max_norm", self.post_max_norm, 0.0, open_low=True)

    def init_state(self, n: int, device: torch.device) -> State:
        return {
            "level": torch.zeros(n, dtype=torch.float32, device=device),
            "count": torch.zeros(n, dtype=torch.int32, device=device),
            "streak": torch.zeros(n, dtype=torch.int32, device=device),
        }

    def level(self, state: State) -> Tensor | None:
        return state["level"]

    def _after_warmup(self, state: State, norms: Tensor) -> tuple[Tensor, State]:
        level = state["level"].double()
        known = level > 0
        allowed = torch.clamp(self.ratio * level / norms, max=1.0)
        # An element without a level and with a non-finite norm has no threshold, so its gradient stays as it is.
        scales = torch.where(known & (norms != 0), _power(allowed, self.power), 1.0)
        streak = torch.where(known & (allowed < 1), state["streak"] + 1, 0)
        overdue = (streak - self.patience).double()  # an int tensor times a float would be fp32
        count = state["count"] + 1
        r = norms / level
        bounded = _power(torch.clamp(r, 1 / self.ratio, self.ratio), self._rate(count))
        move = torch.where(overdue > 0, _power(r, torch.clamp(self.rate * overdue, max=1.0)), bounded)
        return scales, _kept(norms, state, torch.where(known, level * move, norms), count, streak)

    def _observe(self, state: State, clipped_norms: Tensor, t: Tensor) -> State:
        level = state["level"].double()
        count = state["count"] + 1
        r = torch.clamp(clipped_norms / level, 1 / self.warmup_ratio, self.warmup_ratio)
        updated = torch.where(level > 0, level * _power(r, self._rate(count)), clipped_norms)
        return _kept(clipped_norms, state, updated, count, state["streak"])

    def _rate(self, count: Tensor) -> Tensor:
        return torch.clamp(1 / count.double(), min=self.rate)


def _kept(norms: Tensor, state: State, level: Tensor, count: Tensor, streak: Tensor) -> State:
    """Return the new state of elements whose norm and level can be stored, and the old state of the others."""
    seen = storable(norms) & storable(level)
    return {
        "level": torch.where(seen, level.float(), state["level"]),
        "count": torch.where(seen, count, state["count"]),
        "streak": torch.where(seen, streak, state["streak"]),
    }


def _power(base: Tensor, exponent: Tensor | float) -> Tensor:
    """Return ``base ** exponent`` with bits that do not depend on an element's position, so that copies stay equal.

    torch.pow on the CPU rounds the last few elements of a vector differently from the others; exp and log do not.
    """
    return torch.exp(exponent * torch.log(base))
