"""The report of one clip, whose device tensors sync the host only when they are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class ReportedNorms:
    """The global norm before and after clipping, each fp32 0-dim or None, computed at the first read and kept.

    They are lazy because most steps do not read them. Under pipeline parallelism the stages' sums may also still be
    under way when the report is made, so that reading the norm waits for them and the optimizer step does not.

    Args:
        find: computes both.
        known: whether the norm before clipping is not None.
        at_once: compute them now. Replays of a CUDA graph compute only what was captured with it.
    """

    def __init__(
        self,
        find: Callable[[], tuple[Tensor | None, Tensor | None]],
        *,
        known: bool = True,
        at_once: bool = False,
    ) -> None:
        self.known = known
        self._find: Callable[[], tuple[Tensor | None, Tensor | None]] | None = find
        self._norms: tuple[Tensor | None, Tensor | None] = (None, None)
        if at_once:
            self.get()

    def __getstate__(self) -> dict[str, Any]:
        # How the norms are found holds collectives under way; what they are can be sent to another process.
        self.get()
        return vars(self)

    def get(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the norm before clipping and the norm after it."""
        if self._find is not None:
            with torch.no_grad():
                self._norms, self._find = self._find(), None
        return self._norms


@dataclasses.dataclass(frozen=True)
class ClipReport:
    """What a call of ``GradClipper.clip_`` measured and did. Nothing in it syncs the host until it is read.

    Attributes:
        names: FQN of each of the n tensors that this rank takes part in.
        tensor_norms: fp32 [n], L2 norm of each gradient before clipping (with scope "shard": of this rank's shard).
        scales: fp32 [n], what each gradient was multiplied by.
        nonfinite: bool 0-dim, whether any norm was NaN or Inf (where steps may be skipped: on any rank).
        skip: bool 0-dim, whether the step is to be skipped; then nothing was clipped or remembered. Set only with
            ``nonfinite="skip"``, ``guard`` or ``scaler``.
        num_grads: number of tensors that have a gradient on this rank.

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
        """L2 norm of all gradients before clipping, fp32 0-dim, the same on every rank. Computed once and kept.

        None where it would have cost a collective that no policy needed: across pipeline stages, and with scope
        "shard". ``GradClipper(log_global_norm=True)`` always computes it.
        """
        return self._global_norms.get()[0]

    @property
    def has_global_norm(self) -> bool:
        """Whether `global_norm` is not None, without waiting for it."""
        return self._global_norms.known

    @property
    def clipped_global_norm(self) -> Tensor | None:
        """L2 norm of all gradients after clipping, fp32 0-dim.

        None where `global_norm` is None, and where it would cost one more collective.
        """
        return self._global_norms.get()[1]

    @property
    def empty(self) -> bool:
        """Whether no tensor had a gradient on this rank, so that nothing was clipped (a clip before any backward)."""
        return self.num_grads == 0

    @property
    def clipped_fraction(self) -> Tensor:
        """Share of the tensors with a non-zero gradient whose scale is below 1, fp32 0-dim in [0, 1]."""
        has_grad = self.tensor_norms != 0
        clipped = has_grad & (self.scales < 1)
        return clipped.sum().float() / has_grad.sum().clamp(min=1)

    @property
    def min_scale(self) -> Tensor:
        """The smallest scale, fp32 0-dim; 1 without tensors."""
        return self.scales.min() if len(self.names) else torch.ones((), device=self.scales.device)

    def metrics(self) -> dict[str, Tensor]:
        """Return the numbers that a dashboard shows, fp32 0-dim tensors on the device, without a host sync.

        "clip/grad_norm" and "clip/grad_norm_after" are the global norm before and after clipping; each is left out where it
        is not known (see `global_norm`). "clip/fraction" is the share of the gradients that were clipped,
        "clip/min_scale" the smallest scale; "clip/skipped" and "clip/nonfinite" are 0 or 1.

        Example:
            >>> import dist_clip
            >>> model = torch.nn.Linear(2, 2)
            >>> clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(1.0))
            >>> model(torch.ones(1, 2)).sum().backward()
            >>> sorted(clipper.clip_().metrics())
            ['clip/fraction', 'clip/grad_norm', 'clip/grad_norm_after', 'clip/min_scale', 'clip/nonfinite', 'clip/skipped']
        """
        norms = {"clip/grad_norm": self.global_norm, "clip/grad_norm_after": self.clipped_global_norm}
        return {
            **{key: norm for key, norm in norms.items() if norm is not None},
            "clip/fraction": self.clipped_fraction,
            "clip/min_scale": self.min_scale,
            "clip/skipped": self.skip.float(),
            "clip/nonfinite": self.nonfinite.float(),
        }

    def __str__(self) -> str:
        """Return a summary in one line. Syncs the host."""
        if self.empty:
            return "no gradients: nothing was clipped"
        norm = "not reduced" if self.global_norm is None else f"{self.global_norm.item():.4g}"
        return (
            f"global norm {norm}, clipped {self.clipped_fraction.item():.0%} of {self.num_grads} gradients, "
            f"smallest scale {self.min_scale.item():.3g}{', NON-FINITE' if self.nonfinite.item() else ''}"
            f"{', step to be skipped' if self.skip.item() else ''}"
        )
