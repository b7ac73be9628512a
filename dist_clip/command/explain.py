"""What a configuration means: the rule in words and its options, with the defaults beside them."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import dist_clip
from dist_clip.command.text import table
from dist_clip.guards import Guard, registered_guards
from dist_clip.monitor import read_run
from dist_clip.policies import Policy, options_of, registered


def explain(config: str) -> str:
    """Return what `config` means: see ``dist-clip explain --help``.

    Raises:
        ValueError, TypeError: it names no policy and no guard, or an option that there is not.

    Example:
        >>> from dist_clip.command.explain import explain
        >>> print(explain("skipabove max_norm=10").partition(".")[0])
        SkipAbove: Skips a step whose global norm exceeds a fixed threshold
    """
    return "\n\n".join(_about(each) for each in _parts(config))


def _parts(config: str) -> list[Policy | Guard]:
    if config == "recommended":
        chosen = dist_clip.recommended()
        return [chosen["policy"], chosen["guard"]]
    path = Path(config)
    if path.is_dir() or path.suffix == ".jsonl":
        header = read_run(path).header
        return [_of_class(entry) for entry in (header["policy"], *header.get("guards", []))]
    text = path.read_text(encoding="utf-8") if path.suffix == ".json" else config
    if text.lstrip().startswith("{"):
        spec = json.loads(text)
        if {"policy", "guard"} & set(spec):
            guards = spec.get("guard") or []
            found = [dist_clip.policy(spec["policy"])] if "policy" in spec else []
            return [*found, *map(dist_clip.guard, guards if isinstance(guards, list) else [guards])]
        return [_one(spec, str(spec.get("name")))]
    return [_one(text, text.split()[0] if text.split() else "")]


def _one(spec: Any, name: str) -> Policy | Guard:
    guard = name in registered_guards()
    return dist_clip.guard(spec) if guard else dist_clip.policy(spec)


def _of_class(config: dict[str, Any]) -> Policy | Guard:
    """Return the policy or guard whose `config` this is."""
    kind = "policy" if "policy" in config else "guard"
    known: dict[str, type[Any]] = registered() if kind == "policy" else registered_guards()
    cls = next((cls for cls in known.values() if cls.__name__ == config[kind]), None)
    if cls is None:
        raise ValueError(f"no {kind} is called {config[kind]!r} here: import the module that registers it")
    names = {field.name for field in dataclasses.fields(cls)}
    return cls(**{key: value for key, value in config.items() if key in names})


def _about(thing: Policy | Guard) -> str:
    cls = type(thing)
    doc = inspect.cleandoc(cls.__doc__ or "")
    rows = []
    scope = getattr(thing, "scope", None)
    if any(field.name == "scope" for field in dataclasses.fields(thing)):  # type: ignore[arg-type]
        default = next(f.default for f in dataclasses.fields(thing) if f.name == "scope")  # type: ignore[arg-type]
        rows.append(
            ("scope", str(scope), _default(scope, default), "what one element is: a tensor, a shard, or the model")
        )
    for option in options_of(cls):
        value = getattr(thing, option.name)
        default = "required" if option.required else _default(value, option.default)
        rows.append((option.name, _text(value), default, option.help))
    words = doc.split("\n\nArgs:")[0]
    head, _, rest = words.partition("\n\n")
    options = table(("option", "value", "default", "meaning"), rows) if rows else "It has no options."
    return "\n\n".join(part for part in (f"{cls.__name__}: {' '.join(head.split())}", rest, options) if part)


def _default(value: Any, default: Any) -> str:
    return "" if value == default else _text(default)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
