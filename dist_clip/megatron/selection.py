"""Selectors of ``overrides=`` under Megatron, where an optimizer holds other tensors than the model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dist_clip.construction.selection import Selection, are_groups, has_groups, parameters_of
from dist_clip.errors import LayoutError
from dist_clip.layouts import LogicalTensor
from dist_clip.layouts.process_groups import gather
from dist_clip.megatron import compat
from dist_clip.policies import Policy


def selections(overrides: Any, optimizer: Any) -> Any:
    """Return ``overrides=`` with `Steps` in place of optimizers and param_groups. What else is wrong with it stays."""
    if isinstance(overrides, Mapping) or not isinstance(overrides, (list, tuple)):
        return overrides
    out = []
    for pair in overrides:
        if isinstance(pair, (list, tuple)) and len(pair) == 2:
            selector, policy = pair
            if has_groups(selector) or compat.is_chained(selector):
                pair = (Steps(type(selector).__name__, selector, optimizer), policy)
            elif are_groups(selector):
                pair = (Steps("param_groups", selector, optimizer), policy)
        out.append(pair)
    return out


def with_norm_groups(overrides: Any, policy: Any, chunks: Sequence[nn.Module], groups: compat.Groups) -> Any:
    """Return ``overrides=`` with a copy of `policy` for each of Megatron's groups with a norm of its own, the last.

    Collective over the ranks of the model, of which those of the last pipeline stage know the groups. Guards do not look at
    these tensors: Megatron's own threshold does not.
    """
    params = [compat.model_param(param) for chunk in chunks for param in chunk.parameters()]
    names = {name for param in params if (name := compat.grad_norm_group(param)) is not None}
    for group in (groups.stage, groups.pp):
        if group is not None:
            names = set().union(*gather(names, group).values())
    if not names or not isinstance(policy, Policy):
        return overrides
    pairs = list(overrides.items() if isinstance(overrides, Mapping) else overrides or ())
    for name in sorted(names):
        own = copy.copy(policy)
        object.__setattr__(own, "guarded", False)
        pairs.append((NormGroup(name), own))
    return pairs


APART = "grad_norm_group "
"""How the labels of the selections for Megatron's own norm groups begin."""


class NormGroup(Selection):
    """Selects the parameters of one of Megatron's groups with a norm of their own: detached heads of multi-token layers."""

    def __init__(self, name: str) -> None:
        super().__init__(APART + name)
        self._name = name

    def selects(self, tensor: LogicalTensor) -> bool | None:
        return None if tensor.param is None else compat.grad_norm_group(tensor.param) == self._name


class Steps(Selection):
    """Selects the model parameters that a part of a Megatron optimizer steps.

    A rank whose optimizers hold no piece of a parameter cannot tell.

    Args:
        said: an optimizer inside of `optimizer` (a chain, a leaf, or the torch optimizer of a leaf), or param_groups.
    """

    def __init__(self, label: str, said: Any, optimizer: Any) -> None:
        super().__init__(label)
        self._said, self._optimizer = said, optimizer
        self._verdicts: dict[int, bool] = {}

    def prepare(self, known: frozenset[int]) -> None:
        chosen = {id(node) for node in compat.inside(self._said)} if not are_groups(self._said) else set()
        tensors = [] if chosen & {id(node) for node in compat.inside(self._optimizer)} else self._tensors()
        wanted, found = {id(tensor) for tensor in tensors}, set()
        for leaf in compat.leaves(self._optimizer):
            for piece in compat.pieces(leaf.optimizer):
                mine = wanted & {id(piece.param), id(piece.holder)}
                found |= mine
                self._verdicts[id(piece.param)] = id(leaf.optimizer) in chosen or bool(mine)
        lost = [list(tensor.shape) for tensor in tensors if id(tensor) not in found]
        if lost:
            raise LayoutError(
                f"overrides: {self.label} holds {len(lost)} tensors (shapes {lost[:3]}) that the attached optimizer does "
                "not step: pass one of its chained_optimizers, param_groups of one, or a function (name, parameter) -> bool"
            )

    def _tensors(self) -> list[Any]:
        said = self._said
        if not has_groups(said):
            if not are_groups(said):
                raise LayoutError(f"overrides: {self.label} is no part of the attached optimizer")
            return parameters_of(said)
        return parameters_of(said.param_groups)

    def selects(self, tensor: LogicalTensor) -> bool | None:
        return None if tensor.param is None else self._verdicts.get(id(tensor.param))
