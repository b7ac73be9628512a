"""The guards, which decide whether a step is taken at all, one file a guard."""

from dist_clip.guards.base import Guard, GuardInputs, GuardNeed, WhenStuck
from dist_clip.guards.drop_norm import DropNorm
from dist_clip.guards.median import MedianGuard
from dist_clip.guards.registry import guard, register_guard, registered_guards
from dist_clip.guards.skip_above import SkipAbove
from dist_clip.guards.skip_step import SkipStep

__all__ = [
    "DropNorm",
    "Guard",
    "GuardInputs",
    "GuardNeed",
    "MedianGuard",
    "SkipAbove",
    "SkipStep",
    "WhenStuck",
    "guard",
    "register_guard",
    "registered_guards",
]
