"""A tensor tied across pipeline stages, sharded inside each of them: its copies stay bitwise the same.

Each stage adds up the shards' squares in a group of its own, as one entry of a vector of its own length. A library may add
in another order at another position, so the sums are gathered and added in rank order there. Two ranks cannot show the
difference, eight can: with an all-reduce, 12 of 100 steps left copies that differed in float64.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import dist_clip
from tests.harness import pool

from .layouts import mesh

SHAPES = [{"embed": (64, 8), "a": (32, 32), "b": (16,), "c": (8, 40)}, {"d": (48, 16), "e": (24,), "embed": (64, 8)}]


def value_of(name: str, step: int) -> Tensor:
    shape = next(shapes[name] for shapes in SHAPES if name in shapes)
    generator = torch.Generator().manual_seed(1000 * step + sum(map(ord, name)))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def clipped_copies(policy: dist_clip.Policy) -> list[tuple[list[float], list[float]]]:
    """This rank's shard of the tied tensor's gradient and its report, after each of 100 clips."""
    both = mesh((2, 4), ("pp", "fsdp"))
    stage, inner = both["pp"].get_local_rank(), both["fsdp"]
    params = {
        name: nn.Parameter(distribute_tensor(torch.zeros(shape, dtype=torch.float64), inner, [Shard(0)]))
        for name, shape in SHAPES[stage].items()
    }
    clipper = dist_clip.GradClipper(params.items(), policy, pp_group=both.get_group("pp"))
    embed = params["embed"]
    out = []
    for step in range(100):
        for name, param in params.items():
            param.grad = distribute_tensor(value_of(name, step), inner, [Shard(0)])
        report = clipper.clip_()
        k = report.names.index("embed")
        assert isinstance(embed.grad, DTensor)
        shard = embed.grad.to_local()
        out.append((shard.flatten().tolist(), [report.tensor_norms[k].item(), report.scales[k].item()]))
    dist.barrier()
    return out


@pytest.mark.parametrize(
    "policy",
    [dist_clip.AdaGC(warmup_steps=5, lambda_rel=0.9), dist_clip.GlobalNorm(0.1)],
    ids=lambda p: type(p).__name__,
)
def test_copies_stay_bitwise_the_same(policy: dist_clip.Policy) -> None:
    ranks = pool(8).run(clipped_copies, policy)
    for first, last in zip(ranks[:4], ranks[4:], strict=True):
        assert first == last
    assert any(scale < 1 for _, (_, scale) in ranks[0][10:])
