"""The trial of a guard at construction, which raises for what would go wrong at a later step or at a restart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from dist_clip.guards.base import IN_A_ROW, Guard, GuardInputs, GuardNeed, check_patience
from dist_clip.policies.base import State
from dist_clip.policies.trial import (
    NORMS,
    check_config,
    check_declared,
    check_pair,
    check_same_kind,
    check_unchanged,
    checked_first_state,
)

_CPU = torch.device("cpu")
_LOSSES = (2.0, float("nan"), 0.0, float("inf"), -1.0)


def checked_guards(guards: object) -> tuple[Guard, ...]:
    """Return what ``guard=`` was given, a guard, several or None, as a tuple of guards that keep the contract.

    Raises:
        TypeError, ValueError: another type, or a guard that breaks the contract; the message names the fault.
    """
    if guards is None:
        return ()
    several = list(guards) if isinstance(guards, Sequence) and not isinstance(guards, str) else [guards]
    return tuple(check_guard(guard) for guard in several)


def check_guard(guard: object) -> Guard:
    """Return `guard` if it keeps the contract of `Guard`.

    Raises:
        TypeError, ValueError: it breaks the contract; the message names the guard, the fault and the remedy.
    """
    if not isinstance(guard, Guard):
        raise TypeError(f"guard must be a dist_clip guard such as MedianGuard(), or a list of guards, got {guard!r}")
    name = type(guard).__name__
    check_declared(type(guard), name)
    if type(guard).step is Guard.step:
        raise TypeError(f"{name} must define step(self, state, inputs), which decides whether to skip")
    check_patience(guard)
    unknown = sorted(set(guard.needs()) - set(get_args(GuardNeed)))
    if unknown:
        raise ValueError(f"{name}.needs() asks for {unknown}; there are {', '.join(get_args(GuardNeed))}")
    check_config(guard.config(), name)
    with unset_fake_temporarily(), torch.no_grad():
        for n in (3, 0):
            _check_state(guard, name, n)
        _check_steps(guard, name)
    return guard


def _check_state(guard: Guard, name: str, n: int) -> None:
    state = checked_first_state(guard.init_state(n, _CPU), name)
    missing = sorted({*guard.tensor_slots} - set(state))
    if missing or IN_A_ROW in state:
        raise ValueError(
            f"{name}: tensor_slots names {missing}, which init_state lacks"
            if missing
            else f"{name}.init_state: the slot {IN_A_ROW!r} is the clipper's; choose another name"
        )
    for slot, value in state.items():
        if slot in guard.tensor_slots and (value.dim() not in (1, 2) or value.shape[-1] != n):
            raise ValueError(
                f"{name}.init_state({n}, device): slot {slot!r} has shape {list(value.shape)}, not [{n}] or [k, {n}]"
            )
        if slot not in guard.tensor_slots and value.shape != guard.init_state(n + 1, _CPU)[slot].shape:
            raise ValueError(f"{name}.init_state: the shape of slot {slot!r} depends on n: list it in tensor_slots")
        if not bool(value.isfinite().all()):
            raise ValueError(
                f"{name}.init_state: slot {slot!r} starts with NaN or Inf: choose another value for 'nothing observed'"
            )


def _check_steps(guard: Guard, name: str) -> None:
    state = guard.init_state(len(NORMS), _CPU)
    for norms, total, loss in _cases():
        shown = f"{name}, tried out on norms {norms.tolist()}, global norm {float(total)} and loss {float(loss)}"
        before = [(value.clone(), value) for value in (*state.values(), norms, total, loss)]
        tallies = _tallies(guard, shown, state, norms)
        needs = guard.needs()
        inputs = GuardInputs(
            norms,
            torch.tensor(1),
            torch.tensor(0, dtype=torch.int32),
            tallies,
            total if "global_norm" in needs else None,
            loss if "loss" in needs else None,
        )
        try:
            result = guard.step(state, inputs)
        except Exception as error:
            missing = [f for f in get_args(GuardNeed) if f not in needs]
            hint = f" ({' and '.join(missing)} is None, for needs() does not ask for it)" if missing else ""
            raise TypeError(
                f"{shown}, failed in step: {type(error).__name__}: {error}. The contract is step(self, state, inputs) -> "
                f"skip, new state{hint}"
            ) from error
        skip, new = check_pair(result, shown, "skip")
        if not isinstance(skip, Tensor) or skip.shape != () or skip.dtype != torch.bool:
            got = f"{skip.dtype} {list(skip.shape)}" if isinstance(skip, Tensor) else repr(skip)
            raise ValueError(f"{shown}, must return skip as one bool, a tensor of shape [], got {got}")
        check_unchanged(before, shown)
        _check_new_state(shown, state, new)
        state = new


def _tallies(guard: Guard, shown: str, state: State, norms: Tensor) -> Tensor:
    tally = guard.tally(state, norms)
    if not isinstance(tally, Tensor) or tally.dim() != 2 or tally.shape[1] != norms.numel():
        got = list(tally.shape) if isinstance(tally, Tensor) else repr(tally)
        raise ValueError(f"{shown}, must return a tally of shape [k, {norms.numel()}], got {got}")
    return tally.double().sum(dim=1)


def _check_new_state(shown: str, state: State, new: State) -> None:
    if set(new) != set(state):
        raise ValueError(f"{shown}, returned the slots {sorted(new)}, where init_state has {sorted(state)}")
    for slot, value in new.items():
        check_same_kind(slot, value, state[slot], shown)
        if not bool(value.isfinite().all()):
            raise ValueError(
                f"{shown}, put {value.tolist()} into slot {slot!r}: NaN and Inf must not enter the state. Keep the old "
                "value where a norm or the loss is not finite"
            )


def _cases() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the norms, the global norm and the loss of a few steps, non-finite ones and zeros among them."""
    for _ in range(2):
        for total, loss in zip(NORMS, _LOSSES, strict=True):
            norms = torch.tensor(NORMS, dtype=torch.float64, device=_CPU)
            yield norms, torch.tensor(total, dtype=torch.float64), torch.tensor(loss, dtype=torch.float64)
