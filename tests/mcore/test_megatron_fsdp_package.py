"""The package megatron-fsdp by itself, without Megatron's models and optimizers: `GradClipper` reads its DTensors."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import dist_clip
from tests import reference
from tests.harness import WorkerError, pool

pytestmark = pytest.mark.skipif(
    find_spec("megatron_fsdp") is None, reason="needs the package megatron-fsdp (scripts/test_megatron_latest.sh)"
)
STEPS, WARMUP = 20, 5


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 7), nn.Tanh(), nn.Linear(7, 3))


def loss_of(model: Any, step: int, rank: int = 0, world: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    batch, spike = torch.randn(8, 6, generator=generator), 30.0 if step in (9, 14) else 1.0
    return spike * model(batch[rank::world]).square().mean()


def shard(**options: Any) -> tuple[Any, Any]:
    from launch import megatron_cpu

    from .setups import start

    start()
    from megatron_fsdp import fully_shard_model, fully_shard_optimizer, param_and_grad_buffer
    from torch.distributed.device_mesh import init_device_mesh

    if param_and_grad_buffer._coalescing_manager.__name__ != "waiting":
        megatron_cpu.wait_for_gathers(param_and_grad_buffer)
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("fsdp", "tp"))
    model = fully_shard_model(
        make_model(), device_mesh=mesh, dp_shard_dim="fsdp", tp_dim="tp", fsdp_unit_modules=[nn.Linear], **options
    )
    model.ddp_config.gradient_reduce_div_fusion = False  # gloo has no PREMUL_SUM
    return model, fully_shard_optimizer(torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0))


def train(strategy: str) -> dict[str, Any]:
    model, optimizer = shard(zero_dp_strategy=strategy)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    clipper = dist_clip.GradClipper(model, dist_clip.AdaGC(warmup_steps=WARMUP))
    clipper.attach(optimizer)
    records = []
    for step in range(1, STEPS + 1):
        loss_of(model, step, dist.get_rank(), dist.get_world_size()).backward()
        optimizer.step()
        report = clipper.last_report
        records.append((report.tensor_norms.tolist(), report.scales.tolist()))
        optimizer.zero_grad()
    gammas = clipper.state_dict()["tensors"]
    return {
        "names": report.names,
        "records": records,
        "params": [param.detach().to_local().flatten().clone() for param in params],
        "gammas": {name: float(entry["gamma"]) for name, entry in gammas.items()},
    }


@functools.cache
def alone() -> dict[str, Any]:
    model, rule = make_model(), reference.AdaGC(warmup_steps=WARMUP)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for param in model.parameters():  # fully_shard_optimizer steps once with gradients of zero
        param.grad = torch.zeros_like(param)
    optimizer.step()
    records = []
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        outcome = reference.clip(rule, {name: param.grad for name, param in model.named_parameters()})
        records.append(outcome)
        for name, param in model.named_parameters():
            param.grad = outcome.grads[name].view_as(param).float()
        optimizer.step()
    params = {name: param.detach().flatten() for name, param in model.named_parameters()}
    return {"records": records, "params": params, "gammas": {name: rule.memory(name)["gamma"] for name in params}}


@pytest.mark.parametrize("strategy", ["no_shard", "optim", "optim_grads", "optim_grads_params"])
def test_training(strategy: str) -> None:
    ranks, expected = pool(2, "megatron").run(train, strategy), alone()
    names = list(expected["params"])
    for rank in ranks:
        assert list(rank["names"]) == names
        for (norms, scales), outcome in zip(rank["records"], expected["records"], strict=True):
            assert dict(zip(names, norms, strict=True)) == pytest.approx(outcome.norms, rel=1e-4)
            assert dict(zip(names, scales, strict=True)) == pytest.approx(outcome.scales, rel=1e-4)
        assert rank["gammas"] == pytest.approx(expected["gammas"], rel=1e-4)
    assert min(min(scales) for _, scales in ranks[0]["records"][WARMUP:]) < 0.5
    for parts, whole in zip(
        zip(*(rank["params"] for rank in ranks), strict=True), expected["params"].values(), strict=True
    ):
        found = parts[0] if strategy == "no_shard" else torch.cat(parts)
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)


def made_late() -> None:
    model, _ = shard()
    model(torch.ones(2, 6))
    dist_clip.GradClipper(model, dist_clip.AdaGC())


def test_after_a_forward_pass_it_is_refused_by_name() -> None:
    with pytest.raises(WorkerError) as caught:
        pool(2, "megatron").run(made_late)
    assert not caught.value.timed_out
    assert str(caught.value).count("'0.weight' is what Megatron-FSDP computes with") >= 2


def decoupled() -> tuple[float, float, list[float]]:
    model, optimizer = shard(use_decoupled_grad=True)
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(0.01))
    loss_of(model, 1).backward()
    params = [p for group in optimizer.param_groups for p in group["params"] if p.to_local().numel()]
    before = float(sum(p.decoupled_grad.to_local().square().sum() for p in params))
    report = clipper.clip_()
    after = float(sum(p.decoupled_grad.to_local().square().sum() for p in params))
    return float(report.global_norm), before, [after, sum(p.grad is not None for p in params)]


def test_decoupled_gradients() -> None:
    ranks = pool(2, "megatron").run(decoupled)
    squares = sum(before for _, before, _ in ranks)
    for norm, _, (_, plain) in ranks:
        assert norm == pytest.approx(squares**0.5, rel=1e-5)
        assert plain == 0
    assert sum(after for _, _, (after, _) in ranks) ** 0.5 == pytest.approx(0.01, rel=1e-4)
