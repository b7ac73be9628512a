"""The clipper's state in Megatron's checkpoints: the whole model's, as plain values that every rank saves alike.

Plain values go to the common part of a distributed checkpoint, which is free of the layout: it loads under any tensor,
pipeline, expert and data parallelism. Names and values are packed, one tensor a slot, so that thousands of experts do not
become thousands of tiny tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_clip.state import cleared, restore, snapshot

if TYPE_CHECKING:
    from dist_clip.clipper import GradClipper

KEY = "dist_clip"
"""Where the state is in an optimizer's state dict."""

Packed = list[dict[str, Any]]


def save(clipper: GradClipper) -> dict[str, Any]:
    """The state of the whole model. Collective over the pipeline stages (over all ranks with scope "shard")."""
    mine = snapshot(clipper)
    stages = _gather(mine, clipper.pp_group)
    tensors: dict[str, dict[str, Tensor]] = {}
    for stage in stages:
        tensors.update({name: entry for name, entry in stage["tensors"].items() if name not in mine["shards"]})
    payload = {**stages[0], "tensors": pack(_without(tensors, *(stage["shards"] for stage in stages)))}
    payload["shards"] = {}
    if any(domain.policy.rule_scope == "shard" for domain in clipper.domains):
        # A shard's state is of use to the rank that holds that shard, and to nobody else.
        shards = {name: mine["tensors"][name] for name in mine["shards"]}
        everyone = _gather({"shards": mine["shards"], "tensors": pack(shards)}, dist.group.WORLD)
        payload["shards"] = dict(enumerate(everyone))
    return payload


def load(clipper: GradClipper, payload: Any) -> None:
    """Load what `save` made, under this layout or another.

    Raises:
        ValueError: it does not fit; tensors that are missing or unknown anywhere in the model are named, on every rank.
    """
    if not isinstance(payload, Mapping) or not isinstance(payload.get("tensors"), list):
        raise ValueError(f"the checkpoint's {KEY!r} entry is no state of a GradClipper: {type(payload).__name__}")
    state = {**payload, "tensors": unpack(payload["tensors"]), "shards": {}}
    _check_names(clipper, state["tensors"])
    shards: Mapping[int, Any] = payload["shards"]
    if shards:
        mine = shards.get(dist.get_rank(), {"shards": {}, "tensors": []})
        own = snapshot(clipper)["shards"]
        fits = mine["shards"] == own and len(shards) == dist.get_world_size()
        if _all_agree(fits, clipper.device):
            state["shards"] = dict(mine["shards"])
            state["tensors"].update(unpack(mine["tensors"]))
        else:
            warnings.warn(
                "scope 'shard': the checkpoint was saved under another layout, so what each shard remembers does not fit "
                "and starts afresh, with its next norm",
                stacklevel=2,
            )
            for name in own:
                state["tensors"][name] = cleared(clipper.policy_for(name), int(state["step"]))
            state["shards"] = own
    restore(clipper, state)


def pack(tensors: Mapping[str, Mapping[str, Tensor]]) -> Packed:
    """{name: {slot: tensor}} as [{"names": [...], "slots": {slot: tensor of n rows}}], names of equal slots together."""
    by_slots: dict[tuple[str, ...], list[str]] = {}
    for name, entry in tensors.items():
        by_slots.setdefault(tuple(sorted(entry)), []).append(name)
    return [
        {
            "names": names,
            "slots": {slot: torch.stack([_coded(tensors[name][slot]) for name in names]) for slot in slots},
        }
        for slots, names in by_slots.items()
    ]


def unpack(packed: Packed) -> dict[str, dict[str, Tensor]]:
    out: dict[str, dict[str, Tensor]] = {}
    for part in packed:
        for k, name in enumerate(part["names"]):
            out[name] = {slot: _decoded(rows[k]) for slot, rows in part["slots"].items()}
    return out


def _coded(value: Tensor) -> Tensor:
    """Rows of a warm-up's record that hold nothing are NaN, which differs from itself: Megatron, which compares what the
    ranks save, would warn. All that the state holds is at least 0."""
    return torch.where(value.isnan(), -1.0, value) if value.is_floating_point() else value


def _decoded(value: Tensor) -> Tensor:
    return torch.where(value < 0, torch.nan, value) if value.is_floating_point() else value


def _without(tensors: dict[str, dict[str, Tensor]], *names: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    dropped = {name for each in names for name in each}
    return {name: entry for name, entry in tensors.items() if name not in dropped}


def _check_names(clipper: GradClipper, loaded: Mapping[str, Any]) -> None:
    """The same error on every rank, also where only another stage's tensors are missing."""
    everywhere = {*clipper.layout.names, *clipper.names_elsewhere}
    expected = {name for name in everywhere if clipper.policy_for(name).rule_scope == "tensor"}
    missing, unknown = sorted(expected - set(loaded)), sorted(set(loaded) - everywhere)
    if missing or unknown:
        raise ValueError(
            f"the checkpoint's clipping state does not fit this model: missing {missing}, unknown {unknown}"
        )


def _gather(mine: Any, group: Any) -> list[Any]:
    if group is None or group.size() == 1:
        return [mine]
    gathered: list[Any] = [None] * group.size()
    dist.all_gather_object(gathered, mine, group=group)
    return gathered


def _all_agree(fits: bool, device: torch.device) -> bool:
    flag = torch.tensor(float(fits), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag > 0)
