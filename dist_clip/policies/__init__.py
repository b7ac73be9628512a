"""The clipping rules: pure maths from norms to scales, one file a rule."""

from dist_clip.policies.adagc import AdaGC
from dist_clip.policies.base import Policy
from dist_clip.policies.global_norm import GlobalNorm
from dist_clip.policies.logclip import LogClip
from dist_clip.policies.zclip import ZClip

__all__ = ["AdaGC", "GlobalNorm", "LogClip", "Policy", "ZClip"]
