"""Command-line flags in Megatron's style, and the policy that they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, get_args

from torch import nn

from dist_clip.clipper import GradClipper
from dist_clip.domains import NonFinite
from dist_clip.frameworks.megatron.attachment import attach
from dist_clip.policies import AdaGC, GlobalNorm, LogClip, Policy, ZClip
from dist_clip.policies.adagc import GammaInit
from dist_clip.policies.zclip import ClipOption, Mode

_SCOPED: dict[str, tuple[type[AdaGC | LogClip | ZClip], Any]] = {
    "adagc": (AdaGC, "tensor"),
    "adagc-shard": (AdaGC, "shard"),
    "adagc-global": (AdaGC, "global"),
    "zclip": (ZClip, "global"),
    "zclip-tensor": (ZClip, "tensor"),
    "zclip-shard": (ZClip, "shard"),
    "logclip": (LogClip, "tensor"),
    "logclip-shard": (LogClip, "shard"),
    "logclip-global": (LogClip, "global"),
}
MODES = ("global", *_SCOPED)

# Flag of one rule -> the policy's argument. No defaults here: a flag that was not given leaves the policy's own.
_ADAGC = {
    "adagc_lambda_rel": "lambda_rel",
    "adagc_beta": "beta",
    "adagc_warmup_steps": "warmup_steps",
    "adagc_gamma_init": "gamma_init",
    "adagc_eps": "eps",
}
_ZCLIP = {
    "zclip_alpha": "alpha",
    "zclip_z_thresh": "z_thresh",
    "zclip_warmup_steps": "warmup_steps",
    "zclip_mode": "mode",
    "zclip_option": "clip_option",
    "zclip_factor": "clip_factor",
    "zclip_skip_update_on_spike": "skip_update_on_spike",
    "zclip_eps": "eps",
}
_LOGCLIP = {
    "logclip_ratio": "ratio",
    "logclip_power": "power",
    "logclip_rate": "rate",
    "logclip_warmup_steps": "warmup_steps",
    "logclip_warmup_ratio": "warmup_ratio",
    "logclip_patience": "patience",
    "logclip_post_max_norm": "post_max_norm",
}
_FLAGS: dict[type[Policy], dict[str, str]] = {GlobalNorm: {}, AdaGC: _ADAGC, LogClip: _LOGCLIP, ZClip: _ZCLIP}


def add_clip_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags, in a group of their own; usable as Megatron-LM's ``extra_args_provider``. Returns the parser."""
    group = parser.add_argument_group(
        "gradient clipping (dist_clip)", "In place of Megatron's own; --clip-grad stays the threshold of the warm-up."
    )

    def add(flag: str, **kwargs: Any) -> None:
        group.add_argument(flag, default=None, **kwargs)

    add("--grad-clip-mode", choices=MODES, help="The rule. Not given: Megatron's own clipping, untouched.")
    add("--adagc-lambda-rel", type=float, help="How far above its moving average a norm may go.")
    add("--adagc-beta", type=float, help="Decay of the moving average.")
    add("--adagc-warmup-steps", type=int, help="Steps of global clipping at --clip-grad before the rule starts.")
    add(
        "--adagc-gamma-init",
        choices=get_args(GammaInit),
        help="Statistic of the warm-up's norms that starts the average.",
    )
    add("--adagc-eps", type=float, help="Added to the norm in the ratio.")
    add("--zclip-alpha", type=float, help="Decay of mean and variance.")
    add("--zclip-z-thresh", type=float, help="Standard deviations above the mean that make a spike.")
    add("--zclip-warmup-steps", type=int, help="Norms to record before the rule starts.")
    add("--zclip-mode", choices=get_args(Mode), help="How a spike is told.")
    add("--zclip-option", choices=get_args(ClipOption), help="What a spike is clipped to.")
    add("--zclip-factor", type=float, help="Multiplies the adaptive threshold.")
    add(
        "--zclip-skip-update-on-spike", action="store_const", const=True, help="A spike leaves mean and variance alone."
    )
    add("--zclip-eps", type=float, help="Added to the standard deviation.")
    add("--logclip-ratio", type=float, help="How far above its level a norm may go.")
    add("--logclip-power", type=float, help="How hard a norm above that is scaled down; 1 is to the threshold.")
    add("--logclip-rate", type=float, help="Share of the log of a norm's ratio that the level moves by.")
    add("--logclip-warmup-steps", type=int, help="Steps of global clipping at --clip-grad before the rule starts.")
    add("--logclip-warmup-ratio", type=float, help="Bound of one warm-up observation, in levels.")
    add("--logclip-patience", type=int, help="Clipped steps running before a level follows without a bound.")
    add("--logclip-post-max-norm", type=float, help="Clip the result globally at this norm.")
    add("--grad-clip-nonfinite", choices=get_args(NonFinite), help="What a NaN or Inf in a gradient leads to.")
    add(
        "--grad-clip-exclude",
        nargs="+",
        metavar="PATTERN",
        help="Global names of tensors to leave alone, as fnmatch patterns.",
    )
    add(
        "--no-grad-clip-log-norm",
        action="store_const",
        const=True,
        help="Do not find the global norm on steps that need it for the log alone.",
    )
    add(
        "--grad-clip-detect-desync",
        action="store_const",
        const=True,
        help="Stop when ranks have clipped differently often, or remember different norms. No collective more.",
    )
    return parser


def policy_from_args(args: argparse.Namespace, clip_grad: float) -> Policy | None:
    """The policy of ``--grad-clip-mode``; None where it was not given.

    Args:
        args: parsed arguments, with the flags of `add_clip_args`.
        clip_grad: Megatron's ``--clip-grad``: threshold of GlobalNorm and of the warm-up of AdaGC and LogClip, upper bound
            of ZClip's norm.

    Raises:
        ValueError: flags that contradict each other, or values that a policy refuses; each named.
    """
    mode = getattr(args, "grad_clip_mode", None)
    given = {flag for flags in _FLAGS.values() for flag in flags if getattr(args, flag, None) is not None}
    if mode is None:
        others = {"grad_clip_nonfinite", "grad_clip_exclude", "no_grad_clip_log_norm", "grad_clip_detect_desync"}
        stray = sorted(given | {flag for flag in others if getattr(args, flag, None) is not None})
        if stray:
            raise ValueError(f"{_flags(stray)} without --grad-clip-mode: give it one of {', '.join(MODES)}")
        return None
    rule, scope = _SCOPED.get(mode, (GlobalNorm, None))
    stray = sorted(given - set(_FLAGS[rule]))
    if stray:
        raise ValueError(f"{_flags(stray)} does not go with --grad-clip-mode {mode}")
    options: dict[str, Any] = {
        argument: getattr(args, flag) for flag, argument in _FLAGS[rule].items() if flag in given
    }
    if scope is not None:
        options["scope"] = scope
    if rule is ZClip:
        return ZClip(max_norm=clip_grad if clip_grad > 0 else None, **options)
    if not clip_grad > 0:
        raise ValueError(f"--grad-clip-mode {mode} clips at --clip-grad, which must be above 0, got {clip_grad}")
    return rule(max_norm=clip_grad, **options)


def attach_from_args(
    optimizer: Any,
    args: argparse.Namespace,
    *,
    model: nn.Module | Sequence[nn.Module],
    clip_grad: float | None = None,
    pg_collection: Any = None,
) -> GradClipper | None:
    """`attach` as the flags say; None, and nothing changed, without ``--grad-clip-mode``.

    Args:
        clip_grad: default, ``args.clip_grad``.
    """
    threshold = getattr(args, "clip_grad", None) if clip_grad is None else clip_grad
    policy = policy_from_args(args, 1.0 if threshold is None else float(threshold))
    if policy is None:
        return None
    return attach(
        optimizer,
        policy,
        model=model,
        nonfinite=args.grad_clip_nonfinite or "propagate",
        exclude=args.grad_clip_exclude or (),
        log_global_norm=not args.no_grad_clip_log_norm,
        detect_desync=bool(args.grad_clip_detect_desync),
        pg_collection=pg_collection,
    )


def _flags(names: list[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)
