"""Construction: arguments checked, ranks agreed, elements counted."""

from dist_clip.construction.draft import Construction, construct
from dist_clip.construction.options import Options

__all__ = ["Construction", "Options", "construct"]
