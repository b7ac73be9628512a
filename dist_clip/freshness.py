"""Whether gradients are other ones than those that were clipped last."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor

from dist_clip.layout import LogicalTensor


class ClippedGradients:
    """Remembers the gradients that were clipped: which tensors, and how often they had been written to."""

    def __init__(self) -> None:
        self._clipped: dict[int, tuple[weakref.ref[Tensor], int | None]] = {}

    def remember(self, tensors: Iterable[LogicalTensor]) -> None:
        """Call it after clipping, which writes to them."""
        self._clipped = {}
        for tensor in tensors:
            if tensor.param is not None and tensor.param.grad is not None:
                grad = tensor.param.grad
                self._clipped[id(tensor.param)] = (weakref.ref(grad), _version(grad))

    def is_new(self, param: Tensor) -> bool:
        """Whether `param` has a gradient that is another one, or has been written to, since `remember`."""
        grad = param.grad
        if grad is None:
            return False
        ref, version = self._clipped.get(id(param), (None, None))
        return ref is None or ref() is not grad or version != _version(grad)

    def all_clipped(self, tensors: Iterable[LogicalTensor]) -> bool:
        """Whether this rank has gradients, and none of them is new since `remember`."""
        params = [t.param for t in tensors if t.param is not None and t.param.grad is not None]
        return bool(params) and not any(self.is_new(param) for param in params)


def _version(grad: Tensor) -> int | None:
    """How often the tensor has been written to in place; None where that is not counted (inference mode)."""
    return None if grad.is_inference() else grad._version
