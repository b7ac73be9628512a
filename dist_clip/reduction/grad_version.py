"""Whether gradients are other ones than those that were clipped last."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_clip.layouts.layout import LogicalTensor

_numbers = itertools.count()


class ClippedGradients:
    """Marks the gradients that were clipped: which tensors, and how often they had been written to.

    The mark is an attribute of the gradient, a few numbers, and goes away with it. A weak reference would do as well, but
    torch refuses to move a model whose parameters or gradients have one; the gradient itself would keep its memory.

    Not every write is counted: collectives and `torch._foreach_*` on DTensors are not.
    """

    def __init__(self) -> None:
        self._attribute = f"_dist_clip_{next(_numbers)}"
        self._clip = 0

    def remember(self, tensors: Iterable[LogicalTensor]) -> None:
        """Mark the gradients as they are now. Call it after clipping, which writes to them."""
        self._clip += 1
        self.mark(tensors)

    def mark(self, tensors: Iterable[LogicalTensor]) -> None:
        """Mark further gradients, beside those that are marked."""
        for tensor in tensors:
            if tensor.param is not None and tensor.param.grad is not None:
                grad = tensor.param.grad
                setattr(grad, self._attribute, (self._clip, versions(grad)))

    def is_new(self, param: Tensor) -> bool:
        """Whether `param` has a gradient that is another one, or has been written to, since `remember`."""
        grad = param.grad
        return grad is not None and getattr(grad, self._attribute, None) != (self._clip, versions(grad))

    def is_marked(self, param: Tensor) -> bool:
        """Whether the gradient of `param` is the tensor that `remember` marked, whatever was written to it since."""
        clip, _ = getattr(param.grad, self._attribute, (None, ()))
        return clip == self._clip

    def all_clipped(self, tensors: Iterable[LogicalTensor]) -> bool:
        """Whether this rank has gradients, and none of them is new since `remember`."""
        params = [t.param for t in tensors if t.param is not None and t.param.grad is not None]
        return bool(params) and not any(self.is_new(param) for param in params)


def versions(tensor: Tensor) -> tuple[int | None, ...]:
    """How often the tensor has been written to in place; None where that is not counted (inference mode).

    Of a DTensor, and of its local tensor by itself: that is what FSDP2 adds to.
    """
    tensors = (tensor, tensor._local_tensor) if isinstance(tensor, DTensor) else (tensor,)
    return tuple(None if each.is_inference() else each._version for each in tensors)
