"""ZClip, which bounds a norm when it is an outlier of its own recent distribution."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import torch
from torch import Tensor

from dist_clip.policies.base import Policy, Scope, State, StepInputs, global_clip_scale, observed
from dist_clip.policies.check import check_choice, check_count, check_finite, check_fraction, check_number
from dist_clip.policies.registry import register

Mode = Literal["zscore", "percentile"]
ClipOption = Literal["adaptive_scaling", "mean"]


@register("zclip")
@dataclasses.dataclass(frozen=True)
class ZClip(Policy):
    """Z-score based clipping of the global norm N, or of each tensor's or shard's norm as if it were N.

    Warm-up: ``warmup_steps`` norms are recorded, and gradients are clipped at ``max_norm`` if given. The mean and the
    population variance of the record start the state. After it, ``z = (N - mean) / (std + eps)``; a threshold is set if
    ``z > z_thresh`` ("zscore") or if N exceeds ``mean + z_thresh * std`` ("percentile"). The gradients are scaled to
    ``min(threshold or N, max_norm)``, and mean and variance follow the threshold, or N where none was set.
    A norm of zero (no gradients), NaN or Inf never enters the state, nor the warm-up's record.

    Args:
        alpha: decay of mean and variance, in [0, 1).
        z_thresh: how many standard deviations above the mean count as a spike, above 0.
        warmup_steps: finite norms to record before the z-score starts, at least 1.
        mode: "zscore" or "percentile".
        clip_option: for "zscore", the threshold: "adaptive_scaling" ``clip_factor * (mean + z_thresh**2 * std / z)``
            or "mean".
        clip_factor: multiplies the "adaptive_scaling" threshold, above 0.
        max_norm: upper bound of the norm at all times, above 0; None for none. It bounds the norm that the rule clips:
            with scope "tensor" or "shard" each tensor's or shard's, so that the global norm may be larger.
        skip_update_on_spike: leave mean and variance as they are when a threshold was set.
        eps: added to the standard deviation in the z-score, at least 0.
        scope: "global" is the paper's; "tensor" and "shard" apply the rule to each tensor, or to each rank's piece, by
            itself, and never need the global norm.

    State: ``mean`` and ``var`` (float64 [n]) and ``count`` (int64 [n]), the number of norms recorded so far.

    Raises:
        TypeError, ValueError: a hyper-parameter of the wrong type or out of its range.

    Example:
        >>> import dist_clip
        >>> policy = dist_clip.ZClip(z_thresh=3.0, max_norm=None)

    Reference: arXiv 2504.02507, and the package zclip 1.0.0, whose results this equals step by step.
    """

    alpha: float = 0.97
    z_thresh: float = 2.5
    warmup_steps: int = 25
    mode: Mode = "zscore"
    clip_option: ClipOption = "adaptive_scaling"
    clip_factor: float = 1.0
    max_norm: float | None = 1.0
    skip_update_on_spike: bool = False
    eps: float = 1e-6
    scope: Scope = "global"

    def __post_init__(self) -> None:
        check_fraction("ZClip", "alpha", self.alpha)
        check_number("ZClip", "z_thresh", self.z_thresh, 0.0, open_low=True)
        check_count("ZClip", "warmup_steps", self.warmup_steps, 1)
        check_choice("ZClip", "mode", self.mode, get_args(Mode))
        check_choice("ZClip", "clip_option", self.clip_option, get_args(ClipOption))
        check_number("ZClip", "clip_factor", self.clip_factor, 0.0, open_low=True)
        if self.max_norm is not None:
            check_number("ZClip", "max_norm", self.max_norm, 0.0, open_low=True)
        if not isinstance(self.skip_update_on_spike, bool):
            raise TypeError(f"ZClip: skip_update_on_spike must be a bool, got {self.skip_update_on_spike!r}")
        check_finite("ZClip", "eps", self.eps, 0.0)
        check_choice("ZClip", "scope", self.scope, get_args(Scope))

    def init_state(self, n: int, device: torch.device) -> State:
        return {
            "mean": torch.zeros(n, dtype=torch.float64, device=device),
            "var": torch.zeros(n, dtype=torch.float64, device=device),
            "count": torch.zeros(n, dtype=torch.int64, device=device),
        }

    def level(self, state: State) -> Tensor | None:
        return state["mean"]

    def step(self, state: State, inputs: StepInputs) -> tuple[Tensor, State]:
        norms = inputs.norms
        mean, var, count = state["mean"], state["var"], state["count"]
        seen = observed(norms)
        in_warmup = count < self.warmup_steps

        # Welford's running mean and population variance: after the last warm-up step they are those of the record.
        new_count = torch.where(in_warmup & seen, count + 1, count)
        k = new_count.clamp(min=1)
        warm_mean = mean + (norms - mean) / k
        warm_var = var + ((norms - mean) * (norms - warm_mean) - var) / k
        warm_scales = torch.ones_like(norms) if self.max_norm is None else global_clip_scale(self.max_norm, norms)

        threshold, spike = self._threshold(mean, var, norms)
        target = torch.where(spike, threshold, norms)
        applied = target if self.max_norm is None else torch.clamp(target, max=self.max_norm)
        steady_scales = torch.where(norms > applied, applied / (norms + 1e-6), 1.0)
        # A NaN norm compares false with everything. It must make the gradients NaN, as in torch.
        steady_scales = torch.where(torch.isnan(norms), norms, steady_scales)
        steady_mean = self.alpha * mean + (1 - self.alpha) * target
        steady_var = self.alpha * var + (1 - self.alpha) * (target - steady_mean).square()
        follows = seen & torch.logical_not(spike) if self.skip_update_on_spike else seen

        new_mean = torch.where(in_warmup, torch.where(seen, warm_mean, mean), torch.where(follows, steady_mean, mean))
        new_var = torch.where(in_warmup, torch.where(seen, warm_var, var), torch.where(follows, steady_var, var))
        scales = torch.where(in_warmup, warm_scales, steady_scales)
        return scales, {"mean": new_mean, "var": new_var, "count": new_count}

    def _threshold(self, mean: Tensor, var: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
        """Return the threshold, float64 [n], and whether it is set, bool [n]."""
        std = var.clamp(min=0).sqrt()
        if self.mode == "percentile":
            threshold = mean + self.z_thresh * std
            return threshold, norms > threshold
        z = (norms - mean) / (std + self.eps)
        spike = z > self.z_thresh
        if self.clip_option == "mean":
            return mean, spike
        return self.clip_factor * (mean + self.z_thresh * std / (z / self.z_thresh)), spike
