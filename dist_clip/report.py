"""The report of one clip: device tensors, read back only when somebody asks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor


class GlobalNorms:
    """Global norm before and after clipping, each fp32 0-dim or None; worked out when asked for.

    Most steps nobody asks. And under pipeline parallelism the stages' shares may still be on their way when the report is
    made: whoever needs the norm waits for it, and the optimizer step that follows clipping does not. Worked out anew each
    time, so that the report of a captured CUDA graph tells of the last replay.
    """

    def __init__(self, find: Callable[[], tuple[Tensor | None, Tensor | None]], *, known: bool = True) -> None:
        self.known = known  # whether the first of them is not None, without waiting for it
        self.get = find


@dataclasses.dataclass(frozen=True)
class ClipReport:
    """What a call of ``GradClipper.clip_`` measured and did. Nothing here costs a host sync until it is read.

    Attributes:
        names: FQN of each tensor this rank takes part in, n of them.
        tensor_norms: fp32 [n], L2 norm of each gradient before clipping (with scope "shard": of this rank's shard).
        scales: fp32 [n], what each gradient was multiplied by.
        nonfinite: bool 0-dim, whether any norm was NaN or Inf (with ``nonfinite="skip"``: on any rank).
        skip: bool 0-dim, whether the step is to be skipped: nothing was clipped or remembered. Never without
            ``nonfinite="skip"`` or ``skip_above``.
        num_grads: tensors that have a gradient on this rank.
    """

    names: tuple[str, ...]
    tensor_norms: Tensor
    scales: Tensor
    nonfinite: Tensor
    skip: Tensor
    num_grads: int
    _global_norms: GlobalNorms = dataclasses.field(repr=False)

    @property
    def global_norm(self) -> Tensor | None:
        """fp32 0-dim: L2 norm of all gradients before clipping, the same on every rank.

        None where finding it would have cost a collective that the policy had no need of: across pipeline stages, and
        with scope "shard". ``GradClipper(log_global_norm=True)`` always gives it.
        """
        return self._global_norms.get()[0]

    @property
    def has_global_norm(self) -> bool:
        """Whether `global_norm` is not None. Does not wait for it."""
        return self._global_norms.known

    @property
    def clipped_global_norm(self) -> Tensor | None:
        """fp32 0-dim: the same after clipping. None where `global_norm` is, and where it would cost a collective more."""
        return self._global_norms.get()[1]

    @property
    def empty(self) -> bool:
        """No tensor had a gradient on this rank: nothing was clipped (a clip before any backward)."""
        return self.num_grads == 0

    @property
    def clipped_fraction(self) -> Tensor:
        """fp32 0-dim: share of the tensors with a non-zero gradient whose scale is below 1."""
        has_grad = self.tensor_norms != 0
        clipped = has_grad & (self.scales < 1)
        return clipped.sum().float() / has_grad.sum().clamp(min=1)

    @property
    def min_scale(self) -> Tensor:
        """fp32 0-dim: the smallest scale."""
        return self.scales.min() if len(self.names) else torch.ones((), device=self.scales.device)

    def __str__(self) -> str:
        """A line for people. Reads tensors back."""
        if self.empty:
            return "no gradients: nothing was clipped"
        norm = "not reduced" if self.global_norm is None else f"{self.global_norm.item():.4g}"
        return (
            f"global norm {norm}, clipped {self.clipped_fraction.item():.0%} of {self.num_grads} gradients, "
            f"smallest scale {self.min_scale.item():.3g}{', NON-FINITE' if self.nonfinite.item() else ''}"
            f"{', step to be skipped' if self.skip.item() else ''}"
        )
