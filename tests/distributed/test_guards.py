"""Guards over real layouts: what the reference decides, the same bits on every rank, no collective more, state, errors."""

from __future__ import annotations

import functools
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

import dist_clip
from tests import reference
from tests.harness import pool

from . import training
from .counting import CollectiveLog
from .layouts import Setup

STEPS = 14
COUNTED = (7, 11)
"""No powers of two, at which replicas are compared."""
BAD = {5: 40.0, 9: 1e3, 12: math.nan}
"""Step -> what every gradient is multiplied by."""
SPIKES = {13: 9.0}
"""Step -> what is added to the loss."""


def guards() -> list[dist_clip.Guard]:
    return [
        dist_clip.MedianGuard(warmup_steps=2, window=5, max_skips_in_a_row=4),
        dist_clip.SkipStep(window=6, sigma=8.0),
        dist_clip.DropNorm(factor=10.0),
    ]


def clipper_of(setup: Setup, **kwargs: Any) -> dist_clip.GradClipper:
    return training.make_clipper(setup, dist_clip.LogClip(warmup_steps=3), **{"guard": guards(), **kwargs})


def own_loss(setup: Setup, step: int) -> Tensor | None:
    """This rank's loss, which is another one on each rank; None where a pipeline's stage is not the last."""
    if setup.pp_group is not None and dist.get_rank(setup.pp_group) < setup.pp_group.size() - 1:
        return None
    return torch.tensor(2.0 + 0.1 * math.sin(step) + 0.01 * dist.get_rank() + SPIKES.get(step, 0.0))


def backward(setup: Setup, step: int) -> None:
    for module in setup.modules:
        module.zero_grad(set_to_none=True)
    setup.backward(20 + step)  # after the spikes that the layouts have themselves
    for _, param in setup.named:
        if param.grad is not None:
            training.local(param.grad).mul_(BAD.get(step, 1.0))


def run(layout: str) -> dict[str, Any]:
    setup = training.build(layout, torch.float64)
    clipper = clipper_of(setup)
    # Where steps may be skipped the stages communicate on each step; guards need nothing beyond that.
    plain = training.make_clipper(setup, dist_clip.LogClip(warmup_steps=3), nonfinite="skip")
    out: dict[str, Any] = {"names": clipper.layout.names, "norms": [], "skips": [], "losses": [], "logs": []}
    for step in range(1, STEPS + 1):
        backward(setup, step)
        restore = training.remember_gradients(setup.modules)
        with CollectiveLog() as without:
            plain.clip_()
        restore()
        loss = own_loss(setup, step)
        with CollectiveLog() as log:
            report = clipper.clip_(loss)
        if step in COUNTED:
            out["logs"].append((without.entries, log.entries))
        out["norms"].append(report.tensor_norms.double().tolist())
        out["skips"].append(bool(report.skip))
        out["losses"].append(None if loss is None else float(loss.double()))
    return {**out, "state": plain_state(clipper)}


def plain_state(clipper: dist_clip.GradClipper) -> dict[str, Any]:
    """The guards' states as plain numbers, mergeable over pipeline stages."""
    out: dict[str, Any] = {}
    for k, entry in clipper.state_dict()["guards"].items():
        for name, slots in {"model": entry["model"], **entry["tensors"]}.items():
            out |= {f"{k} {name} {slot}": value.tolist() for slot, value in slots.items()}
    return out


def merged(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One state of all stages; ranks that know the same value know the same bits."""
    out: dict[str, Any] = {}
    for rank in ranks:
        for name, value in rank["state"].items():
            assert out.setdefault(name, value) == value, name
    return out


@functools.cache
def ran(layout: str, world: int) -> list[dict[str, Any]]:
    return pool(world).run(run, layout)


# No vector travels that could add the ranks' losses: one all-reduce of three numbers does.
WITHOUT_VECTOR = [("ddp", 2), ("pp-dp-by-hand", 4)]
WITH_VECTOR = [
    ("fsdp-uneven", 2),
    ("hsdp", 4),
    ("tp-fsdp", 4),
    ("ep", 4),
    ("pp", 2),
    ("pp-tied", 2),
    ("pp-fsdp", 4),
    ("pp-tp", 4),
    ("pp-tp-fsdp", 8),
]
LAYOUTS = [*WITHOUT_VECTOR, *WITH_VECTOR]


@pytest.mark.parametrize(("layout", "world"), LAYOUTS, ids=[f"{name}-{world}" for name, world in LAYOUTS])
def test_ranks_decide_as_the_reference_does(layout: str, world: int) -> None:
    ranks = ran(layout, world)
    median = reference.MedianGuard(warmup=2, window=5, most=4)
    step_guard, drop = reference.SkipStep(6, 8.0), reference.DropNorm(factor=10.0)
    expected = []
    for step in range(STEPS):
        norms = {name: norm for rank in ranks for name, norm in zip(rank["names"], rank["norms"][step], strict=True)}
        losses = [rank["losses"][step] for rank in ranks if rank["losses"][step] is not None]
        loss, total = sum(losses) / len(losses), reference.total_norm(norms)
        votes = [median.skips(norms), step_guard.skips(total, loss), drop.skips(total, loss)]
        expected.append(any(votes))
    for rank in ranks:
        assert rank["skips"] == expected
    skipped = {step for step, skip in enumerate(expected, start=1) if skip}
    assert {*BAD, *SPIKES} <= skipped
    assert len(skipped) <= len(BAD) + len(SPIKES) + 1
    state = merged(ranks)
    assert state["1 model losses"] == pytest.approx(
        [0.0] * (6 - len(step_guard.losses or ())) + (step_guard.losses or [])
    )
    for name, level in median.level.items():
        assert state[f"0 {name} level"] == pytest.approx(level, rel=1e-5)


def test_all_layouts_of_one_model_remember_the_same() -> None:
    states = [merged(ran(layout, world)) for layout, world in (("pp", 2), ("pp-tp", 4))]
    for state in states:
        del state["1 model losses"]  # each rank has its own
    assert states[1].keys() == states[0].keys()
    for name, value in states[1].items():
        assert value == pytest.approx(states[0][name], rel=1e-5), name


@pytest.mark.parametrize(("layout", "world"), LAYOUTS, ids=[f"{name}-{world}" for name, world in LAYOUTS])
def test_no_collective_more_where_a_vector_travels(layout: str, world: int) -> None:
    for rank in ran(layout, world):
        for without, with_guards in rank["logs"]:
            if (layout, world) in WITHOUT_VECTOR:
                (loss,) = with_guards[: len(with_guards) - len(without)]
                assert loss.ranks == tuple(range(world))
                with_guards = with_guards[1:]
            assert len(with_guards) == len(without)
            if layout == "hsdp":  # one sum over all ranks in place of one over those that hold shards
                assert [each.ranks for each in with_guards] == [tuple(range(world))]
            else:
                assert with_guards == without


# ---- state ---------------------------------------------------------------------------------------------------------------


def save(layout: str, path: str, packed: bool) -> dict[str, Any]:
    setup = training.build(layout, torch.float64)
    clipper = clipper_of(setup)
    skips = []
    for step in range(1, STEPS + 1):
        if step == 9:
            saved = plain_state(clipper)
            dcp.save({"clipper": clipper.packed() if packed else clipper}, checkpoint_id=path)
        backward(setup, step)
        skips.append(bool(clipper.clip_(own_loss(setup, step)).skip))
    return {"state": saved, "skips": skips[8:], "end": plain_state(clipper)}


def load(layout: str, path: str, packed: bool) -> dict[str, Any]:
    setup = training.build(layout, torch.float64)
    clipper = clipper_of(setup)
    for step in (1, 2):  # a past of its own, which loading has to replace
        backward(setup, step)
        clipper.clip_(own_loss(setup, step))
    dcp.load({"clipper": clipper.packed() if packed else clipper}, checkpoint_id=path)
    loaded, skips = plain_state(clipper), []
    for step in range(9, STEPS + 1):
        backward(setup, step)
        skips.append(bool(clipper.clip_(own_loss(setup, step)).skip))
    clipper.check_in_sync()
    return {"state": loaded, "skips": skips, "end": plain_state(clipper)}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("first", "second"), [(("pp-tp", 4), ("pp-tp", 4)), (("pp-tp", 4), ("pp", 2))])
def test_states_are_exact_after_a_resume_and_resharding(first: Any, second: Any, packed: bool, tmp_path: Path) -> None:
    before = pool(first[1]).run(save, first[0], str(tmp_path), packed)
    after = pool(second[1]).run(load, second[0], str(tmp_path), packed)
    assert merged(after) == merged(before)
    assert after[0]["skips"] == before[0]["skips"]
    assert True in after[0]["skips"]
    if first == second:
        assert [rank["end"] for rank in after] == [rank["end"] for rank in before]


def out_of_step() -> list[str]:
    setup = training.build("fsdp", torch.float64)
    told = []
    for what in ("spent", "level"):
        clipper = clipper_of(setup, guard=dist_clip.MedianGuard(warmup_steps=2), detect_desync=True)
        for step in (1, 2, 3):
            backward(setup, step)
            clipper.clip_()
        clipper.check_in_sync()
        if dist.get_rank() == 1:
            clipper.memory.guards[0].state[what].add_(1)
        for check in (clipper.check_in_sync, clipper.clip_):
            backward(setup, 4)
            with pytest.raises(dist_clip.DesyncError) as error:
                check()
            told.append(str(error.value))
    return told


def test_guards_that_differ_are_a_desync() -> None:
    first, second = pool(2).run(out_of_step)
    assert first == second
    assert all("the first state that differs is that of 'guard 0" in told for told in first)


# ---- errors on every rank alike -------------------------------------------------------------------------------------------


def passing(layout: str, losses: dict[int, Any], usual: Any) -> dict[str, Any]:
    """Two clips: `losses` by rank, `usual` elsewhere; and one that is right."""
    setup = training.build(layout, torch.float64)
    clipper = clipper_of(setup, guard=dist_clip.SkipStep(window=6))
    told = []
    for step in (1, 2):
        backward(setup, step)
        before = [g.clone() for _, p in setup.named if (g := training.local_grad(p)) is not None]
        try:
            clipper.clip_(losses.get(dist.get_rank(), usual))
            told.append("")
        except (TypeError, ValueError) as error:
            told.append(str(error))
        after = [g for _, p in setup.named if (g := training.local_grad(p)) is not None]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    clipper.clip_(1.0)
    return {"told": told, "recorded": int(clipper.memory.guards[0].state["num_losses"])}


@pytest.mark.parametrize(
    ("layout", "world"), [("ddp", 2), ("tp-fsdp", 4), ("pp", 2), ("pp-dp-by-hand", 4), ("pp-fsdp", 4)]
)
@pytest.mark.parametrize(
    ("losses", "usual", "message"),
    [
        ({1: None}, 1.0, "SkipStep looks at the loss, but rank 1 passed none."),
        ({}, None, "SkipStep looks at the loss, but no rank passed it."),
        ({1: torch.ones(3)}, 1.0, "but rank 1 passed another thing (loss must be a number or a tensor of one element"),
        (
            {1: "two"},
            None,
            "but rank 1 passed another thing (loss must be a number or a tensor of one element, got str)",
        ),
    ],
    ids=["none on one", "none", "vector", "text"],
)
def test_a_loss_that_ranks_do_not_pass(layout: str, world: int, losses: Any, usual: Any, message: str) -> None:
    if layout == "pp" and None in losses.values():
        pytest.skip("each stage is one rank, and any of them may have the loss")
    for rank in pool(world).run(passing, layout, losses, usual):
        assert all(message in told for told in rank["told"]), rank["told"]
        assert rank["recorded"] == 1


def stuck(layout: str) -> list[str]:
    setup = training.build(layout, torch.float64)
    guard = dist_clip.SkipAbove(1e-6, max_skips_in_a_row=2, when_stuck="raise")
    clipper = clipper_of(setup, guard=guard)
    told = []
    for step in range(1, 5):
        backward(setup, step)
        try:
            told.append(f"skip: {bool(clipper.clip_().skip)}")
        except dist_clip.StuckError as error:
            told.append(str(error))
    return told


@pytest.mark.parametrize(("layout", "world"), [("ddp", 2), ("tp-fsdp", 4), ("pp", 2)])
def test_a_stuck_guard_raises_on_every_rank(layout: str, world: int) -> None:
    for told in pool(world).run(stuck, layout):
        assert told[:2] == ["skip: True"] * 2
        assert all("has skipped as many steps in a row as it may" in error for error in told[2:])


def another_guard() -> str:
    guard = dist_clip.SkipAbove(5.0) if dist.get_rank() else dist_clip.SkipAbove(6.0)
    with pytest.raises(dist_clip.LayoutError) as error:
        dist_clip.GradClipper(nn.Linear(2, 2), dist_clip.GlobalNorm(), guard=guard)
    return str(error.value)


def test_other_guards_on_a_rank() -> None:
    for told in pool(2).run(another_guard):
        assert "rank 1 is configured differently from rank 0" in told
        assert "SkipAbove(max_norm=5.0" in told


def older_state() -> list[str]:
    setup = training.build("fsdp", torch.float64)
    old = clipper_of(setup, guard=None)
    backward(setup, 1)
    old.clip_()
    new = clipper_of(setup)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        new.load_state_dict(old.state_dict())
    backward(setup, 2)
    new.clip_(1.0)
    new.check_in_sync()
    return [str(w.message) for w in caught]


def test_a_state_from_before_the_guards() -> None:
    for told in pool(2).run(older_state):
        assert len(told) == 3
        assert all("as it was saved without it: it starts afresh" in message for message in told)
