"""Command-line flags for the options of all registered guards, as those of the policies: ``--GUARD-OPTION``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dist_clip.guards.base import Guard
from dist_clip.guards.registry import guard, registered_guards
from dist_clip.policies.command_line import PolicyFlag, given_options
from dist_clip.policies.registry import options_of


def guard_flags() -> tuple[PolicyFlag, ...]:
    """Return the flags of all registered guards: one for each option but those that no flag can set."""
    return tuple(
        PolicyFlag(name, option)
        for name, cls in registered_guards().items()
        for option in options_of(cls)
        if option.type is not object
    )


def guards_from_flags(names: Sequence[str], values: Mapping[str, Any], flag: str) -> list[Guard]:
    """Return the guards of a command line.

    Args:
        names: the chosen guards.
        values: parsed arguments by `PolicyFlag.dest`, None where the flag was not given. Other arguments are ignored.
        flag: the flag that chooses guards, for the errors.

    Raises:
        ValueError: a flag of a guard that was not chosen, a required flag that was not given, or a value out of range.
        TypeError: a value of the wrong type.
    """
    chosen = " ".join([flag, *names]) if names else f"a command line without {flag}"
    given_options(guard_flags(), set(names), values, chosen)  # raises for stray and missing flags
    guards = []
    for name in dict.fromkeys(names):
        own = [each for each in guard_flags() if each.rule == name]
        guards.append(guard(name, **given_options(own, {name}, values, chosen)))
    return guards
