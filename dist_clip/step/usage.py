"""Warnings for loops that clip at the wrong place. They look at host numbers only, and only in a clipper's first clips."""

from __future__ import annotations

import warnings

from dist_clip.layouts import Layout
from dist_clip.reduction.grad_version import ClippedGradients, versions
from dist_clip.step.report import ClipReport

_CLIPS = 32
"""For how many clips a clipper looks: a loop that is wrong is wrong from the start, and later clips pay nothing."""
_EMPTY = 3
"""Clips in a row without any gradient that are no accident."""


class Usage:
    """Looks whether gradients are clipped again before a step, and whether there are any. Warns of each once."""

    def __init__(self) -> None:
        self._clipped = ClippedGradients()
        self._params: list[tuple[int | None, ...]] = []
        self._clips = self._empty = 0
        self._looks = self._steps_are_counted = False

    def before(self, layout: Layout, num_grads: int, last: ClipReport | None, *, attached: bool) -> None:
        """Look at what is about to be clipped.

        Args:
            last: the report of the last clip, whose flags are read only where the warning depends on them.
            attached: whether an attached optimizer's steps clip, which happens once a step anyway.
        """
        self._empty = 0 if num_grads or not len(layout) else self._empty + 1
        if self._empty == _EMPTY:
            warnings.warn(
                f"{_EMPTY} clips in a row found no gradient on this rank, so nothing is clipped: call clip_() after "
                "backward(), before zero_grad()",
                stacklevel=4,
            )
        self._looks = self._clips < _CLIPS and not attached
        if self._looks and self._clips_again(layout) and not (last and bool(last.skip | last.nonfinite)):
            self._clips = _CLIPS
            warnings.warn(
                "gradients that were clipped are clipped again, and no step was taken between: each clip counts as a step, "
                "and micro-batches after the first are added to clipped gradients. Call clip_() once a step, after the "
                "backward of the last micro-batch",
                stacklevel=4,
            )

    def after(self, layout: Layout) -> None:
        """Remember what was clipped."""
        self._clips += 1
        if self._looks:
            self._clipped.remember(layout)
            self._params = _versions_of(layout)

    def _clips_again(self, layout: Layout) -> bool:
        """Whether all gradients are those of the last clip, or had others added, and no weight moved since.

        Some optimizers write to weights past torch's count, and some steps are not taken. So this holds only once weights
        were seen to move between two clips.
        """
        if len(self._params) != len(layout):
            return False
        if _versions_of(layout) != self._params:
            self._steps_are_counted = True
            return False
        params = [tensor.param for tensor in layout if tensor.param is not None and tensor.param.grad is not None]
        return self._steps_are_counted and bool(params) and all(map(self._clipped.is_marked, params))


def _versions_of(layout: Layout) -> list[tuple[int | None, ...]]:
    return [() if tensor.param is None else versions(tensor.param) for tensor in layout]
