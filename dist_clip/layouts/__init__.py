"""Layouts, read from modules, parameters or optimizers with plain tensors, DTensors or FSDP1's flat parameters."""

from dist_clip.layouts.gradients import Gradients, UsualGradients
from dist_clip.layouts.layout import Layout, LayoutReader, LogicalTensor, merge_groups
from dist_clip.layouts.naming import modules_of, named_parameters
from dist_clip.layouts.partial import PartialReducer
from dist_clip.layouts.plain import build_layout, layout_of_parameters
from dist_clip.layouts.sharded import ShardedBy
from dist_clip.layouts.watch import ParameterWatch

__all__ = [
    "Gradients",
    "Layout",
    "LayoutReader",
    "LogicalTensor",
    "ParameterWatch",
    "PartialReducer",
    "ShardedBy",
    "UsualGradients",
    "build_layout",
    "layout_of_parameters",
    "merge_groups",
    "modules_of",
    "named_parameters",
]
