"""The versions of gradients, which show whether they changed since the last clip."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_clip.layouts.layout import LogicalTensor


class GradVersion:
    """The version of a parameter's gradient: which tensor it is, and how often it has been written to.

    torch does not count every write: collectives and `torch._foreach_*` on DTensors are not counted.
    """

    def __init__(self, param: Tensor) -> None:
        self._grad = None if param.grad is None else weakref.ref(param.grad)
        self._versions = _versions(param.grad)

    def unchanged(self, param: Tensor) -> bool:
        """Return whether `param` still has this gradient, and torch has counted no write since."""
        grad = None if self._grad is None else self._grad()
        return param.grad is grad and (grad is None) == (self._grad is None) and self._versions == _versions(param.grad)


class ClippedGradients:
    """The versions of the gradients that were clipped last."""

    def __init__(self) -> None:
        self._clipped: dict[int, GradVersion] = {}

    def remember(self, tensors: Iterable[LogicalTensor]) -> None:
        """Record the versions of the gradients. Call it after clipping, which writes to them."""
        params = (t.param for t in tensors if t.param is not None and t.param.grad is not None)
        self._clipped = {id(param): GradVersion(param) for param in params}

    def is_new(self, param: Tensor) -> bool:
        """Return whether `param` has a gradient that was replaced or written to since `remember`."""
        if param.grad is None:
            return False
        seen = self._clipped.get(id(param))
        return seen is None or not seen.unchanged(param)

    def all_clipped(self, tensors: Iterable[LogicalTensor]) -> bool:
        """Return whether this rank has gradients, and none of them is new since `remember`."""
        params = [t.param for t in tensors if t.param is not None and t.param.grad is not None]
        return bool(params) and not any(self.is_new(param) for param in params)


def _versions(grad: Tensor | None) -> tuple[int | None, ...]:
    """Return how often the gradient has been written to in place; None where torch does not count (inference mode).

    A DTensor's local tensor is counted as well, because FSDP2 adds to it.
    """
    if grad is None:
        return ()
    tensors = (grad, grad._local_tensor) if isinstance(grad, DTensor) else (grad,)
    return tuple(None if tensor.is_inference() else tensor._version for tensor in tensors)
