"""MeasureOnly, which leaves gradients as they are."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dist_clip.policies.base import Policy, State, StepInputs


@dataclasses.dataclass(frozen=True)
class MeasureOnly(Policy):
    """No clipping: the tensors are measured, for the report and the log, and every scale is 1.

    As an override it takes tensors out of the clip of the others: each policy has its own global norm, and these tensors
    are in none that clips. ``report.global_norm`` is still the norm of all tensors. Unlike `exclude`, which leaves
    tensors unmeasured, it lets a NaN be found: ``nonfinite=`` holds for these tensors as for all.

    Args:
        guarded: whether guards look at these tensors. False: they are in neither the norms nor the global norm that
            guards see.

    Raises:
        TypeError: `guarded` is no bool.

    Example:
        >>> import dist_clip
        >>> model = torch.nn.Linear(4, 4)
        >>> overrides = [(lambda name, param: param.ndim == 2, dist_clip.MeasureOnly())]
        >>> clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(1.0), overrides=overrides)
    """

    guarded: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.guarded, bool):
            raise TypeError(f"MeasureOnly: guarded must be a bool, got {self.guarded!r}")

    def step(self, state: State, inputs: StepInputs) -> tuple[Tensor, State]:
        return torch.ones_like(inputs.norms), state
