"""GlobalNorm, the usual clipping with one threshold for the norm of all gradients together."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from dist_clip.policies.base import Policy, State, StepInputs, global_clip_scale
from dist_clip.policies.check import check_number
from dist_clip.policies.registry import register


@register("global")
@dataclasses.dataclass(frozen=True)
class GlobalNorm(Policy):
    """Global-norm clipping (GlobalGC): scales every gradient by ``min(1, max_norm / (N + 1e-6))``.

    N is the L2 norm of all gradients of the policy's tensors together. There is no state.

    Args:
        max_norm: threshold, in units of the gradient norm; at least 0 (0 sets every gradient to 0, ``inf`` only
            measures).

    Raises:
        TypeError, ValueError: `max_norm` is not a number, or negative.

    Example:
        >>> import dist_clip
        >>> clipper = dist_clip.GradClipper(torch.nn.Linear(2, 2), dist_clip.GlobalNorm(1.0))

    Reference: Pascanu et al. 2013, arXiv 1211.5063; the formula of ``torch.nn.utils.clip_grad_norm_``.
    """

    max_norm: float = 1.0

    scope = "global"

    def __post_init__(self) -> None:
        check_number("GlobalNorm", "max_norm", self.max_norm, 0.0)

    def step(self, state: State, inputs: StepInputs) -> tuple[Tensor, State]:
        return global_clip_scale(self.max_norm, inputs.norms), state
