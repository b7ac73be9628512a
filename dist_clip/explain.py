"""The table that tells what the clipper will do with each tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dist_clip.layout import LogicalTensor, group_label
from dist_clip.overlap import Overlap

if TYPE_CHECKING:
    from dist_clip.clipper import GradClipper
    from dist_clip.domains import Domain


def _note(tensor: LogicalTensor) -> str:
    if tensor.param is None:
        return " (held by other ranks)"
    return "" if tensor.param.requires_grad else " (frozen)"


def explain_table(clipper: GradClipper) -> str:
    """One row a tensor, then what a step costs in collectives."""
    plan = clipper.reduction_plan
    header = ("tensor", "shape", "placement", "norm groups", "reduction", "policy", "counts")
    rows = [header]
    for i, tensor in enumerate(clipper.layout):
        rows.append(
            (
                tensor.name + _note(tensor),
                "x".join(map(str, tensor.shape)) or "scalar",
                tensor.placement,
                " ".join(group_label(g) for g in tensor.norm_groups) or "none",
                plan.describe(i),
                clipper.policy_label(i),
                "yes" if clipper.counts(i) else "on an earlier stage",
            )
        )
    widths = [max(len(row[c]) for row in rows) for c in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    for stage in plan.stages:
        lines.append(
            f"{stage.collective} over {group_label(stage.group)}: {len(stage.indices)} tensors, "
            f"{8 * len(stage.indices)} bytes a step"
        )
    if not plan.stages:
        lines.append("no collective for tensor norms: every tensor is whole on this rank")
    if isinstance(plan, Overlap):
        lines.append(
            f"the first {len(plan.early)} of these are launched in backward, inside of last_backward(), as soon as their "
            "gradients are there; the others in clip_()"
        )
    lines.append(f"kernels: {clipper.kernels.name} ({clipper.kernels.why})")
    if clipper.pp_group is not None:
        lines.append(
            f"pipeline {group_label(clipper.pp_group)}: one gather of a few numbers on steps that need the global norm"
        )
    lines += [_post_clip(clipper, domain) for domain in clipper.domains if domain.policy.post_max_norm is not None]
    return "\n".join(lines)


def _post_clip(clipper: GradClipper, domain: Domain) -> str:
    scope = domain.policy.rule_scope
    costs = []
    if scope == "shard" and clipper.reduction_plan.stages:
        costs.append("the tensors' collectives")
    if scope != "global" and clipper.pp_group is not None:
        costs.append("a gather over the pipeline")
    cost = f"{' and '.join(costs)} once more a step, after the rule" if costs else "no collective more"
    return f"{domain.pattern!r}: the result is clipped at a global norm of {domain.policy.post_max_norm:g}: {cost}"
