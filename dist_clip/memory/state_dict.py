"""The state dict of a memory, which users save: keyed by FQN, independent of the layout, checked before it is loaded.

It holds what a snapshot holds (`dist_clip.memory.snapshot`), but its keys do not depend on the step. This is needed
because `torch.distributed.checkpoint` loads into the keys that the clipper has when it loads, which may be at another
step.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_clip.memory.guard_states import (
    checked_guard_states,
    fresh_guard_state,
    guard_states,
    store_guard_states,
)
from dist_clip.memory.memory import Memory, PolicyGroup
from dist_clip.memory.snapshot import (
    FORMAT_VERSION,
    OnMismatch,
    checked_step,
    cleared,
    columns_of,
    fresh,
    policies,
    policies_fit,
    rows_of,
    shard_of,
    take_over,
)
from dist_clip.policies.base import Policy, may_hold

_LAYOUT = "layout"
"""Key, beside a tensor's shards, of how the tensor was cut into them."""

_SHAPES = "shapes"
"""Key, beside the policies, of the shapes of the tensors."""


def state_dict(memory: Memory) -> dict[str, Any]:
    """Return the state of this rank's pipeline stage. Syncs the host.

    Warns if a state has a NaN or Inf that loading would refuse.

    Returns:
        ``{"format_version", "step", "policies", "names", "tensors": {fqn: {slot: value}}, "global": {pattern: {slot:
        value}}, "shards": {fqn: {"layout": text, "k of n": {slot: value}}}}``. "policies" has one line of JSON a rule, and
        one with the tensors' shapes, because older checkpoints would lack a key of their own. "names" has the FQNs of
        the whole model, including those of other pipeline stages. "shards" is for scope "shard". A value is a 0-dim
        CPU tensor or, for a slot that only a warm-up records, a list of numbers, empty once the warm-up is over. With
        guards there is "guards" as well (`dist_clip.memory.guard_states`).

    Raises:
        RuntimeError: a step is under way, of which some tensors are clipped.
    """
    memory.check_between_steps("state_dict")
    step = memory.steps
    tensors: dict[str, dict[str, Any]] = {}
    shared: dict[str, dict[str, Any]] = {}
    shards: dict[str, dict[str, Any]] = {}
    for group in memory.groups:
        values = _listed(group, step)
        if group.one_element:
            shared[group.pattern] = values[0]
            continue
        for i, value in zip(group.indices, values, strict=True):
            tensor = memory.layout.tensors[i]
            if group.per_shard:
                shards[tensor.name] = {_LAYOUT: tensor.cut or tensor.placement, shard_of(tensor): value}
            else:
                tensors[tensor.name] = value
    return {
        "format_version": FORMAT_VERSION,
        "step": step,
        "policies": [*map(json.dumps, policies(memory)), json.dumps({_SHAPES: memory.shapes}, sort_keys=True)],
        "names": sorted({*memory.layout.names, *memory.names_elsewhere}),
        "tensors": tensors,
        "global": shared,
        "shards": shards,
        **guard_states(memory),
    }


def load_state_dict(memory: Memory, loaded: Mapping[str, Any], *, strict: bool = True) -> None:
    """Load what `state_dict` returned, under this layout or another. Nothing changes unless all of it fits.

    Args:
        strict: False warns of missing and unknown tensors and of changed policies, and loads what fits.

    Raises:
        ValueError: the state is damaged or does not fit; the message says where.
    """
    if not isinstance(loaded, Mapping):
        raise ValueError(f"not a state of GradClipper: {type(loaded).__name__}")
    kinds = {"policies": list, "names": list, "tensors": Mapping, "global": Mapping, "shards": Mapping}
    absent = {"format_version", "step", *kinds} - set(loaded)
    if absent:
        raise ValueError(f"not a state of GradClipper: it lacks {sorted(absent)}")
    for key, kind in kinds.items():
        if not isinstance(loaded[key], kind):
            expected = "a list" if kind is list else "a dict"
            raise ValueError(f"the state's {key!r} must be {expected}, got {type(loaded[key]).__name__}")
    if not all(isinstance(name, str) for name in loaded["names"]):
        raise ValueError("the state's 'names' must be strings")
    sections = {key: loaded[key] for key in ("tensors", "global", "shards")}
    step = checked_step(loaded)
    on_mismatch = _refuse if strict else _warn
    lines = [_parsed(line) for line in loaded["policies"]]
    if not policies_fit(memory, [line for line in lines if _SHAPES not in line], on_mismatch):
        take_over(memory, fresh(memory, 0))
        store_guard_states(memory, [fresh_guard_state(held, len(memory.layout)) for held in memory.guards])
        return
    _check_names(memory, loaded["names"], sections, on_mismatch)
    shapes = {name: shape for line in lines for name, shape in line.get(_SHAPES, {}).items()}
    known = set(loaded["names"]) - _check_shapes(memory, shapes, on_mismatch)
    guards = checked_guard_states(memory, loaded, on_mismatch, known)
    take_over(memory, _chosen(memory, step, sections, known))
    store_guard_states(memory, guards)


def carry_over(memory: Memory, saved: Mapping[str, Any], names: set[str]) -> None:
    """Go on from a state dict of the same policies with the tensors of `names`; the others start afresh."""
    guards = checked_guard_states(memory, saved, _refuse, names)
    take_over(memory, _chosen(memory, int(saved["step"]), saved, names))
    store_guard_states(memory, guards)


def _chosen(memory: Memory, step: int, sections: Mapping[str, Mapping[str, Any]], names: set[str]) -> dict[str, Any]:
    """Return this rank's part of a state dict as a snapshot, with fresh states for the elements that it lacks."""
    chosen = fresh(memory, step)
    recut = []
    for group in memory.groups:
        found = {}
        for tensor in (memory.layout.tensors[i] for i in group.indices):
            name = tensor.name
            if group.one_element or name not in names:
                continue
            entry = sections["tensors"].get(name)
            if group.per_shard:
                pieces = sections["shards"].get(name)
                if not isinstance(pieces, Mapping) or pieces.get(_LAYOUT) not in (tensor.cut, tensor.placement):
                    pieces = {}
                entry = pieces.get(chosen["shards"][name])
                if entry is None:
                    recut.append(name)
            if entry is not None:
                found[name] = entry
        chosen["tensors"].update(_unlisted(found, group.policy, step))
        if group.one_element and group.pattern in sections["global"]:
            chosen["global"].update(_unlisted({group.pattern: sections["global"][group.pattern]}, group.policy, step))
    if recut:
        warnings.warn(
            f"scope 'shard': {len(recut)} tensors ({_some(recut)}) are cut into other shards than when the state was saved, "
            "so what their shards remember starts afresh, with their next norm",
            stacklevel=4,
        )
    return chosen


def _parsed(line: Any) -> dict[str, Any]:
    try:
        policy = json.loads(line)
        if isinstance(policy[_SHAPES] if policy.keys() == {_SHAPES} else None, dict):
            return dict(policy)
        return {"pattern": policy["pattern"], "policy": policy["policy"], **policy}
    except (AttributeError, TypeError, ValueError, KeyError):
        raise ValueError(f"the state's policies are damaged: {line!r} is none") from None


def _check_names(
    memory: Memory, names: list[str], sections: Mapping[str, Mapping[str, Any]], on_mismatch: OnMismatch
) -> None:
    mine = {*memory.layout.names, *memory.names_elsewhere}
    # "names" decides which tensors were saved, because a partial load keeps the clipper's own entries for the others.
    unknown = sorted({*names, *sections["tensors"], *sections["shards"]} - mine)
    lost = {group.pattern for group in memory.groups if group.one_element} - set(sections["global"])
    for group in memory.groups:
        if not group.one_element and not group.per_shard:
            lost |= {memory.layout.names[i] for i in group.indices} - set(sections["tensors"])
    missing = sorted((mine - set(names)) | lost)
    if missing or unknown:
        hint = ": were they renamed? Then rename them in the state too" if missing and unknown else ""
        on_mismatch(f"the state does not fit this model: missing {missing}, unknown {unknown}{hint}")


def _check_shapes(memory: Memory, saved: Mapping[str, Any], on_mismatch: OnMismatch) -> set[str]:
    """Return the names of the tensors whose shape is not the saved one. An older state has no shapes."""
    other = {name for name, shape in memory.shapes.items() if name in saved and saved[name] != list(shape)}
    if other:
        some = [f"{name!r} had shape {saved[name]} and has {list(memory.shapes[name])}" for name in sorted(other)]
        more = f" and {len(some) - 3} more" if len(some) > 3 else ""
        on_mismatch(f"the state does not fit this model: {', '.join(some[:3])}{more}")
    return other


def _refuse(message: str) -> None:
    raise ValueError(f"{message}. Pass strict=False to load what fits; the rest starts afresh")


def _warn(message: str) -> None:
    warnings.warn(f"{message}. What fits is loaded, the rest starts afresh", stacklevel=4)


def _lasting(policy: Policy) -> tuple[str, ...]:
    """Return the slots that a checkpoint needs at every step, also after a warm-up."""
    return policy.slots_after(2**62)


def _listed(group: PolicyGroup, step: int) -> list[dict[str, Any]]:
    """Return each element's slots under keys that do not depend on the step.

    Slots that only a warm-up records become lists of numbers, which are empty after it.
    """
    columns = columns_of(group, step)
    _warn_of_nonfinite(group, columns)
    lasting = _lasting(group.policy)
    values: dict[str, Sequence[Any]] = {slot: columns[slot].unbind() for slot in lasting}
    for slot in group.policy.slots_after(0):
        if slot not in lasting:
            column = columns.get(slot)
            n = group.num_elements
            values[slot] = (
                [[] for _ in range(n)] if column is None else column.reshape(n, column.shape[1:].numel()).tolist()
            )
    return rows_of(values, group.num_elements)


def _unlisted(entries: Mapping[str, Any], policy: Policy, step: int) -> dict[str, Any]:
    """Return elements of one policy, each {slot: value}, as they were before `_listed`.

    Raises:
        ValueError: a record is no list of numbers. `take_over` checks everything else.
    """
    unobserved, lasting = cleared(policy, step), _lasting(policy)
    # The record of a warm-up that is over is dropped.
    out: dict[str, Any] = {
        name: {slot: value for slot, value in entry.items() if slot in unobserved or not isinstance(value, list)}
        if isinstance(entry, Mapping)
        else entry
        for name, entry in entries.items()
    }
    for slot, empty in unobserved.items():
        absent: list[float] | None = None if slot in lasting else []
        records = {name: entry.get(slot, absent) for name, entry in entries.items() if isinstance(entry, Mapping)}
        records = {name: record for name, record in records.items() if isinstance(record, list)}
        for record in records.values():
            if not set(map(type, record)) <= {int, float}:
                raise ValueError(f"the state is damaged: {slot} must be a list of numbers, got {record}")
        # The record may be of a warm-up of another length or kind, or of none, so as much of it is loaded as fits.
        rest = empty.flatten().tolist()
        rows = [record[: len(rest)] + rest[len(record) :] for record in records.values()]
        for name, row in zip(records, torch.tensor(rows, dtype=empty.dtype), strict=True):
            out[name][slot] = row.view(empty.shape)
    return out


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")


def _warn_of_nonfinite(group: PolicyGroup, columns: Mapping[str, Tensor]) -> None:
    for slot, column in columns.items():
        if not may_hold(group.policy, slot, column):
            warnings.warn(
                f"the state of {type(group.policy).__name__} for {group.pattern!r} has NaN or Inf in {slot!r}: it is saved, "
                "but will be refused when it is loaded. The policy must keep the old value where dist_clip.observed says so",
                stacklevel=5,
            )
