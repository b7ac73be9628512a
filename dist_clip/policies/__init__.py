"""The clipping rules, pure maths from norms to scales, one file a rule."""

from dist_clip.policies.adagc import AdaGC
from dist_clip.policies.base import Need, Policy, Scope, State, StepInputs, observed
from dist_clip.policies.global_norm import GlobalNorm
from dist_clip.policies.logclip import LogClip
from dist_clip.policies.registry import modes, options_of, parse_mode, policy, register, registered
from dist_clip.policies.zclip import ZClip

__all__ = [
    "AdaGC",
    "GlobalNorm",
    "LogClip",
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
