"""Gradient clipping for distributed training that knows how the gradients are sharded."""

from typing import Any

from dist_clip.attachment import Attachment
from dist_clip.clipper import GradClipper
from dist_clip.errors import DesyncError, LayoutError, NonFiniteGradError, StuckError, VerifyError
from dist_clip.functional import clip_grad_norm_
from dist_clip.guards import (
    DropNorm,
    Guard,
    GuardInputs,
    GuardNeed,
    MedianGuard,
    SkipAbove,
    SkipStep,
    WhenStuck,
    guard,
    register_guard,
)
from dist_clip.kernels import Kernels
from dist_clip.monitor import ClipMonitor
from dist_clip.policies import (
    AGC,
    AdaGC,
    AutoClip,
    GlobalNorm,
    LogClip,
    MeasureOnly,
    Need,
    Policy,
    Scope,
    State,
    StepInputs,
    ZClip,
    observed,
    policy,
    register,
)
from dist_clip.recommended import recommended
from dist_clip.step import ClipReport, NonFinite
from dist_clip.verify import VerifiedNorm, VerifyReport

__version__ = "0.2.0.dev0"


_PARTS = ("accelerate", "axolotl", "lightning", "megatron", "olmo_core", "torchtitan", "transformers")
"""Modules that need packages of their own: imported at their first use."""


def __getattr__(name: str) -> Any:
    """Import a part such as ``dist_clip.megatron`` at its first use, because only that part needs its framework."""
    if name in _PARTS:
        import importlib
        import importlib.util

        if importlib.util.find_spec(f"dist_clip.{name}") is not None:
            return importlib.import_module(f"dist_clip.{name}")
    raise AttributeError(f"module 'dist_clip' has no attribute {name!r}")


__all__ = [
    "AGC",
    "AdaGC",
    "Attachment",
    "AutoClip",
    "ClipMonitor",
    "ClipReport",
    "DesyncError",
    "DropNorm",
    "GlobalNorm",
    "GradClipper",
    "Guard",
    "GuardInputs",
    "GuardNeed",
    "Kernels",
    "LayoutError",
    "LogClip",
    "MeasureOnly",
    "MedianGuard",
    "Need",
    "NonFinite",
    "NonFiniteGradError",
    "Policy",
    "Scope",
    "SkipAbove",
    "SkipStep",
    "State",
    "StepInputs",
    "StuckError",
    "VerifiedNorm",
    "VerifyError",
    "VerifyReport",
    "WhenStuck",
    "ZClip",
    "__version__",
    "clip_grad_norm_",
    "guard",
    "observed",
    "policy",
    "recommended",
    "register",
    "register_guard",
]
