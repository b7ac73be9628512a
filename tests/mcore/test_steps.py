"""What a step costs and what it returns: collectives, skipped steps, the logged norm, detaching."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

import dist_clip
from dist_clip.megatron import compat
from tests.distributed.counting import CollectiveLog
from tests.harness import pool

from . import training
from .setups import Config, build, megatron_version

WARMUP = 3


def spans(log: CollectiveLog, stage: set[int]) -> tuple[int, int]:
    """How many collectives stayed inside the stage, and how many reached across stages."""
    inside = sum(set(entry.ranks) <= stage for entry in log.entries)
    return inside, len(log.entries) - inside


def count(config: Config, log_global_norm: bool) -> dict[str, Any]:
    setup = build(config)
    from megatron.core import parallel_state

    stage = set(
        dist.get_process_group_ranks(parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))
    )
    setup.backward(1)
    setup.optimizer.prepare_grads()
    with CollectiveLog() as log:
        setup.optimizer.get_grad_norm()
    out: dict[str, Any] = {"megatron": spans(log, stage)}
    clipper = dist_clip.megatron.attach(
        setup.optimizer, dist_clip.AdaGC(warmup_steps=WARMUP), model=setup.chunks, log_global_norm=log_global_norm
    )
    clip = clipper.clip_
    for step in range(1, WARMUP + 3):
        setup.backward(step)
        logs = []

        def counted(logs: list[CollectiveLog] = logs) -> Any:
            with CollectiveLog() as log:
                report = clip()
            logs.append(log)
            return report

        clipper.clip_ = counted
        _, norm, _ = setup.optimizer.step()
        if step == 3:  # at the clips 1, 2 and 4 replicas are compared
            out["warm-up"] = spans(logs[0], stage)
        if step == WARMUP + 2:
            out["after"] = spans(logs[0], stage)
            out["norm"] = None if norm is None else float(norm)
    return out


# Collectives a step as (inside the stage, across stages): what Megatron itself does for its one norm; AdaGC in its
# warm-up, and after it. Where only some ranks do something, the tuple has the most that any rank does. docs/megatron.md
# shows this table.
COSTS: dict[str, tuple[int, Config, tuple[int, int], tuple[int, int], tuple[int, int]]] = {
    "dp2": (2, Config(), (1, 0), (0, 0), (0, 0)),
    "tp2": (2, Config(tp=2), (1, 0), (1, 0), (1, 0)),
    "pp2": (2, Config(pp=2), (0, 1), (0, 1), (0, 0)),
    "pp2-tied": (2, Config(pp=2, tied=True), (0, 1), (0, 1), (0, 0)),
    "tp2-pp2": (4, Config(tp=2, pp=2, tied=True), (0, 1), (1, 1), (1, 0)),
    "zero": (2, Config(zero=True), (1, 0), (1, 0), (1, 0)),
    "tp2-zero": (4, Config(tp=2, zero=True), (1, 0), (1, 0), (1, 0)),
    "pp2-zero": (4, Config(pp=2, zero=True), (0, 1), (1, 1), (1, 0)),
    "zero-instances": (4, Config(zero=True, instances=2), (1, 0), (1, 0), (1, 0)),
    "ep2": (2, Config(ep=2, experts=4), (2, 0), (1, 0), (1, 0)),
    "ep2-zero": (4, Config(ep=2, experts=4, zero=True), (1, 0), (1, 0), (1, 0)),
    "tp2-ep2": (4, Config(tp=2, ep=2, etp=1, experts=4, sequence_parallel=True), (2, 0), (1, 0), (1, 0)),
    "pp2-ep2-zero": (4, Config(pp=2, ep=2, experts=4, zero=True), (0, 1), (1, 1), (1, 0)),
    "layer-wise": (2, Config(layer_wise=True), (1, 0), (1, 0), (1, 0)),
    "muon-ep2": (2, Config(muon="plain", ep=2, experts=4), (3, 0), (1, 0), (1, 0)),
    "muon-layer-wise-tp2": (4, Config(muon="layer-wise", tp=2, bf16=True), (1, 0), (1, 0), (1, 0)),
    "fsdp": (2, Config(fsdp="optim_grads_params"), (1, 0), (1, 0), (1, 0)),
    "fsdp-ep2": (4, Config(fsdp="optim_grads_params", ep=2, experts=4), (1, 0), (1, 0), (1, 0)),
}
NEWER: dict[str, tuple[int, Config, tuple[int, int], tuple[int, int], tuple[int, int]]] = {
    "muon-with-zero-tp2": (4, Config(muon="layer-wise + ZeRO-1", tp=2, bf16=True), (2, 0), (1, 0), (1, 0)),
    "muon-with-zero-pp2": (4, Config(muon="layer-wise + ZeRO-1", pp=2, bf16=True), (0, 2), (1, 1), (1, 0)),
}
if megatron_version() >= (0, 19):
    COSTS |= NEWER


@pytest.mark.parametrize("name", COSTS)
def test_collectives(name: str) -> None:
    world, config, megatron, warmup, after = COSTS[name]
    ranks = pool(world, "megatron").run(count, config, False)

    def most(key: str) -> tuple[int, int]:
        return max(rank[key][0] for rank in ranks), max(rank[key][1] for rank in ranks)

    assert (most("megatron"), most("warm-up"), most("after")) == (megatron, warmup, after)
    for rank in ranks:
        # Without stages the norm costs nothing, so it is there; across stages it was asked not to be.
        assert (rank["norm"] is None) == (config.pp > 1)


@pytest.mark.parametrize("name", ["pp2", "pp2-zero", "pp2-ep2-zero"])
def test_the_logged_norm_costs_one_gather_across_stages(name: str) -> None:
    world, config, _, _, (inside, _) = COSTS[name]
    for rank in pool(world, "megatron").run(count, config, True):
        assert rank["after"] == (inside, 1)
        assert rank["norm"] > 0


# ---- steps that are skipped ------------------------------------------------------------------------------------------


def overflow(config: Config) -> list[dict[str, Any]]:
    """fp16 with a dynamic loss scale; the third step's loss overflows."""
    setup = build(config)
    clipper = dist_clip.megatron.attach(setup.optimizer, dist_clip.AdaGC(warmup_steps=2), model=setup.chunks)
    pieces = training.main_params(setup)
    out = []
    for step in range(1, 7):
        setup.backward(step, factor=1e8 if step == 3 else 1.0)
        scale = setup.optimizer.get_loss_scale().item()
        before = training.flat([main.detach() for _, _, main in pieces])
        state = clipper.state_dict()
        success, norm, _ = setup.optimizer.step()
        out.append(
            {
                "success": success,
                "norm": norm if norm is None else float(norm),
                "scale": (scale, setup.optimizer.get_loss_scale().item()),
                "same_params": torch.equal(before, training.flat([main.detach() for _, _, main in pieces])),
                "same_state": str(state) == str(clipper.state_dict()),
                "steps": clipper.steps,
            }
        )
    return out


@pytest.mark.parametrize("config", [Config(fp16=True), Config(fp16=True, pp=2), Config(fp16=True, zero=True)], ids=str)
def test_an_fp16_step_that_overflows_leaves_the_state_alone(config: Config) -> None:
    for records in pool(2, "megatron").run(overflow, config):
        assert [record["success"] for record in records] == [True, True, False, True, True, True]
        assert records[2]["norm"] is None
        assert records[2]["same_params"]
        assert records[2]["same_state"]
        assert records[2]["scale"][1] == records[2]["scale"][0] / 2
        assert records[-1]["steps"] == 5
        # Gradients are unscaled before they are measured.
        assert all(0 < record["norm"] < 100 for record in records if record["success"])


def poisoned(config: Config, nonfinite: Any, value: float) -> list[dict[str, Any]]:
    """bf16 has no overflow check: a NaN or Inf reaches the clipper."""
    setup = build(config)
    clipper = dist_clip.megatron.attach(
        setup.optimizer, dist_clip.AdaGC(warmup_steps=2), model=setup.chunks, nonfinite=nonfinite
    )
    pieces = training.main_params(setup)
    out = []
    for step in range(1, 6):
        setup.backward(step)
        if step == 4 and dist.get_rank() == 1:
            for _, param in setup.named():
                if param.main_grad.dim() == 2:
                    param.main_grad.view(-1)[-1] = value
        before = training.flat([main.detach() for _, _, main in pieces])
        state = str(clipper.state_dict())
        record: dict[str, Any] = {"error": None, "success": None}
        try:
            record["success"], norm, _ = setup.optimizer.step()
            record["norm"] = None if norm is None else float(norm)
        except dist_clip.NonFiniteGradError as error:
            record["error"] = str(error)
        after = training.flat([main.detach() for _, _, main in pieces])
        record |= {"same_params": torch.equal(before, after), "finite": bool(after.isfinite().all())}
        record |= {"same_state": state == str(clipper.state_dict()), "steps": clipper.steps}
        out.append(record)
    return out


@pytest.mark.parametrize("config", [Config(bf16=True, zero=True), Config(bf16=True, tp=2), Config(pp=2)], ids=str)
@pytest.mark.parametrize("nonfinite", ["skip", "raise", "zero"])
def test_a_nan_on_one_rank(nonfinite: str, config: Config) -> None:
    for records in pool(2, "megatron").run(poisoned, config, nonfinite, math.nan):
        bad = records[3]
        if nonfinite == "zero":
            assert bad["success"]
            assert bad["finite"]
            assert records[-1]["finite"]
            continue
        assert bad["same_params"]
        assert bad["same_state"]
        assert records[-1]["steps"] == 4
        if nonfinite == "skip":
            assert bad["success"] is False
        else:
            assert "rank 1" in bad["error"]
            assert "weight" in bad["error"]


def above_the_threshold(config: Config) -> list[dict[str, Any]]:
    """Newer versions skip a step whose norm exceeds grad_norm_skip_threshold, after clipping: nothing may remember it."""
    setup = build(config)
    newer = hasattr(setup.optimizer.config, "grad_norm_skip_threshold")
    setup.optimizer.config.grad_norm_skip_threshold = 20.0
    clipper = dist_clip.megatron.attach(
        setup.optimizer, dist_clip.AdaGC(warmup_steps=1), model=setup.chunks, log_global_norm=False
    )
    step_with_ready_grads = setup.optimizer.step_with_ready_grads
    get_grad_norm = setup.optimizer.get_grad_norm
    norms = []

    def recorded() -> Any:
        norms.append(float(get_grad_norm()))  # it is there before the step, not only after
        return norms[-1]

    def as_newer_versions_do() -> bool:
        return False if setup.optimizer.get_grad_norm() > 20.0 else step_with_ready_grads()

    setup.optimizer.get_grad_norm = recorded

    if not newer:
        setup.optimizer.step_with_ready_grads = as_newer_versions_do
    out = []
    for step in range(1, 5):
        setup.backward(step, factor=100.0 if step == 3 else 1.0)
        state = str(clipper.state_dict())
        success, norm, _ = setup.optimizer.step()
        out.append(
            {
                "success": success,
                "norm": float(norm),
                "before": norms[-1],
                "scales": clipper.last_report.scales.tolist(),
            }
        )
        out[-1] |= {"same_state": state == str(clipper.state_dict()), "steps": clipper.steps}
    return out


@pytest.mark.parametrize(
    "config", [Config(zero=True), Config(pp=2), Config(muon="layer-wise", bf16=True)], ids=["zero", "pp2", "muon"]
)
def test_a_step_above_megatrons_threshold_is_not_remembered(config: Config) -> None:
    for records in pool(2, "megatron").run(above_the_threshold, config):
        assert [record["success"] for record in records] == [True, True, False, True]
        assert [record["same_state"] for record in records] == [False, False, True, False]
        assert set(records[2]["scales"]) == {1.0}
        assert records[2]["before"] > 20
        assert records[-1]["steps"] == 3


# ---- detaching, and the built-in clipping ----------------------------------------------------------------------------


def detached(config: Config) -> dict[str, Any]:
    setup = build(config)
    setup.backward(1)
    _, megatrons, _ = setup.optimizer.step()
    clipper = dist_clip.megatron.attach(setup.optimizer, dist_clip.GlobalNorm(1.0), model=setup.chunks)
    off = setup.optimizer.config.clip_grad
    error = ""
    try:
        dist_clip.megatron.attach(setup.optimizer, dist_clip.GlobalNorm(1.0), model=setup.chunks)
    except RuntimeError as caught:
        error = str(caught)
    setup.backward(1)
    setup.optimizer.step()
    clipper.attachment.remove()
    steps = clipper.steps
    setup.backward(1)
    _, norm, _ = setup.optimizer.step()
    return {
        "off": off,
        "on": setup.optimizer.config.clip_grad,
        "error": error,
        "steps": (steps, clipper.steps),
        "float": isinstance(norm, float),
        "megatrons": megatrons,
    }


def test_detaching_brings_megatrons_own_clipping_back() -> None:
    for rank in pool(2, "megatron").run(detached, Config(tp=2)):
        assert (rank["off"], rank["on"]) == (0.0, 1.0)
        assert "attached already" in rank["error"]
        assert rank["steps"] == (1, 1)
        assert rank["float"], "Megatron's own norm is a Python float"


def both_norms(config: Config) -> tuple[float, float]:
    setup = build(config)
    setup.backward(1)
    setup.optimizer.prepare_grads()
    theirs = setup.optimizer.get_grad_norm()
    dist_clip.megatron.attach(setup.optimizer, dist_clip.GlobalNorm(1.0), model=setup.chunks)
    setup.backward(1)
    _, ours, _ = setup.optimizer.step()
    return float(theirs), float(ours)


@pytest.mark.parametrize(
    ("world", "config"),
    [
        (1, Config()),
        (2, Config(tp=2, sequence_parallel=True)),
        (4, Config(tp=2, pp=2, tied=True, zero=False)),
        (4, Config(pp=2, zero=True, tied=True)),
        (4, Config(ep=2, experts=4, zero=True)),
    ],
    ids=str,
)
def test_the_norm_is_megatrons_where_megatrons_is_right(world: int, config: Config) -> None:
    for theirs, ours in pool(world, "megatron").run(both_norms, config):
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_contract_precision_aware_optimizers_keep_their_gradient_elsewhere() -> None:
    """They need Transformer Engine: a stand-in with the attributes of DistributedOptimizer."""
    from types import SimpleNamespace

    low, full = torch.zeros(4, dtype=torch.bfloat16), torch.zeros(3)
    low_shard, full_shard = low[1:3], full[:2]
    low_shard.decoupled_grad, full_shard.decoupled_grad = torch.ones(2), torch.full((2,), 2.0)
    ranges = {id(low): SimpleNamespace(start=1, end=3), id(full): SimpleNamespace(start=0, end=2)}
    leaf = SimpleNamespace(
        config=SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=True),
        model_float16_groups=[[low]],
        model_fp32_groups=[[full]],
        shard_float16_groups=[[low_shard]],
        shard_fp32_groups=[[full_shard]],
        shard_fp32_from_float16_groups=[[None]],  # Transformer Engine's optimizer holds them
        _get_model_param_range_map=lambda param: {"param": ranges[id(param)]},
    )
    found = list(compat.pieces(leaf))
    assert [
        (piece.param is param, piece.start, piece.stop) for piece, param in zip(found, (low, full), strict=True)
    ] == [
        (True, 1, 3),
        (True, 0, 2),
    ]
    assert [
        piece.grad() is shard.decoupled_grad for piece, shard in zip(found, (low_shard, full_shard), strict=True)
    ] == [
        True,
        True,
    ]


def bare(config: Config) -> dict[str, Any]:
    """An optimizer used without its chain, which calls clip_grad_norm itself."""
    setup = build(config)
    leaf = setup.optimizer.chained_optimizers[0]
    clipper = dist_clip.megatron.attach(leaf, dist_clip.GlobalNorm(0.01), model=setup.chunks)
    setup.backward(1)
    _, norm, _ = leaf.step()
    grads = [main.grad for _, _, main in training.main_params(setup)]
    after = math.hypot(*(grad.norm().item() for grad in grads if grad is not None))
    return {"norm": float(norm), "after": after, "steps": clipper.steps}


@pytest.mark.parametrize("config", [Config(), Config(bf16=True), Config(zero=True)], ids=str)
def test_an_optimizer_without_its_chain(config: Config) -> None:
    (rank,) = pool(1, "megatron").run(bare, config)
    assert rank["steps"] == 1
    assert rank["norm"] > 0.01
    assert rank["after"] == pytest.approx(0.01, rel=1e-3)
