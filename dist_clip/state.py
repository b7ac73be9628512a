"""The clipper's state as plain data: keyed by FQN, free of the layout, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from dist_clip.policies.base import State

if TYPE_CHECKING:
    from dist_clip.clipper import GradClipper
    from dist_clip.domains import Domain

FORMAT_VERSION = 1


def state_dict(clipper: GradClipper) -> dict[str, Any]:
    """``{"format_version", "step", "policies", "tensors": {fqn: {slot: tensor}}, "global": {pattern: {slot: tensor}},
    "shards": {fqn: "k of n"}}``, the last for tensors under scope "shard", whose state belongs to one shard."""
    step = clipper.steps
    tensors: dict[str, dict[str, Tensor]] = {}
    global_state: dict[str, dict[str, Tensor]] = {}
    shards: dict[str, str] = {}
    for domain in clipper.domains:
        if domain.policy.rule_scope == "global":
            global_state[domain.pattern] = _element(domain, 0, step)
            continue
        for k, i in enumerate(domain.indices):
            name = clipper.layout.names[i]
            tensors[name] = _element(domain, k, step)
            if domain.policy.rule_scope == "shard":
                shards[name] = _shard_of(clipper, i)
    return {
        "format_version": FORMAT_VERSION,
        "step": step,
        "policies": _policies(clipper),
        "tensors": tensors,
        "global": global_state,
        "shards": shards,
    }


def load_state_dict(clipper: GradClipper, loaded: Mapping[str, Any]) -> None:
    """Check everything, then copy: a state that does not fit changes nothing."""
    step = _check_frame(clipper, loaded)
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


def _check_frame(clipper: GradClipper, loaded: Mapping[str, Any]) -> int:
    """Check all that is not state of some tensor; the step."""
    if not isinstance(loaded, Mapping):
        raise ValueError(f"not a state of GradClipper: {type(loaded).__name__}")
    missing_keys = {"format_version", "step", "policies", "tensors", "global", "shards"} - set(loaded)
    if missing_keys:
        raise ValueError(f"not a state of GradClipper: it lacks {sorted(missing_keys)}")
    if loaded["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"the state has format version {loaded['format_version']!r}; this dist_clip reads version {FORMAT_VERSION}"
        )
    for key in ("tensors", "global", "shards"):
        if not isinstance(loaded[key], Mapping):
            raise ValueError(f"the state's {key!r} must be a dict, got {type(loaded[key]).__name__}")
    step = loaded["step"]
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"the state's step must be an int of at least 0, got {step!r}")
    if list(loaded["policies"]) != _policies(clipper):
        raise ValueError(
            f"the state was made by other policies: it has {list(loaded['policies'])}, the clipper {_policies(clipper)}"
        )
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
