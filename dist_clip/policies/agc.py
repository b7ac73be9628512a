"""AGC, which bounds a gradient's norm by a share of its parameter's norm."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import get_args

import torch
from torch import Tensor

from dist_clip.policies.base import Need, Policy, Scope, State, StepInputs
from dist_clip.policies.check import check_choice, check_finite
from dist_clip.policies.registry import register


@register("agc")
@dataclasses.dataclass(frozen=True)
class AGC(Policy):
    """Adaptive gradient clipping by the parameters' norms, per tensor. It remembers nothing.

    With ``n`` the norm of a tensor's gradient and ``w`` that of its parameter, a gradient with
    ``n > lam * max(w, eps)`` is scaled by ``lam * max(w, eps) / max(n, 1e-6)``.

    The paper applies this to each output row of a matrix, here the unit is the whole tensor: rules that scale rows or
    elements are out of scope. The norm of a matrix of equal rows is ``sqrt(rows)`` times a row's, on both sides of the
    comparison, so that ``lam`` means the same. One row that goes astray hides in the whole matrix, though.

    Which tensors to leave out is yours to say. The paper leaves out the last layer. A bias that starts at 0 has ``w = 0``,
    so that its gradient is held to ``lam * eps`` until it has grown: leave out biases and norms, too, unclipped with
    ``exclude=["*.bias", "*norm*", "head.*"]``, or give them another policy with ``overrides=``.

    The parameters are read on every step. Their squared norms travel in the packed vector of the gradients', so AGC costs
    no collective more, under any sharding.

    Args:
        lam: the largest norm of a gradient as a share of its parameter's norm, above 0. The paper has .01 to .16,
            smaller for larger batches.
        eps: the least norm that a parameter counts as having, above 0, so that parameters of zeros can be learnt.
        scope: "tensor" compares whole tensors; "shard" each rank's piece of the gradient with that piece of the
            parameter, which communicates nothing; "global" the global norm with the norm of all parameters.

    Raises:
        TypeError, ValueError: a hyper-parameter of the wrong type or out of its range.

    Example:
        >>> import dist_clip
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> clipper = dist_clip.GradClipper(model, dist_clip.AGC(), exclude=["*.bias", "1.*"])

    Reference: arXiv 2102.06171 (NFNets); timm's ``adaptive_clip_grad`` and optax's ``adaptive_grad_clip`` clip by rows.
    """

    lam: float = 0.01
    eps: float = 1e-3
    scope: Scope = "tensor"

    def __post_init__(self) -> None:
        check_finite("AGC", "lam", self.lam, 0.0, open_low=True)
        check_finite("AGC", "eps", self.eps, 0.0, open_low=True)
        check_choice("AGC", "scope", self.scope, get_args(Scope))

    def needs(self, step: int) -> Collection[Need]:
        needs: tuple[Need, ...] = ("weight_norms",)
        return needs

    def step(self, state: State, inputs: StepInputs) -> tuple[Tensor, State]:
        assert inputs.weight_norms is not None
        norms = inputs.norms
        allowed = self.lam * inputs.weight_norms.clamp(min=self.eps)
        # A NaN norm is not within what is allowed, and makes the scale NaN, as with the other rules.
        return torch.where(norms <= allowed, 1.0, torch.clamp(allowed / norms.clamp(min=1e-6), max=1.0)), state
