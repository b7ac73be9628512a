"""The clipping rules, pure maths from norms to scales, one file a rule."""

from dist_clip.policies.adagc import AdaGC
from dist_clip.policies.agc import AGC
from dist_clip.policies.autoclip import AutoClip
from dist_clip.policies.base import Need, Policy, Scope, State, StepInputs, observed
from dist_clip.policies.global_norm import GlobalNorm
from dist_clip.policies.logclip import LogClip
from dist_clip.policies.measure_only import MeasureOnly
from dist_clip.policies.registry import modes, options_of, parse_mode, policy, register, registered
from dist_clip.policies.zclip import ZClip

__all__ = [
    "AGC",
    "AdaGC",
    "AutoClip",
    "GlobalNorm",
    "LogClip",
    "MeasureOnly",
    "Need",
    "Policy",
    "Scope",
    "State",
    "StepInputs",
    "ZClip",
    "modes",
    "observed",
    "options_of",
    "parse_mode",
    "policy",
    "register",
    "registered",
]
