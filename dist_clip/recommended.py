"""The one setting that docs/recommended.md supports."""

from __future__ import annotations

from typing import Any

from dist_clip.guards import MedianGuard
from dist_clip.policies import LogClip

NAME = "recommended"
"""What launchers and Megatron's flag call it, in the place of a policy's name."""


def recommended(max_norm: float = 1.0) -> dict[str, Any]:
    """Return the keyword arguments of `GradClipper` that the study recommends, whatever the optimizer.

    `LogClip` clips tensors whose norm is out of the ordinary, a global clip follows, and `MedianGuard` skips the
    steps of bad batches. Nothing has to be set. docs/recommended.md has the measurements, and says for whom it is not.

    Args:
        max_norm: the norm to which the global clip bounds all gradients together, above 0.

    Returns:
        {"policy": ..., "guard": ...}; change an entry, or add others, as you like.

    Example:
        >>> import dist_clip
        >>> model = torch.nn.Linear(2, 2)
        >>> clipper = dist_clip.GradClipper(model, **dist_clip.recommended())
        >>> clipper.policy.post_max_norm
        1.0
    """
    return {"policy": LogClip(max_norm=max_norm, post_max_norm=max_norm), "guard": MedianGuard()}
