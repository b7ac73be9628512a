"""Warnings for loops that clip at the wrong place. They look at host numbers only, and only in a clipper's first clips."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from dist_clip.layouts import Layout
from dist_clip.memory.host_copy import capturing
from dist_clip.reduction.grad_version import ClippedGradients, versions
from dist_clip.step.report import ClipReport

_STEPS = 8
"""For how many steps a clipper looks: a loop that is wrong is wrong from the start, and later clips pay nothing.

A look takes about 2 ms of the host for 1,000 tensors."""
_CLIPS = 512
"""As `_STEPS`, in clips, for optimizers whose steps torch does not count."""
_AGAIN = 2
"""Steps with gradients that were clipped twice. One is an accident: a user's own rule may leave a step out."""
_EMPTY = 3
"""Clips in a row without any gradient that are no accident."""
_UNSEEN = 2
"""Steps with gradients that no clip saw. One is an accident, as weights that were loaded between two clips are."""


class Usage:
    """Looks whether gradients are clipped again before a step, and whether there are any. Warns of each once.

    Attributes:
        clipped: the gradients that the last clip left, as long as it looks.
    """

    def __init__(self) -> None:
        self.clipped = ClippedGradients()
        self._params: list[tuple[int | None, ...]] = []
        self._bare: list[bool] = []
        self._clips = self._steps = self._empty = self._unseen = 0
        self._looks = self._moved = self._told_of_empty = False
        self._excuses: list[Tensor] = []

    def before(
        self,
        layout: Layout,
        num_grads: int,
        last: ClipReport | None,
        device: torch.device,
        *,
        attached: bool,
        early: frozenset[int],
    ) -> None:
        """Look at what is about to be clipped.

        Args:
            early: the numbers of the tensors that `clip_early_` has clipped.
            last: the report of the last clip. Its flags are read only where all else says that a warning is due.
            device: where the flags are.
            attached: whether an attached optimizer's steps clip as well.
        """
        self._empty = 0 if num_grads or not len(layout) else self._empty + 1
        self._looks = self._steps < _STEPS and self._clips < _CLIPS and not capturing(device)
        if self._looks:
            self._look_for_unseen(layout, early)
        if self._empty == _EMPTY and not self._told_of_empty:
            self._told_of_empty = True
            warnings.warn(
                f"{_EMPTY} clips in a row found no gradient on this rank, so nothing is clipped: call clip_() after "
                "backward(), before zero_grad()",
                stacklevel=4,
            )
        if self._looks and last is not None and self._clips_again(layout):
            self._excuses.append(last.skip | last.nonfinite)
            if len(self._excuses) == _AGAIN:
                self._excuses = [excuse for excuse in self._excuses if not bool(excuse)]
            if len(self._excuses) == _AGAIN:
                self._steps = _STEPS
                cure = (
                    "The attached optimizer's step clips already: leave clip_() out"
                    if attached
                    else "Call clip_() once a step, after the backward of the last micro-batch"
                )
                warnings.warn(
                    "gradients that were clipped are clipped again, and no step was taken between: each clip counts as a "
                    f"step, and micro-batches after the first are added to clipped gradients. {cure}",
                    stacklevel=4,
                )

    def _look_for_unseen(self, layout: Layout, early: frozenset[int]) -> None:
        """Warn of weights that moved since the last clip, though they had no gradient at that one and have none now.

        If some have a gradient, only those with a hook count: Muon's authors step with zeros where there is no gradient.
        """
        before, self._bare = (
            self._bare,
            [i not in early and (tensor.param is None or tensor.param.grad is None) for i, tensor in enumerate(layout)],
        )
        if len(before) != len(layout) or len(self._params) != len(layout):
            return
        moved = [
            tensor.name
            for tensor, was_bare, bare, version in zip(layout, before, self._bare, self._params, strict=True)
            if was_bare
            and bare
            and tensor.param is not None
            and tensor.param.requires_grad
            and (all(self._bare) or _has_hook(tensor.param))
            and versions(tensor.param) != version
        ]
        self._unseen += bool(moved)
        if moved and self._unseen == _UNSEEN:
            self._told_of_empty = True
            warnings.warn(
                f"{len(moved)} tensors such as {moved[0]!r} were stepped with gradients that no clip saw: they move, and "
                "have no gradient when clip_() is called. If an optimizer steps inside backward, call "
                "clipper.clip_early_([param]) in its hook, before the step (docs/in-backward.md); if not, call clip_() "
                "after backward(), before optimizer.step() and zero_grad()",
                stacklevel=5,
            )

    def after(self, layout: Layout, *, mark: bool) -> None:
        """Remember what was clipped; with `mark` also where nothing is looked at any more."""
        self._clips += 1
        if self._looks or mark:
            self.clipped.remember(layout)
        if self._looks:
            self._params = _versions_of(layout)

    def _clips_again(self, layout: Layout) -> bool:
        """Whether all gradients are those of the last clip, or had others added, and no weight moved since.

        Some optimizers write to weights past torch's count. So this holds only right after a clip before which weights were
        seen to move: once a step, however many clips follow it.
        """
        moved, self._moved = self._moved, False
        if len(self._params) != len(layout):
            return False
        if _versions_of(layout) != self._params:
            self._moved = True
            self._steps += 1
            return False
        params = [tensor.param for tensor in layout if tensor.param is not None and tensor.param.grad is not None]
        return moved and bool(params) and all(map(self.clipped.is_marked, params))


def _has_hook(param: Tensor) -> bool:
    """Whether anything that steps inside backward may have been registered on `param`."""
    names = ("_post_accumulate_grad_hooks", "_backward_hooks", "_in_backward_optimizers")
    return any(getattr(param, name, None) for name in names)


def _versions_of(layout: Layout) -> list[tuple[int | None, ...]]:
    return [() if tensor.param is None else versions(tensor.param) for tensor in layout]
