"""This rank's shards of all gradients, read with as little Python as there can be, because every step reads them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_clip.layouts.gradient import REAL
from dist_clip.layouts.layout import Layout

_grad = operator.attrgetter("grad")
_dtype = operator.attrgetter("dtype")
_layout = operator.attrgetter("layout")
_local = operator.attrgetter("_local_tensor")
_placements = operator.attrgetter("placements")


class Gradients:
    """Reads the gradients of a layout.

    Where all of them are what they usually are, `map` asks the questions of `usable`, a sixth of the time that it takes to
    ask tensor by tensor (2,000 plain tensors). Whatever is unusual in any of them takes that way.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._params: list[Any] = [tensor.param for tensor in layout]
        types = {type(param) is DTensor or isinstance(param, DTensor) for param in self._params}
        self._usual = len(types) == 1 and all(tensor.own_grad for tensor in layout)
        self._sharded = types == {True}
        self._cuts = [param.placements for param in self._params] if self._usual and self._sharded else []

    def read(self) -> list[Tensor | None]:
        """Return the shards, real numbers that can be written to in place, in the layout's order; None where there is none.

        Raises:
            RuntimeError: a gradient cannot be clipped. The error names it.
        """
        grads = list(map(_grad, self._params)) if self._usual else []
        if self._sharded and self._usual and set(map(type, grads)) == {DTensor}:
            grads = list(map(_local, grads)) if list(map(_placements, grads)) == self._cuts else []
        return grads if grads and _are_usual(grads) else [tensor.grad() for tensor in self._layout]


def _are_usual(grads: list[Any]) -> bool:
    """Whether `usable` would return each of these tensors as it is."""
    return (
        set(map(type, grads)) == {Tensor}
        and REAL.issuperset(map(_dtype, grads))
        and set(map(_layout, grads)) == {torch.strided}
        and all(map(Tensor.is_contiguous, grads))
        and not any(map(Tensor.is_neg, grads))
        and not any(map(Tensor.is_inference, grads))
    )
