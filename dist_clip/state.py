"""The clipper's state as plain data: keyed by FQN, free of the layout, checked before anything is loaded.

Two forms. A *snapshot* has, for each element, the tensors that decide anything from here on. A *state dict*, which users
save, has the same under keys that do not depend on the step: `torch.distributed.checkpoint` loads into the keys that
the clipper has at that time, which may be at another step than the one that was saved.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_clip.policies.base import Policy, State

if TYPE_CHECKING:
    from dist_clip.clipper import GradClipper
    from dist_clip.domains import Domain

FORMAT_VERSION = 1
_LAYOUT = "layout"
"""Key, beside a tensor's shards, of how the tensor was cut into them."""

Tell = Callable[[str], None]
"""What is done about a state that does not fit: raise, or warn."""


# ---------------------------------------------------------------------------------------------------------- state dicts


def state_dict(clipper: GradClipper) -> dict[str, Any]:
    """``{"format_version", "step", "policies", "names", "tensors": {fqn: {slot: value}}, "global": {pattern: {slot:
    value}}, "shards": {fqn: {"layout": text, "k of n": {slot: value}}}}``.

    `policies` are lines of JSON, one a rule; `names` are the FQNs of the whole model, those of other pipeline stages
    included. `shards` is for scope "shard". A value is a 0-dim CPU tensor, or, for what only a warm-up records, a list of
    numbers, empty once the warm-up is over.
    """
    taken = snapshot(clipper)
    cuts = _cuts(clipper)
    shards: dict[str, dict[str, Any]] = {}
    tensors: dict[str, dict[str, Any]] = {}
    for name, entry in taken["tensors"].items():
        value = _listed(entry, clipper.policy_for(name))
        if name in taken["shards"]:
            shards[name] = {_LAYOUT: cuts[name], taken["shards"][name]: value}
        else:
            tensors[name] = value
    rules = {domain.pattern: domain.policy for domain in clipper.domains}
    return {
        "format_version": taken["format_version"],
        "step": taken["step"],
        "policies": [json.dumps(policy) for policy in taken["policies"]],
        "names": sorted({*clipper.layout.names, *clipper.names_elsewhere}),
        "tensors": tensors,
        "global": {pattern: _listed(entry, rules[pattern]) for pattern, entry in taken["global"].items()},
        "shards": shards,
    }


def load_state_dict(clipper: GradClipper, loaded: Mapping[str, Any], *, strict: bool = True) -> None:
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
    tell = _refuse if strict else _warn
    if not _policies_fit(clipper, [_parsed(line) for line in loaded["policies"]], tell):
        restore(clipper, _afresh(clipper, 0))
        return
    _check_names(clipper, loaded["names"], sections, tell)
    restore(clipper, _chosen(clipper, step, sections, set(loaded["names"])))


def _chosen(
    clipper: GradClipper, step: int, sections: Mapping[str, Mapping[str, Any]], names: set[str]
) -> dict[str, Any]:
    """The snapshot that a state dict comes to on this rank: its part of what was saved, where there is such, else afresh."""
    chosen = _afresh(clipper, step)
    cuts = _cuts(clipper)
    recut = []
    for name, empty in chosen["tensors"].items():
        if name not in names:
            continue
        entry = sections["tensors"].get(name)
        if name in chosen["shards"]:
            pieces = sections["shards"].get(name)
            if not isinstance(pieces, Mapping) or pieces.get(_LAYOUT) != cuts[name]:
                pieces = {}
            entry = pieces.get(chosen["shards"][name])
            if entry is None:
                recut.append(name)
        if entry is not None:
            chosen["tensors"][name] = _unlisted(entry, clipper.policy_for(name), empty)
    rules = {domain.pattern: domain.policy for domain in clipper.domains}
    for pattern, empty in chosen["global"].items():
        if pattern in sections["global"]:
            chosen["global"][pattern] = _unlisted(sections["global"][pattern], rules[pattern], empty)
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


def _policies_fit(clipper: GradClipper, saved: list[dict[str, Any]], tell: Tell) -> bool:
    """Whether the state is of the same rules for the same patterns; changed hyper-parameters are told and let pass."""
    mine = _policies(clipper)
    if [_kind(policy) for policy in saved] != [_kind(policy) for policy in mine]:
        tell(f"the state was made by other policies: it has {saved}, the clipper {mine}")
        return False
    changed = [
        f"{key} was {old.get(key)!r} and is {new.get(key)!r} (for {new['pattern']!r})"
        for old, new in zip(saved, mine, strict=True)
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if changed:
        tell(f"the state was made by other policies: {', '.join(changed)}")
    return True


def _kind(policy: Mapping[str, Any]) -> tuple[Any, ...]:
    return policy["pattern"], policy["policy"], policy.get("scope")


def _check_names(clipper: GradClipper, names: list[str], sections: Mapping[str, Mapping[str, Any]], tell: Tell) -> None:
    mine = {*clipper.layout.names, *clipper.names_elsewhere}
    # The names decide: a partial load leaves entries that were in the clipper before it.
    unknown = sorted({*names, *sections["tensors"], *sections["shards"]} - mine)
    lost = {
        name
        for domain in clipper.domains
        if domain.policy.rule_scope == "tensor"
        for name in (clipper.layout.names[i] for i in domain.indices)
        if name not in sections["tensors"]
    }
    lost |= {d.pattern for d in clipper.domains if d.policy.rule_scope == "global"} - set(sections["global"])
    missing = sorted((mine - set(names)) | lost)
    if missing or unknown:
        hint = ": were they renamed? Then rename them in the state too" if missing and unknown else ""
        tell(f"the state does not fit this model: missing {missing}, unknown {unknown}{hint}")


def _refuse(message: str) -> None:
    raise ValueError(f"{message}. Pass strict=False to load what fits; the rest starts afresh")


def _warn(message: str) -> None:
    warnings.warn(f"{message}. What fits is loaded, the rest starts afresh", stacklevel=4)


def _afresh(clipper: GradClipper, step: int) -> dict[str, Any]:
    """The snapshot of a clipper that has observed nothing, at any step."""
    return _assembled(clipper, step, lambda domain, k: cleared(domain.policy, step))


def cleared(policy: Policy, step: int) -> dict[str, Tensor]:
    """The state of one element of which nothing was observed, at any step."""
    state = policy.init_state(1, torch.device("cpu"))
    return {slot: state[slot][..., 0] for slot in policy.slots_after(step)}


def _lasting(policy: Policy) -> tuple[str, ...]:
    """Slots of every step, also of those after a warm-up."""
    return policy.slots_after(2**62)


def _listed(entry: Mapping[str, Tensor], policy: Policy) -> dict[str, Any]:
    """Slots under keys that do not depend on the step: what only a warm-up records becomes a list, empty after it."""
    lasting = _lasting(policy)
    out: dict[str, Any] = {slot: entry[slot] for slot in lasting}
    for slot in policy.slots_after(0):
        if slot not in lasting:
            value = entry.get(slot)
            out[slot] = [] if value is None else value.reshape(-1).tolist()
    return out


def _unlisted(entry: Any, policy: Policy, afresh: Mapping[str, Tensor]) -> Any:
    """The inverse of `_listed`, for a clipper that needs the slots of `afresh`. What is wrong is left for _fill to tell."""
    if not isinstance(entry, Mapping):
        return entry
    # A record that this clipper has no use for, its warm-up being over, is let go.
    out = {slot: value for slot, value in entry.items() if slot in afresh or not isinstance(value, list)}
    for slot, empty in afresh.items():
        record = entry.get(slot, None if slot in _lasting(policy) else [])
        if isinstance(record, list):
            # Also of a warm-up of another length or kind, or over: as much of it as there is.
            if not all(isinstance(value, (int, float)) for value in record):
                raise ValueError(f"the state is damaged: {slot} must be a list of numbers, got {record}")
            rows = torch.tensor(record[: empty.numel()], dtype=empty.dtype)
            out[slot] = torch.cat([rows, empty.reshape(-1)[len(rows) :]]).view(empty.shape)
    return out


def _cuts(clipper: GradClipper) -> dict[str, str]:
    """How each tensor is cut into shards."""
    return {tensor.name: tensor.placement for tensor in clipper.layout}


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")


# ------------------------------------------------------------------------------------------------------------ snapshots


def snapshot(clipper: GradClipper) -> dict[str, Any]:
    """``{"format_version", "step", "policies", "tensors": {fqn: {slot: tensor}}, "global": {pattern: {slot: tensor}},
    "shards": {fqn: "k of n"}}``, the last for tensors under scope "shard", whose state belongs to one shard."""
    step = clipper.steps
    return _assembled(clipper, step, lambda domain, k: _element(domain, k, step))


def _assembled(clipper: GradClipper, step: int, element: Callable[[Domain, int], dict[str, Tensor]]) -> dict[str, Any]:
    """A snapshot whose elements, number k of a domain, are what `element` says."""
    tensors: dict[str, dict[str, Tensor]] = {}
    shared: dict[str, dict[str, Tensor]] = {}
    shards: dict[str, str] = {}
    for domain in clipper.domains:
        if domain.policy.rule_scope == "global":
            shared[domain.pattern] = element(domain, 0)
            continue
        for k, i in enumerate(domain.indices):
            name = clipper.layout.names[i]
            tensors[name] = element(domain, k)
            if domain.policy.rule_scope == "shard":
                shards[name] = _shard_of(clipper, i)
    frame = {"format_version": FORMAT_VERSION, "step": step, "policies": _policies(clipper)}
    return {**frame, "tensors": tensors, "global": shared, "shards": shards}


def restore(clipper: GradClipper, loaded: Mapping[str, Any]) -> None:
    """Load a snapshot. Check everything, then copy: one that does not fit changes nothing."""
    step = _checked_step(loaded)
    if list(loaded["policies"]) != _policies(clipper):
        raise ValueError(
            f"the state was made by other policies: it has {list(loaded['policies'])}, the clipper {_policies(clipper)}"
        )
    fresh: list[State] = []
    expected: set[str] = set()
    for domain in clipper.domains:
        # From scratch, for the clipper may have let go of the record of its warm-up, which the loaded state may have.
        n = 1 if domain.policy.rule_scope == "global" else len(domain.indices)
        state = domain.policy.init_state(n, clipper.device)
        slots = set(domain.policy.slots_after(step))
        if domain.policy.rule_scope == "global":
            _fill(state, 0, slots, loaded["global"].get(domain.pattern), f"global {domain.pattern!r}")
        else:
            for k, i in enumerate(domain.indices):
                name = clipper.layout.names[i]
                expected.add(name)
                if name not in loaded["tensors"]:
                    continue  # told below, with all the others
                _fill(state, k, slots, loaded["tensors"][name], repr(name))
                if domain.policy.rule_scope == "shard" and loaded["shards"].get(name) != _shard_of(clipper, i):
                    raise ValueError(
                        f"with scope 'shard' the state of {name!r} belongs to shard {loaded['shards'].get(name)}, but this "
                        f"rank holds shard {_shard_of(clipper, i)}: load each rank's own state under the layout that made it"
                    )
        fresh.append(state)
    missing = sorted(expected - set(loaded["tensors"]))
    # Under pipeline parallelism the state of the whole model is welcome: each stage takes its part.
    unknown = sorted(set(loaded["tensors"]) - expected - clipper.names_elsewhere)
    if missing or unknown:
        raise ValueError(f"the state does not fit this model: missing {missing}, unknown {unknown}")
    for domain, state in zip(clipper.domains, fresh, strict=True):
        for slot, value in state.items():
            if slot in domain.state:
                value = domain.state[slot].copy_(value)  # in place: its memory never moves
            domain.state[slot] = value
    clipper.set_steps(step)


def _checked_step(loaded: Mapping[str, Any]) -> int:
    if loaded["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"the state has format version {loaded['format_version']!r}; this dist_clip reads version {FORMAT_VERSION}"
        )
    step = loaded["step"]
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"the state's step must be an int of at least 0, got {step!r}")
    return step


def _policies(clipper: GradClipper) -> list[dict[str, Any]]:
    return [{"pattern": d.pattern, **d.policy.config()} for d in clipper.domains]


def _shard_of(clipper: GradClipper, index: int) -> str:
    """Which piece of the tensor this rank holds."""
    component = sorted(clipper.layout.tensors[index].component)
    position = component.index(dist.get_rank()) if len(component) > 1 else 0
    return f"{position} of {len(component)}"


def _element(domain: Domain, k: int, step: int) -> dict[str, Tensor]:
    return {slot: domain.state[slot][..., k].detach().cpu().clone() for slot in domain.policy.slots_after(step)}


def _fill(state: State, k: int, slots: set[str], element: Any, where: str) -> None:
    """Check the slots of one element and copy them into column `k` of `state`."""
    if not isinstance(element, Mapping) or set(element) != slots:
        has = sorted(element) if isinstance(element, Mapping) else element
        raise ValueError(f"the state of {where} has {has}, expected {sorted(slots)}")
    for slot, value in element.items():
        target = state[slot][..., k]
        if not isinstance(value, Tensor) or tuple(value.shape) != tuple(target.shape):
            got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(
                f"the state of {where} has {slot} of {got}, expected a tensor of shape {list(target.shape)}"
            )
        # A row of the warm-up's record that holds nothing is NaN.
        usable = value.isnan() | (value >= 0) if slot == "history" else (value >= 0) & value.isfinite()
        if not bool(usable.all()):
            raise ValueError(f"the state of {where} has {slot} = {value.tolist()}: it must be finite and at least 0")
        target.copy_(value)
