"""Ranks that have fallen out of step: found by what rides along with the packed vector, named, and the same on every rank.

Gradients are made up, so that the clipper's collectives are the only ones: in a real step of FSDP the framework's own
would meet each other first (test_faults.py).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist

import dist_clip
from dist_clip.memory.snapshot import snapshot
from tests.harness import pool

from . import training
from .counting import CollectiveLog
from .model import Config, make_net
from .test_collectives import made_up_grad
from .training import POLICIES, WARMUP

WORLD = 4
FAULTY = 2  # the rank that does something else than the others
LAYOUT_NAMES = ["fsdp-uneven", "hsdp", "tp-fsdp", "ep", "tp-sequence", "fsdp-mixed-plain", "pp-fsdp"]


def new_grads(setup: Any, step: int) -> None:
    for _, param in setup.named:
        made_up_grad(param)
        training.local(param.grad).mul_(0.1 * (1 + step % 3))


def in_step(layout: str) -> list[dict[str, Any]]:
    """Five clips by each policy, with and without detect_desync: reports, collectives of the second and the last."""
    setup = training.build(layout, torch.float32)
    out = []
    for policy in POLICY_NAMES:
        both = {}
        for detect in (True, False):
            ours = POLICIES[policy].ours()
            if hasattr(ours, "warmup_steps"):
                ours = dataclasses.replace(ours, warmup_steps=2)
            clipper = training.make_clipper(setup, ours, detect_desync=detect)
            reports, logs = [], []
            for step in range(1, 6):
                new_grads(setup, step)
                with CollectiveLog() as log:
                    reports.append(training.plain_report(clipper.clip_()))
                logs.append(len(log.entries))
            clipper.check_in_sync()
            both[detect] = {"reports": reports, "logs": [logs[1], logs[-1]]}
        out.append(both)
    return out


POLICY_NAMES = ("global_norm", "adagc", "adagc-median", "adagc-shard", "zclip", "logclip", "logclip-shard-post")


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_no_false_alarm_and_no_collective_more(layout: str) -> None:
    for rank in pool(WORLD).run(in_step, layout):
        for both in rank:
            ours, plain = both[True], both[False]
            assert all(a <= b for a, b in zip(ours["logs"], plain["logs"], strict=True)), (ours["logs"], plain["logs"])
            for a, b in zip(ours["reports"], plain["reports"], strict=True):
                assert a["scales"] == pytest.approx(b["scales"], rel=1e-6)
                assert a["tensor_norms"] == pytest.approx(b["tensor_norms"], rel=1e-6)


def out_of_step(layout: str, policy: str, fault: str) -> dict[str, Any]:
    """Six good clips, then one rank goes astray; the error, how many clips it took, and what had been changed."""
    setup = training.build(layout, torch.float32)
    clipper = training.make_clipper(setup, POLICIES[policy].ours(), detect_desync=True)
    for step in range(1, WARMUP + 3):
        new_grads(setup, step)
        clipper.clip_()
    faulty = dist.get_rank() == FAULTY
    name = clipper.layout.names[3]
    if fault == "loaded" and faulty:  # a checkpoint that only one rank loads
        clipper.memory.set_steps(2)
    if fault == "flipped" and faulty:  # a bit of memory
        clipper.memory.groups[0].state["gamma"].view(torch.int32)[3] ^= 1
    if fault == "mean" and faulty:
        clipper.memory.groups[0].state["mean"] += 1e-6
    out: dict[str, Any] = {"name": name, "error": None}
    for step in range(WARMUP + 3, WARMUP + 6):
        if not (fault == "twice" and faulty and step == WARMUP + 4):  # a clip without a backward
            new_grads(setup, step)
        before = training.flat([training.local_grad(param) for _, param in setup.named])
        state = snapshot(clipper.memory)
        try:
            clipper.clip_()
        except dist_clip.DesyncError as error:
            out |= {"error": str(error), "step": step}
            out["grads_untouched"] = torch.equal(
                before, training.flat([training.local_grad(param) for _, param in setup.named])
            )
            after = snapshot(clipper.memory)
            out["state_untouched"] = all(
                torch.equal(entry[slot], after["tensors"][fqn][slot])
                for fqn, entry in state["tensors"].items()
                for slot in entry
            )
            break
    return out


def check_error(ranks: list[dict[str, Any]], step: int, words: list[str], seen_by: set[int]) -> None:
    errors = {ranks[rank]["error"] for rank in seen_by}
    assert len(errors) == 1, errors
    error = errors.pop()
    assert error is not None
    for word in words:
        assert word in error, error
    for rank in seen_by:
        assert ranks[rank]["step"] == step
        assert ranks[rank]["grads_untouched"]
        assert ranks[rank]["state_untouched"]
    for rank in set(range(WORLD)) - seen_by:
        assert ranks[rank]["error"] is None


@pytest.mark.parametrize("fault", ["loaded", "flipped", "twice"])
@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_found_at_once_on_every_rank(layout: str, fault: str) -> None:
    """Of one pipeline stage where there are several: after AdaGC's warm-up the stages do not talk."""
    ranks = pool(WORLD).run(out_of_step, layout, "adagc", fault)
    words = {
        "loaded": [f"rank {FAULTY} is at step 2 and the other ranks at {WARMUP + 2}"],
        "flipped": [f"the first state that differs is that of {ranks[FAULTY]['name']!r}: gamma ", f"on rank {FAULTY}"],
        "twice": [f"rank {FAULTY} clipped again without a backward"],
    }[fault]
    seen_by = {2, 3} if layout == "pp-fsdp" else set(range(WORLD))
    if len(seen_by) == 2 and fault != "twice":
        words = ["first state that differs"] if fault == "flipped" else ["are out of step", "at step"]  # no majority
    step = WARMUP + 4 if fault == "twice" else WARMUP + 3
    check_error(ranks, step, words, seen_by)


def test_state_of_a_global_policy() -> None:
    ranks = pool(WORLD).run(out_of_step, "fsdp", "zclip", "mean")
    check_error(
        ranks, WARMUP + 3, ["first state that differs is that of '*'", f"on rank {FAULTY}", "mean "], {0, 1, 2, 3}
    )


def test_pipeline_stages_compare_their_steps_where_they_talk() -> None:
    """A global policy gathers over the stages at each step, and the count of steps rides along."""
    ranks = pool(WORLD).run(out_of_step, "pp", "global_norm", "loaded")
    check_error(ranks, WARMUP + 3, [f"rank {FAULTY} is at step 2 and the other ranks at {WARMUP + 2}"], {0, 1, 2, 3})


def on_demand(fault: str | None) -> str | None:
    """DDP, where nothing is reduced and nothing can ride along: one rank misses a clip, or has other gradients."""
    setup = training.build("ddp", torch.float32)
    clipper = training.make_clipper(setup, POLICIES["adagc"].ours(), detect_desync=True, check_replicas=False)
    for step in range(1, WARMUP + 4):
        new_grads(setup, step)
        faulty = dist.get_rank() == FAULTY
        if fault == "missed" and faulty and step == 3:
            continue
        if fault == "other gradients" and faulty and step == WARMUP + 2:
            setup.modules[0].module.blocks["1"].up.weight.grad *= 0.01
        clipper.clip_()
    try:
        clipper.check_in_sync()
    except dist_clip.DesyncError as error:
        return str(error)
    return None


def test_on_demand() -> None:
    assert pool(WORLD).run(on_demand, None) == [None] * WORLD
    for fault, words in (
        ("missed", f"rank {FAULTY} is at step {WARMUP + 2} and the other ranks at {WARMUP + 3}"),
        ("other gradients", "that of 'blocks.1.up.weight': gamma "),
    ):
        (error,) = set(pool(WORLD).run(on_demand, fault))
        assert words in error
        assert f"rank {FAULTY}" in error


def different_argument() -> str:
    net = make_net(Config())
    with pytest.raises(dist_clip.LayoutError, match="detect_desync=True") as caught:
        dist_clip.GradClipper(net, dist_clip.GlobalNorm(), detect_desync=dist.get_rank() == 0)
    return str(caught.value)


def test_asked_for_on_one_rank_only() -> None:
    assert len(set(pool(2).run(different_argument))) == 1
