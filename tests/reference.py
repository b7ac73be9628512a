"""The single-process reference of the clipping rules, in plain Python floats, written like the algorithms' description.

A rule turns a dict of norms into a dict of scales and keeps its state in plain attributes. `clip` measures whole
tensors, calls the rule, and scales them. For AdaGC-Shard the tensors are the pieces that the ranks hold, each distinct
piece once, under any keys. Nothing here knows of ranks, is fast, or shares code with dist_clip.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Hashable, Mapping
from typing import Any, Protocol

import numpy as np
import torch

Norms = Mapping[Hashable, float]
Scales = dict[Hashable, float]


def l2_norm(tensor: torch.Tensor) -> float:
    """Return the L2 norm of a whole tensor, computed in float64."""
    return math.sqrt(float(tensor.detach().double().square().sum()))


def total_norm(norms: Norms) -> float:
    """Return N = sqrt(sum_i n_i^2)."""
    return math.sqrt(sum(norm * norm for norm in norms.values()))


def at_most_one(value: float) -> float:
    """Return min(1, value), except that NaN stays NaN, as with torch.clamp."""
    return value if math.isnan(value) else min(1.0, value)


def observable(norm: float) -> bool:
    """Return whether a norm may enter a rule's state: zero and non-finite norms say nothing about the usual norm."""
    return math.isfinite(norm) and norm > 0


def fp32(value: float) -> float:
    """Return the value rounded to float32, the dtype of AdaGC's state; 0 or Inf beyond its range."""
    return float(torch.tensor(value, dtype=torch.float64).float())


class Rule(Protocol):
    def scales(self, norms: Norms) -> Scales: ...

    def memory(self, name: Hashable) -> dict[str, float]:
        """Return the rule's state of a tensor (of N for a global rule, with any name); zeros before its first norm."""
        ...


@dataclasses.dataclass
class GlobalGC:
    """s = min(1, max_norm / (N + 1e-6)) for every tensor."""

    max_norm: float = 1.0

    def scales(self, norms: Norms) -> Scales:
        scale = at_most_one(self.max_norm / (total_norm(norms) + 1e-6))
        return dict.fromkeys(norms, scale)

    def memory(self, name: Hashable) -> dict[str, float]:
        return {}


class OnceToN:
    """A mix-in that precedes a rule and applies it once, to N."""

    def scales(self, norms: Norms) -> Scales:
        scale = super().scales({"N": total_norm(norms)})["N"]
        return dict.fromkeys(norms, scale)

    def memory(self, name: Hashable) -> dict[str, float]:
        return super().memory("N")


GAMMA_INITS = {"min": min, "median": statistics.median, "mean": statistics.fmean, "last": lambda seen: seen[-1]}


class AdaGC:
    """AdaGC over the given tensors: whole tensors (scope "tensor"), or the ranks' pieces (scope "shard").

    gamma_i is one float32 scalar, so a norm that is 0 or Inf in float32 is no observation.
    """

    def __init__(
        self,
        lambda_rel: float = 1.04,
        beta: float = 0.99,
        warmup_steps: int = 100,
        max_norm: float = 1.0,
        gamma_init: str = "min",
        eps: float = 1e-6,
    ) -> None:
        self.lambda_rel, self.beta, self.warmup_steps = lambda_rel, beta, warmup_steps
        self.max_norm, self.gamma_init, self.eps = max_norm, gamma_init, eps
        self.t = 0
        self.gamma: dict[Hashable, float] = {}
        self.seen: dict[Hashable, list[float]] = {}

    def scales(self, norms: Norms) -> Scales:
        self.t += 1
        if self.t <= self.warmup_steps:
            return self._warmup(norms)
        return {name: self._scale(name, norm) for name, norm in norms.items()}

    def _warmup(self, norms: Norms) -> Scales:
        """Apply GlobalGC; gamma_i is a statistic of the norms after it."""
        scales = GlobalGC(self.max_norm).scales(norms)
        for name, norm in norms.items():
            after = norm * scales[name]
            if observable(fp32(after)):
                self.seen.setdefault(name, []).append(after)
                self.gamma[name] = fp32(GAMMA_INITS[self.gamma_init](self.seen[name]))
        return scales

    def _scale(self, name: Hashable, norm: float) -> float:
        """Return h_i = min(1, lambda_rel * gamma_i / (n_i + eps)) with gamma_i before this step, and move gamma_i."""
        if norm == 0:
            return 1.0
        if name not in self.gamma:  # first seen after the warm-up: unclipped, whatever the norm
            if observable(fp32(norm)):
                self.gamma[name] = fp32(norm)
            return 1.0
        limit = self.lambda_rel * self.gamma[name]
        scale = at_most_one(limit / (norm + self.eps))
        gamma = fp32(self.beta * self.gamma[name] + (1 - self.beta) * min(norm, limit))
        if observable(norm) and observable(gamma):
            self.gamma[name] = gamma
        return scale

    def memory(self, name: Hashable) -> dict[str, float]:
        return {"gamma": self.gamma.get(name, 0.0)}


class AdaGCGlobal(OnceToN, AdaGC):
    """AdaGC-Global: the rule applied once, to N."""


class LogClip:
    """LogClip over the given tensors: whole tensors (scope "tensor"), or the ranks' pieces (scope "shard").

    The level is one float32 scalar, so a norm that is 0 or Inf in float32 is no observation.
    """

    def __init__(
        self,
        ratio: float = 2.0,
        power: float = 2.0,
        rate: float = 0.03,
        warmup_steps: int = 100,
        max_norm: float = 1.0,
        warmup_ratio: float = 100.0,
        patience: int = 50,
        post_max_norm: float | None = None,
    ) -> None:
        self.ratio, self.power, self.rate, self.warmup_steps = ratio, power, rate, warmup_steps
        self.max_norm, self.warmup_ratio, self.patience = max_norm, warmup_ratio, patience
        self.post_max_norm = post_max_norm
        self.t = 0
        self.level: dict[Hashable, float] = {}
        self.count: dict[Hashable, int] = {}
        self.streak: dict[Hashable, int] = {}

    def scales(self, norms: Norms) -> Scales:
        self.t += 1
        if self.t <= self.warmup_steps:
            scales = self._warmup(norms)
        else:
            scales = {name: self._scale(name, norm) for name, norm in norms.items()}
        if self.post_max_norm is None:
            return scales
        after = total_norm({name: scales[name] * norm for name, norm in norms.items()})
        factor = at_most_one(self.post_max_norm / (after + 1e-6))
        return {name: scale * factor for name, scale in scales.items()}

    def _warmup(self, norms: Norms) -> Scales:
        """Apply GlobalGC; the level observes the norms after it."""
        scales = GlobalGC(self.max_norm).scales(norms)
        for name, norm in norms.items():
            x = norm * scales[name]
            if observable(fp32(x)):
                self._observe(name, x, self.warmup_ratio)
        return scales

    def _scale(self, name: Hashable, norm: float) -> float:
        """Return min(1, ratio / r) ** power with the level from before this step, and move the level."""
        if norm == 0:
            return 1.0
        if name not in self.level:  # first seen after the warm-up: unclipped, whatever the norm
            if observable(fp32(norm)):
                self._observe(name, norm, self.ratio)
            return 1.0
        level = self.level[name]
        scale = at_most_one(self.ratio * level / norm) ** self.power
        if observable(fp32(norm)):
            streak = self.streak.get(name, 0) + 1 if norm > self.ratio * level else 0
            late = streak - self.patience
            if late > 0:
                moved = level * (norm / level) ** min(1.0, late * self.rate)
                if observable(fp32(moved)):
                    self._remember(name, moved, streak)
            else:
                self._observe(name, norm, self.ratio, streak)
        return scale

    def _observe(self, name: Hashable, x: float, bound: float, streak: int = 0) -> None:
        """Set the level to its first norm, or move it by a share of the norm's log, within the bound."""
        moved = x
        if name in self.level:
            r = min(max(x / self.level[name], 1 / bound), bound)
            moved = self.level[name] * r ** max(self.rate, 1 / (self.count[name] + 1))
        if observable(fp32(moved)):
            self._remember(name, moved, streak)

    def _remember(self, name: Hashable, level: float, streak: int) -> None:
        self.level[name] = fp32(level)
        self.count[name] = self.count.get(name, 0) + 1
        self.streak[name] = streak

    def memory(self, name: Hashable) -> dict[str, float]:
        kept = {"level": self.level, "count": self.count, "streak": self.streak}
        return {slot: values.get(name, 0) for slot, values in kept.items()}


class LogClipGlobal(OnceToN, LogClip):
    """LogClip applied once, to N."""


class ZClip:
    """Z-score clipping of the global norm."""

    def __init__(
        self,
        alpha: float = 0.97,
        z_thresh: float = 2.5,
        warmup_steps: int = 25,
        mode: str = "zscore",
        clip_option: str = "adaptive_scaling",
        clip_factor: float = 1.0,
        max_norm: float | None = 1.0,
        skip_update_on_spike: bool = False,
        eps: float = 1e-6,
    ) -> None:
        self.alpha, self.z_thresh, self.warmup_steps, self.mode = alpha, z_thresh, warmup_steps, mode
        self.clip_option, self.clip_factor, self.max_norm = clip_option, clip_factor, max_norm
        self.skip_update_on_spike, self.eps = skip_update_on_spike, eps
        self.record: list[float] = []
        self.mean = self.var = math.nan

    def scales(self, norms: Norms) -> Scales:
        scale = self._scale(total_norm(norms))
        return dict.fromkeys(norms, scale)

    def _scale(self, norm: float) -> float:
        if len(self.record) < self.warmup_steps:  # an unobservable norm is not recorded and so prolongs the warm-up
            if observable(norm):
                self.record.append(norm)
                self.mean, self.var = statistics.fmean(self.record), statistics.pvariance(self.record)
            return 1.0 if self.max_norm is None else at_most_one(self.max_norm / (norm + 1e-6))
        if math.isnan(norm):
            return math.nan
        threshold = self.threshold(norm)
        applied = norm if threshold is None else threshold
        if self.max_norm is not None:
            applied = min(applied, self.max_norm)
        scale = applied / (norm + 1e-6) if norm > applied else 1.0
        if observable(norm) and not (threshold is not None and self.skip_update_on_spike):
            x = norm if threshold is None else threshold
            self.mean = self.alpha * self.mean + (1 - self.alpha) * x
            self.var = self.alpha * self.var + (1 - self.alpha) * (x - self.mean) ** 2
        return scale

    def threshold(self, norm: float) -> float | None:
        """Return the norm to clip to, or None if this norm is no spike."""
        std = math.sqrt(self.var)
        if self.mode == "percentile":
            spike = norm > self.mean + self.z_thresh * std
        else:
            spike = (norm - self.mean) / (std + self.eps) > self.z_thresh
        return self.limit(norm, self.mean, self.var) if spike else None

    def limit(self, norm: float, mean: float, var: float) -> float:
        """Return the norm to clip a spike to, with a mean and a variance."""
        std = math.sqrt(var)
        if self.mode == "percentile":
            return mean + self.z_thresh * std
        if self.clip_option == "mean":
            return mean
        z = (norm - mean) / (std + self.eps)
        return self.clip_factor * (mean + self.z_thresh * std / (z / self.z_thresh))

    def memory(self, name: Hashable) -> dict[str, float]:
        if not self.record:
            return {"mean": 0.0, "var": 0.0, "count": 0}
        return {"mean": self.mean, "var": self.var, "count": len(self.record)}


class ZClipEach:
    """ZClip for each given tensor (or piece), as if it were the whole model."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.rules: dict[Hashable, ZClip] = {}

    def rule(self, name: Hashable) -> ZClip:
        return self.rules.setdefault(name, ZClip(**self.settings))

    def scales(self, norms: Norms) -> Scales:
        return {name: self.rule(name).scales({name: norm})[name] for name, norm in norms.items()}

    def memory(self, name: Hashable) -> dict[str, float]:
        return self.rule(name).memory(name)


class AutoClip:
    """Clipping of each norm at a percentile of its own history, which it enters first."""

    def __init__(self, percentile: float = 10.0, history: int = 10_000) -> None:
        self.percentile, self.length = percentile, history
        self.history: dict[Hashable, list[float]] = {}
        self.count: dict[Hashable, int] = {}

    def scales(self, norms: Norms) -> Scales:
        return {name: self._scale(name, norm) for name, norm in norms.items()}

    def _scale(self, name: Hashable, norm: float) -> float:
        history = self.history.setdefault(name, [])
        if observable(norm):
            history.append(norm)
            del history[: -self.length]
            self.count[name] = self.count.get(name, 0) + 1
        if not history:
            return 1.0
        threshold = float(np.percentile(history, self.percentile))
        return 1.0 if norm <= threshold else threshold / (norm + 1e-6)

    def memory(self, name: Hashable) -> dict[str, float]:
        return {"count": self.count.get(name, 0)}


class AutoClipGlobal(OnceToN, AutoClip):
    """AutoClip of N, as in the paper."""


class AGC:
    """A gradient's norm is at most a share of its parameter's; `weigh` says the parameters' norms before each step."""

    def __init__(self, lam: float = 0.01, eps: float = 1e-3) -> None:
        self.lam, self.eps = lam, eps
        self.weights: dict[Hashable, float] = {}

    def weigh(self, weights: Norms) -> None:
        self.weights = dict(weights)

    def scales(self, norms: Norms) -> Scales:
        return {name: self._scale(norm, self.weights[name]) for name, norm in norms.items()}

    def _scale(self, norm: float, weight: float) -> float:
        if math.isnan(norm):
            return math.nan
        if norm / max(weight, self.eps) > self.lam:
            return self.lam * max(weight, self.eps) / max(norm, 1e-6)
        return 1.0

    def memory(self, name: Hashable) -> dict[str, float]:
        return {}


class AGCGlobal(OnceToN, AGC):
    """AGC of N and the norm of all parameters."""

    def weigh(self, weights: Norms) -> None:
        super().weigh({"N": total_norm(weights)})


@dataclasses.dataclass
class Untouched:
    """Every scale is 1."""

    guarded: bool = True

    def scales(self, norms: Norms) -> Scales:
        return dict.fromkeys(norms, 1.0)

    def memory(self, name: Hashable) -> dict[str, float]:
        return {}


@dataclasses.dataclass
class Outcome:
    """The result of one clip: norms before it, scales, the scaled gradients (same dtypes as before), and N."""

    norms: dict[Hashable, float]
    scales: Scales
    grads: dict[Hashable, torch.Tensor]
    global_norm: float
    nonfinite: bool = False
    skipped: bool = False


def clip(
    rule: Rule,
    grads: Mapping[Hashable, torch.Tensor | None],
    nonfinite: str = "propagate",
    weights: Mapping[Hashable, torch.Tensor] | None = None,
) -> Outcome:
    """Clip whole gradients by `rule`. Gradients that are None are ignored, and the inputs are not changed.

    `weights`: the parameters, for a rule that looks at them.
    """
    if isinstance(rule, AGC):
        assert weights is not None
        rule.weigh({name: l2_norm(weight) for name, weight in weights.items()})
    present = {name: grad for name, grad in grads.items() if grad is not None}
    norms: dict[Hashable, float] = {name: l2_norm(grad) for name, grad in present.items()}
    bad = {name for name, norm in norms.items() if not math.isfinite(norm)}
    if bad and nonfinite == "raise":
        raise FloatingPointError(f"non-finite gradients: {sorted(map(str, bad))}")
    if bad and nonfinite == "skip":
        ones = dict.fromkeys(norms, 1.0)
        return Outcome(norms, ones, dict(present), total_norm(norms), nonfinite=True, skipped=True)
    # The rule does not see a tensor whose gradient is set to zero: it is not in N, and no observation.
    measured = {name: norm for name, norm in norms.items() if not (nonfinite == "zero" and name in bad)}
    scales = rule.scales(measured)
    clipped: dict[Hashable, torch.Tensor] = {}
    for name, grad in present.items():
        if name in measured:
            clipped[name] = (grad.double() * scales[name]).to(grad.dtype)
        else:
            scales[name], clipped[name] = 0.0, torch.zeros_like(grad)
    return Outcome(norms, scales, clipped, total_norm(measured), nonfinite=bool(bad))


RULES: dict[str, tuple[Any, Any]] = {
    "GlobalNorm": (GlobalGC, None),
    "AdaGC": (AdaGCGlobal, AdaGC),
    "LogClip": (LogClipGlobal, LogClip),
    "ZClip": (ZClip, ZClipEach),
    "AutoClip": (AutoClipGlobal, AutoClip),
    "AGC": (AGCGlobal, AGC),
    "MeasureOnly": (Untouched, None),
}
"""By the class of a policy: the rule at scope "global", and the one for each tensor or shard."""


def rule_of(policy: Any) -> Any:
    """The reference of a policy, with its settings."""
    settings = dataclasses.asdict(policy)
    once, each = RULES[type(policy).__name__]
    return (once if settings.pop("scope", "global") == "global" else each)(**settings)


# ---- guards: whether to skip a step, from its norms and its loss --------------------------------------------------------


class SkipStep:
    """OLMo-core's rule on windows of the last losses and norms, neither of which a value that is not finite enters."""

    def __init__(self, window: int = 128, sigma: float = 6.0, loss: bool = True) -> None:
        self.window, self.sigma = window, sigma
        self.norms: list[float] = []
        self.losses: list[float] | None = [] if loss else None

    def skips(self, norm: float, loss: float) -> bool:
        """Return whether the step is skipped, and record it."""
        outlier = self._outlier(self.norms, norm)
        if norm > 0:
            self._record(self.norms, norm)
        if self.losses is not None:
            outlier = self._outlier(self.losses, loss) or outlier
            self._record(self.losses, loss)
        return outlier

    def _outlier(self, past: list[float], value: float) -> bool:
        if not math.isfinite(value):
            return True
        if len(past) < max(2, self.window // 2):
            return False
        mean = statistics.fmean(past)
        return value - mean > self.sigma * max(statistics.stdev(past), 1e-6 * abs(mean))

    def _record(self, past: list[float], value: float) -> None:
        if math.isfinite(value):
            past.append(value)
            del past[: -self.window]


class DropNorm:
    """AXLearn's rule; after `most` skips in a row the step is taken and the averages begin with it."""

    def __init__(
        self, variant: str = "mean", factor: float = 20.0, decay: float = 0.99, min_steps: int = 500, most: int = 50
    ) -> None:
        self.variant, self.factor, self.decay, self.min_steps, self.most = variant, factor, decay, min_steps, most
        self.seen: list[float] = []
        self.in_a_row = 0

    def skips(self, norm: float, loss: float) -> bool:
        skip = not math.isfinite(norm) or self._too_high(norm)
        if skip and math.isfinite(norm) and self.in_a_row >= self.most:
            skip, self.seen = False, []
        self.in_a_row = self.in_a_row + 1 if skip else 0
        if not skip and norm > 0:
            self.seen.append(norm)
        return skip

    def average(self, power: int) -> float:
        """Return the bias-corrected moving average of norm ** power: a weighted mean with the weights decay ** age."""
        weights = [self.decay**age for age in range(len(self.seen))]
        return sum(w * x**power for w, x in zip(weights, reversed(self.seen), strict=True)) / sum(weights)

    def _too_high(self, norm: float) -> bool:
        if self.variant == "mean":
            return bool(self.seen) and norm >= self.factor * self.average(1)
        if len(self.seen) < self.min_steps:
            return False
        mean = self.average(1)
        return norm >= mean + self.factor * math.sqrt(max(self.average(2) - mean**2, 0.0))


class MedianGuard:
    """The library's guard, by the median itself; levels are float32."""

    def __init__(
        self, threshold: float = 2.0, rate: float = 0.02, warmup: int = 100, window: int = 128, most: int = 50
    ) -> None:
        self.threshold, self.rate, self.warmup, self.window, self.most = threshold, rate, warmup, window, most
        self.moves: list[float] = []  # the medians of ln(norm / level), rounded
        self.drift = self.scatter = 0.0  # their moving average, and that of their distances from it
        self.level: dict[Hashable, float] = {}
        self.peaks: dict[Hashable, tuple[float, float]] = {}
        self.count: dict[Hashable, int] = {}
        self.taken = self.lows = self.spent = 0

    def skips(self, norms: Norms) -> bool:
        usual = {name: max(self.peaks[name]) for name in norms if self.count.get(name, 0) >= self.warmup}
        there = [name for name in usual if norms[name] != 0]
        ratios = [math.inf if math.isnan(norms[name]) else norms[name] / usual[name] for name in there]
        far = bool(ratios) and statistics.median_low(ratios) > max(
            self.threshold, math.exp(self.drift + 5.0 * self.scatter)
        )
        low = bool(ratios) and statistics.median_high(ratios) < 0.25
        bad = far and self.lows <= 8
        finite = all(math.isfinite(norm) for norm in norms.values())
        renew = bad and self.spent >= 50 * self.most and finite
        skip = bad and not renew
        change = 1 if low else 0 if far else -1
        if not skip and not (low and self.lows < self.window):
            if not renew:
                self._move(
                    [(norm, self.level[name]) for name, norm in norms.items() if name in self.level and norm != 0]
                )
            self._follow(norms, renew)
        self.lows = min(max(self.lows + change, 0), self.window)
        self.spent = self.spent + 50 if skip else max(self.spent - 1, 0)
        return skip

    def _move(self, pairs: list[tuple[float, float]]) -> None:
        if not pairs:
            return
        logs = [-math.inf if math.isnan(n) else math.log(n / level) for n, level in pairs]
        unit = math.log(self.threshold) / 8  # the median is known to the nearest of these, and as 16 of them at most
        middle = min(max(statistics.median_low(logs) / unit, -16.0), 16.0)
        move = unit * round(middle)
        if self.moves:
            rate = max(self.rate, 1 / len(self.moves))
            self.scatter = fp32(self.scatter + rate * (abs(move - self.drift) - self.scatter))
        self.moves.append(move)
        self.drift = fp32(self.drift + max(self.rate, 1 / len(self.moves)) * (move - self.drift))

    def _follow(self, norms: Norms, renew: bool) -> None:
        self.taken += 1
        for name, norm in norms.items():
            now, earlier = self.peaks.get(name, (0.0, 0.0))
            if observable(fp32(norm)):
                count = self.count[name] = self.count.get(name, 0) + 1
                old = self.level.get(name)
                if old is None or renew:
                    level = norm
                else:
                    bound = 100.0 if count <= self.warmup else self.threshold
                    ratio = min(max(norm / old, 1 / bound), bound)
                    level = old * ratio ** max(self.rate, 1 / count)
                level = self.level[name] = fp32(level)
                now, earlier = (level, level) if renew or count <= self.warmup else (max(now, level), earlier)
            if self.taken % self.window == 0:
                now, earlier = self.level.get(name, 0.0), now
            self.peaks[name] = (now, earlier)
