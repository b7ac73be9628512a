"""The report of one clip: device tensors, read back only when somebody asks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor


class ReportedNorms:
    """The global norm before and after clipping, each fp32 0-dim or None: computed at the first read, and kept.

    Most steps nobody reads them. And under pipeline parallelism the stages' shares may still be on their way when the
    report is made: whoever reads the norm waits for it, and the optimizer step that follows clipping does not.

    Args:
        find: computes both.
        known: whether the first of them is not None, known without waiting for it.
    """

    def __init__(self, find: Callable[[], tuple[Tensor | None, Tensor | None]], *, known: bool = True) -> None:
        self.known = known
        self._find: Callable[[], tuple[Tensor | None, Tensor | None]] | None = find
        self._norms: tuple[Tensor | None, Tensor | None] = (None, None)
        # A graph's replays compute the norms anew, but only what was captured with it.
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            self.get()

    def get(self) -> tuple[Tensor | None, Tensor | None]:
        """The norm before clipping, and after it."""
        if self._find is not None:
            with torch.no_grad():
                self._norms, self._find = self._find(), None
        return self._norms


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

    Example:
        >>> import dist_clip
        >>> model = torch.nn.Linear(2, 2)
        >>> clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(1.0))
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> report = clipper.clip_()
        >>> print(report)
        global norm 2.449, clipped 100% of 2 gradients, smallest scale 0.408
        >>> report.names, report.scales
        (('weight', 'bias'), tensor([0.4082, 0.4082]))
    """

    names: tuple[str, ...]
    tensor_norms: Tensor
    scales: Tensor
    nonfinite: Tensor
    skip: Tensor
    num_grads: int
    _global_norms: ReportedNorms = dataclasses.field(repr=False)

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
        """Whether no tensor had a gradient on this rank, so that nothing was clipped (a clip before any backward)."""
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
