"""Domains: which policy rules which tensors, with its state; and what a step measures for them."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from dist_clip.layout import Layout
from dist_clip.policies.base import Policy, State

NonFinite = Literal["propagate", "zero", "skip", "raise"]


@dataclasses.dataclass
class Domain:
    """The tensors one policy rules, and its state. Its global norm is the norm of these tensors together."""

    policy: Policy
    pattern: str
    indices: tuple[int, ...]
    index: Tensor
    state: State


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one step measured, float64 [n] each: the shards' squared norms `local`; the tensors' norms `whole` (None if
    not reduced); `norms`, per tensor or shard as the scope says; `clean`, `norms` as the policies see them; `bad`, bool,
    which norms are NaN or Inf."""

    local: Tensor
    whole: Tensor | None
    norms: Tensor
    clean: Tensor
    bad: Tensor


def checked_rules(policy: object, nonfinite: object, groups: object, exclude: object) -> list[tuple[str, Policy]]:
    """Check the arguments that need no parameters; (pattern, policy) pairs in order, the default last."""
    if not isinstance(policy, Policy):
        raise TypeError(f"policy must be a dist_clip policy such as AdaGC(), got {policy!r}")
    if nonfinite not in get_args(NonFinite):
        raise ValueError(f"nonfinite must be one of {', '.join(map(repr, get_args(NonFinite)))}, got {nonfinite!r}")
    if groups is not None and not isinstance(groups, Mapping):
        raise TypeError(f"groups must map FQN patterns to policies, got {groups!r}")
    if isinstance(exclude, str) or not isinstance(exclude, Iterable):
        raise TypeError(f"exclude must be a list of FQN patterns, got {exclude!r}")
    rules: list[tuple[str, Policy]] = []
    for pattern, group_policy in (groups or {}).items():
        if not isinstance(pattern, str):
            raise TypeError(f"groups: a pattern must be a string, got {pattern!r}")
        if pattern == "*":
            raise ValueError(
                "groups: the pattern '*' would leave nothing to the policy argument: pass that policy there"
            )
        if not isinstance(group_policy, Policy):
            raise TypeError(f"groups: {pattern!r} must map to a dist_clip policy, got {group_policy!r}")
        rules.append((pattern, group_policy))
    for pattern in exclude:
        if not isinstance(pattern, str):
            raise TypeError(f"exclude: a pattern must be a string, got {pattern!r}")
    return [*rules, ("*", policy)]


def rule_for(rules: list[tuple[str, Policy]], name: str) -> tuple[int, Policy]:
    """Which rule a name falls under: the first whose pattern it matches."""
    return next((k, policy) for k, (pattern, policy) in enumerate(rules) if fnmatch.fnmatchcase(name, pattern))


def make_domains(rules: list[tuple[str, Policy]], layout: Layout, device: torch.device) -> list[Domain]:
    """One domain a rule, with the tensors whose first match it is, possibly none."""
    owner = [rule_for(rules, name)[0] for name in layout.names]
    domains = []
    for k, (pattern, policy) in enumerate(rules):
        indices = tuple(i for i, o in enumerate(owner) if o == k)
        n = 1 if policy.rule_scope == "global" else len(indices)
        index = torch.tensor(indices, dtype=torch.int64, device=device)
        domains.append(Domain(policy, pattern, indices, index, policy.init_state(n, device)))
    return domains
