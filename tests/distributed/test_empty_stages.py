"""A pipeline stage with nothing to clip (no parameters, or all of them excluded) takes part and hinders nobody."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

import dist_clip
from tests.harness import pool

from .layouts import mesh


def clip_beside_nothing(policy: dist_clip.Policy) -> list[float]:
    """Rank 0 has a tensor with a gradient of norm 2, rank 1 has none; the global norm of each clip."""
    pp_group = mesh((dist.get_world_size(),), ("pp",)).get_group()
    stage = nn.Linear(4, 1, bias=False) if dist.get_rank() == 0 else nn.Module()
    clipper = dist_clip.GradClipper(stage, policy, pp_group=pp_group, log_global_norm=True)
    norms = []
    for _ in range(3):
        for param in stage.parameters():
            param.grad = torch.ones_like(param)
        norms.append(float(clipper.clip_().global_norm))
    return norms


@pytest.mark.parametrize(
    "policy", [dist_clip.GlobalNorm(9.0), dist_clip.AdaGC(warmup_steps=1, max_norm=9.0)], ids=lambda p: type(p).__name__
)
def test_a_stage_without_parameters(policy: dist_clip.Policy) -> None:
    """gloo says that it can send CUDA tensors also where there is no CUDA."""
    assert pool(2).run(clip_beside_nothing, policy) == [[2.0] * 3] * 2
