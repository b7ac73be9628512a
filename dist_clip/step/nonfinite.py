"""The four modes for a NaN or Inf in a gradient, with all that differs between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from dist_clip.errors import NonFiniteGradError
from dist_clip.kernels import Kernels
from dist_clip.layouts.layout import Layout
from dist_clip.layouts.process_groups import gather

NonFinite = Literal["propagate", "zero", "skip", "raise"]


@dataclasses.dataclass(frozen=True)
class NonFiniteMode:
    """One of the modes of ``GradClipper(nonfinite=)``.

    Attributes:
        propagates, zeroes, skips, raises: which of the modes it is.

    Raises:
        ValueError: there is no such mode.
    """

    name: NonFinite
    propagates: bool = dataclasses.field(init=False)
    zeroes: bool = dataclasses.field(init=False)
    skips: bool = dataclasses.field(init=False)
    raises: bool = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        if self.name not in get_args(NonFinite):
            raise ValueError(f"nonfinite must be one of {', '.join(map(repr, get_args(NonFinite)))}, got {self.name!r}")
        for attribute, name in (
            ("propagates", "propagate"),
            ("zeroes", "zero"),
            ("skips", "skip"),
            ("raises", "raise"),
        ):
            object.__setattr__(self, attribute, self.name == name)

    def clean(self, values: Tensor, bad: Tensor) -> Tensor:
        """Return `values` as the policies see them: with "zero", 0 where `bad` is set."""
        return torch.where(bad, 0.0, values) if self.zeroes else values

    def zero_(self, kernels: Kernels, shards: Sequence[Tensor | None], bad: Tensor, skip: Tensor | None) -> None:
        """With "zero", set the gradients to 0 where `bad` is set. A product would not do, because 0 * inf is NaN."""
        if self.zeroes:
            # A step that a guard skips changes nothing.
            kernels.zero_where_(shards, bad if skip is None else torch.logical_and(bad, torch.logical_not(skip)))


def raise_nonfinite(layout: Layout, squares: Tensor, process_group: dist.ProcessGroup | None) -> None:
    """Raise an error that names the tensors with a NaN or Inf gradient and the ranks whose shards have it.

    Collective over `process_group`.

    Args:
        squares: [n], the squared norms of this rank's shards.

    Raises:
        NonFiniteGradError: always.
    """
    bad = torch.logical_not(torch.isfinite(squares)).tolist()
    mine = [tensor.name for tensor, faulty in zip(layout, bad, strict=True) if faulty]
    found: dict[str, list[int]] = {}
    for rank, names in gather(mine, process_group).items():
        for name in names:
            found.setdefault(name, []).append(rank)
    listed = [f"{name!r} (rank {', '.join(map(str, holders))})" for name, holders in sorted(found.items())]
    more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
    raise NonFiniteGradError(
        f"the gradient is NaN or Inf in {', '.join(listed[:8])}{more}; nothing was clipped and the state is as it was. "
        'nonfinite="skip" or "zero" would let training go on'
    )
