"""The state of the whole model as one entry of a checkpoint, for models of thousands of tensors.

torch.distributed.checkpoint plans, writes and reads each tensor of a state dict by itself, which for a few numbers a
tensor of the model takes longer than the model. One entry cannot be put together from what the pipeline stages have, so
each rank holds that of all stages, and all save the same.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_clip.layouts.process_groups import gather
from dist_clip.memory.guard_states import KEY as GUARDS
from dist_clip.memory.memory import Memory
from dist_clip.memory.state_dict import load_state_dict, state_dict

_KEY = "packed"


class PackedState:
    """A Stateful of `torch.distributed.checkpoint`; `GradClipper.packed` makes it.

    Args:
        memory: what is saved and loaded.
        pp_group: the group across pipeline stages; None without them.
        strict: whether loading raises where the state does not fit.

    Raises:
        ValueError: a policy has scope "shard", whose states belong to ranks.
    """

    def __init__(self, memory: Memory, pp_group: dist.ProcessGroup | None, *, strict: bool) -> None:
        if any(group.per_shard for group in memory.groups):
            raise ValueError("packed() has the state of whole tensors; with scope 'shard' save the clipper itself")
        self._memory, self._pp_group, self._strict = memory, pp_group, strict

    def state_dict(self) -> dict[str, bytes]:
        """Return the state of the whole model under one key. Collective over the pipeline stages; syncs the host."""
        mine = state_dict(self._memory)
        packed = {place: _pack(tensors) for place, tensors in _by_place(mine).items()}
        stages = [packed] if self._pp_group is None else list(gather(packed, self._pp_group).values())
        whole = {place: [part for stage in stages for part in stage[place]] for place in packed}
        file = io.BytesIO()
        torch.save(_with(mine, whole), file)
        return {_KEY: file.getvalue()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned, under this layout or another.

        Raises:
            ValueError: it is damaged, or does not fit.
        """
        try:
            loaded = torch.load(io.BytesIO(state[_KEY]), weights_only=True)
            loaded = _with(loaded, {place: _unpack(parts) for place, parts in _by_place(loaded).items()})
        except Exception as error:  # zipfile, pickle and torch raise many classes
            raise ValueError(f"not a packed state of GradClipper, or a damaged one: {error}") from error
        load_state_dict(self._memory, loaded, strict=self._strict)


def _by_place(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a state dict has by tensor: of the policies under "", of each guard under its number."""
    return {"": state["tensors"], **{k: guard["tensors"] for k, guard in state.get(GUARDS, {}).items()}}


def _with(state: Mapping[str, Any], by_place: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict with other values in the places of `_by_place`."""
    guards = {k: {**guard, "tensors": by_place[k]} for k, guard in state.get(GUARDS, {}).items()}
    return {**state, "tensors": by_place[""], **({GUARDS: guards} if guards else {})}


def _pack(tensors: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return {name: {slot: value}} with one tensor, or one list of lists, for each slot of names with equal slots."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name, entry in tensors.items():
        alike.setdefault(tuple((slot, isinstance(value, Tensor)) for slot, value in entry.items()), []).append(name)
    return [
        {
            "names": names,
            "slots": {
                slot: torch.stack([tensors[name][slot] for name in names])
                if stacked
                else [tensors[name][slot] for name in names]
                for slot, stacked in slots
            },
        }
        for slots, names in alike.items()
    ]


def _unpack(packed: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for part in packed:
        columns = {slot: list(values) for slot, values in part["slots"].items()}
        for k, name in enumerate(part["names"]):
            out[name] = {slot: column[k] for slot, column in columns.items()}
    return out
