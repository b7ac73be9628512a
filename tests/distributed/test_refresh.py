"""clipper.refresh() on several ranks: parameters that came later are clipped as well, and what is known of others stays."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import dist_clip
from tests.harness import pool

from .layouts import mesh


def grads(model: nn.Module, value: float) -> None:
    for param in model.parameters():
        param.grad = torch.full_like(param, value)


def adapter_on_a_sharded_model() -> dict[str, Any]:
    """On each rank: two steps, an adapter with uneven shards, what the next clip says, and the step after refresh()."""
    torch.manual_seed(0)
    both = mesh((2,), ("dp",))
    model = nn.ModuleDict({"body": nn.Linear(6, 5), "head": nn.Linear(5, 3)})
    for layer in model.values():
        fully_shard(layer, mesh=both)
    clipper = dist_clip.GradClipper(model, dist_clip.AdaGC(warmup_steps=1))
    for value in (0.01, 0.02):
        grads(model, value)
        clipper.clip_()
    gamma = clipper.state_dict()["tensors"]["body.weight"]["gamma"].item()
    model["adapter"] = fully_shard(nn.Linear(3, 5, bias=False), mesh=both)
    grads(model, 0.5)
    try:
        clipper.clip_()
        told = "clipped"
    except dist_clip.LayoutError as error:
        told = str(error)
    clipper.refresh()
    kept = clipper.state_dict()["tensors"]["body.weight"]["gamma"].item() == gamma
    report = clipper.clip_()
    norms = dict(zip(report.names, report.tensor_norms.tolist(), strict=True))
    local = sum(float(p.grad.to_local().square().sum()) for p in model.parameters() if isinstance(p.grad, DTensor))
    return {"told": told, "kept": kept, "norms": norms, "steps": clipper.steps, "squares": local, "report": report}


@pytest.mark.report("huggingface/peft#1303")
def test_an_adapter_on_a_sharded_model() -> None:
    ranks = pool(2).run(adapter_on_a_sharded_model)
    for rank in ranks:
        assert "'adapter.weight' is another parameter" in rank["told"]
        assert "clipper.refresh() on every rank" in rank["told"]
        assert rank["kept"]
        assert rank["steps"] == 3
        assert rank["norms"]["adapter.weight"] == pytest.approx(0.5 * 15**0.5, rel=1e-6)
        assert rank["norms"]["body.weight"] == pytest.approx(0.5 * 30**0.5, rel=1e-6)
    clipped = math.sqrt(sum(rank["squares"] for rank in ranks))
    assert float(ranks[0]["report"].clipped_global_norm) == pytest.approx(clipped, rel=1e-5)
