"""What a policy is: pure maths from a vector of norms to a vector of scales, with a small explicit state."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import Tensor

Scope = Literal["tensor", "shard", "global"]
"""What one element of a policy is: a logical tensor, this rank's shard of one, or all tensors of the policy together."""


@dataclasses.dataclass(frozen=True)
class Elements:
    """What a scope means to the clipper.

    Attributes:
        one: all tensors together are one element, whose norm is the global norm.
        per_rank: each rank's shards are elements of their own: they need no reduction, and their scales may differ.
    """

    one: bool = False
    per_rank: bool = False


ELEMENTS: dict[str, Elements] = {
    "tensor": Elements(),
    "shard": Elements(per_rank=True),
    "global": Elements(one=True),
}
"""The scopes by name."""

Need = Literal["global_norm", "weight_norms"]
"""A measurement that a policy has to ask for, because it can cost a collective."""

State = dict[str, Tensor]
"""Name of a slot -> tensor of shape [n] or [k, n], for n elements."""


@dataclasses.dataclass(frozen=True)
class StepInputs:
    """What a policy sees of one step. Later versions may add fields.

    Attributes:
        norms: float64 [n], L2 norm of each element's gradient before clipping; 0 without a gradient; possibly non-finite.
        numel: int64 [n], how many numbers each element has.
        t: int64 0-dim on the device, the number of this step, from 1. Steps that were skipped do not count.
        steps_done: how many steps were taken before this one, as far as the host knows: never more than ``t - 1``, and
            less where steps may be skipped. It only serves to leave out work that is over for good, as a warm-up is.
        global_norm: float64 0-dim, L2 norm of all gradients of the policy's tensors; None unless `Policy.needs` asks.
        weight_norms: float64 [n], L2 norm of each element's parameter; None unless `Policy.needs` asks.
    """

    norms: Tensor
    numel: Tensor
    t: Tensor
    steps_done: int = 0
    global_norm: Tensor | None = None
    weight_norms: Tensor | None = None


class Policy:
    """Base class of the clipping rules. A policy knows nothing of ranks, names or processes.

    A subclass is a frozen dataclass whose fields are its hyper-parameters. It must define `step`; everything else has a
    default that is right for most rules. `GradClipper` tries each policy out when it is constructed, and refuses one that
    would fail later. docs/policies.md walks through a complete policy.

    Attributes:
        scope: what one element is. A subclass may set it for the class or declare it as a field.
        nan_slots: names of the state's slots in which NaN is a value. Elsewhere a NaN is an error.
        post_max_norm: threshold of a global clip of what the rule has scaled, None for none. The policy's gradients are
            then clipped at this norm of all of them, ``N' = sqrt(sum (scale_i n_i)^2)``. Where the scales differ, this
            costs a collective on every step across pipeline stages and, with scope "shard", over the norm groups.

    Example:
        >>> import dataclasses, dist_clip
        >>> @dataclasses.dataclass(frozen=True)
        ... class Fixed(dist_clip.Policy):
        ...     max_norm: float = 1.0
        ...
        ...     def step(self, state, inputs):
        ...         return (self.max_norm / (inputs.norms + 1e-6)).clamp(max=1.0), state
        >>> clipper = dist_clip.GradClipper(torch.nn.Linear(2, 2), Fixed())
    """

    scope: Scope = "tensor"
    nan_slots: tuple[str, ...] = ()
    post_max_norm: float | None = None

    @property
    def elements(self) -> Elements:
        """What `scope` means."""
        return ELEMENTS[self.scope]

    def init_state(self, n: int, device: torch.device) -> State:
        """Return the state of `n` elements before anything was observed: tensors of shape [n] or [k, n] on `device`."""
        return {}

    def slots_after(self, step: int) -> tuple[str, ...]:
        """Return the slots that a checkpoint needs after `step` steps; by default all.

        A rule may leave out what only its warm-up records, once the warm-up is over.
        """
        return tuple(self.init_state(1, torch.device("cpu")))

    def needs(self, step: int) -> Collection[Need]:
        """Return what step number `step` (from 1) must have measured beside the norms: of "global_norm", "weight_norms".

        With scope "global" the global norm is the one element's norm and need not be asked for. Where steps may be
        skipped, the host does not know a step's number and measures what the first step needs as well.
        """
        return ()

    def one_scale(self, step: int) -> bool:
        """Return whether step number `step` (from 1) scales all elements alike, as a global warm-up does.

        The global norm after clipping then follows from the one before it and costs no collective. With scope "global"
        there is one scale in any case.
        """
        return False

    def step(self, state: State, inputs: StepInputs) -> tuple[Tensor, State]:
        """Decide one step. Pure: it changes no argument and never syncs the host.

        Args:
            state: what `init_state` or the step before returned.
            inputs: what was measured.

        Returns:
            The scales, float64 [n], at most 1 (NaN or 0 where a norm is NaN or Inf, as the formula gives it), and the new
            state. A slot that the new state lacks is dropped for good.
        """
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """Return name and hyper-parameters as JSON has them, for checkpoints and for comparing ranks."""
        return {"policy": type(self).__name__, **{f.name: _plain(getattr(self, f.name)) for f in _fields(self)}}


def _fields(policy: Policy) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(policy)  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    """`value` as JSON gives it back, where tuples are lists: a state then compares equal when it is loaded."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def is_finite(norms: Tensor) -> Tensor:
    """Bool: which norms (non-negative, so one comparison does) are neither NaN nor Inf."""
    return norms < math.inf


def is_nonfinite(norms: Tensor) -> Tensor:
    # Not ``~``: Python's operators on fake CUDA tensors need a CUDA build, and fakes are how host syncs are tested for.
    return torch.logical_not(is_finite(norms))


def observed(norms: Tensor) -> Tensor:
    """Return, as bool [n], which norms may enter a state: a zero norm means no gradient, NaN and Inf are faults.

    Example:
        >>> observed(torch.tensor([2.0, 0.0, float("nan")])).tolist()
        [True, False, False]
    """
    return is_finite(norms) & (norms > 0)


def global_clip_scale(max_norm: float, global_norm: Tensor) -> Tensor:
    """GlobalGC: ``min(1, max_norm / (N + 1e-6))``, the formula of ``torch.nn.utils.clip_grad_norm_``."""
    return torch.clamp(max_norm / (global_norm + 1e-6), max=1.0)
