"""How to read a layout off what users have: modules, parameters, optimizers; plain tensors and DTensors."""

from dist_clip.readers.build import build_layout, layout_of_parameters
from dist_clip.readers.dtensor import PartialReducer
from dist_clip.readers.naming import named_parameters

__all__ = ["PartialReducer", "build_layout", "layout_of_parameters", "named_parameters"]
