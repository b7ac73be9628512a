"""The guards' part of a snapshot and of a state dict: what each guard remembers, of the model and of each tensor by FQN."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from dist_clip.guards.base import IN_A_ROW
from dist_clip.memory.memory import GuardMemory, Memory
from dist_clip.policies.base import State

KEY = "guards"
"""Key of the guards' part; a clipper without guards has none."""

OnMismatch = Callable[[str], None]


def guard_states(memory: Memory) -> dict[str, Any]:
    """Return what the guards remember, copied to the CPU. Syncs the host.

    Returns:
        ``{"guards": {"0": {"guard": JSON, "model": {slot: tensor}, "tensors": {fqn: {slot: tensor}}}}}``, one entry a
        guard by its number, for guards that remember anything; nothing if none does. "model" has the slots that are not a
        tensor's.
    """
    entries = {str(k): _entry(held, memory.layout.names) for k, held in enumerate(memory.guards) if _remembers(held)}
    return {KEY: entries} if entries else {}


def _remembers(held: GuardMemory) -> bool:
    # A fixed threshold remembers nothing, and its checkpoints are those of a clipper without it.
    return bool(held.state) or held.guard.max_skips_in_a_row is not None


def _entry(held: GuardMemory, names: Collection[str]) -> dict[str, Any]:
    by_tensor = held.guard.tensor_slots
    model = {slot: value.cpu().clone() for slot, value in held.state.items() if slot not in by_tensor}
    columns = {slot: held.state[slot].cpu().movedim(-1, 0).clone().unbind() for slot in by_tensor}
    return {
        "guard": json.dumps(held.guard.config()),
        "model": {**model, IN_A_ROW: held.skips_in_a_row.cpu().clone()},
        "tensors": {name: {slot: columns[slot][i] for slot in by_tensor} for i, name in enumerate(names)},
    }


def checked_guard_states(
    memory: Memory, loaded: Mapping[str, Any], on_mismatch: OnMismatch, names: Collection[str] | None = None
) -> list[State]:
    """Return the guards' states from a snapshot or state dict, one a guard with its number of skips in a row among them.

    A guard starts afresh, with a warning, if the state has none, and after `on_mismatch` if it has another one there. If
    only hyper-parameters differ, the state is loaded after `on_mismatch`.

    Args:
        loaded: what has the guards' part; it may hold the whole model.
        names: tensors to load; those that are missing start afresh. None: all, and missing ones are an error.

    Raises:
        ValueError: a state that is damaged.
    """
    saved = loaded.get(KEY) or {}
    if not isinstance(saved, Mapping) or not all(isinstance(entry, Mapping) for entry in saved.values()):
        raise ValueError("the state's guards are damaged: they must be a dict of dicts")
    mine = {str(k) for k, held in enumerate(memory.guards) if _remembers(held)}
    if saved.keys() - mine:
        warnings.warn(
            f"the state is one of {len(saved)} guards and the clipper has {len(mine)} that remember anything: what the "
            "others remembered is lost",
            stacklevel=5,
        )
    states = []
    for k, held in enumerate(memory.guards):
        state = fresh_guard_state(held, len(memory.layout))
        entry = saved.get(str(k))
        if not _remembers(held):
            pass
        elif entry is None:
            warnings.warn(
                f"the state has nothing about {type(held.guard).__name__}, as it was saved without it: it starts afresh",
                stacklevel=5,
            )
        elif _fits(held, entry, on_mismatch):
            _fill(held, state, entry, memory.layout.names, names)
        states.append(state)
    return states


def fresh_guard_state(held: GuardMemory, n: int) -> State:
    """Return the state of a guard before the first step, with its number of skips in a row, on its device."""
    return {
        **held.guard.init_state(n, held.skips_in_a_row.device),
        IN_A_ROW: torch.zeros_like(held.skips_in_a_row),
    }


def store_guard_states(memory: Memory, states: list[State]) -> None:
    """Copy the states into `memory`, in place."""
    for held, state in zip(memory.guards, states, strict=True):
        held.skips_in_a_row.copy_(state[IN_A_ROW])
        for slot, value in held.state.items():
            value.copy_(state[slot])


def _fits(held: GuardMemory, entry: Mapping[str, Any], on_mismatch: OnMismatch) -> bool:
    mine = held.guard.config()
    try:
        saved = dict(json.loads(entry["guard"]))
        kind = saved["guard"]
    except (TypeError, ValueError, KeyError):
        raise ValueError(f"the state's guards are damaged: {entry.get('guard')!r} is none") from None
    if kind != mine["guard"]:
        on_mismatch(f"the state was made by another guard: it has {saved}, the clipper {mine}")
        return False
    changed = [
        f"{key} was {saved.get(key)!r} and is {mine.get(key)!r}"
        for key in sorted(saved.keys() | mine.keys())
        if json.dumps(saved.get(key)) != json.dumps(mine.get(key))
    ]
    if changed:
        on_mismatch(f"the state was made by another {kind}: {', '.join(changed)}")
        # A window of another length holds other values.
        model = entry.get("model")
        fresh = held.guard.init_state(1, torch.device("cpu"))
        shapes = {slot: value.shape for slot, value in fresh.items() if slot not in held.guard.tensor_slots}
        return isinstance(model, Mapping) and all(
            slot in model and model[slot].shape == shape for slot, shape in shapes.items()
        )
    return True


def _fill(
    held: GuardMemory, state: State, entry: Mapping[str, Any], mine: Collection[str], names: Collection[str] | None
) -> None:
    """Copy `entry` into `state`.

    Raises:
        ValueError: it lacks something, or has a wrong shape, NaN or Inf; the message says where.
    """
    where, by_tensor = type(held.guard).__name__, held.guard.tensor_slots
    model, tensors = entry.get("model"), entry.get("tensors")
    if not isinstance(model, Mapping) or not isinstance(tensors, Mapping):
        raise ValueError(f"the state of {where} is damaged: it has {sorted(entry)}")
    for slot, value in state.items():
        if slot not in by_tensor:
            value.copy_(_checked(f"{where}: {slot}", model.get(slot), value.shape))
    if not by_tensor:
        return
    missing = [name for name in mine if name not in tensors]
    if missing and names is None:
        raise ValueError(f"the state of {where} does not fit this model: missing {missing}")
    chosen = [(i, tensors[name]) for i, name in enumerate(mine) if name in tensors and (names is None or name in names)]
    if not chosen:
        return
    index = torch.tensor([i for i, _ in chosen], device=held.skips_in_a_row.device)
    for slot in by_tensor:
        shape = state[slot].shape[:-1]
        rows = torch.stack([_checked(f"{where}: {slot}", dict(row).get(slot), shape) for _, row in chosen])
        state[slot].index_copy_(-1, index, rows.movedim(0, -1).to(index.device, state[slot].dtype))


def _checked(where: str, value: Any, shape: torch.Size) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != shape:
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"the state of {where} has {got}, expected a tensor of shape {list(shape)}")
    if not bool(value.isfinite().all()):
        raise ValueError(f"the state of {where} has {value.tolist()}: it must be finite")
    return value.cpu()
