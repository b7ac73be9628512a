"""The communication of a step: the plan of collectives, sums over pipeline stages, and the detector of desync."""

from dist_clip.reduction.channel import Channel
from dist_clip.reduction.desync import DesyncDetector
from dist_clip.reduction.pipeline import PendingSum, PipelineReducer
from dist_clip.reduction.plan import ReductionPlan

__all__ = ["Channel", "DesyncDetector", "PendingSum", "PipelineReducer", "ReductionPlan"]
