"""The parts of one step: measure, global norms, decide, report."""

from dist_clip.step.decide import decide
from dist_clip.step.global_norms import GlobalNorms
from dist_clip.step.measure import Meter
from dist_clip.step.nonfinite import NonFinite, NonFiniteMode, raise_nonfinite
from dist_clip.step.report import ClipReport

__all__ = ["ClipReport", "GlobalNorms", "Meter", "NonFinite", "NonFiniteMode", "decide", "raise_nonfinite"]
