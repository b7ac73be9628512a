"""The registered policies, as the benchmark and the simulation compare them."""

from __future__ import annotations

from typing import Any

import dist_clip
from dist_clip.policies import options_of, parse_mode, registered


def compared(*more: str) -> tuple[str, ...]:
    """Return the modes to compare: every registered policy with its own scope, and `more`."""
    return (*registered(), *more)


def make(mode: str, **options: Any) -> dist_clip.Policy:
    """Make the policy of a mode with those of `options` that it has."""
    known = {option.name for option in options_of(parse_mode(mode)[0])}
    return dist_clip.policy(mode, **{name: value for name, value in options.items() if name in known})


def label(mode: str) -> str:
    """Return what tables call a mode: the class, and the scope where the mode names one."""
    cls, fixed = parse_mode(mode)
    return cls.__name__ + "".join(f' {name}="{value}"' for name, value in fixed.items())
