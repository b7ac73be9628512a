"""The number of collectives of one clip_, per layout and policy, in and after the warm-up.

- none under DDP, and none that spans pipeline stages after AdaGC's warm-up;
- elsewhere at most one per distinct 1-D process group, plus one where the framework left Partial gradients;
- the same number for 5 and for 50 layers;
- the same sequence on all ranks of a group whatever their gradients look like.

Counted with torch's own CommDebugMode; a dispatch mode of ours agrees with it and knows the groups.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from tests.harness import pool

from . import training
from .counting import Collective, CollectiveLog
from .layouts import CASES, LAYOUTS, Setup
from .model import Config, make_net

WARMUP = 3
"""Odd, and WARMUP + 2 no power of two: at the clips 1, 2, 4, 8, ... replicas are compared, which test_replicas.py counts."""


def clipper_of(setup: Setup, policy: str, check_replicas: bool = True) -> Any:
    """With a short warm-up: a longer one sends the same on each of its steps."""
    ours = training.POLICIES[policy].ours()
    if hasattr(ours, "warmup_steps"):
        ours = dataclasses.replace(ours, warmup_steps=WARMUP)
    return training.make_clipper(setup, ours, check_replicas=check_replicas)


SHARDED = [(name, world) for name, world in CASES if not name.startswith(("ddp", "pp", "dtensor-dp"))]


def count_steps(layout: str, policies: tuple[str, ...], drop_on_last: bool = False) -> dict[str, Any]:
    """The collectives of one step within the warm-up and of one after it; the report's global norm with each.

    The policies clip the same gradients, one after the other.
    """
    setup = training.build(layout, torch.float32)
    clippers = {policy: clipper_of(setup, policy, check_replicas=not drop_on_last) for policy in policies}
    out: dict[str, Any] = {policy: {"logs": [], "counts": [], "global_norms": []} for policy in policies}
    pp_ranks = tuple(dist.get_process_group_ranks(setup.pp_group)) if setup.pp_group is not None else None
    for policy in policies:
        out[policy] |= {"groups": sorted(setup.groups), "pp_ranks": pp_ranks}
    for step in range(1, WARMUP + 3):
        for module in setup.modules:
            module.zero_grad(set_to_none=True)
        setup.backward(step)
        if drop_on_last and dist.get_rank() == dist.get_world_size() - 1:
            for module in setup.modules:
                module.zero_grad(set_to_none=True)
        restore = training.remember_gradients(setup.modules)
        for policy, clipper in clippers.items():
            restore()
            if step not in (WARMUP, WARMUP + 2):
                clipper.clip_()
                continue
            # Entered outside the counted block, CommDebugMode does not see the log's own calls, nor the log its.
            with CommDebugMode() as comm, CollectiveLog() as log:
                report = clipper.clip_()
            out[policy]["logs"].append(log.entries)
            out[policy]["counts"].append(comm.get_total_counts())
            out[policy]["global_norms"].append(report.global_norm is not None)
    return out


def policies_of(layout: str) -> tuple[str, ...]:
    """Those that the tests below ask for."""
    few = ("global_norm", "adagc", "adagc-shard", "zclip")
    more = ("adagc-global", "logclip", "logclip-post", "logclip-shard", "logclip-shard-post")
    return (*few, *more) if layout.startswith(("ddp", "pp")) else few


@functools.cache
def counted(layout: str, world: int, drop_on_last: bool = False) -> list[dict[str, Any]]:
    return pool(world).run(count_steps, layout, policies_of(layout), drop_on_last)


def ranks_of(layout: str, world: int, policy: str, drop_on_last: bool = False) -> list[dict[str, Any]]:
    """One policy's counts, by rank. All policies of a layout are counted in one run, for all tests that ask."""
    return [rank[policy] for rank in counted(layout, world, drop_on_last)]


def check_modes_agree(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["counts"] == [len(log) for log in rank["logs"]], "CommDebugMode and our log disagree"


def tell(log: list[Collective]) -> str:
    return "; ".join(f"{entry.name} over {entry.ranks}" for entry in log) or "nothing"


def test_the_counter_counts() -> None:
    for rank in pool(2).run(three_collectives):
        assert [entry.name for entry in rank["log"]] == ["allreduce_", "_allgather_base_", "all_reduce"]
        assert all(entry.ranks == (0, 1) for entry in rank["log"])
        assert rank["count"] == 3


def three_collectives() -> dict[str, Any]:
    from torch.distributed._functional_collectives import all_reduce

    one = torch.ones(1)
    with CommDebugMode() as comm, CollectiveLog() as log:
        dist.all_reduce(one)
        dist.all_gather_into_tensor(torch.empty(2), one)
        all_reduce(one, "sum", dist.group.WORLD).sum()
    return {"log": log.entries, "count": comm.get_total_counts()}


@pytest.mark.parametrize(
    "policy", ["global_norm", "adagc", "adagc-shard", "adagc-global", "zclip", "logclip-post", "logclip-shard-post"]
)
@pytest.mark.parametrize("world", [2, 4])
def test_none_under_ddp(world: int, policy: str) -> None:
    ranks = ranks_of("ddp", world, policy)
    check_modes_agree(ranks)
    for rank in ranks:
        assert rank["logs"] == [[], []], f"warm-up: {tell(rank['logs'][0])}; after: {tell(rank['logs'][1])}"
        assert rank["global_norms"] == [True, True], "where N costs nothing it is reported"


@pytest.mark.parametrize("policy", ["global_norm", "adagc", "zclip"])
@pytest.mark.parametrize(("layout", "world"), SHARDED, ids=[f"{name}-{world}" for name, world in SHARDED])
def test_at_most_one_per_group(layout: str, world: int, policy: str) -> None:
    ranks = ranks_of(layout, world, policy)
    check_modes_agree(ranks)
    for rank in ranks:
        limit = len(rank["groups"]) + LAYOUTS[layout].partial
        for log in rank["logs"]:
            assert (limit > 0) <= len(log) <= limit, f"groups {rank['groups']}: {tell(log)}"
        assert rank["global_norms"] == [True, True], "every sharded tensor's norm is known, so N is too"


@pytest.mark.parametrize("layout", ["fsdp-uneven", "hsdp", "tp", "tp-fsdp", "ep", "fsdp-mixed-plain", "pp-fsdp"])
def test_adagc_shard_is_silent_after_warmup(layout: str) -> None:
    ranks = ranks_of(layout, 4, "adagc-shard")
    check_modes_agree(ranks)
    for rank in ranks:
        warmup, after = rank["logs"]
        assert 1 <= len(warmup) <= len(rank["groups"]), tell(warmup)
        assert after == [], tell(after)
        assert rank["global_norms"] == [True, False]


@pytest.mark.parametrize("world", [2, 4])
def test_dtensor_data_parallelism_only_reduces_the_gradients(world: int) -> None:
    ranks = ranks_of("dtensor-dp", world, "adagc")
    check_modes_agree(ranks)
    for rank in ranks:
        for log in rank["logs"]:
            assert len(log) == 1, tell(log)


PIPELINES = [(name, world) for name, world in CASES if name.startswith("pp")]


@pytest.mark.parametrize(("layout", "world"), PIPELINES, ids=[f"{name}-{world}" for name, world in PIPELINES])
def test_adagc_leaves_the_other_stages_alone(layout: str, world: int) -> None:
    ranks = ranks_of(layout, world, "adagc")
    check_modes_agree(ranks)
    for rank in ranks:
        warmup, after = rank["logs"]
        assert 1 <= len(warmup) <= len(rank["groups"]), tell(warmup)
        assert len(after) <= len(rank["groups"]) - 1, tell(after)
        across = [entry for entry in after if len(set(entry.ranks) & set(rank["pp_ranks"])) > 1]
        assert not across, f"spans pipeline stages: {tell(across)}"
        assert rank["global_norms"] == [True, False]


@pytest.mark.parametrize(("layout", "world"), PIPELINES, ids=[f"{name}-{world}" for name, world in PIPELINES])
def test_a_global_clip_after_the_rule_asks_once_more(layout: str, world: int) -> None:
    """One gather over the stages that the rule alone has no need of, and where shards have scales of their own, their norm
    groups again."""
    for policy in ("logclip", "logclip-shard"):
        without = ranks_of(layout, world, policy)
        ranks = ranks_of(layout, world, f"{policy}-post")
        check_modes_agree(ranks)
        for rank, plain in zip(ranks, without, strict=True):
            (warmup, after), (plain_warmup, plain_after) = rank["logs"], plain["logs"]
            # In the warm-up one scale rules all tensors: N' is that times N.
            assert warmup == plain_warmup, tell(warmup)
            more = after[len(plain_after) :]
            assert after[: len(plain_after)] == plain_after, tell(after)
            again = len(rank["groups"]) - 1 if policy == "logclip-shard" else 0
            assert len(more) <= 1 + again, tell(more)
            assert set(rank["pp_ranks"]) <= set(more[-1].ranks), tell(more)


@pytest.mark.parametrize("policy", ["global_norm", "zclip", "adagc-global"])
@pytest.mark.parametrize(("layout", "world"), PIPELINES, ids=[f"{name}-{world}" for name, world in PIPELINES])
def test_global_policies_cross_the_stages_once(layout: str, world: int, policy: str) -> None:
    ranks = ranks_of(layout, world, policy)
    check_modes_agree(ranks)
    for rank in ranks:
        for log in rank["logs"]:
            assert 1 <= len(log) <= len(rank["groups"]), tell(log)
        assert rank["global_norms"] == [True, True]


@pytest.mark.parametrize("policy", ["global_norm", "adagc", "zclip"])
@pytest.mark.parametrize("layout", ["fsdp", "hsdp", "tp", "tp-fsdp", "ep", "pp", "pp-fsdp"])
def test_same_sequence_where_one_rank_has_no_gradients(layout: str, policy: str) -> None:
    with_all = ranks_of(layout, 4, policy)
    with_hole = ranks_of(layout, 4, policy, drop_on_last=True)
    assert [rank["logs"] for rank in with_hole] == [rank["logs"] for rank in with_all]


def count_with_depth(layout: str, policies: tuple[str, ...], depth: int) -> dict[str, list[list[Collective]]]:
    """As count_steps, for a model of `depth` blocks and made-up gradients."""
    chosen = LAYOUTS[layout]
    config = dataclasses.replace(chosen.config, blocks=depth)
    setup = chosen.build(make_net(config), config)
    logs: dict[str, list[list[Collective]]] = {policy: [] for policy in policies}
    for policy in policies:
        clipper = clipper_of(setup, policy)
        for step in range(1, WARMUP + 3):
            for _, param in setup.named:
                made_up_grad(param)
            with CollectiveLog() as log:
                clipper.clip_()
            if step in (WARMUP, WARMUP + 2):
                logs[policy].append(log.entries)
    return logs


def made_up_grad(param: nn.Parameter) -> None:
    grad = torch.ones_like(training.local(param.detach()))
    if isinstance(param, DTensor):
        spec = param._spec
        grad = DTensor.from_local(
            grad, spec.mesh, spec.placements, run_check=False, shape=param.shape, stride=param.stride()
        )
    param.grad = grad


@pytest.mark.parametrize("layout", ["fsdp", "hsdp", "tp", "tp-fsdp", "ep", "pp", "pp-fsdp"])
def test_number_does_not_depend_on_the_number_of_tensors(layout: str) -> None:
    policies = ("global_norm", "adagc", "adagc-shard", "zclip", "logclip")
    few, many = (4, 48) if layout.startswith("pp") else (5, 50)
    shallow = pool(4).run(count_with_depth, layout, policies, few)
    deep = pool(4).run(count_with_depth, layout, policies, many)
    assert shallow == deep


def test_config_is_a_copy() -> None:
    """`count_with_depth` must not change the layouts that other tests use."""
    assert LAYOUTS["fsdp"].config == Config()
