"""What a policy is: pure maths from a vector of norms to a vector of scales, with a small explicit state."""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any, Literal

import torch
from torch import Tensor

Scope = Literal["tensor", "shard", "global"]
State = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Policy:
    """Base of the policies: a rule, and the scope at which it runs.

    The rule sees `norms` and decides `scales` elementwise. The scope says what an element is: a logical tensor
    ("tensor"), this rank's piece of one ("shard"), or the whole domain ("global", one element, the global norm). A policy
    knows nothing of ranks, names or processes.
    """

    @property
    def rule_scope(self) -> Scope:
        return "global"

    @property
    def post_max_norm(self) -> float | None:
        """Threshold of a global clip of what the rule has scaled; None for none.

        The domain's gradients are clipped at this norm of all of them, ``N' = sqrt(sum (scale_i n_i)^2)``. That is known
        only after the rule, so where the scales differ the pipeline stages (with scope "shard" also the norm groups) are
        asked once more: a collective more, on every step.
        """
        return None

    def init_state(self, n: int, device: torch.device) -> State:
        """State of `n` elements before anything was observed: tensors of shape [n] or [k, n]."""
        return {}

    def slots_after(self, step: int) -> tuple[str, ...]:
        """Names of the state's tensors that decide anything after `step` steps: those that a checkpoint needs."""
        return ()

    def needs_global_norm(self, step: int) -> bool:
        """Whether step number `step` (from 1) cannot be decided without the global norm. Known to the host."""
        return True

    def step(self, state: State, norms: Tensor, global_norm: Tensor | None, t: Tensor) -> tuple[Tensor, State]:
        """Decide one step. Pure: returns the scales and the new state, changes nothing, never syncs the host.

        Args:
            state: as returned by `init_state` or the step before.
            norms: float64 [n], before clipping; 0 where there is no gradient; possibly non-finite.
            global_norm: float64 0-dim, or None where `needs_global_norm` said it is not needed.
            t: int64 0-dim, the number of this step, from 1.

        Returns:
            scales, float64 [n], at most 1 (NaN or 0 where a norm is NaN or Inf, as the formula gives it), and the state.
        """
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """Name and hyper-parameters, for checkpoints and for comparing ranks."""
        return {"policy": type(self).__name__, **dataclasses.asdict(self)}


def is_finite(norms: Tensor) -> Tensor:
    """Bool: which norms (non-negative, so one comparison does) are neither NaN nor Inf."""
    return norms < math.inf


def is_nonfinite(norms: Tensor) -> Tensor:
    # Not ``~``: Python's operators on fake CUDA tensors need a CUDA build, and fakes are how host syncs are tested for.
    return torch.logical_not(is_finite(norms))


def observed(norms: Tensor) -> Tensor:
    """Bool [n]: the norms that may enter a state. A zero norm means no gradient; NaN and Inf are faults."""
    return is_finite(norms) & (norms > 0)


def global_clip_scale(max_norm: float, global_norm: Tensor) -> Tensor:
    """GlobalGC: ``min(1, max_norm / (N + 1e-6))``, the formula of ``torch.nn.utils.clip_grad_norm_``."""
    return torch.clamp(max_norm / (global_norm + 1e-6), max=1.0)


def check_number(
    owner: str, name: str, value: object, low: float, high: float = math.inf, *, open_low: bool = False
) -> None:
    """Raise unless `value` is a real number in [low, high] ((low, high] with `open_low`)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{owner}: {name} must be a number, got {value!r}")
    number = float(value)
    if math.isnan(number) or number > high or number < low or (open_low and number == low):
        upper = "" if math.isinf(high) else f" and at most {high:g}"
        raise ValueError(f"{owner}: {name} must be {'above' if open_low else 'at least'} {low:g}{upper}, got {value!r}")


def check_finite(owner: str, name: str, value: object, low: float, *, open_low: bool = False) -> None:
    """Raise unless `value` is a finite real number of at least `low` (above it with `open_low`)."""
    check_number(owner, name, value, low, open_low=open_low)
    if math.isinf(float(value)):  # type: ignore[arg-type]
        raise ValueError(f"{owner}: {name} must be finite, got {value!r}")


def check_fraction(owner: str, name: str, value: object) -> None:
    """Raise unless `value` is a real number in [0, 1), as the decay of a moving average has to be."""
    check_number(owner, name, value, 0.0, 1.0)
    if float(value) == 1.0:  # type: ignore[arg-type]
        raise ValueError(f"{owner}: {name} must be below 1 (at 1 the average would never move), got {value!r}")


def check_count(owner: str, name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: {name} must be an int, got {value!r}")
    if value < low:
        raise ValueError(f"{owner}: {name} must be at least {low}, got {value!r}")


def check_choice(owner: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{owner}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
