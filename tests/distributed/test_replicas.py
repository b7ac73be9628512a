"""What should be copies of one tensor is compared by its norms; `sharded=` says by hand what nothing marks.

The oracle is one process with plain tensors: the whole gradients of all ranks in one list, clipped by torch.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import dist_clip
from tests.harness import pool

from .layouts import mesh


class Experts(nn.Module):
    """A dense layer that all ranks share, and an expert that each rank has for itself under one name."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.dense = nn.Linear(6, 6)
        torch.manual_seed(10 + rank)
        self.expert = nn.Linear(6, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.expert(self.dense(x).relu())


def batch(rank: int) -> torch.Tensor:
    torch.manual_seed(100 + rank)
    return torch.randn(5, 6)


def whole_gradients(world: int) -> dict[str, torch.Tensor]:
    """The gradients in one process: the dense layer's averaged over the ranks' batches, the experts' stacked."""
    models = [Experts(rank) for rank in range(world)]
    for rank, model in enumerate(models):
        model(batch(rank)).square().mean().backward()
    dense = {
        name: torch.stack([dict(model.named_parameters())[name].grad for model in models]).mean(0)
        for name in ("dense.weight", "dense.bias")
    }
    return {**dense, "expert.weight": torch.stack([model.expert.weight.grad for model in models])}


def experts_under(kind: str) -> nn.Module:
    """The model under DDP's ignore list, FSDP2's ignored_params, or beside DTensors of tensor parallelism."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = Experts(rank)
    if kind == "ddp":
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["expert.weight"])
        return DistributedDataParallel(model)
    if kind == "fsdp2":
        fully_shard(model, mesh=mesh((world,), ("dp",)), ignored_params={model.expert.weight})
        return model
    tp = mesh((world,), ("tp",))
    for name in ("weight", "bias"):
        whole = getattr(model.dense, name)
        setattr(model.dense, name, nn.Parameter(distribute_tensor(whole.detach(), tp, [Shard(0)])))
    return model


def backward(kind: str, model: nn.Module) -> None:
    """Give every parameter the gradient that data parallelism gives, times the parameter's part under DTensor."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if kind != "tp":
        model(batch(rank)).square().mean().backward()
        return
    gradients = whole_gradients(world)
    for name, param in model.named_parameters():
        whole = gradients[name]
        param.grad = (
            distribute_tensor(whole, param.device_mesh, [Shard(0)]) if isinstance(param, DTensor) else whole[rank]
        )


def clip(kind: str, **arguments: Any) -> Any:
    model = experts_under(kind)
    if arguments.get("sharded") == "world":
        arguments["sharded"] = {"*expert.weight": dist.group.WORLD}
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(0.1), log_global_norm=True, **arguments)
    backward(kind, model)
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    try:
        report = clipper.clip_()
    except dist_clip.LayoutError as error:
        dist.barrier()
        same = all(torch.equal(local(p.grad), local(before[name])) for name, p in model.named_parameters())
        return {"error": str(error), "untouched": same, "steps": clipper.steps}
    norms = dict(zip(report.names, report.tensor_norms.tolist(), strict=True))
    return {
        "global": float(report.global_norm),
        "norms": norms,
        "scale": report.scales.tolist(),
        "text": clipper.explain(),
    }


def local(grad: torch.Tensor) -> torch.Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "tp"])
def test_plain_experts_are_an_error_on_every_rank(kind: str) -> None:
    ranks = pool(2).run(clip, kind)
    assert len({rank["error"] for rank in ranks}) == 1
    expert = whole_gradients(2)["expert.weight"]
    for rank in ranks:
        assert rank["untouched"]
        assert rank["steps"] == 0
        assert "'expert.weight' should be one tensor with copies on ranks 0, 1" in rank["error"]
        found = {int(i): float(norm) for norm, i in re.findall(r"([\d.e-]+) on rank (\d)", rank["error"])}
        assert found == pytest.approx({i: float(expert[i].norm()) for i in range(2)}, rel=1e-5)
        assert "sharded={'expert.weight': " in rank["error"]
        assert "check_replicas=False" in rank["error"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "tp"])
def test_plain_experts_said_by_hand_are_measured_as_one(kind: str) -> None:
    ranks = pool(2).run(clip, kind, sharded="world")
    gradients = whole_gradients(2)
    total = torch.nn.utils.clip_grad_norm_([_with_grad(g) for g in gradients.values()], 0.1)
    for rank in ranks:
        assert rank["global"] == pytest.approx(float(total), rel=1e-5)
        for name, whole in gradients.items():
            assert rank["norms"][name] == pytest.approx(float(whole.norm()), rel=1e-5)
        assert rank["scale"] == ranks[0]["scale"]
        assert rank["scale"][0] == pytest.approx(0.1 / float(total), rel=1e-4)
        assert "divided by hand (stacked over 2)" in rank["text"]


def _with_grad(grad: torch.Tensor) -> torch.Tensor:
    param = torch.zeros_like(grad, requires_grad=True)
    param.grad = grad.clone()
    return param


def test_off_by_argument() -> None:
    for rank in pool(2).run(clip, "ddp", check_replicas=False):
        assert "error" not in rank
        assert "replicas: not compared (check_replicas=False)" in rank["text"]
