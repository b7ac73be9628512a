"""The registry of guards by name, whose options come from their dataclasses, as the policies' do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from dist_clip.guards.base import Guard
from dist_clip.policies.registry import check_name, check_options, enter, options_of

_G = TypeVar("_G", bound=type[Guard])

_registered: dict[str, type[Guard]] = {}


def register_guard(name: str) -> Callable[[_G], _G]:
    """Return a class decorator that makes a guard known under `name`, for launchers and Megatron's flags.

    Args:
        name: lower-case letters and digits, a letter first.

    Raises:
        ValueError: the name is taken by another class, or contains other characters.

    Example:
        >>> import dataclasses, torch, dist_clip
        >>> @dist_clip.register_guard("never")
        ... @dataclasses.dataclass(frozen=True)
        ... class Never(dist_clip.Guard):
        ...     def step(self, state, inputs):
        ...         return torch.zeros_like(inputs.t, dtype=torch.bool), state
        >>> dist_clip.guard("never")
        Never()
    """

    check_name("guard", name)

    def decorate(cls: _G) -> _G:
        enter(_registered, "guard", name, cls)
        return cls

    return decorate


def registered_guards() -> dict[str, type[Guard]]:
    """Return {name: guard class}, in the order of registration."""
    return dict(_registered)


def guard(name: str, **options: Any) -> Guard:
    """Return a guard by its registered name, with the given hyper-parameters.

    Args:
        name: "median", "skipstep", "dropnorm", "skipabove" or a name of `register_guard`.
        options: the guard's hyper-parameters; the others have their defaults.

    Raises:
        ValueError: no guard of that name, or a value out of range.
        TypeError: an option that the guard does not have, or a value of the wrong type.

    Example:
        >>> import dist_clip
        >>> dist_clip.guard("skipstep", sigma=4.0).sigma
        4.0
    """
    cls = _registered.get(name)
    if cls is None:
        raise ValueError(f"no guard is called {name!r}; there are {', '.join(_registered)}")
    check_options(f"the guard {name}", options, [option.name for option in options_of(cls)])
    return cls(**options)
