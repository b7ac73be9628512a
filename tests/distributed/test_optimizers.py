"""attach() on optimizers that share their work among the ranks: they step as one process does with clipped gradients.

torch's ZeroRedundancyOptimizer steps other parameters on each rank and sends them around; KellerJordan's Muon does so
within each step; PostLocalSGDOptimizer averages parameters after it. A skip has to leave out all of that on all ranks.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import dist_clip
from tests.harness import pool

MAX_NORM = 0.5
SIZES = (1.0, 30.0, 1e7, 1.0, 1e7, 1.0)
"""Of the batch, by step. The gradient of the largest is to be skipped."""
SKIP_ABOVE = 1e3
LR = 0.1


def model_of() -> nn.Sequential:
    """Two layers of one size: Muon sends parameters around in pairs."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 5, bias=False), nn.Tanh(), nn.Linear(5, 5, bias=False))


def loss_of(model: nn.Module, rank: int, step: int, *, same: bool) -> torch.Tensor:
    """The loss of a rank's batch. Each rank's is its own, unless they are all the `same`."""
    torch.manual_seed(100 * step + (0 if same else rank))
    return SIZES[step] * model(torch.randn(4, 5)).square().mean()


def optimizer_of(kind: str, params: list[nn.Parameter], *, plain: bool) -> Any:
    """The optimizer as it is on many ranks, or a plain one that does the same in one process."""
    if kind == "ZeroRedundancy":
        if plain:
            return torch.optim.SGD(params, lr=LR, momentum=0.9)
        return ZeroRedundancyOptimizer(params, torch.optim.SGD, lr=LR, momentum=0.9)
    if kind == "PostLocalSGD":
        base = torch.optim.SGD(params, lr=LR, momentum=0.9)
        return base if plain else PostLocalSGDOptimizer(base, PeriodicModelAverager(period=1, warmup_steps=0))
    import muon

    return muon.SingleDeviceMuon(params, lr=LR) if plain else muon.Muon(params, lr=LR)


def on_ranks(kind: str) -> dict[str, Any]:
    model = DistributedDataParallel(model_of())
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(MAX_NORM), guard=dist_clip.SkipAbove(SKIP_ABOVE))
    optimizer = optimizer_of(kind, list(model.parameters()), plain=False)
    clipper.attach(optimizer)
    norms, skips, path = [], [], []
    for step in range(len(SIZES)):
        optimizer.zero_grad()
        loss_of(model, dist.get_rank(), step, same=kind == "Muon").backward()
        optimizer.step()
        norms.append(float(clipper.last_report.global_norm))  # type: ignore[arg-type, union-attr]
        skips.append(bool(clipper.last_report.skip))  # type: ignore[union-attr]
        path.append([param.detach().tolist() for param in model.parameters()])
    return {"norms": norms, "skips": skips, "path": path, "steps": clipper.steps}


def in_one_process(kind: str, world: int) -> dict[str, Any]:
    model = model_of()
    params = list(model.parameters())
    optimizer = optimizer_of(kind, params, plain=True)
    norms, skips, path = [], [], []
    for step in range(len(SIZES)):
        optimizer.zero_grad()
        for rank in range(world):
            (loss_of(model, rank, step, same=kind == "Muon") / world).backward()
        norm = float(nn.utils.clip_grad_norm_(params, MAX_NORM))
        if norm <= SKIP_ABOVE:
            optimizer.step()
        norms.append(norm)
        skips.append(norm > SKIP_ABOVE)
        path.append([param.detach().tolist() for param in params])
    return {"norms": norms, "skips": skips, "path": path, "steps": skips.count(False)}


@pytest.mark.parametrize("kind", ["ZeroRedundancy", "PostLocalSGD", "Muon"])
def test_ranks_step_as_one_process_does(kind: str) -> None:
    """Muon orthogonalises in bfloat16, so that its ranks get the same batch: else it enlarges the rounding of their mean."""
    if kind == "Muon":
        pytest.importorskip("muon")
    due = in_one_process(kind, 2)
    assert due["skips"] == [False, False, True, False, True, False]
    for result in pool(2).run(on_ranks, kind):
        assert result["skips"] == due["skips"]
        assert result["steps"] == due["steps"] == 4
        assert result["norms"] == pytest.approx(due["norms"], rel=1e-5)
        for mine, theirs in zip(result["path"], due["path"], strict=True):
            for param, right in zip(mine, theirs, strict=True):
                torch.testing.assert_close(torch.tensor(param), torch.tensor(right), rtol=1e-4, atol=1e-6)
