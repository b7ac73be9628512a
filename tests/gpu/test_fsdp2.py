"""FSDP2's own streams on a GPU: norms that are measured and reduced in backward are those of a clip after it.

Two processes share the GPU through gloo. Norms are float64 sums in another order: they agree to float32's last digit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import dist_clip
from launch.model import ModelConfig, build_model, next_byte_loss
from tests.harness import pool

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

STEPS, WARMUP = 10, 3


def local(tensor: Any) -> Tensor:
    return tensor.to_local()


def overlapped(policy: dist_clip.Policy) -> dict[str, Any]:
    """Ten steps, each clipped with and without overlap on the same gradients."""
    torch.cuda.set_device(0)
    cfg = ModelConfig(dim=256, layers=4, heads=4, seq_len=128)
    model = build_model(cfg, seed=0).cuda()
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    for block in model.blocks.values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    plain = dist_clip.GradClipper(model, policy)
    clipper = dist_clip.GradClipper(model, policy, overlap=3, detect_desync=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    params: list[nn.Parameter] = list(model.parameters())
    worst, early, equal = 0.0, 0, True
    for step in range(STEPS):
        text = torch.randint(256, (4, cfg.seq_len + 1), generator=torch.Generator().manual_seed(step)).cuda()
        size = 30.0 if step == STEPS - 3 else 1.0
        with clipper.last_backward():
            (size * next_byte_loss(model(text[:, :-1]), text[:, 1:])).backward()  # type: ignore[no-untyped-call]
        early += len(clipper._overlap._launched)  # type: ignore[union-attr]
        kept = [param.grad for param in params]
        for param, grad in zip(params, kept, strict=True):
            param.grad = grad.detach().clone()  # type: ignore[union-attr]
        theirs = plain.clip_()
        others = [local(param.grad) for param in params]
        for param, grad in zip(params, kept, strict=True):
            param.grad = grad
        ours = clipper.clip_()
        worst = max(worst, float((ours.tensor_norms / theirs.tensor_norms - 1).abs().max()))
        equal &= all(
            torch.allclose(local(p.grad), other, rtol=1e-6, atol=0) for p, other in zip(params, others, strict=True)
        )
        optimizer.step()
        optimizer.zero_grad()
    clipper.check_in_sync()
    return {"worst": worst, "early": early, "equal": equal, "clipped": bool((ours.scales <= 1).all())}


@pytest.mark.parametrize(
    "policy", [dist_clip.AdaGC(warmup_steps=WARMUP), dist_clip.GlobalNorm(0.5)], ids=["adagc", "global"]
)
def test_overlap_with_fsdp2(policy: dist_clip.Policy) -> None:
    ranks = pool(2, "gpu").run(overlapped, policy)
    for rank in ranks:
        assert rank["worst"] < 2e-7
        assert rank["equal"]
        assert rank["early"] == 3 * STEPS
