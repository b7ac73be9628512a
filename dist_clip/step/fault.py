"""The name of the gradient that torch could not work on, whose own errors name none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dist_clip.layouts.process_groups import current_rank


@contextlib.contextmanager
def naming_what_fails(names: Sequence[str], grads: Sequence[Tensor | None]) -> Iterator[None]:
    """Let an error of the block that is one gradient's fault name this gradient.

    Raises:
        RuntimeError: torch cannot measure or scale a gradient of `grads`, the tensors `names`.
    """
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # no gradient's fault
        raise
    except RuntimeError as error:
        for name, grad in zip(names, grads, strict=True):
            if grad is not None and (reason := _refusal(grad)) is not None:
                raise RuntimeError(
                    f"rank {current_rank()}: the gradient of {name!r} (a {type(grad).__name__} of {grad.dtype} on "
                    f"{grad.device}) cannot be clipped: {reason}"
                ) from error
        raise


def _refusal(grad: Tensor) -> str | None:
    """Return what torch says to the operators that a clip needs; None if it runs them."""
    try:
        torch.linalg.vector_norm(grad)
        grad.mul_(1)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None
