"""The contract of a policy: pure maths from a vector of norms to a vector of scales, with a small explicit state."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import Tensor

Scope = Literal["tensor", "shard", "global"]
"""What one element of a policy is: a logical tensor, this rank's shard of one, or all tensors of the policy."""


@dataclasses.dataclass(frozen=True)
class Elements:
    """The kind of elements that a scope defines.

    Attributes:
        one: whether all tensors together are one element, whose norm is the global norm.
        per_rank: whether each rank's shards are the elements, which need no reduction and may have different scales.
    """

    one: bool = False
    per_rank: bool = False


ELEMENTS: dict[str, Elements] = {
    "tensor": Elements(),
    "shard": Elements(per_rank=True),
    "global": Elements(one=True),
}
"""Scope -> the kind of its elements."""

Need = Literal["global_norm", "weight_norms"]
"""A measurement that a policy must ask for, because it can cost a collective."""

State = dict[str, Tensor]
"""Slot name -> tensor of shape [n] or [k, n], for n elements."""


@dataclasses.dataclass(frozen=True)
class StepInputs:
    """What a policy sees of one step. Later versions may add fields.

    Attributes:
        norms: float64 [n], L2 norm of each element's gradient before clipping; 0 without a gradient; possibly
            non-finite.
        numel: int64 [n], how many numbers each element has.
        t: int64 0-dim on the device, the number of this step, from 1. Steps that were skipped do not count.
        steps_done: how many steps the host knows to have been taken before this one: at most ``t - 1``, and less where
            steps may be skipped. Use it only to leave out work that is over for good, such as a warm-up.
        global_norm: float64 0-dim, L2 norm of all gradients of the policy's tensors; None unless `Policy.needs` asks.
        weight_norms: float64 [n], L2 norm of each element's parameter; None unless `Policy.needs` asks.

    Example:
        >>> inputs = StepInputs(torch.tensor([3.0, 0.5]).double(), torch.tensor([4, 4]), torch.tensor(1))
        >>> inputs.norms.clamp(max=1.0) / inputs.norms
        tensor([0.3333, 1.0000], dtype=torch.float64)
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
    default that suits most rules. `GradClipper` tries each policy out at its construction, and raises for a policy that
    would fail later. docs/policies.md walks through a complete policy.

    Attributes:
        scope: what one element is. A subclass may set it for the class or declare it as a field.
        nan_slots: names of the state's slots in which NaN is a value. In other slots NaN is an error; Inf is in
            all.
        post_max_norm: threshold, above 0, of a global clip after the rule; None for none. The policy's scaled gradients
            are clipped together, at their norm ``N' = sqrt(sum (scale_i n_i)^2)``. Where the scales differ, this costs
            a collective on every step across pipeline stages and, with scope "shard", over the norm groups.
        guarded: whether guards look at the policy's tensors. False: guards see them as tensors without a gradient.

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
    guarded: bool = True

    @property
    def elements(self) -> Elements:
        """The kind of elements that `scope` defines."""
        return ELEMENTS[self.scope]

    def init_state(self, n: int, device: torch.device) -> State:
        """Return the state of `n` elements before the first step: tensors of shape [n] or [k, n] on `device`.

        By default there is no state.

        Example:
            >>> import dist_clip
            >>> sorted(dist_clip.LogClip().init_state(2, torch.device("cpu")))
            ['count', 'level', 'streak']
        """
        return {}

    def slots_after(self, step: int) -> tuple[str, ...]:
        """Return the names of the slots that a checkpoint needs after `step` steps (from 0); by default all.

        A rule may leave out what only its warm-up records, once the warm-up is over.

        Example:
            >>> import dist_clip
            >>> policy = dist_clip.AdaGC(gamma_init="median", warmup_steps=10)
            >>> policy.slots_after(5), policy.slots_after(10)
            (('gamma', 'history'), ('gamma',))
        """
        return tuple(self.init_state(1, torch.device("cpu")))

    def needs(self, step: int) -> Collection[Need]:
        """Return what step number `step` (from 1) needs beside the norms: "global_norm", "weight_norms"; default none.

        With scope "global" the global norm is the norm of the one element and need not be asked for. Where steps may be
        skipped, the host does not know a step's number, so it also measures what the first step needs.

        Example:
            >>> import dist_clip
            >>> policy = dist_clip.LogClip(warmup_steps=100)
            >>> policy.needs(100), policy.needs(101)
            (('global_norm',), ())
        """
        return ()

    def one_scale(self, step: int) -> bool:
        """Return whether step number `step` (from 1) scales all elements alike, as a global warm-up does; default no.

        The global norm after clipping then follows from the one before it and costs no collective. With scope "global"
        there is one scale in any case.

        Example:
            >>> import dist_clip
            >>> policy = dist_clip.LogClip(warmup_steps=100)
            >>> policy.one_scale(100), policy.one_scale(101)
            (True, False)
        """
        return False

    def step(self, state: State, inputs: StepInputs) -> tuple[Tensor, State]:
        """Compute the scales and the new state of one step. It must change no argument and never sync the host.

        Args:
            state: what `init_state` or the step before returned.
            inputs: what was measured.

        Returns:
            The scales, float64 [n], at most 1 (NaN or 0 where a norm is NaN or Inf, as the formula gives it), and the
            new state. A slot that the new state lacks is dropped for good.

        Raises:
            NotImplementedError: the subclass does not define `step`.

        Example:
            >>> import dist_clip
            >>> inputs = dist_clip.StepInputs(torch.tensor([2.0]).double(), torch.tensor([4]), torch.tensor(1))
            >>> dist_clip.GlobalNorm(1.0).step({}, inputs)
            (tensor([0.5000], dtype=torch.float64), {})
        """
        raise NotImplementedError

    def level(self, state: State) -> Tensor | None:
        """Return each element's usual norm, [n], as the state remembers it (0: nothing yet), for monitors; default None.

        After a step that `one_scale` calls a global warm-up, it may be the usual norm after that clip.

        Example:
            >>> import dist_clip
            >>> policy = dist_clip.LogClip()
            >>> policy.level(policy.init_state(2, torch.device("cpu")))
            tensor([0., 0.])
        """
        return None

    def config(self) -> dict[str, Any]:
        """Return the class name and the hyper-parameters as JSON values, for checkpoints and for comparing ranks.

        Example:
            >>> import dist_clip
            >>> dist_clip.GlobalNorm(0.5).config()
            {'policy': 'GlobalNorm', 'max_norm': 0.5}
        """
        return {"policy": type(self).__name__, **{f.name: plain(getattr(self, f.name)) for f in _fields(self)}}


def may_hold(policy: Policy, slot: str, value: Tensor) -> bool:
    """Return whether `slot` may hold `value` and go into a checkpoint: it is finite, but for NaN in ``nan_slots``."""
    if not value.is_floating_point():
        return True
    fine = value.isfinite() | value.isnan() if slot in policy.nan_slots else value.isfinite()
    return bool(fine.all())


def _fields(policy: Policy) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(policy)  # type: ignore[arg-type]


def plain(value: Any) -> Any:
    """Return `value` as JSON gives it back, with lists for tuples, so that a loaded config compares equal."""
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


def is_finite(norms: Tensor) -> Tensor:
    """Return, as bool [n], which norms are neither NaN nor Inf."""
    return norms < math.inf  # one comparison is enough, because norms are not negative


def is_nonfinite(norms: Tensor) -> Tensor:
    """Return, as bool [n], which norms are NaN or Inf."""
    # Not ``~``: Python's operators on fake CUDA tensors, with which host syncs are tested, need a CUDA build.
    return torch.logical_not(is_finite(norms))


def observed(norms: Tensor) -> Tensor:
    """Return, as bool [n], which norms may enter a state: those that are finite and above 0.

    A zero norm means that there is no gradient, and NaN and Inf are faults.

    Args:
        norms: float [n], not negative, possibly NaN or Inf.

    Example:
        >>> observed(torch.tensor([2.0, 0.0, float("nan")])).tolist()
        [True, False, False]
    """
    return is_finite(norms) & (norms > 0)


def global_clip_scale(max_norm: float, global_norm: Tensor) -> Tensor:
    """Return the scale of GlobalGC, ``min(1, max_norm / (N + 1e-6))``, as in ``torch.nn.utils.clip_grad_norm_``."""
    return torch.clamp(max_norm / (global_norm + 1e-6), max=1.0)
