"""Which collectives a plan takes where there is a choice, and that the norms come out right by each."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

import dist_clip
from dist_clip.reduction import plan
from tests.harness import pool

from . import training
from .counting import CollectiveLog
from .layouts import mesh


@pytest.mark.parametrize("union", [False, True])
def test_large_groups(union: bool) -> None:
    """What groups of more than GATHER_LIMIT ranks do, by groups of two: under HSDP one union instead of a gather."""
    ranks = pool(4, "limit").run(train_with_limit, "hsdp", 1 if union else 16)
    assert {rank["collectives"] for rank in ranks} == {("all_reduce",) if union else ("all_gather",)}
    training.check_policies(ranks, "hsdp", ("zclip", "adagc"), "adamw", torch.float32)


def test_large_groups_inside_pipeline_stages() -> None:
    """TP + FSDP2 in each of two stages: FSDP all-reduces, and what TP replicates is spread in the gather over TP."""
    ranks = pool(8, "limit").run(train_with_limit, "pp-tp-fsdp", 16)
    assert {rank["collectives"] for rank in ranks} == {("all_reduce", "all_gather")}
    training.check_policies(ranks, "pp-tp-fsdp", ("zclip", "adagc"), "adamw", torch.float32)


def train_with_limit(layout: str, limit: int) -> dict[str, Any]:
    before, plan.GATHER_LIMIT = plan.GATHER_LIMIT, limit
    try:
        setup = training.build(layout, torch.float32)
        clipper = training.make_clipper(setup, training.POLICIES["adagc"].ours())
        out = training.train(layout, ("zclip", "adagc"), "adamw", torch.float32)
    finally:
        plan.GATHER_LIMIT = before
    return {**out, "collectives": tuple(collective.kind for collective in clipper._made.plan.collectives)}


def experts_in_stages() -> dict[str, Any]:
    """Two pipeline stages of four ranks: dense tensors over (fsdp), experts over (efsdp, ep), as torchtitan has them."""
    dense = mesh((2, 4), ("pp", "fsdp"))
    sparse = mesh((2, 2, 2), ("pp", "efsdp", "ep"))
    stage = dense["pp"].get_local_rank()
    generator = torch.Generator().manual_seed(stage)
    net = nn.ParameterDict()
    norms = {}
    for name, shape, where in (
        ("attention", (10, 6), dense["fsdp"]),
        ("norm", (5,), dense["fsdp"]),
        ("experts", (4, 6, 3), sparse["efsdp", "ep"]),
    ):
        whole = torch.randn(shape, generator=generator)
        placements = [Shard(1), Shard(0)] if where.ndim == 2 else [Shard(0)]
        net[f"{name}{stage}"] = nn.Parameter(distribute_tensor(torch.zeros(shape), where, placements))
        net[f"{name}{stage}"].grad = distribute_tensor(whole, where, placements, src_data_rank=None)
        norms[f"{name}{stage}"] = float(whole.double().norm())
    clipper = dist_clip.GradClipper(net, dist_clip.AdaGC(warmup_steps=0), pp_group=dense["pp"].get_group())
    with CollectiveLog() as log:
        report = clipper.clip_()
    return {
        "norms": dict(zip(report.names, report.tensor_norms.tolist(), strict=True)),
        "expected": norms,
        "collectives": [(entry.name, entry.ranks) for entry in log.entries],
        "stage": tuple(range(4 * stage, 4 * stage + 4)),
    }


def test_experts_inside_pipeline_stages_take_one_all_reduce() -> None:
    """FSDP's group spans the stage, and with it the experts' groups."""
    for rank in pool(8).run(experts_in_stages):
        assert rank["collectives"] == [("allreduce_", rank["stage"])]
        assert rank["norms"].keys() == rank["expected"].keys()
        for name, norm in rank["norms"].items():
            assert math.isclose(norm, rank["expected"][name], rel_tol=1e-6)
