"""The clipping: from the command line's options to a clipper over whatever this rank holds."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import dist_clip
from launch.parallel import Layout


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Which rule, and its options; those that a rule does not have are ignored."""

    clip: Literal[
        "none",
        "global",
        "adagc",
        "adagc-shard",
        "adagc-global",
        "zclip",
        "zclip-tensor",
        "zclip-shard",
        "logclip",
        "logclip-shard",
        "logclip-global",
    ] = "adagc"
    """none: measure only. Without a scope: adagc and logclip for each tensor, zclip for the global norm."""
    max_norm: float = 1.0
    """global: the threshold. adagc, logclip: the threshold during their warm-up. zclip: upper bound of the norm."""
    clip_warmup_steps: int | None = None
    """adagc, logclip, zclip: steps before the adaptive rule starts. Default: the rule's own (100, 100 and 25)."""
    lambda_rel: float = 1.04
    """adagc: how far above its moving average a norm may go."""
    beta: float = 0.99
    """adagc: decay of the moving average."""
    gamma_init: Literal["min", "median", "mean", "last"] = "min"
    """adagc: which statistic of the warm-up's norms starts the average; min is the paper's."""
    z_thresh: float = 2.5
    """zclip: standard deviations above the mean that make a spike."""
    alpha: float = 0.97
    """zclip: decay of mean and variance."""
    zclip_mode: Literal["zscore", "percentile"] = "zscore"
    """zclip: how a spike is told."""
    zclip_option: Literal["adaptive_scaling", "mean"] = "adaptive_scaling"
    """zclip, zscore: what a spike is clipped to."""
    zclip_factor: float = 1.0
    """zclip: multiplies the adaptive threshold."""
    skip_update_on_spike: bool = False
    """zclip: leave mean and variance as they are at a spike."""
    clip_ratio: float = 2.0
    """logclip: how far above its level a norm may go."""
    clip_power: float = 2.0
    """logclip: how hard a norm above that is scaled down; 1 is to the threshold."""
    level_rate: float = 0.03
    """logclip: share of the log of a norm's ratio that the level moves by."""
    patience: int = 50
    """logclip: steps running that a tensor may be clipped before its level follows without a bound."""
    post_max_norm: float | None = None
    """logclip: clip the result globally at this norm; None: do not."""
    nonfinite: Literal["propagate", "zero", "skip", "raise"] = "propagate"
    """What a NaN or Inf in a gradient leads to."""
    skip_above: float | None = None
    """Do not step where the global norm is above this; None: always step."""
    log_global_norm: bool = True
    """Reduce the global norm on steps where the rule has no need of it (AdaGC under pp), so that it can be logged."""
    detect_desync: bool = False
    """Stop when ranks have clipped differently often or remember different norms; no collective more."""

    def policy(self) -> dist_clip.Policy:
        warmup: dict[str, Any] = {} if self.clip_warmup_steps is None else {"warmup_steps": self.clip_warmup_steps}
        rule, _, named = self.clip.partition("-")
        scope: Any = named or ("global" if rule == "zclip" else "tensor")
        match rule:
            case "none":
                return dist_clip.GlobalNorm(max_norm=math.inf)
            case "global":
                return dist_clip.GlobalNorm(max_norm=self.max_norm)
            case "adagc":
                return dist_clip.AdaGC(
                    lambda_rel=self.lambda_rel,
                    beta=self.beta,
                    max_norm=self.max_norm,
                    scope=scope,
                    gamma_init=self.gamma_init,
                    **warmup,
                )
            case "zclip":
                return dist_clip.ZClip(
                    alpha=self.alpha,
                    z_thresh=self.z_thresh,
                    mode=self.zclip_mode,
                    clip_option=self.zclip_option,
                    clip_factor=self.zclip_factor,
                    max_norm=self.max_norm,
                    skip_update_on_spike=self.skip_update_on_spike,
                    scope=scope,
                    **warmup,
                )
            case "logclip":
                return dist_clip.LogClip(
                    ratio=self.clip_ratio,
                    power=self.clip_power,
                    rate=self.level_rate,
                    max_norm=self.max_norm,
                    scope=scope,
                    patience=self.patience,
                    post_max_norm=self.post_max_norm,
                    **warmup,
                )
            case unknown:
                raise ValueError(f"no such rule: {unknown!r}")


def build_clipper(layout: Layout, cfg: ClipConfig) -> dist_clip.GradClipper:
    # Under pipeline parallelism, the one thing to say is which ranks hold the other stages: a rank cannot know it.
    return dist_clip.GradClipper(
        layout.module,
        cfg.policy(),
        pp_group=layout.pp_group,
        nonfinite=cfg.nonfinite,
        skip_above=math.inf if cfg.skip_above is None else cfg.skip_above,
        log_global_norm=cfg.log_global_norm,
        detect_desync=cfg.detect_desync,
    )
