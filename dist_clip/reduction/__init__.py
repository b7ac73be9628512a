"""The communication of a step: the plan of collectives, sums over pipeline stages, checks of desync and replicas."""

from dist_clip.reduction.channel import Channel
from dist_clip.reduction.desync import DesyncDetector
from dist_clip.reduction.pipeline import PendingSum, PipelineReducer
from dist_clip.reduction.plan import ReductionPlan
from dist_clip.reduction.replicas import ReplicaCheck

__all__ = ["Channel", "DesyncDetector", "PendingSum", "PipelineReducer", "ReductionPlan", "ReplicaCheck"]
