"""Layer and kind of a tensor, from its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Group:
    """Where a tensor is in the model.

    Attributes:
        layer: number of its layer; None outside of the layers.
        kind: what it is in its layer, the same for the tensors of all layers that correspond.
    """

    layer: int | None
    kind: str


def groups_of(names: Iterable[str]) -> dict[str, Group]:
    """Return the layer and kind of each FQN. The first number in a name is its layer, other numbers become ``*``.

    What stands before the number is left out, unless the model has several stacks of layers.

    Example:
        >>> from dist_clip.monitor import groups_of
        >>> groups_of(["embed.weight", "blocks.3.attn.wq.weight"])["blocks.3.attn.wq.weight"]
        Group(layer=3, kind='attn.wq')
    """
    parts = {name: name.partition("@")[0].split(".") for name in names}
    layers = {name: next((i for i, part in enumerate(path) if part.isdecimal()), None) for name, path in parts.items()}
    stacks = {tuple(parts[name][:place]) for name, place in layers.items() if place is not None}
    groups = {}
    for name, path in parts.items():
        place = layers[name]
        if place is None:
            groups[name] = Group(None, _kind(path))
        else:
            stack = path[:place] if len(stacks) > 1 else []
            groups[name] = Group(int(path[place]), _kind([*stack, *path[place + 1 :]]))
    return groups


def _kind(path: list[str]) -> str:
    kept = ["*" if part.isdecimal() else part for part in path]
    if len(kept) > 1 and kept[-1] == "weight":
        kept.pop()
    return ".".join(kept)
