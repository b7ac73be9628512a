"""Complex parameters, sharded and replicated: one norm of all complex numbers, and the gradients scaled by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import dist_clip
from tests.harness import pool

MAX_NORM = 0.5


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(5, 3, dtype=torch.complex64, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_real(x.to(torch.complex64) @ self.weight.T).square().sum()


class Mixed(nn.Module):
    """A complex and a real parameter, as a Fourier layer beside a linear one has them."""

    def __init__(self) -> None:
        super().__init__()
        self.spectral = Spectral()
        self.real = nn.Linear(3, 1, bias=False)
        nn.init.constant_(self.real.weight, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.spectral(x) + self.real(x).square().sum()


X = torch.linspace(-1, 1, 12).view(4, 3)


def expected() -> dict[str, Tensor]:
    """One process's clipped gradients and their norm, by the definition on complex numbers."""
    model = Mixed()
    model(X).backward()
    grads = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    norm = torch.stack([grad.abs().double().square().sum() for grad in grads.values()]).sum().sqrt()
    return {name: grad * min(1.0, MAX_NORM / float(norm)) for name, grad in grads.items()} | {"norm": norm.float()}


def replicated() -> nn.Module:
    model = Mixed()
    nn.parallel.DistributedDataParallel(model)(X).backward()
    return model


def fsdp2() -> nn.Module:
    model = Mixed()
    for part in (model.spectral, model.real, model):  # FSDP2 wants one dtype a group
        fully_shard(part)
    model(X).backward()
    return model


def dtensors() -> nn.Module:
    """As tensor parallelism leaves them: a sharded gradient, and one that is Partial."""
    model, mesh = Mixed(), init_device_mesh("cpu", (dist.get_world_size(),))
    model(X).backward()
    for part in (model.spectral, model.real):
        grad = part.weight.grad
        assert grad is not None
        placements = [Shard(0)] if part is model.spectral else [Replicate()]
        part.weight = nn.Parameter(distribute_tensor(part.weight.detach(), mesh, placements))
        part.weight.grad = distribute_tensor(grad, mesh, placements)
        if part is model.real:
            part.weight.grad = DTensor.from_local(grad / dist.get_world_size(), mesh, [Partial()], run_check=False)
    return model


def partial() -> nn.Module:
    """A complex gradient that is Partial."""
    model, mesh = Mixed(), init_device_mesh("cpu", (dist.get_world_size(),))
    model(X).backward()
    grad = model.spectral.weight.grad
    assert grad is not None
    model.spectral.weight = nn.Parameter(distribute_tensor(model.spectral.weight.detach(), mesh, [Replicate()]))
    share = grad * (0.25 if dist.get_rank() == 0 else 0.75)
    model.spectral.weight.grad = DTensor.from_local(share, mesh, [Partial()], run_check=False)
    return model


def clip(make: Any, by_function: bool) -> dict[str, Tensor]:
    model = make()
    if by_function:
        norm = dist_clip.clip_grad_norm_(model.parameters(), MAX_NORM)
    else:
        clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(MAX_NORM))
        verified = clipper.verify()
        assert verified.ok, str(verified)
        report = clipper.clip_()
        assert report.global_norm is not None
        norm = report.global_norm
    out = {"norm": norm}
    for name, param in model.named_parameters():
        assert param.grad is not None
        out[name] = param.grad.full_tensor() if isinstance(param.grad, DTensor) else param.grad
    return out


@pytest.mark.parametrize("by_function", [False, True])
@pytest.mark.parametrize("make", [replicated, fsdp2, dtensors, partial])
def test_a_complex_parameter(make: Any, by_function: bool) -> None:
    for found in pool(2).run(clip, make, by_function):
        for name, value in expected().items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
