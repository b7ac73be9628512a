"""FSDP2's own streams on a GPU: a clip right after backward measures gradients that are finished.

Two processes share the GPU through gloo. Both have the same batch, so that the gradients are those of the whole model on
one of them. Tolerance: fp32 matrix products of two programs that reduce in another order.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import dist_clip
from launch.model import ModelConfig, build_model, next_byte_loss
from tests.harness import pool

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

STEPS, WARMUP = 10, 3


def sharded_and_whole(policy: dist_clip.Policy) -> tuple[list[str], float, float]:
    """Names, and the largest relative difference of norms and of scales over ten steps."""
    torch.cuda.set_device(0)
    cfg = ModelConfig(dim=256, layers=4, heads=4, seq_len=128)
    model, whole = (build_model(cfg, seed=0).cuda() for _ in range(2))
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    for block in model.blocks.values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    clippers = [dist_clip.GradClipper(each, policy, detect_desync=True) for each in (model, whole)]
    norms, scales = 0.0, 0.0
    for step in range(STEPS):
        text = torch.randint(256, (4, cfg.seq_len + 1), generator=torch.Generator().manual_seed(step)).cuda()
        size = 30.0 if step == STEPS - 3 else 1.0
        reports = []
        for each, clipper in zip((model, whole), clippers, strict=True):
            each.zero_grad()
            (size * next_byte_loss(each(text[:, :-1]), text[:, 1:])).backward()  # type: ignore[no-untyped-call]
            reports.append(clipper.clip_())  # at once: FSDP2's reductions may still be under way
        ours, theirs = reports
        norms = max(norms, float((ours.tensor_norms / theirs.tensor_norms - 1).abs().max()))
        scales = max(scales, float((ours.scales / theirs.scales - 1).abs().max()))
    assert ours.names == theirs.names
    clippers[0].check_in_sync()
    return list(ours.names), norms, scales


@pytest.mark.parametrize(
    "policy", [dist_clip.AdaGC(warmup_steps=WARMUP), dist_clip.GlobalNorm(0.5)], ids=["adagc", "global"]
)
def test_a_clip_right_after_backward(policy: dist_clip.Policy) -> None:
    for names, norms, scales in pool(2, "gpu").run(sharded_and_whole, policy):
        assert names
        assert norms < 1e-4
        assert scales < 2e-4
