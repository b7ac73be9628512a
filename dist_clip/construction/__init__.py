"""Construction of a clipper: checks its arguments, makes ranks agree, and counts the elements that the plan covers."""

from dist_clip.construction.draft import Construction, construct
from dist_clip.construction.options import Options
from dist_clip.construction.selection import Overrides

__all__ = ["Construction", "Options", "Overrides", "construct"]
