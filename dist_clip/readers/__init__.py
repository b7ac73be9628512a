"""How to read a layout off what users have: modules, parameters, optimizers; plain tensors and DTensors."""

from dist_clip.readers.build import build_layout, layout_of_parameters
from dist_clip.readers.dtensor import PartialReducer
from dist_clip.readers.fsdp2 import reduced_together
from dist_clip.readers.naming import modules_of, named_parameters

__all__ = [
    "PartialReducer",
    "build_layout",
    "layout_of_parameters",
    "modules_of",
    "named_parameters",
    "reduced_together",
]
