"""The clipping: from the command line's options to a clipper over whatever this rank holds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import tyro

import dist_clip
from dist_clip.guards import registered_guards
from dist_clip.guards.command_line import guard_flags, guards_from_flags
from dist_clip.policies import modes, options_of, parse_mode, registered
from dist_clip.policies.command_line import COMMON, PolicyFlag, options_from_flags, policy_flags
from dist_clip.recommended import NAME as RECOMMENDED
from launch.parallel import ParallelModel

NONE = "none"


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Which rule, and its options. Each registered rule has flags of its own, named after it."""

    clip: str = RECOMMENDED
    """The rule, and after a dash its scope where that is not the rule's own. recommended: the library's setting, a guard
    included. none: measure only."""
    max_norm: float = 1.0
    """The rule's `max_norm`, where it has one."""
    options: tyro.conf.Suppress[Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """The rule's other hyper-parameters by name; the rule's own defaults for those that are not there."""
    policy_module: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A module that registers rules of your own, imported before the flags are made."""
    nonfinite: Literal["propagate", "zero", "skip", "raise"] = "propagate"
    """What a NaN or Inf in a gradient leads to."""
    guard: tuple[str, ...] = ()
    """What decides whether a step is taken at all; of several, any may skip it. None: no guard but a recommended one."""
    guard_options: tyro.conf.Suppress[Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """The guards' hyper-parameters as {"GUARD_OPTION": value}; the guards' own defaults for those that are not there."""
    log_global_norm: bool = True
    """Reduce the global norm on steps where the rule has no need of it (AdaGC under pp), so that it can be logged."""
    detect_desync: bool = False
    """Stop when ranks have clipped differently often or remember different norms; no collective more."""

    def policy(self) -> dist_clip.Policy:
        """Make the rule.

        Raises:
            ValueError, TypeError: no such rule, or an option that it refuses.
        """
        if self.clip == NONE:
            return dist_clip.GlobalNorm(max_norm=math.inf)
        if self.clip == RECOMMENDED:
            policy: dist_clip.Policy = dist_clip.recommended(self.max_norm)["policy"]
            return policy
        names = {option.name for option in options_of(parse_mode(self.clip)[0])}
        common = {COMMON: self.max_norm} if COMMON in names else {}
        return dist_clip.policy(self.clip, **{**common, **self.options})

    def guards(self) -> list[dist_clip.Guard]:
        """Make the guards.

        Raises:
            ValueError, TypeError: no such guard, or an option that it refuses.
        """
        guards = guards_from_flags(self.guard, self.guard_options, "--guard")
        return guards if self.guard or self.clip != RECOMMENDED else [dist_clip.recommended()["guard"]]


def flags_class() -> type[ClipConfig]:
    """Return a `ClipConfig` with a field for each flag of the rules that are registered now, from which tyro makes flags."""
    thresholds = [
        f"{rule}: {option.help}"
        for rule, cls in registered().items()
        for option in options_of(cls)
        if option.name == COMMON
    ]
    fields: list[tuple[str, Any, Any]] = [
        ("clip", Literal[(RECOMMENDED, NONE, *modes())], ClipConfig.clip),
        (COMMON, Annotated[float, tyro.conf.arg(help=" ".join(thresholds))], ClipConfig.max_norm),
    ]
    guard: Any = Literal[tuple(registered_guards())]
    fields.append(("guard", tuple[guard, ...], ClipConfig.guard))
    fields += [(flag.dest, *_field(flag)) for flag in (*policy_flags(), *guard_flags())]
    made = dataclasses.make_dataclass("ClipFlags", fields, bases=(ClipConfig,), frozen=True)
    made.__doc__ = ClipConfig.__doc__
    return made


def config_from_flags(flags: ClipConfig) -> ClipConfig:
    """Return what an instance of `flags_class` says, with the given flags as `options`.

    Raises:
        ValueError, TypeError: a flag of another rule than the chosen one, or a value that the rule refuses.
    """
    values = {flag.dest: _given(flag, getattr(flags, flag.dest)) for flag in policy_flags()}
    kept = {field.name: getattr(flags, field.name) for field in dataclasses.fields(ClipConfig)}
    rule = None if flags.clip in (NONE, RECOMMENDED) else parse_mode(flags.clip)[0]
    guarding = {flag.dest: _given(flag, getattr(flags, flag.dest)) for flag in guard_flags()}
    given = {dest: value for dest, value in guarding.items() if value is not None}
    options = options_from_flags(rule, values, f"--clip {flags.clip}")
    config = ClipConfig(**kept | {"options": options, "guard_options": given})
    config.policy()
    config.guards()
    return config


def _field(flag: PolicyFlag) -> tuple[Any, Any]:
    """Type and default of a flag. The default is the value that says that the flag was not given."""
    option = flag.option
    about = f"{flag.rule}: {option.help}"
    if option.type is bool and not option.required:
        return Annotated[bool, tyro.conf.arg(help=about)], option.default
    kind: Any = Literal[option.choices] if option.choices else option.type
    shown = "{" + ",".join(map(str, option.choices)) + "}" if option.choices else option.type.__name__.upper()
    return Annotated[kind | None, tyro.conf.arg(help=about, metavar=shown, help_behavior_hint=f"({flag.hint})")], None


def _given(flag: PolicyFlag, value: Any) -> Any:
    return None if flag.option.type is bool and value == flag.option.default else value


def build_clipper(parallel: ParallelModel, cfg: ClipConfig) -> dist_clip.GradClipper:
    # Under pipeline parallelism, the one thing to say is which ranks hold the other stages: a rank cannot know it.
    return dist_clip.GradClipper(
        parallel.module,
        cfg.policy(),
        pp_group=parallel.pp_group,
        nonfinite=cfg.nonfinite,
        guard=cfg.guards() or None,
        log_global_norm=cfg.log_global_norm,
        detect_desync=cfg.detect_desync,
    )
