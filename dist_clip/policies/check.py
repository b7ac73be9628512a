"""Checks of a policy's hyper-parameters, whose errors show the policy, the name and the value."""

from __future__ import annotations

import math
import numbers


def check_frozen_dataclass(cls: type) -> None:
    """Raise unless `cls` is a frozen dataclass.

    Raises:
        TypeError: it is none.
    """
    params = getattr(cls, "__dataclass_params__", None)
    if params is None or not params.frozen:
        raise TypeError(
            f"{cls.__name__} must be a frozen dataclass (@dataclasses.dataclass(frozen=True)): its hyper-parameters are "
            "saved with the state and compared between ranks, so they must be fields that cannot change"
        )


def check_number(
    owner: str, name: str, value: object, low: float, high: float = math.inf, *, open_low: bool = False
) -> None:
    """Raise TypeError or ValueError unless `value` is a real number in [low, high] ((low, high] with `open_low`)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{owner}: {name} must be a number, got {value!r}")
    number = float(value)
    if math.isnan(number) or number > high or number < low or (open_low and number == low):
        upper = "" if math.isinf(high) else f" and at most {high:g}"
        raise ValueError(f"{owner}: {name} must be {'above' if open_low else 'at least'} {low:g}{upper}, got {value!r}")


def check_finite(owner: str, name: str, value: object, low: float, *, open_low: bool = False) -> None:
    """Raise TypeError or ValueError unless `value` is finite, real, and at least `low` (above it with `open_low`)."""
    check_number(owner, name, value, low, open_low=open_low)
    if math.isinf(float(value)):  # type: ignore[arg-type]
        raise ValueError(f"{owner}: {name} must be finite, got {value!r}")


def check_fraction(owner: str, name: str, value: object) -> None:
    """Raise TypeError or ValueError unless `value` is a real number in [0, 1), the range of an average's decay."""
    check_number(owner, name, value, 0.0, 1.0)
    if float(value) == 1.0:  # type: ignore[arg-type]
        raise ValueError(f"{owner}: {name} must be below 1 (at 1 the average would never move), got {value!r}")


def check_count(owner: str, name: str, value: object, low: int) -> None:
    """Raise TypeError unless `value` is an int, and ValueError unless it is at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: {name} must be an int, got {value!r}")
    if value < low:
        raise ValueError(f"{owner}: {name} must be at least {low}, got {value!r}")


def check_choice(owner: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{owner}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
