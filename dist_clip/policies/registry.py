"""The registry of policies by name, with their options, for command lines, tables and tests.

Names, types, defaults and help texts of the options come from the policy's dataclass and its docstring.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin

from dist_clip.policies.base import Policy, Scope
from dist_clip.policies.check import check_frozen_dataclass

_P = TypeVar("_P", bound=type[Policy])

_registered: dict[str, type[Policy]] = {}


@dataclasses.dataclass(frozen=True)
class Option:
    """One hyper-parameter of a policy.

    Attributes:
        name: name of the dataclass's field.
        type: int, float, bool or str; for ``X | None`` it is X; `object` for any other type, which no flag can set.
        default: the field's default; `dataclasses.MISSING` where the option must be given.
        choices: the values of a Literal, else empty.
        optional: whether None is a value.
        help: the field's entry in the docstring's "Args", on one line.
    """

    name: str
    type: type
    default: Any
    choices: tuple[Any, ...]
    optional: bool
    help: str

    @property
    def required(self) -> bool:
        """Whether the option must be given."""
        return self.default is dataclasses.MISSING


def register(name: str) -> Callable[[_P], _P]:
    """Return a class decorator that makes a policy known under `name`.

    Launchers, Megatron's flags, the benchmark, the comparison tables and the test matrix then know it.

    Args:
        name: lower-case letters and digits, a letter first.

    Raises:
        ValueError: the name is taken by another class, or contains other characters.

    Example:
        >>> import dataclasses, dist_clip
        >>> @dist_clip.register("halve")
        ... @dataclasses.dataclass(frozen=True)
        ... class Halve(dist_clip.Policy):
        ...     def step(self, state, inputs):
        ...         return inputs.norms * 0 + 0.5, state
        >>> dist_clip.policy("halve")
        Halve()
    """
    check_name("policy", name)

    def decorate(cls: _P) -> _P:
        enter(_registered, "policy", name, cls)
        return cls

    return decorate


def check_name(kind: str, name: str) -> None:
    """Raise ValueError unless `name` may be the name of a "policy" or a "guard"."""
    if not re.fullmatch(r"[a-z][a-z0-9]*", name):
        raise ValueError(f"a {kind}'s name must be lower-case letters and digits, got {name!r}")


def enter(known: dict[str, type[Any]], kind: str, name: str, cls: type) -> None:
    """Enter `cls` into a registry of that kind of classes, "policy" or "guard".

    Raises:
        ValueError: the name is taken by another class.
    """
    taken = known.get(name)
    # The same class may register again, because notebook cells and reloads execute its module again.
    if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"the {kind} name {name!r} is taken by {taken.__module__}.{taken.__qualname__}")
    known[name] = cls


def check_options(name: str, options: Iterable[str], known: Sequence[str]) -> None:
    """Raise TypeError if any of the `options` that were given for `name` is none of the `known`."""
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(f"{name} has no option {', '.join(unknown)}; it has {', '.join(known)}")


def registered() -> dict[str, type[Policy]]:
    """Return {name: policy class}, in the order of registration."""
    return dict(_registered)


def policy(spec: str | Mapping[str, Any] | Policy, **options: Any) -> Policy:
    """Return a policy by its registered name, with the given hyper-parameters.

    Args:
        spec: "global", "adagc", "logclip", "zclip", ... or a name of `register`; a scope may follow: "adagc-shard",
            "logclip-global", "zclip-tensor". Or all in one, as configuration files and command lines have it:
            "logclip ratio=3 post_max_norm=1", {"name": "logclip", "ratio": 3}, or that as a JSON text. Or a policy, which
            is returned as it is.
        options: the policy's hyper-parameters; the others have their defaults.

    Raises:
        ValueError: no policy or scope of that name, two different scopes, a text that is not of this form, an option given
            twice, or a value out of range.
        TypeError: an option that the policy does not have, or a value of the wrong type.

    Example:
        >>> import dist_clip
        >>> dist_clip.policy("logclip", ratio=3.0).ratio
        3.0
        >>> dist_clip.policy("adagc-global").scope
        'global'
        >>> dist_clip.policy("logclip ratio=3") == dist_clip.policy({"name": "logclip", "ratio": 3})
        True
    """
    if isinstance(spec, Policy):
        refuse_options(spec, options)
        return spec
    name, options = read_spec("policy", spec, options)
    cls, fixed = parse_mode(name)
    check_options(
        name, options, [*(option.name for option in options_of(cls)), *(["scope"] if _has_scope(cls) else [])]
    )
    if "scope" in options and fixed and options["scope"] != fixed["scope"]:
        raise ValueError(f"{name!r} says one scope and scope={options['scope']!r} another: pass one of them")
    return cls(**{**fixed, **options})


def refuse_options(made: object, options: Mapping[str, Any]) -> None:
    """Raise TypeError for options beside a policy or a guard that is made already."""
    if options:
        raise TypeError(f"{type(made).__name__} is made already: options ({', '.join(options)}) go with a name")


def read_spec(kind: str, spec: str | Mapping[str, Any], options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name and the options of a "policy" or a "guard" that `spec` and `options` describe.

    Raises:
        TypeError: `spec` is neither text nor a mapping.
        ValueError: no name, a text that is not of one of the forms, or an option given twice.
    """
    forms = 'a name, "NAME option=value ...", {"name": NAME, option: value}, or that as JSON'
    if isinstance(spec, str):
        found = _read_json(kind, spec) if spec.lstrip().startswith("{") else _read_words(kind, spec, forms)
    elif isinstance(spec, Mapping):
        found = dict(spec)
    else:
        raise TypeError(f"a {kind} is {forms}, or a {kind.capitalize()}, got {spec!r}")
    name = found.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(f"a {kind} is {forms}; {spec!r} has no name")
    twice = sorted(found.keys() & options.keys())
    if twice:
        raise ValueError(f"the {kind} {name!r} is given {', '.join(twice)} twice")
    return name, {**found, **options}


def _read_json(kind: str, text: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise ValueError(f"a {kind} that begins with a brace must be JSON, got {text!r} ({error})") from None
    return found


def _read_words(kind: str, text: str, forms: str) -> dict[str, Any]:
    """Read "logclip ratio=3 scope=global": values are JSON where they can be, else text."""
    name, *words = text.split() or [""]
    found: dict[str, Any] = {"name": name or None}
    for word in words:
        option, equals, value = word.partition("=")
        if not (option and equals):
            raise ValueError(f"a {kind} is {forms}; {word!r} in {text!r} is no option=value")
        if option in found:
            raise ValueError(f"the {kind} {name!r} is given {option} twice")
        try:
            # As Python spells them, too.
            found[option] = (
                {"True": True, "False": False, "None": None}[value] if value in _PYTHON else json.loads(value)
            )
        except ValueError:
            found[option] = value
    return found


_PYTHON = ("True", "False", "None")


def modes() -> tuple[str, ...]:
    """Return all names that `policy` takes: each registered name, followed by its names with other scopes."""
    out: list[str] = []
    for name, cls in _registered.items():
        out.append(name)
        if _has_scope(cls):
            out += [f"{name}-{scope}" for scope in get_args(Scope) if scope != _default_scope(cls)]
    return tuple(out)


def parse_mode(mode: str) -> tuple[type[Policy], dict[str, Any]]:
    """Return the policy class that `mode` names, and the options that it fixes: the scope, if it names one.

    Raises:
        ValueError: no policy of that name, or no such scope of it.
    """
    name, _, scope = mode.partition("-")
    cls = _registered.get(name)
    if cls is None or (scope and (scope not in get_args(Scope) or not _has_scope(cls))):
        raise ValueError(f"no policy is called {mode!r}; there are {', '.join(modes())}")
    return cls, {"scope": scope} if scope else {}


def options_of(cls: type[Any]) -> tuple[Option, ...]:
    """Return the hyper-parameters of a policy's or a guard's class in their order, without its scope."""
    hints = typing.get_type_hints(cls)
    helps = _docstring_args(cls.__doc__ or "")
    out = []
    for field in _fields_of(cls):
        if field.name == "scope" or not field.init:
            continue
        kind, choices, optional = _resolve(hints[field.name])
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        out.append(Option(field.name, kind, default, choices, optional, helps.get(field.name, "")))
    return tuple(out)


def _resolve(hint: Any) -> tuple[type, tuple[Any, ...], bool]:
    """Return the type, the choices, and whether None is allowed, of an annotation."""
    optional = False
    if get_origin(hint) in (typing.Union, types.UnionType):
        members = [member for member in get_args(hint) if member is not type(None)]
        optional = len(members) < len(get_args(hint))
        if len(members) == 1:
            hint = members[0]
    if get_origin(hint) is Literal:
        return type(get_args(hint)[0]), get_args(hint), optional
    return (hint if hint in (int, float, bool, str) else object), (), optional


def _docstring_args(doc: str) -> dict[str, str]:
    """Return {name: description} of the entries of a Google-style "Args:" section."""
    section = re.search(r"^Args:\n((?:    .*\n|\n)*)", inspect.cleandoc(doc) + "\n", re.MULTILINE)
    entries = re.split(r"^    (\w+): ", section[1], flags=re.MULTILINE)[1:] if section else []
    return {name: " ".join(text.split()) for name, text in zip(entries[::2], entries[1::2], strict=True)}


def _has_scope(cls: type[Policy]) -> bool:
    return any(field.name == "scope" for field in _fields_of(cls))


def _default_scope(cls: type[Policy]) -> object:
    return next(field.default for field in _fields_of(cls) if field.name == "scope")


def _fields_of(cls: type[Any]) -> tuple[dataclasses.Field[Any], ...]:
    # Not in `register`, which may stand below the decorator that makes the class a dataclass.
    check_frozen_dataclass(cls)
    return dataclasses.fields(cls)
