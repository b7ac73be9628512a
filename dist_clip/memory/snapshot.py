"""The snapshot of a memory: for each element, the slots that later steps depend on. Checked before it is loaded."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_clip.layouts.layout import LogicalTensor
from dist_clip.layouts.process_groups import current_rank
from dist_clip.memory.guard_states import checked_guard_states, guard_states, store_guard_states
from dist_clip.memory.memory import Memory, PolicyGroup
from dist_clip.policies.base import Policy, State, may_hold

FORMAT_VERSION = 2
_READABLE = (1, 2)
"""Version 1 differs in Megatron's checkpoints (`dist_clip.megatron.checkpoint`), and has fewer hyper-parameters."""

OnMismatch = Callable[[str], None]
"""Called with a message if a state does not fit; raises or warns."""


def snapshot(memory: Memory) -> dict[str, Any]:
    """Return the memory as a snapshot, with copies of the states on the CPU. Syncs the host.

    Returns:
        ``{"format_version", "step", "policies", "tensors": {fqn: {slot: tensor}}, "global": {pattern: {slot: tensor}},
        "shards": {fqn: "k of n"}}``. "shards" has the tensors under scope "shard", whose state belongs to one shard. With
        guards there is their part as well (`guard_states`).
    """
    step = memory.steps
    taken = _assembled(memory, step, lambda group: rows_of(_unbound(columns_of(group, step)), group.num_elements))
    return {**taken, **guard_states(memory)}


def restore(memory: Memory, loaded: Mapping[str, Any]) -> None:
    """Load a snapshot of the same policies. One that does not fit changes nothing.

    Raises:
        ValueError: the snapshot does not fit; the message says where.
    """
    policies_fit(memory, list(loaded["policies"]), _mismatch)
    guards = checked_guard_states(memory, loaded, _mismatch)
    take_over(memory, loaded)
    store_guard_states(memory, guards)


def cleared(policy: Policy, step: int) -> dict[str, Tensor]:
    """Return the state of one element without observations, as a snapshot has it after `step` steps."""
    state = policy.init_state(1, torch.device("cpu"))
    return {slot: state[slot][..., 0] for slot in policy.slots_after(step)}


def fresh(memory: Memory, step: int) -> dict[str, Any]:
    """Return the snapshot of a clipper without observations after `step` steps."""
    return _assembled(memory, step, lambda group: [cleared(group.policy, step)] * group.num_elements)


def _assembled(
    memory: Memory, step: int, elements: Callable[[PolicyGroup], Sequence[Mapping[str, Tensor]]]
) -> dict[str, Any]:
    """Return the snapshot whose elements are those that `elements` returns for each group."""
    tensors: dict[str, Mapping[str, Tensor]] = {}
    shared: dict[str, Mapping[str, Tensor]] = {}
    shards: dict[str, str] = {}
    for group in memory.groups:
        if group.one_element:
            (shared[group.pattern],) = elements(group)
            continue
        for i, element in zip(group.indices, elements(group), strict=True):
            tensor = memory.layout.tensors[i]
            tensors[tensor.name] = element
            if group.per_shard:
                shards[tensor.name] = shard_of(tensor)
    frame = {"format_version": FORMAT_VERSION, "step": step, "policies": policies(memory)}
    return {**frame, "tensors": tensors, "global": shared, "shards": shards}


def take_over(memory: Memory, loaded: Mapping[str, Any]) -> None:
    """Check the states of a snapshot, whose policies must fit, and copy them into `memory`.

    Raises:
        ValueError: the states do not fit; then nothing has changed.
    """
    step = checked_step(loaded)
    states: list[State] = []
    expected: set[str] = set()
    for group in memory.groups:
        slots = group.policy.slots_after(step)
        if group.one_element:
            found = {f"global {group.pattern!r}": loaded["global"].get(group.pattern)}
        else:
            tensors = [memory.layout.tensors[i] for i in group.indices]
            expected |= {tensor.name for tensor in tensors}
            if not expected <= set(loaded["tensors"]):
                continue  # the error below names all missing tensors
            found = {repr(tensor.name): loaded["tensors"][tensor.name] for tensor in tensors}
            if group.per_shard:
                _check_shards(tensors, loaded["shards"])
        # A fresh state, because the clipper may have dropped its warm-up's record, which the loaded state may have.
        state = group.fresh_state()
        _fill(group.policy, state, slots, found)
        states.append(state)
    missing = sorted(expected - set(loaded["tensors"]))
    # Under pipeline parallelism the snapshot may hold the whole model, of which each stage loads its part.
    unknown = sorted(set(loaded["tensors"]) - expected - memory.names_elsewhere)
    if missing or unknown:
        raise ValueError(f"the state does not fit this model: missing {missing}, unknown {unknown}")
    for group, state in zip(memory.groups, states, strict=True):
        for slot, value in state.items():
            if slot in group.state:
                value = group.state[slot].copy_(value)  # in place: its memory never moves
            group.state[slot] = value
    memory.set_steps(step)


def _check_shards(tensors: Sequence[LogicalTensor], shards: Mapping[str, str]) -> None:
    for tensor in tensors:
        if shards.get(tensor.name) != shard_of(tensor):
            raise ValueError(
                f"with scope 'shard' the state of {tensor.name!r} belongs to shard {shards.get(tensor.name)}, but this "
                f"rank holds shard {shard_of(tensor)}: load each rank's own state under the layout that made it"
            )


def policies_fit(memory: Memory, saved: Sequence[Mapping[str, Any]], on_mismatch: OnMismatch) -> bool:
    """Return whether the saved policies have the same rules, patterns and scopes as those of `memory`.

    Calls `on_mismatch` if they have not, and if only hyper-parameters differ, which counts as fitting.
    """
    mine = policies(memory)
    if len(saved) == len(mine):
        # A hyper-parameter that is newer than the saved policy had the effect of its default.
        saved = [
            {**_defaults(group.policy), **old} if old.get("policy") == new["policy"] else old
            for group, old, new in zip(memory.groups, saved, mine, strict=True)
        ]
    if [_kind(policy) for policy in saved] != [_kind(policy) for policy in mine]:
        on_mismatch(f"the state was made by other policies: it has {list(saved)}, the clipper {mine}")
        return False
    changed = [
        f"{key} was {old.get(key)!r} and is {new.get(key)!r} (for {new['pattern']!r})"
        for old, new in zip(saved, mine, strict=True)
        for key in sorted(old.keys() | new.keys())
        if json.dumps(old.get(key)) != json.dumps(new.get(key))
    ]
    if changed:
        on_mismatch(f"the state was made by other policies: {', '.join(changed)}")
    return True


def _defaults(policy: Policy) -> dict[str, Any]:
    fields = dataclasses.fields(policy)  # type: ignore[arg-type]
    names = {f.name for f in fields if f.default is not dataclasses.MISSING}
    plain = type(policy)(**{f.name: getattr(policy, f.name) for f in fields if f.init and f.name not in names}).config()
    return {name: plain[name] for name in names if name in plain}


def _kind(policy: Mapping[str, Any]) -> tuple[Any, ...]:
    return policy.get("pattern"), policy.get("policy"), policy.get("scope")


def _mismatch(message: str) -> None:
    raise ValueError(message)


def checked_step(loaded: Mapping[str, Any]) -> int:
    """Return the snapshot's step.

    Raises:
        ValueError: an unknown format version, or a step that is no int of at least 0.
    """
    if loaded["format_version"] not in _READABLE:
        raise ValueError(
            f"the state has format version {loaded['format_version']!r}; this dist_clip reads versions "
            f"{' and '.join(map(str, _READABLE))}"
        )
    step = loaded["step"]
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"the state's step must be an int of at least 0, got {step!r}")
    return step


def policies(memory: Memory) -> list[dict[str, Any]]:
    """Return the pattern and the config of each policy group."""
    return [{"pattern": group.pattern, **group.policy.config()} for group in memory.groups]


def shard_of(tensor: LogicalTensor) -> str:
    """Return which piece of the tensor this rank holds, as "k of n", k from 0."""
    ranks = sorted(tensor.replica_ranks)
    position = ranks.index(current_rank()) if len(ranks) > 1 else 0
    return f"{position} of {len(ranks)}"


def columns_of(group: PolicyGroup, step: int) -> dict[str, Tensor]:
    """Return the slots that a checkpoint needs after `step` steps, copied to the CPU, with one row an element.

    This takes a few operators a slot, whatever the number of elements.
    """
    return {
        slot: group.state[slot].detach().movedim(-1, 0).to("cpu", copy=True, memory_format=torch.contiguous_format)
        for slot in group.policy.slots_after(step)
    }


def _unbound(columns: Mapping[str, Tensor]) -> dict[str, Sequence[Tensor]]:
    return {slot: column.unbind() for slot, column in columns.items()}


def rows_of(values: Mapping[str, Sequence[Any]], n: int) -> list[dict[str, Any]]:
    """Return [{slot: value}] for n elements from {slot: [value of each element]}."""
    return [{slot: column[k] for slot, column in values.items()} for k in range(n)]


def _fill(policy: Policy, state: State, slots: Sequence[str], elements: Mapping[str, Any]) -> None:
    """Copy `elements`, {where: {slot: tensor}}, into the columns of `state`.

    Raises:
        ValueError: wrong slots, shapes or values; the message says where.
    """
    for where, element in elements.items():
        if not isinstance(element, Mapping) or set(element) != set(slots):
            has = sorted(element) if isinstance(element, Mapping) else element
            raise ValueError(f"the state of {where} has {has}, expected {sorted(slots)}")
        for slot, value in element.items():
            shape = tuple(state[slot].shape[:-1])
            if not isinstance(value, Tensor) or tuple(value.shape) != shape:
                got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise ValueError(f"the state of {where} has {slot} of {got}, expected a tensor of shape {list(shape)}")
    if not elements:
        return
    for slot in slots:
        column = torch.stack(
            [value if (value := element[slot]).is_cpu else value.cpu() for element in elements.values()]
        )
        if not may_hold(policy, slot, column):
            where, value = next(
                (where, element[slot])
                for where, element in elements.items()
                if not may_hold(policy, slot, element[slot])
            )
            allowed = "finite or NaN" if slot in policy.nan_slots else "finite"
            raise ValueError(f"the state of {where} has {slot} = {value.tolist()}: it must be {allowed}")
        state[slot].copy_(column.movedim(0, -1))
