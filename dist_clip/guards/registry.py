"""The registry of guards by name, whose options come from their dataclasses, as the policies' do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from dist_clip.guards.base import Guard
from dist_clip.policies.registry import check_name, check_options, enter, options_of, read_spec, refuse_options

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


def guard(spec: str | Mapping[str, Any] | Guard, **options: Any) -> Guard:
    """Return a guard by its registered name, with the given hyper-parameters.

    Args:
        spec: "median", "skipstep", "dropnorm", "skipabove" or a name of `register_guard`; or all in one, as for
            `dist_clip.policy`: "skipabove max_norm=10", {"name": "skipabove", "max_norm": 10}, or that as a JSON text. Or a
            guard, which is returned as it is.
        options: the guard's hyper-parameters; the others have their defaults.

    Raises:
        ValueError: no guard of that name, a text that is not of this form, an option given twice, or a value out of range.
        TypeError: an option that the guard does not have, or a value of the wrong type.

    Example:
        >>> import dist_clip
        >>> dist_clip.guard("skipstep", sigma=4.0).sigma
        4.0
        >>> dist_clip.guard("skipabove max_norm=10").max_norm
        10
    """
    if isinstance(spec, Guard):
        refuse_options(spec, options)
        return spec
    name, options = read_spec("guard", spec, options)
    cls = _registered.get(name)
    if cls is None:
        raise ValueError(f"no guard is called {name!r}; there are {', '.join(_registered)}")
    check_options(f"the guard {name}", options, [option.name for option in options_of(cls)])
    return cls(**options)
