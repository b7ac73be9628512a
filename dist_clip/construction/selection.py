"""Which policy clips which tensors: the selectors of ``overrides=``, and the rules that follow from them."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_clip.errors import LayoutError
from dist_clip.layouts import LogicalTensor
from dist_clip.layouts.fsdp1 import is_flat
from dist_clip.memory import Rule
from dist_clip.policies import Policy
from dist_clip.policies.trial import check_policy

Predicate = Callable[[str, Tensor], bool]
Overrides = Mapping[str, Policy] | Sequence[tuple[Any, Policy]]
"""{FQN pattern: policy}, or (selector, policy) pairs. Selectors: patterns, predicates, optimizers and their param_groups."""

UNKNOWN = -1
"""The rule number of a tensor of which this rank cannot tell, and another rank can."""

_KINDS = "an FQN pattern, a function (name, parameter) -> bool, an optimizer, or its param_groups"


class Selection:
    """One selector of ``overrides=``. Frameworks whose optimizers hold other tensors than the model have their own.

    Args:
        label: names the policy's tensors in states and messages, the same on every rank and in every run.
    """

    def __init__(self, label: str) -> None:
        self.label = label

    def prepare(self, known: frozenset[int]) -> None:
        """Get ready to select, as happens once the layout is read.

        Args:
            known: ids of all parameters of the target.

        Raises:
            LayoutError: the selector names what is no parameter of the target.
        """

    def selects(self, tensor: LogicalTensor) -> bool | None:
        """Return whether the tensor is selected; None where this rank cannot tell."""
        raise NotImplementedError


class _Pattern(Selection):
    def selects(self, tensor: LogicalTensor) -> bool:
        return fnmatch.fnmatchcase(tensor.name, self.label)


class _Predicate(Selection):
    def __init__(self, predicate: Predicate) -> None:
        super().__init__(getattr(predicate, "__qualname__", type(predicate).__name__))
        self._predicate = predicate

    def selects(self, tensor: LogicalTensor) -> bool | None:
        param = tensor.param
        if param is None:
            return None
        if is_flat(param) or param.dim() != len(tensor.shape):
            # FSDP1 flattens its shards. How many dimensions a tensor has must not depend on the layout.
            param = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        try:
            selected = self._predicate(tensor.name, param)
        except Exception as error:
            raise LayoutError(
                f"overrides: {self.label} failed on {tensor.name!r}: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(selected, bool):
            raise TypeError(f"overrides: {self.label} returned {selected!r} for {tensor.name!r}, not True or False")
        return selected


class _Parameters(Selection):
    def __init__(self, label: str, groups: Callable[[], Any]) -> None:
        super().__init__(label)
        self._groups = groups
        self._ids: frozenset[int] = frozenset()

    def prepare(self, known: frozenset[int]) -> None:
        params = parameters_of(self._groups())
        for param in params:
            if id(param) not in known:
                raise LayoutError(
                    f"overrides: {self.label} holds a parameter of shape {list(param.shape)} that is none of the clipper's: "
                    "construct the optimizer and the clipper from the same parameters, after whatever replaces them"
                )
        self._ids = frozenset(map(id, params))

    def selects(self, tensor: LogicalTensor) -> bool:
        return id(tensor.param) in self._ids


def selection(selector: object) -> Selection:
    """Return the `Selection` of one selector, whose label may be another's as well.

    Raises:
        TypeError: it is no selector.
    """
    if isinstance(selector, Selection):
        return selector
    if isinstance(selector, str):
        return _Pattern(selector)
    if has_groups(selector):
        return _Parameters(type(selector).__name__, lambda: selector.param_groups)  # type: ignore[attr-defined]
    if are_groups(selector):
        return _Parameters("param_groups", lambda: selector)
    if callable(selector) and not isinstance(selector, (nn.Module, Tensor, type)):
        return _Predicate(selector)
    raise TypeError(f"overrides: a selector must be {_KINDS}, got {selector!r}")


def has_groups(selector: object) -> bool:
    """Return whether a selector is an optimizer."""
    return not isinstance(selector, type) and isinstance(getattr(selector, "param_groups", None), Sequence)


def are_groups(selector: object) -> bool:
    """Return whether a selector is an optimizer's param_groups, or one of them."""
    if isinstance(selector, Mapping):
        return "params" in selector
    some = isinstance(selector, Sequence) and len(selector) > 0
    return some and all(isinstance(group, Mapping) and "params" in group for group in selector)  # type: ignore[attr-defined]


def parameters_of(groups: Any) -> list[Tensor]:
    """Return the parameters of param_groups, or of one of them."""
    groups = [groups] if isinstance(groups, Mapping) else groups
    found = []
    for group in groups:
        params = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
        found += [param[1] if isinstance(param, tuple) else param for param in params]
    return found


def pairs_of(overrides: object) -> list[tuple[Any, Any]]:
    """Return ``overrides=`` as (selector, policy) pairs.

    Raises:
        TypeError: it is neither a mapping nor a list of pairs.
    """
    if overrides is None:
        return []
    if isinstance(overrides, Mapping):
        for pattern in overrides:
            if not isinstance(pattern, str):
                raise TypeError(
                    f"overrides: a pattern must be a string, got {pattern!r}; other selectors go into a list"
                )
        return list(overrides.items())
    if isinstance(overrides, Sequence) and all(
        isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in overrides
    ):
        return [(selector, policy) for selector, policy in overrides]
    raise TypeError(
        f"overrides must map FQN patterns to policies, or be a list of (selector, policy) pairs, got {overrides!r}"
    )


def checked_rules(policy: object, overrides: object, exclude: object) -> tuple[list[Rule], list[Selection]]:
    """Check the clipper's arguments. Returns the rules, the default last, and the selection of each but the default.

    Raises:
        TypeError, ValueError: an argument of another type, the pattern "*", two selectors of one name, or a policy that
            breaks its contract.
    """
    checked = check_policy(policy)
    pairs = pairs_of(overrides)
    if isinstance(exclude, str) or not isinstance(exclude, Iterable):
        raise TypeError(f"exclude must be a list of FQN patterns, got {exclude!r}")
    for pattern in exclude:
        if not isinstance(pattern, str):
            raise TypeError(f"exclude: a pattern must be a string, got {pattern!r}")
    rules: list[Rule] = []
    selections: list[Selection] = []
    alike: Counter[str] = Counter()
    for selector, override in pairs:
        chosen = selection(selector)
        if selector == "*":
            raise ValueError(
                "overrides: the pattern '*' would leave nothing to the policy argument: pass that policy there"
            )
        if not isinstance(selector, str):
            alike[chosen.label] += 1
            if alike[chosen.label] > 1:
                chosen.label = f"{chosen.label} {alike[chosen.label]}"
        if any(chosen.label == label for label, _ in rules) or chosen.label == "*":
            raise ValueError(
                f"overrides: two selectors are called {chosen.label!r}, by which states know their tensors: leave one "
                "out, or give the function another name"
            )
        rules.append((chosen.label, check_policy(override, f"overrides: {chosen.label!r}")))
        selections.append(chosen)
    return [*rules, ("*", checked)], selections


def numbers_of(
    selections: Sequence[Selection], tensors: Iterable[LogicalTensor], known: frozenset[int]
) -> tuple[tuple[int, ...], set[str]]:
    """Return each tensor's rule number, `UNKNOWN` where this rank cannot tell, and the labels that select any tensor.

    Raises:
        LayoutError, TypeError: a selector fails.
    """
    for each in selections:
        each.prepare(known)
    numbers, matched = [], set()
    for tensor in tensors:
        verdicts = [each.selects(tensor) for each in selections]
        matched |= {each.label for each, verdict in zip(selections, verdicts, strict=True) if verdict}
        first = next((k for k, verdict in enumerate(verdicts) if verdict is not False), len(selections))
        numbers.append(UNKNOWN if first < len(selections) and verdicts[first] is None else first)
    return tuple(numbers), matched
