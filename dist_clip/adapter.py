"""What the adapters for training frameworks share: the clipper, its state as JSON, its numbers, no second clip."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_clip import guards, policies
from dist_clip.clipper import GradClipper
from dist_clip.guards import Guard
from dist_clip.policies import Policy
from dist_clip.recommended import recommended
from dist_clip.step import ClipReport

PolicySpec = Policy | str | Mapping[str, Any]
"""What `dist_clip.policy` takes."""
GuardSpec = Guard | str | Mapping[str, Any]
"""What `dist_clip.guard` takes."""


def make_clipper(
    target: Any,
    policy: PolicySpec | None = None,
    guard: GuardSpec | Sequence[GuardSpec] | bool | None = None,
    **options: Any,
) -> GradClipper:
    """Make a clipper from what a user says in a configuration.

    Args:
        target: what `GradClipper` takes.
        policy: a policy in any form of `dist_clip.policy`; None: that of `dist_clip.recommended`.
        guard: a guard in any form of `dist_clip.guard`, or a list of them. None: the recommended one where the policy
            is the recommended one, else none. False: none.
        options: more keyword arguments of `GradClipper`.

    Raises:
        TypeError, ValueError, LayoutError: as `dist_clip.policy`, `dist_clip.guard` and `GradClipper`.

    Example:
        >>> clipper = make_clipper(torch.nn.Linear(2, 2), "logclip ratio=3", ["median", "skipabove max_norm=9"])
        >>> clipper.policy.ratio
        3
    """
    chosen = recommended()
    if policy is not None:
        chosen = {"policy": policies.policy(policy), "guard": None}
    if guard is True:
        raise TypeError("guard=True names no guard: pass a guard, a name such as 'median', or a list of them")
    if guard is False:
        chosen["guard"] = None
    elif isinstance(guard, Sequence) and not isinstance(guard, str):
        chosen["guard"] = [guards.guard(each) for each in guard] or None
    elif guard is not None:
        chosen["guard"] = guards.guard(guard)
    return GradClipper(target, **chosen, **options)


_TENSOR = "tensor"


def to_json(state: Any) -> Any:
    """Return a state dict as what JSON can store, each number exactly.

    Example:
        >>> to_json({"level": torch.tensor([0.1])})
        {'level': {'tensor': 'float32', 'shape': [1], 'values': [0.10000000149011612]}}
    """
    if isinstance(state, Tensor):
        values = [_number(value) for value in state.flatten().tolist()]
        return {_TENSOR: str(state.dtype).removeprefix("torch."), "shape": list(state.shape), "values": values}
    if isinstance(state, Mapping):
        return {key: to_json(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [to_json(value) for value in state]
    return _number(state)


def _number(value: Any) -> Any:
    """Return a number as JSON has it: NaN and the infinities, which it has not, as text."""
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def from_json(stored: Any) -> Any:
    """Return the state dict that `to_json` made `stored` of.

    Example:
        >>> from_json(to_json({"level": torch.tensor([0.1])}))
        {'level': tensor([0.1000])}
    """
    if isinstance(stored, Mapping):
        if set(stored) == {_TENSOR, "shape", "values"}:
            values = [from_json(value) for value in stored["values"]]
            return torch.tensor(values, dtype=getattr(torch, stored[_TENSOR])).reshape(stored["shape"])
        return {key: from_json(value) for key, value in stored.items()}
    if isinstance(stored, list):
        return [from_json(value) for value in stored]
    return float(stored) if stored in ("nan", "inf", "-inf") else stored


def numbers_of(report: ClipReport) -> dict[str, float]:
    """Return the metrics of a report as numbers, at one copy to the host.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> numbers_of(make_clipper(model, "global").clip_())["clip/fraction"]
        0.0
    """
    metrics = report.metrics()
    return dict(zip(metrics, torch.stack([value.float() for value in metrics.values()]).tolist(), strict=True))


def refuse_native_clip(framework: str, setting: str, value: object, off: str = "None") -> None:
    """Raise ValueError because `framework` would clip as well: `setting` is `value`, and `off` switches it off."""
    raise ValueError(
        f"{framework} clips too, with {setting}={value!r}: gradients would be clipped twice. Set {setting}={off}, and the "
        "policy's own threshold instead"
    )
