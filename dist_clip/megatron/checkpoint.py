"""The clipping state in Megatron's checkpoints: that of the whole model, as plain values that every rank saves alike.

Plain values go to the common part of a distributed checkpoint, which does not depend on the layout, so that it loads
under any tensor, pipeline, expert and data parallelism. Names and values are packed, one tensor a slot, so that
thousands of experts do not become thousands of tiny tensors.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_clip.layouts.process_groups import gather
from dist_clip.memory import Memory
from dist_clip.memory.snapshot import cleared, restore, snapshot

KEY = "dist_clip"
"""Key of the clipping state in an optimizer's state dict."""

_BYTES = "bytes"

Packed = list[dict[str, Any]]


def save(memory: Memory, pp_group: dist.ProcessGroup | None) -> dict[str, Any]:
    """Return the state of the whole model. Collective over the pipeline stages (over all ranks with scope "shard")."""
    mine = snapshot(memory)
    stages = [mine] if pp_group is None else list(gather(mine, pp_group).values())
    tensors: dict[str, Mapping[str, Tensor]] = {}
    for stage in stages:
        tensors.update({name: entry for name, entry in stage["tensors"].items() if name not in mine["shards"]})
    payload = {**stages[0], "tensors": pack(_without(tensors, *(stage["shards"] for stage in stages)))}
    payload["shards"] = {}
    for k, guard in payload.get("guards", {}).items():
        everywhere: dict[str, Mapping[str, Tensor]] = {}
        for stage in stages:
            everywhere.update(stage["guards"][k]["tensors"])
        payload["guards"] = {**payload["guards"], k: {**guard, "tensors": pack(everywhere)}}
    if any(group.per_shard for group in memory.groups):
        # Only the rank that holds a shard can use its state, so states are kept by rank.
        shards = {name: mine["tensors"][name] for name in mine["shards"]}
        payload["shards"] = gather({"shards": mine["shards"], "tensors": pack(shards)}, None)
    return payload


def load(memory: Memory, payload: Any) -> None:
    """Load what `save` returned, under this layout or another. Collective with scope "shard".

    Warns if the layout has changed, so that the states of shards start afresh.

    Raises:
        ValueError: the state does not fit. Names the tensors that are missing or unknown in the whole model, on every
            rank.
    """
    if not isinstance(payload, Mapping) or not isinstance(payload.get("tensors"), list):
        raise ValueError(f"the checkpoint's {KEY!r} entry is no state of a GradClipper: {type(payload).__name__}")
    coded = payload.get("format_version") == 1
    state = {**payload, "tensors": unpack(payload["tensors"], coded), "shards": {}}
    _check_names(memory, state["tensors"])
    if "guards" in payload:
        guards = payload["guards"].items()
        state["guards"] = {k: {**guard, "tensors": unpack(guard["tensors"], False)} for k, guard in guards}
    shards: Mapping[int, Any] = payload["shards"]
    if shards:
        mine = shards.get(dist.get_rank(), {"shards": {}, "tensors": []})
        own = snapshot(memory)["shards"]
        fits = mine["shards"] == own and len(shards) == dist.get_world_size()
        if all(gather(fits, None).values()):
            state["shards"] = dict(mine["shards"])
            state["tensors"].update(unpack(mine["tensors"], coded))
        else:
            warnings.warn(
                "scope 'shard': the checkpoint was saved under another layout, so what each shard remembers does not fit "
                "and starts afresh, with its next norm",
                stacklevel=2,
            )
            for name in own:
                state["tensors"][name] = cleared(memory.policy_for(name), int(state["step"]))
            state["shards"] = own
    restore(memory, state)


def to_bytes(payload: dict[str, Any] | None) -> dict[str, bytes]:
    """Return the payload as one plain value, for a checkpoint that loads only what a state dict has a place for.

    None: the empty place, for loading. torch.distributed.checkpoint saves Megatron-FSDP's state dicts and loads into them.
    """
    buffer = io.BytesIO()
    if payload is not None:
        torch.save(payload, buffer)
    return {_BYTES: buffer.getvalue()}


def from_bytes(found: Any) -> Any:
    """Return what `to_bytes` got, None from an empty place; anything else as it is."""
    if not isinstance(found, Mapping) or set(found) != {_BYTES}:
        return found
    return torch.load(io.BytesIO(found[_BYTES]), weights_only=True) if found[_BYTES] else None


def pack(tensors: Mapping[str, Mapping[str, Tensor]]) -> Packed:
    """Return {name: {slot: tensor}} as [{"names": [...], "slots": {slot: n rows}, "nan": {slot: bool n rows}}].

    Names with equal slots share an entry. "nan" marks the NaNs of a slot, which are saved as 0. Megatron compares what
    the ranks save and would warn of NaNs, which differ from themselves.
    """
    by_slots: dict[tuple[Any, ...], list[str]] = {}
    for name, entry in tensors.items():
        key = tuple((slot, tuple(value.shape)) for slot, value in sorted(entry.items()))
        by_slots.setdefault(key, []).append(name)
    packed = []
    for key, names in by_slots.items():
        rows = {slot: torch.stack([tensors[name][slot] for name in names]) for slot, _ in key}
        nan = {slot: value.isnan() for slot, value in rows.items() if bool(value.isnan().any())}
        slots = {slot: torch.where(nan[slot], 0.0, value) if slot in nan else value for slot, value in rows.items()}
        packed.append({"names": names, "slots": slots, "nan": nan})
    return packed


def unpack(packed: Packed, coded: bool) -> dict[str, dict[str, Tensor]]:
    """Return what was packed by `pack`. `coded`: by format version 1, which saved NaN as -1."""
    out: dict[str, dict[str, Tensor]] = {}
    for part in packed:
        slots: dict[str, Tensor] = {}
        for slot, rows in part["slots"].items():
            nan = rows < 0 if coded else part["nan"].get(slot)
            slots[slot] = rows if nan is None or not rows.is_floating_point() else torch.where(nan, torch.nan, rows)
        for k, name in enumerate(part["names"]):
            out[name] = {slot: rows[k] for slot, rows in slots.items()}
    return out


def _without(tensors: dict[str, Mapping[str, Tensor]], *names: Iterable[str]) -> dict[str, Mapping[str, Tensor]]:
    dropped = {name for each in names for name in each}
    return {name: entry for name, entry in tensors.items() if name not in dropped}


def _check_names(memory: Memory, loaded: Mapping[str, Any]) -> None:
    """Raise ValueError, the same on every rank, if tensors of any pipeline stage are missing or unknown."""
    everywhere = {*memory.layout.names, *memory.names_elsewhere}
    elements = {name: memory.policy_for(name).elements for name in everywhere}
    expected = {name for name, kind in elements.items() if not (kind.one or kind.per_rank)}
    missing, unknown = sorted(expected - set(loaded)), sorted(set(loaded) - everywhere)
    if missing or unknown:
        raise ValueError(
            f"the checkpoint's clipping state does not fit this model: missing {missing}, unknown {unknown}"
        )
