"""The one setting that docs/stability.md supports."""

from __future__ import annotations

from typing import Any

from dist_clip.guards import MedianGuard
from dist_clip.policies import LogClip


def recommended() -> dict[str, Any]:
    """Return the keyword arguments of `GradClipper` that the study recommends, whatever the optimizer.

    `LogClip` clips tensors whose norm is out of the ordinary, a global clip at 1 follows, and `MedianGuard` skips the
    steps of bad batches. Nothing has to be set. docs/stability.md has the measurements, and says for whom it is not.

    Returns:
        {"policy": ..., "guard": ...}; change an entry, or add others, as you like.

    Example:
        >>> import dist_clip
        >>> model = torch.nn.Linear(2, 2)
        >>> clipper = dist_clip.GradClipper(model, **dist_clip.recommended())
        >>> clipper.policy.post_max_norm
        1.0
    """
    return {"policy": LogClip(post_max_norm=1.0), "guard": MedianGuard()}
