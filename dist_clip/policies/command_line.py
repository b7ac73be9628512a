"""Command-line flags for the options of all registered policies, the same in every launcher: ``--RULE-OPTION``."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from dist_clip.policies.base import Policy
from dist_clip.policies.registry import Option, options_of, registered

COMMON = "max_norm"
"""The option that every launcher sets by one flag for all rules."""


@dataclasses.dataclass(frozen=True)
class PolicyFlag:
    """The flag of one option of one policy or guard.

    Attributes:
        rule: the registered name, such as "logclip".
        option: one of its hyper-parameters.
    """

    rule: str
    option: Option

    @property
    def dest(self) -> str:
        """The name of the parsed argument, such as "logclip_ratio"."""
        return f"{self.rule}_{self.option.name}"

    @property
    def hint(self) -> str:
        """The text about the default in a help text."""
        return "required" if self.option.required else f"default: {self.option.default}"


def policy_flags() -> tuple[PolicyFlag, ...]:
    """Return the flags of all registered policies: one for each option but `COMMON` and those that no flag can set."""
    return tuple(
        PolicyFlag(rule, option)
        for rule, cls in registered().items()
        for option in options_of(cls)
        if option.name != COMMON and option.type is not object
    )


def options_from_flags(rule: type[Policy] | None, values: Mapping[str, Any], chosen: str) -> dict[str, Any]:
    """Return {name: value} of the options of a policy that were given as flags.

    Args:
        rule: the policy's class; None if the command line chooses none, so that every policy flag is an error.
        values: parsed arguments by `PolicyFlag.dest`, None where the flag was not given. Other arguments are ignored.
        chosen: the part of the command line that chooses `rule`, for the errors.

    Raises:
        ValueError: a flag of another policy, or a required flag that was not given; the message names them.
    """
    names = {name for name, cls in registered().items() if cls is rule}
    return given_options(policy_flags(), names, values, chosen)


def given_options(
    flags: Iterable[PolicyFlag], rules: Collection[str], values: Mapping[str, Any], chosen: str
) -> dict[str, Any]:
    """Return {name: value} of the options that were given as flags, all of which must be those of `rules`.

    Raises:
        ValueError: a flag of another rule, or a required flag that was not given; the message names them.
    """
    flags = tuple(flags)
    given = {flag.dest: flag for flag in flags if values.get(flag.dest) is not None}
    own = {flag.dest: flag for flag in flags if flag.rule in rules}
    stray = sorted(given.keys() - own.keys())
    if stray:
        raise ValueError(f"{flag_names(stray)} does not go with {chosen}")
    missing = sorted(dest for dest, flag in own.items() if flag.option.required and dest not in given)
    if missing:
        raise ValueError(f"{chosen} needs {flag_names(missing)}")
    return {flag.option.name: values[dest] for dest, flag in given.items()}


def flag_names(dests: Iterable[str]) -> str:
    """Return the flags of parsed arguments as text, for a message."""
    return ", ".join("--" + dest.replace("_", "-") for dest in dests)


def import_modules(flag: str, arguments: Sequence[str]) -> None:
    """Import the modules that `flag` names among `arguments`, so that the policies they register get flags as well.

    Call it before the parser is built. The flag may be repeated.

    Raises:
        ImportError: a module cannot be imported; the message names it.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag, action="append", default=[], dest="modules")
    for module in parser.parse_known_args(arguments)[0].modules:
        try:
            importlib.import_module(module)
        except Exception as error:
            raise ImportError(f"{flag} {module}: cannot be imported ({type(error).__name__}: {error})") from error
