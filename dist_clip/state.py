"""The clipper's state as plain data: keyed by FQN, free of the layout, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from dist_clip.clipper import GradClipper
    from dist_clip.domains import Domain

FORMAT_VERSION = 1


def state_dict(clipper: GradClipper) -> dict[str, Any]:
    """``{"format_version", "step", "policies", "tensors": {fqn: {slot: tensor}}, "global": {pattern: {slot: tensor}}}``."""
    tensors: dict[str, dict[str, Tensor]] = {}
    global_state: dict[str, dict[str, Tensor]] = {}
    for domain in clipper.domains:
        if domain.policy.rule_scope == "global":
            global_state[domain.pattern] = _element(domain, 0)
        else:
            for k, i in enumerate(domain.indices):
                tensors[clipper.layout.names[i]] = _element(domain, k)
    return {
        "format_version": FORMAT_VERSION,
        "step": clipper.steps,
        "policies": _policies(clipper),
        "tensors": tensors,
        "global": global_state,
    }


def load_state_dict(clipper: GradClipper, loaded: Mapping[str, Any]) -> None:
    """Check everything, then copy: a state that does not fit changes nothing."""
    missing_keys = {"format_version", "step", "policies", "tensors", "global"} - set(loaded)
    if missing_keys:
        raise ValueError(f"not a state of GradClipper: it lacks {sorted(missing_keys)}")
    if loaded["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"the state has format version {loaded['format_version']!r}; this dist_clip reads version {FORMAT_VERSION}"
        )
    if list(loaded["policies"]) != _policies(clipper):
        raise ValueError(
            f"the state was made by other policies: it has {list(loaded['policies'])}, the clipper {_policies(clipper)}"
        )
    copies: list[tuple[Tensor, Tensor, str]] = []
    expected: set[str] = set()
    for domain in clipper.domains:
        if domain.policy.rule_scope == "global":
            copies += _copies(domain, 0, loaded["global"].get(domain.pattern), f"global {domain.pattern!r}")
        else:
            for k, i in enumerate(domain.indices):
                name = clipper.layout.names[i]
                expected.add(name)
                if name in loaded["tensors"]:
                    copies += _copies(domain, k, loaded["tensors"][name], repr(name))
    missing = sorted(expected - set(loaded["tensors"]))
    # Under pipeline parallelism the state of the whole model is welcome: each stage takes its part.
    unknown = sorted(set(loaded["tensors"]) - expected) if clipper.pp_group is None else []
    if missing or unknown:
        raise ValueError(f"the state does not fit this model: missing {missing}, unknown {unknown}")
    for target, value, _ in copies:
        target.copy_(value)
    clipper.set_steps(int(loaded["step"]))


def _policies(clipper: GradClipper) -> list[dict[str, Any]]:
    return [{"pattern": d.pattern, **d.policy.config()} for d in clipper.domains]


def _element(domain: Domain, k: int) -> dict[str, Tensor]:
    return {slot: value[..., k].detach().cpu().clone() for slot, value in domain.state.items()}


def _copies(domain: Domain, k: int, element: Any, where: str) -> list[tuple[Tensor, Tensor, str]]:
    if not isinstance(element, Mapping) or set(element) != set(domain.state):
        has = sorted(element) if isinstance(element, Mapping) else element
        raise ValueError(f"the state of {where} has {has}, expected {sorted(domain.state)}")
    pairs = []
    for slot, value in domain.state.items():
        target = value[..., k]
        if tuple(element[slot].shape) != tuple(target.shape):
            raise ValueError(
                f"the state of {where} has {slot} of shape {list(element[slot].shape)}, expected {list(target.shape)}"
            )
        pairs.append((target, element[slot], where))
    return pairs
