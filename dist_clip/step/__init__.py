"""The parts of one step: it measures, computes global norms, decides, and reports."""

from dist_clip.step.decide import decide
from dist_clip.step.early import EarlyClips
from dist_clip.step.global_norms import GlobalNorms
from dist_clip.step.guarding import Guards
from dist_clip.step.measure import Meter
from dist_clip.step.nonfinite import NonFinite, NonFiniteMode, raise_nonfinite
from dist_clip.step.report import ClipReport
from dist_clip.step.usage import Usage

__all__ = [
    "ClipReport",
    "EarlyClips",
    "GlobalNorms",
    "Guards",
    "Meter",
    "NonFinite",
    "NonFiniteMode",
    "Usage",
    "decide",
    "raise_nonfinite",
]
