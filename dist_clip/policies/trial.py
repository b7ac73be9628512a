"""The trial of a policy at construction, which raises for what would go wrong at a later step or at a restart."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from dist_clip.policies.base import Need, Policy, Scope, State, StepInputs, may_hold
from dist_clip.policies.check import check_frozen_dataclass, check_number

_CPU = torch.device("cpu")
NORMS = (1.0, 0.0, float("nan"), float("inf"), 3.0)
"""The norms on which policies and guards are tried out."""
_LATE = 10**9  # a step by which every warm-up is over


def check_policy(policy: object, argument: str = "policy") -> Policy:
    """Return `policy` if it keeps the contract of `Policy`.

    Args:
        argument: how the user passed it, for the error.

    Raises:
        TypeError, ValueError: it breaks the contract; the message names the policy, the fault and the remedy.
    """
    if not isinstance(policy, Policy):
        raise TypeError(f"{argument} must be a dist_clip policy such as LogClip(), got {policy!r}")
    name = type(policy).__name__
    _check_class(policy, name)
    check_config(policy.config(), name)
    with unset_fake_temporarily(), torch.no_grad():
        _check_state(policy, name)
        _check_steps(policy, name)
    return policy


def acts_on_each_alone(policy: Policy) -> bool:
    """Return whether the policy, after any warm-up, gives each element the same bits whatever the other elements are."""
    with unset_fake_temporarily(), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        together, few = policy.init_state(5, _CPU), torch.tensor([3, 1])
        for step in range(4):
            norms, weights = torch.rand(2, 5, dtype=torch.float64, generator=generator).unbind()
            inputs = StepInputs(
                norms=norms * 10 ** (step % 2),
                numel=torch.full((5,), 4),
                t=torch.tensor(_LATE + step + 1),
                steps_done=_LATE + step,
                global_norm=norms.norm() if "global_norm" in policy.needs(_LATE) else None,
                weight_norms=weights if "weight_norms" in policy.needs(_LATE) else None,
            )
            fewer = dataclasses.replace(
                inputs,
                norms=inputs.norms[few],
                numel=inputs.numel[few],
                weight_norms=None if inputs.weight_norms is None else weights[few],
            )
            scales, new = policy.step({slot: value[..., few] for slot, value in together.items()}, fewer)
            all_scales, together = policy.step(together, inputs)
            if not torch.equal(scales, all_scales[few]):
                return False
            if not all(torch.equal(value, together[slot][..., few]) for slot, value in new.items()):
                return False
    return True


def check_declared(cls: type, name: str) -> None:
    """Raise TypeError unless `cls` is a frozen dataclass, and itself one if it declares fields."""
    check_frozen_dataclass(cls)
    undeclared = sorted(set(inspect.get_annotations(cls)) - {f.name for f in dataclasses.fields(cls)})
    if undeclared and "__dataclass_params__" not in cls.__dict__:
        raise TypeError(
            f"{name} derives from a dataclass but is none itself, so {', '.join(undeclared)} is no field of it: decorate it "
            "with @dataclasses.dataclass(frozen=True)"
        )


def _check_class(policy: Policy, name: str) -> None:
    check_declared(type(policy), name)
    if type(policy).step is Policy.step:
        raise TypeError(f"{name} must define step(self, state, inputs), which decides the scales")
    if policy.scope not in get_args(Scope):
        raise ValueError(f"{name}: scope must be one of {', '.join(map(repr, get_args(Scope)))}, got {policy.scope!r}")
    if policy.post_max_norm is not None:
        check_number(name, "post_max_norm", policy.post_max_norm, 0.0, open_low=True)
    if not isinstance(policy.guarded, bool):
        raise TypeError(f"{name}: guarded must be a bool, got {policy.guarded!r}")
    for step in (1, _LATE):
        unknown = sorted(set(policy.needs(step)) - set(get_args(Need)))
        if unknown:
            raise ValueError(f"{name}.needs({step}) asks for {unknown}; there are {', '.join(get_args(Need))}")


def check_config(config: Mapping[str, Any], name: str) -> None:
    """Raise TypeError unless JSON can store the hyper-parameters of a policy's or guard's `config`."""
    for key, value in config.items():
        try:
            same = json.loads(json.dumps(value)) == value or value != value
        except (TypeError, ValueError):
            same = False
        if not same:
            raise TypeError(
                f"{name}: the hyper-parameter {key} = {value!r} cannot be saved: JSON has no {type(value).__name__}; use "
                "numbers, strings, bools, None, and lists or dicts (with string keys) of them"
            )


def checked_first_state(state: object, name: str) -> State:
    """Return what `init_state` of a policy or guard returned on the CPU, if it is a dict of real tensors there.

    Raises:
        TypeError, ValueError: it is not.
    """
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise TypeError(f"{name}.init_state must return a dict of tensors, got {state!r}")
    for slot, value in state.items():
        if value.is_complex() or value.device.type != "cpu":
            raise ValueError(
                f"{name}.init_state: slot {slot!r} is {value.dtype} on {value.device}; it must be real and on the device "
                "that init_state is given"
            )
    return state


def check_unchanged(before: Sequence[tuple[Tensor, Tensor]], shown: str) -> None:
    """Raise ValueError if any of the (copy from before the step, argument) pairs differ."""
    if not all(torch.equal(old.nan_to_num(), now.nan_to_num()) for old, now in before):
        raise ValueError(f"{shown}, changed an argument in place: it must return a new state and leave the old")


def check_same_kind(slot: str, value: object, old: Tensor, shown: str) -> None:
    """Raise ValueError unless the new `value` of a slot is a tensor of the shape and dtype of the old."""
    if not isinstance(value, Tensor) or value.shape != old.shape or value.dtype != old.dtype:
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{shown}, made slot {slot!r} {got}, where init_state has {old.dtype} {list(old.shape)}")


def check_pair(result: object, shown: str, first: str) -> tuple[object, State]:
    """Return what a step returned, if it is (`first`, new state).

    Raises:
        TypeError: it is not.
    """
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], dict):
        raise TypeError(f"{shown}, must return ({first}, new state), got {type(result).__name__}")
    return result


def _check_state(policy: Policy, name: str) -> None:
    for n in (3, 0):
        state = checked_first_state(policy.init_state(n, _CPU), name)
        for slot, value in state.items():
            if value.dim() not in (1, 2) or value.shape[-1] != n:
                raise ValueError(
                    f"{name}.init_state({n}, device): slot {slot!r} has shape {list(value.shape)}, not [{n}] or [k, {n}]"
                )
            if not may_hold(policy, slot, value):
                raise ValueError(
                    f"{name}.init_state: slot {slot!r} starts with NaN or Inf: choose another value for 'nothing observed', "
                    f"or list it in nan_slots = ({slot!r},) if NaN is a value"
                )
    slots = set(policy.init_state(1, _CPU))
    for step in (0, _LATE):
        unknown = sorted(set(policy.slots_after(step)) - slots)
        if unknown:
            raise ValueError(f"{name}: slots_after({step}) names {unknown}; the state has {sorted(slots)}")


def _check_steps(policy: Policy, name: str) -> None:
    for state, inputs in _cases(policy):
        before = _copies(state, inputs)
        shown = f"{name}.step, tried out on norms {inputs.norms.tolist()} as step {int(inputs.t)}"
        try:
            result = policy.step(state, inputs)
        except Exception as error:
            missing = [f for f in get_args(Need) if getattr(inputs, f) is None]
            hint = f" ({' and '.join(missing)} is None, for needs() does not ask for it)" if missing else ""
            raise TypeError(
                f"{shown}, failed: {type(error).__name__}: {error}. The contract is step(self, state, inputs) -> scales, "
                f"new state{hint}"
            ) from error
        scales, new = check_pair(result, shown, "scales")
        if not isinstance(scales, Tensor) or scales.shape != inputs.norms.shape or not scales.is_floating_point():
            got = f"{scales.dtype} {list(scales.shape)}" if isinstance(scales, Tensor) else repr(scales)
            raise ValueError(f"{shown}, must return one float scale an element, [{len(inputs.norms)}], got {got}")
        check_unchanged(before, shown)
        if inputs.steps_done == int(inputs.t) - 1 and policy.one_scale(int(inputs.t)) and len(set(scales.tolist())) > 1:
            raise ValueError(f"{shown}, scaled elements differently, against what one_scale({int(inputs.t)}) says")
        _check_new_state(policy, shown, state, new)
        # The clipper drops the slots that a step leaves out, so the trial drops them too.
        state.clear()
        state.update(new)


def _check_new_state(policy: Policy, shown: str, state: State, new: State) -> None:
    for slot, value in new.items():
        old = state.get(slot)
        if old is None:
            raise ValueError(f"{shown}, returned slot {slot!r}, which init_state lacks or an earlier step dropped")
        check_same_kind(slot, value, old, shown)
        if not may_hold(policy, slot, value):
            raise ValueError(
                f"{shown}, put {value.tolist()} into slot {slot!r}: NaN and Inf must not enter the state. Keep the old "
                f"value where dist_clip.observed(norms) is false, or list the slot in nan_slots if NaN (not Inf) is a value"
            )


def _cases(policy: Policy) -> Iterator[tuple[State, StepInputs]]:
    """Yield the state and inputs of steps 1 and 2, of a late step whose number the host does not know, and of the next.

    The host knows the number of the last one. All steps share one state, into which the caller puts the result.
    """
    several = [(norm,) for norm in NORMS] if policy.elements.one else [NORMS]
    for norms in several:
        n = len(norms)
        state = dict(policy.init_state(n, _CPU))
        for t, steps_done in ((1, 0), (2, 1), (_LATE, 1), (_LATE + 1, _LATE)):
            needs = {*policy.needs(steps_done + 1), *(() if steps_done == t - 1 else policy.needs(1))}
            values = torch.tensor(norms, dtype=torch.float64, device=_CPU)
            yield (
                state,
                StepInputs(
                    norms=values,
                    numel=torch.full((n,), 4, dtype=torch.int64, device=_CPU),
                    t=torch.tensor(t, device=_CPU),
                    steps_done=steps_done,
                    global_norm=torch.tensor(5.0, dtype=torch.float64, device=_CPU) if "global_norm" in needs else None,
                    weight_norms=torch.ones_like(values) if "weight_norms" in needs else None,
                ),
            )


def _copies(state: State, inputs: StepInputs) -> list[tuple[Tensor, Tensor]]:
    tensors: list[Any] = [
        *state.values(),
        inputs.norms,
        inputs.numel,
        inputs.t,
        inputs.global_norm,
        inputs.weight_norms,
    ]
    return [(tensor.clone(), tensor) for tensor in tensors if tensor is not None]
