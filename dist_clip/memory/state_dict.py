"""The memory as plain data: keyed by FQN, free of the layout, checked before anything is loaded.

Two forms. A *snapshot* has, for each element, the slots that decide anything from here on. A *state dict*, which users
save, has the same under keys that do not depend on the step: `torch.distributed.checkpoint` loads into the keys that
the clipper has at that time, which may be at another step than the one that was saved.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_clip.layouts.layout import LogicalTensor
from dist_clip.layouts.process_groups import current_rank
from dist_clip.memory.memory import Memory, PolicyGroup
from dist_clip.policies.base import Policy, State

FORMAT_VERSION = 2
_READABLE = (1, 2)
"""Version 1 differs in Megatron's checkpoints (`dist_clip.megatron.checkpoint`), and knew fewer hyper-parameters."""

_LAYOUT = "layout"
"""Key, beside a tensor's shards, of how the tensor was cut into them."""

OnMismatch = Callable[[str], None]
"""What is done about a state that does not fit: raise, or warn."""


# ---------------------------------------------------------------------------------------------------------- state dicts


def state_dict(memory: Memory) -> dict[str, Any]:
    """Return ``{"format_version", "step", "policies", "names", "tensors": {fqn: {slot: value}}, "global": {pattern:
    {slot: value}}, "shards": {fqn: {"layout": text, "k of n": {slot: value}}}}``.

    `policies` are lines of JSON, one a rule; `names` are the FQNs of the whole model, those of other pipeline stages
    included. `shards` is for scope "shard". A value is a 0-dim CPU tensor, or, for what only a warm-up records, a list of
    numbers, empty once the warm-up is over.
    """
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
                shards[tensor.name] = {_LAYOUT: tensor.placement, _shard_of(tensor): value}
            else:
                tensors[tensor.name] = value
    return {
        "format_version": FORMAT_VERSION,
        "step": step,
        "policies": [json.dumps(policy) for policy in _policies(memory)],
        "names": sorted({*memory.layout.names, *memory.names_elsewhere}),
        "tensors": tensors,
        "global": shared,
        "shards": shards,
    }


def load_state_dict(memory: Memory, loaded: Mapping[str, Any], *, strict: bool = True) -> None:
    """Load what `state_dict` made, under this layout or another. Nothing changes unless all of it fits."""
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
    step = _checked_step(loaded)
    on_mismatch = _refuse if strict else _warn
    if not _policies_fit(memory, [_parsed(line) for line in loaded["policies"]], on_mismatch):
        _take_over(memory, _fresh(memory, 0))
        return
    _check_names(memory, loaded["names"], sections, on_mismatch)
    _take_over(memory, _chosen(memory, step, sections, set(loaded["names"])))


def _chosen(memory: Memory, step: int, sections: Mapping[str, Mapping[str, Any]], names: set[str]) -> dict[str, Any]:
    """Return this rank's part of a state dict as a snapshot, with a fresh state for what the state dict lacks."""
    chosen = _fresh(memory, step)
    recut = []
    for tensor in memory.layout:
        name = tensor.name
        if name not in names:
            continue
        entry = sections["tensors"].get(name)
        if name in chosen["shards"]:
            pieces = sections["shards"].get(name)
            if not isinstance(pieces, Mapping) or pieces.get(_LAYOUT) != tensor.placement:
                pieces = {}
            entry = pieces.get(chosen["shards"][name])
            if entry is None:
                recut.append(name)
        if entry is not None:
            chosen["tensors"][name] = _unlisted(entry, memory.policy_for(name), chosen["tensors"][name])
    for group in memory.groups:
        if group.one_element and group.pattern in sections["global"]:
            entry = sections["global"][group.pattern]
            chosen["global"][group.pattern] = _unlisted(entry, group.policy, chosen["global"][group.pattern])
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
        return {"pattern": policy["pattern"], "policy": policy["policy"], **policy}
    except (TypeError, ValueError, KeyError):
        raise ValueError(f"the state's policies are damaged: {line!r} is none") from None


def _policies_fit(memory: Memory, saved: Sequence[Mapping[str, Any]], on_mismatch: OnMismatch) -> bool:
    """Whether the state is of the same rules for the same patterns; changed hyper-parameters are a mismatch that fits."""
    mine = _policies(memory)
    if len(saved) == len(mine):
        # A hyper-parameter that the policy did not have yet had the effect of its default.
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


def _check_names(
    memory: Memory, names: list[str], sections: Mapping[str, Mapping[str, Any]], on_mismatch: OnMismatch
) -> None:
    mine = {*memory.layout.names, *memory.names_elsewhere}
    # The names decide: a partial load leaves entries that were in the clipper before it.
    unknown = sorted({*names, *sections["tensors"], *sections["shards"]} - mine)
    lost = {group.pattern for group in memory.groups if group.one_element} - set(sections["global"])
    for group in memory.groups:
        if not group.one_element and not group.per_shard:
            lost |= {memory.layout.names[i] for i in group.indices} - set(sections["tensors"])
    missing = sorted((mine - set(names)) | lost)
    if missing or unknown:
        hint = ": were they renamed? Then rename them in the state too" if missing and unknown else ""
        on_mismatch(f"the state does not fit this model: missing {missing}, unknown {unknown}{hint}")


def _refuse(message: str) -> None:
    raise ValueError(f"{message}. Pass strict=False to load what fits; the rest starts afresh")


def _warn(message: str) -> None:
    warnings.warn(f"{message}. What fits is loaded, the rest starts afresh", stacklevel=4)


def _lasting(policy: Policy) -> tuple[str, ...]:
    """Slots of every step, also of those after a warm-up."""
    return policy.slots_after(2**62)


def _listed(group: PolicyGroup, step: int) -> list[dict[str, Any]]:
    """Each element's slots under keys that do not depend on the step: what only a warm-up records is a list of numbers."""
    columns = _columns(group, step)
    _warn_of_nonfinite(group, columns)
    lasting = _lasting(group.policy)
    values: dict[str, Sequence[Any]] = {slot: columns[slot].unbind() for slot in lasting}
    for slot in group.policy.slots_after(0):
        if slot not in lasting:
            column = columns.get(slot)
            n = group.num_elements
            values[slot] = [[] for _ in range(n)] if column is None else column.reshape(n, -1).tolist()
    return _rows(values, group.num_elements)


def _unlisted(entry: Any, policy: Policy, fresh: Mapping[str, Tensor]) -> Any:
    """The inverse of `_listed` for one element, for a clipper that needs the slots of `fresh`. `_fill` checks the rest."""
    if not isinstance(entry, Mapping):
        return entry
    # A record that this clipper has no use for, because its warm-up is over, is dropped.
    out = {slot: value for slot, value in entry.items() if slot in fresh or not isinstance(value, list)}
    for slot, empty in fresh.items():
        record = entry.get(slot, None if slot in _lasting(policy) else [])
        if isinstance(record, list):
            # Also of a warm-up of another length or kind, or over: as much of it as there is.
            if not all(isinstance(value, (int, float)) for value in record):
                raise ValueError(f"the state is damaged: {slot} must be a list of numbers, got {record}")
            rows = torch.tensor(record[: empty.numel()], dtype=empty.dtype)
            out[slot] = torch.cat([rows, empty.reshape(-1)[len(rows) :]]).view(empty.shape)
    return out


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")


# ------------------------------------------------------------------------------------------------------------ snapshots


def snapshot(memory: Memory) -> dict[str, Any]:
    """Return ``{"format_version", "step", "policies", "tensors": {fqn: {slot: tensor}}, "global": {pattern: {slot:
    tensor}}, "shards": {fqn: "k of n"}}``, the last for tensors under scope "shard", whose state belongs to one shard."""
    step = memory.steps
    return _assembled(memory, step, lambda group: _rows(_unbound(_columns(group, step)), group.num_elements))


def restore(memory: Memory, loaded: Mapping[str, Any]) -> None:
    """Load a snapshot of the same policies. Check everything, then copy: one that does not fit changes nothing."""
    _policies_fit(memory, list(loaded["policies"]), _mismatch)
    _take_over(memory, loaded)


def cleared(policy: Policy, step: int) -> dict[str, Tensor]:
    """Return the state of one element of which nothing was observed, at any step."""
    state = policy.init_state(1, torch.device("cpu"))
    return {slot: state[slot][..., 0] for slot in policy.slots_after(step)}


def _fresh(memory: Memory, step: int) -> dict[str, Any]:
    """Return the snapshot of a clipper that has observed nothing, at any step."""
    return _assembled(memory, step, lambda group: [cleared(group.policy, step)] * group.num_elements)


def _assembled(
    memory: Memory, step: int, elements: Callable[[PolicyGroup], Sequence[Mapping[str, Tensor]]]
) -> dict[str, Any]:
    """Return the snapshot whose elements, group by group, are what `elements` says."""
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
                shards[tensor.name] = _shard_of(tensor)
    frame = {"format_version": FORMAT_VERSION, "step": step, "policies": _policies(memory)}
    return {**frame, "tensors": tensors, "global": shared, "shards": shards}


def _take_over(memory: Memory, loaded: Mapping[str, Any]) -> None:
    step = _checked_step(loaded)
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
                continue  # the error below names all that are missing
            found = {repr(tensor.name): loaded["tensors"][tensor.name] for tensor in tensors}
            if group.per_shard:
                _check_shards(tensors, loaded["shards"])
        # From scratch, for the clipper may have dropped the record of its warm-up, which the loaded state may have.
        state = group.fresh_state()
        _fill(group.policy, state, slots, found)
        states.append(state)
    missing = sorted(expected - set(loaded["tensors"]))
    # Under pipeline parallelism the state of the whole model is welcome: each stage takes its part.
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
        if shards.get(tensor.name) != _shard_of(tensor):
            raise ValueError(
                f"with scope 'shard' the state of {tensor.name!r} belongs to shard {shards.get(tensor.name)}, but this "
                f"rank holds shard {_shard_of(tensor)}: load each rank's own state under the layout that made it"
            )


def _mismatch(message: str) -> None:
    raise ValueError(message)


def _checked_step(loaded: Mapping[str, Any]) -> int:
    if loaded["format_version"] not in _READABLE:
        raise ValueError(
            f"the state has format version {loaded['format_version']!r}; this dist_clip reads versions "
            f"{' and '.join(map(str, _READABLE))}"
        )
    step = loaded["step"]
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"the state's step must be an int of at least 0, got {step!r}")
    return step


def _policies(memory: Memory) -> list[dict[str, Any]]:
    return [{"pattern": group.pattern, **group.policy.config()} for group in memory.groups]


def _shard_of(tensor: LogicalTensor) -> str:
    """Which piece of the tensor this rank holds."""
    ranks = sorted(tensor.replica_ranks)
    position = ranks.index(current_rank()) if len(ranks) > 1 else 0
    return f"{position} of {len(ranks)}"


def _columns(group: PolicyGroup, step: int) -> dict[str, Tensor]:
    """The slots that matter after `step` steps, element by row, copied to the CPU: a few operators a slot."""
    return {
        slot: group.state[slot].detach().movedim(-1, 0).to("cpu", copy=True, memory_format=torch.contiguous_format)
        for slot in group.policy.slots_after(step)
    }


def _unbound(columns: Mapping[str, Tensor]) -> dict[str, Sequence[Tensor]]:
    return {slot: column.unbind() for slot, column in columns.items()}


def _rows(values: Mapping[str, Sequence[Any]], n: int) -> list[dict[str, Any]]:
    """[{slot: value}] of the n elements, from {slot: [value of each element]}."""
    return [{slot: column[k] for slot, column in values.items()} for k in range(n)]


def _warn_of_nonfinite(group: PolicyGroup, columns: Mapping[str, Tensor]) -> None:
    for slot, column in columns.items():
        if not _storable(group.policy, slot, column):
            warnings.warn(
                f"the state of {type(group.policy).__name__} for {group.pattern!r} has NaN or Inf in {slot!r}: it is saved, "
                "but will be refused when it is loaded. The policy must keep the old value where dist_clip.observed says so",
                stacklevel=5,
            )


def _storable(policy: Policy, slot: str, value: Tensor) -> bool:
    """Whether all of `value` may stand in a checkpoint: anything finite, and NaN in the slots that the policy names."""
    if not value.is_floating_point():
        return True
    fine = value.isfinite() | value.isnan() if slot in policy.nan_slots else value.isfinite()
    return bool(fine.all())


def _fill(policy: Policy, state: State, slots: Sequence[str], elements: Mapping[str, Any]) -> None:
    """Check `elements`, {where: {slot: tensor}}, and copy them into the columns of `state`."""
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
        column = torch.stack([element[slot].to("cpu") for element in elements.values()])
        if not _storable(policy, slot, column):
            where, value = next(
                (where, element[slot])
                for where, element in elements.items()
                if not _storable(policy, slot, element[slot])
            )
            allowed = "finite or NaN" if slot in policy.nan_slots else "finite"
            raise ValueError(f"the state of {where} has {slot} = {value.tolist()}: it must be {allowed}")
        state[slot].copy_(column.movedim(0, -1))
