"""The errors that users may want to catch."""


class LayoutError(ValueError):
    """The parameters cannot be clipped as they are laid out. Raised at construction, the same on every rank."""


class NonFiniteGradError(RuntimeError):
    """A gradient norm is NaN or Inf, and ``nonfinite="raise"`` or ``error_if_nonfinite=True`` was passed."""


class StuckError(RuntimeError):
    """A guard with ``when_stuck="raise"`` has skipped its ``max_skips_in_a_row`` steps in a row, and would skip another."""


class DesyncError(RuntimeError):
    """Ranks are out of step: they differ in the number of clips or in the policies' state. See docs/faults.md."""


class VerifyError(RuntimeError):
    """``verify()`` found a norm that differs from that of the whole gradient. The same on every rank."""
