"""The errors a user may want to catch."""


class LayoutError(ValueError):
    """The parameters cannot be clipped as they are laid out: raised at construction, on every rank alike."""


class NonFiniteGradError(RuntimeError):
    """A gradient norm is NaN or Inf and ``nonfinite="raise"`` (or ``error_if_nonfinite``) was asked for."""


class DesyncError(RuntimeError):
    """Ranks are out of step: one has clipped more often than others, or remembers something else. See docs/faults.md."""
