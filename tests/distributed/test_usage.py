"""Under DDP and FSDP2 as well, a clip after every micro-batch is told, and an ordinary loop is not; lr 0 stops no rank."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import dist_clip
from tests.harness import pool


def told(kind: str, every_micro_batch: bool, set_to_none: bool) -> list[str]:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    if kind == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    else:
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters())
    clipper = dist_clip.GradClipper(model, dist_clip.LogClip())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(8):
            model(torch.ones(2, 3)).square().mean().backward()
            if step % 2 or every_micro_batch:
                clipper.clip_()
            if step % 2:
                optimizer.step()
                optimizer.zero_grad(set_to_none=set_to_none)
    return [str(each.message) for each in caught if "clipped again" in str(each.message)]


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_clip_after_every_micro_batch_is_told(kind: str, set_to_none: bool) -> None:
    assert [len(texts) for texts in pool(2).run(told, kind, True, set_to_none)] == [1, 1]
    assert pool(2).run(told, kind, False, set_to_none) == [[], []]


def steps_at_a_schedule_that_ends_at_0(rank_with_gradients: int, *args: None) -> int:
    """A rank without gradients never gets an optimizer's state, as a checkpoint function's fresh optimizer has none."""
    model = nn.Linear(3, 2)
    clipper = dist_clip.GradClipper(model, dist_clip.LogClip(), check_replicas=False)
    optimizer = torch.optim.AdamW(model.parameters())
    clipper.attach(optimizer)
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 0.1 * (step < 3)
        if dist.get_rank() == rank_with_gradients:
            model(torch.ones(1, 3)).sum().backward()
        optimizer.step(*args)
        optimizer.zero_grad()
    return clipper.steps


def test_a_learning_rate_of_0_makes_no_rank_wait_for_others() -> None:
    assert pool(2).run(steps_at_a_schedule_that_ends_at_0, 0) == [4, 4]
    assert pool(2).run(steps_at_a_schedule_that_ends_at_0, 0, None) == [4, 4]  # as Accelerate's wrapper calls it
