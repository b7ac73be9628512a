"""Gradients that arrive placed otherwise than their parameters, early or late, on all ranks or on some.

What autograd leaves Partial is a sum that is still to be made. Along replicated dimensions it is made packed, one
collective a group, whatever the number of tensors; values are compared with the plain sum in each case.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import dist_clip
from tests.harness import pool

from .counting import CollectiveLog
from .layouts import mesh

SHAPE = (8, 4)


def addend(seed: int) -> Tensor:
    """What this rank has computed of a gradient."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(100 * dist.get_rank() + seed))


def whole_of(seed: int) -> Tensor:
    """The sum of all ranks' addends, made without any of them."""
    parts = [
        torch.randn(SHAPE, generator=torch.Generator().manual_seed(100 * rank + seed)) for rank in range(world_size())
    ]
    return torch.stack(parts).double().sum(0)


def world_size() -> int:
    return dist.get_world_size()


def parameter(device_mesh: DeviceMesh, placements: list[Any]) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(torch.zeros(SHAPE), device_mesh, placements))


def partial(device_mesh: DeviceMesh, seed: int) -> DTensor:
    placements = [Partial()] * device_mesh.ndim
    return DTensor.from_local(addend(seed), device_mesh, placements, run_check=False)


def zero_shard_backward() -> tuple[float, float, float]:
    """Parameters on [Replicate, Shard(0)], gradients Partial along both: data parallelism with plain DTensor."""
    device_mesh = mesh((2, world_size() // 2), ("replicate", "shard"))
    param = parameter(device_mesh, [Replicate(), Shard(0)])
    clipper = dist_clip.GradClipper([("w", param)], dist_clip.GlobalNorm(1.0))
    worst = 0.0
    for seed in range(3):
        param.grad = partial(device_mesh, seed)
        report = clipper.clip_()
        expected = whole_of(seed)
        norm = expected.norm()
        worst = max(worst, abs(report.tensor_norms[0].item() / norm.item() - 1))
        got = param.grad.full_tensor().double()
        worst = max(worst, ((got - expected / (norm + 1e-6)).abs().max() / got.abs().max()).item())
    return worst, float(param.grad.placements[0].is_replicate()), float(param.grad.placements[1].is_shard())


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.report("pytorch/pytorch#159856")
def test_partial_along_a_sharded_dimension_too(world: int) -> None:
    for worst, replicated, sharded in pool(world).run(zero_shard_backward):
        assert worst < 1e-6
        assert (replicated, sharded) == (1, 1), "the gradient ends placed as its parameter"


def late(count: int, missing_on_last: bool) -> tuple[list[int], float]:
    """`count` replicated tensors, frozen at first; their gradients are Partial once they have any."""
    device_mesh = mesh((world_size(),), ("tp",))
    always = parameter(device_mesh, [Shard(0)])
    params = [parameter(device_mesh, [Replicate()]) for _ in range(count)]
    for param in params:
        param.requires_grad_(False)
    named = [("always", always), *((f"late{i}", param) for i, param in enumerate(params))]
    clipper = dist_clip.GradClipper(named, dist_clip.GlobalNorm(1e9), check_replicas=False)
    counts, worst = [], 0.0
    for step in range(1, 8):
        always.grad = distribute_tensor(torch.ones(SHAPE), device_mesh, [Shard(0)])
        if step == 3:
            for param in params:
                param.requires_grad_(True)
        lacks = missing_on_last and step > 4 and dist.get_rank() == world_size() - 1
        for seed, param in enumerate(params):
            param.grad = partial(device_mesh, seed) if step >= 3 and not lacks else None
        with CollectiveLog() as log:
            report = clipper.clip_()
        counts.append(len(log.entries))
        if step in (3, 4):
            for seed in range(count):
                worst = max(worst, abs(report.tensor_norms[1 + seed].item() / whole_of(seed).norm().item() - 1))
    return counts, worst


@pytest.mark.parametrize("missing_on_last", [False, True])
@pytest.mark.parametrize("count", [1, 20])
def test_partial_gradients_that_appear_late_are_packed(count: int, missing_on_last: bool) -> None:
    for counts, worst in pool(2).run(late, count, missing_on_last):
        assert worst < 1e-6
        assert counts[1] == 1, "the norms of sharded tensors"
        assert counts[3:] == [2] * 4, f"and one for all {count} Partial gradients: {counts}"


def first_seen_late() -> list[int]:
    """Trainable from the start, but without a gradient until call 6: the names are exchanged again at call 8."""
    device_mesh = mesh((world_size(),), ("tp",))
    param = parameter(device_mesh, [Replicate()])
    always = parameter(device_mesh, [Shard(0)])
    clipper = dist_clip.GradClipper([("w", param), ("always", always)], dist_clip.GlobalNorm(1.0))
    worst = []
    for step in range(1, 11):
        always.grad = distribute_tensor(torch.zeros(SHAPE), device_mesh, [Shard(0)])
        param.grad = partial(device_mesh, step) if step >= 6 else None
        report = clipper.clip_()
        if step >= 6:
            worst.append(abs(report.tensor_norms[0].item() / whole_of(step).norm().item() - 1))
    return [value < 1e-6 for value in worst]


def test_a_tensor_that_is_first_used_late() -> None:
    assert pool(2).run(first_seen_late) == [[True] * 5] * 2


# ---- clip_grad_norm_ remembers what it found out about a list of parameters -------------------------------------------


def repeated_calls(layout: str) -> tuple[list[int], list[float], list[float]]:
    if layout == "tp":
        device_mesh = mesh((world_size(),), ("tp",))
        placements = [[Replicate()], [Shard(0)]]
    else:
        device_mesh = mesh((2, world_size() // 2), ("replicate", "shard"))
        placements = [[Replicate(), Shard(0)], [Replicate(), Shard(1)]]
    params = [parameter(device_mesh, each) for each in placements]
    counts, norms, expected = [], [], []
    for step in range(1, 5):
        torch.manual_seed(step)
        values = [torch.randn(SHAPE) for _ in params]
        for param, value, each in zip(params, values, placements, strict=True):
            param.grad = distribute_tensor(value, device_mesh, each)
        if layout == "tp":
            params[0].grad = partial(device_mesh, step)
            values[0] = whole_of(step)
        expected.append(torch.cat([value.double().flatten() for value in values]).norm().item())
        with CollectiveLog() as log:
            norms.append(dist_clip.clip_grad_norm_((p for p in params), 1e9).item())
        counts.append(len(log.entries))
    return counts, norms, expected


@pytest.mark.parametrize(("layout", "world", "each"), [("tp", 2, 2), ("hsdp", 4, 1)])
def test_clip_grad_norm_learns_once(layout: str, world: int, each: int) -> None:
    for counts, norms, expected in pool(world).run(repeated_calls, layout):
        assert norms == pytest.approx(expected, rel=1e-6)
        assert counts[1:] == [each] * 3, f"no exchange of names after the first call: {counts}"
