"""Whether gradients are other ones than those that were clipped last."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_clip.layouts.layout import LogicalTensor


class GradVersion:
    """A parameter's gradient as it is now: which tensor, and how often it has been written to.

    Not every write is counted: collectives and `torch._foreach_*` on DTensors are not.
    """

    def __init__(self, param: Tensor) -> None:
        self._grad = None if param.grad is None else weakref.ref(param.grad)
        self._versions = _versions(param.grad)

    def unchanged(self, param: Tensor) -> bool:
        """Whether `param` has that very gradient, not written to since."""
        grad = None if self._grad is None else self._grad()
        return param.grad is grad and (grad is None) == (self._grad is None) and self._versions == _versions(param.grad)


class ClippedGradients:
    """Remembers the gradients that were clipped: which tensors, and how often they had been written to."""

    def __init__(self) -> None:
        self._clipped: dict[int, GradVersion] = {}

    def remember(self, tensors: Iterable[LogicalTensor]) -> None:
        """Call it after clipping, which writes to them."""
        params = (t.param for t in tensors if t.param is not None and t.param.grad is not None)
        self._clipped = {id(param): GradVersion(param) for param in params}

    def is_new(self, param: Tensor) -> bool:
        """Whether `param` has a gradient that is another one, or has been written to, since `remember`."""
        if param.grad is None:
            return False
        seen = self._clipped.get(id(param))
        return seen is None or not seen.unchanged(param)

    def all_clipped(self, tensors: Iterable[LogicalTensor]) -> bool:
        """Whether this rank has gradients, and none of them is new since `remember`."""
        params = [t.param for t in tensors if t.param is not None and t.param.grad is not None]
        return bool(params) and not any(self.is_new(param) for param in params)


def _versions(grad: Tensor | None) -> tuple[int | None, ...]:
    """How often the tensor has been written to in place; None where that is not counted (inference mode).

    Of a DTensor, and of its local tensor by itself: that is what FSDP2 adds to.
    """
    if grad is None:
        return ()
    tensors = (grad, grad._local_tensor) if isinstance(grad, DTensor) else (grad,)
    return tuple(None if tensor.is_inference() else tensor._version for tensor in tensors)
