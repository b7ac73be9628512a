"""The table of what the clipper does with each tensor."""

from __future__ import annotations

from dist_clip.construction import Construction
from dist_clip.guards import Guard
from dist_clip.layouts import LogicalTensor
from dist_clip.layouts.process_groups import distributed, group_label
from dist_clip.memory import Memory, PolicyGroup
from dist_clip.reduction import Channel


def explain_table(memory: Memory, channel: Channel, made: Construction) -> str:
    """Return one row a tensor, followed by the collectives that a step costs."""
    plan = channel.plan
    header = ("tensor", "shape", "placement", "norm groups", "reduction", "policy", "counts")
    labels = {i: f"{type(g.policy).__name__}[{g.policy.scope}]" for g in memory.groups for i in g.indices}
    rows = [header]
    for i, tensor in enumerate(memory.layout):
        rows.append(
            (
                tensor.name + _note(tensor),
                "x".join(map(str, tensor.shape)) or "scalar",
                tensor.placement,
                " ".join(group_label(g) for g in tensor.norm_groups) or "none",
                plan.describe(i),
                labels[i],
                "yes" if made.counted[i] else "on an earlier stage",
            )
        )
    widths = [max(len(row[c]) for row in rows) for c in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    for collective in plan.collectives:
        lines.append(
            f"{collective.kind} over {group_label(collective.group)}: {len(collective.indices)} tensors, "
            f"{8 * len(collective.indices)} bytes a step"
        )
    if not plan.collectives:
        lines.append("no collective for tensor norms: every tensor is whole on this rank")
    lines.append(f"kernels: {made.kernels.name} ({made.kernels.why})")
    if channel.pp_group is not None:
        lines.append(
            f"pipeline {group_label(channel.pp_group)}: one gather of a few numbers on steps that need the global norm"
        )
    if distributed():
        lines.append(made.replicas.describe())
    lines += [_warmup(group, memory.calls) for group in memory.groups if memory.calls < _warmup_steps(group)]
    lines += [_post_clip(group, channel) for group in memory.groups if group.policy.post_max_norm is not None]
    lines += [_guard(held.guard, channel) for held in memory.guards]
    return "\n".join(lines)


def _note(tensor: LogicalTensor) -> str:
    if tensor.param is None:
        return " (held by other ranks)"
    return "" if tensor.param.requires_grad else " (frozen)"


def _warmup_steps(group: PolicyGroup) -> int:
    return getattr(group.policy, "warmup_steps", 0)


def _warmup(group: PolicyGroup, clips: int) -> str:
    return f"{group.pattern!r}: the rule begins after a warm-up of {_warmup_steps(group)} steps; {clips} clips so far"


def _guard(guard: Guard, channel: Channel) -> str:
    cost = "no collective more"
    if channel.pp_group is not None:
        cost = "on every step its numbers travel in the pipeline's gather"
    if "loss" in guard.needs() and distributed():
        how = "with what travels" if channel.carries else "by one all-reduce of three numbers a step"
        cost += f"; the loss is added {how}"
    return f"guard {guard!r}: {cost}"


def _post_clip(group: PolicyGroup, channel: Channel) -> str:
    costs = []
    if group.per_shard and channel.reduces_shards:
        costs.append("the tensors' collectives")
    if not group.one_element and channel.pp_group is not None:
        costs.append("a gather over the pipeline")
    cost = f"{' and '.join(costs)} once more a step, after the rule" if costs else "no collective more"
    return f"{group.pattern!r}: the result is clipped at a global norm of {group.policy.post_max_norm:g}: {cost}"
