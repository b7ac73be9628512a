"""A NaN or inf in one shard on one rank, in each `nonfinite` mode: all ranks agree, and the state is as it was.

One element of one rank's gradient is poisoned, once within the warm-up and once after it (copies of that very shard
are poisoned alike, as the framework's own reduction would have it). The reference is handed the same gradients.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist

import dist_clip
from dist_clip.memory.snapshot import snapshot
from tests import reference
from tests.harness import pool

from . import training
from .layouts import LAYOUTS
from .training import POLICIES, WARMUP

WORLD = 4
POISONED = 1  # the rank
AT = (3, 8)  # steps within and after the warm-up
STEPS = 10
MODES = ["propagate", "zero", "skip", "raise"]
NAMES = {"pp": "blocks.1.up.weight", "pp-fsdp": "blocks.0.up.weight"}
LAYOUT_NAMES = ["ddp", "fsdp-uneven", "hsdp", "tp-fsdp", "pp", "pp-fsdp"]


def poison(layout: str, setup: Any, name: str, value: float) -> None:
    """Write `value` into the first element of rank POISONED's piece, wherever that piece is held."""
    mine = training.held(layout).get(name)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, None if mine is None else mine.tolist())
    if mine is not None and mine.numel() and mine.tolist() == everyone[POISONED]:
        grad = dict(setup.named)[name].grad
        with torch.no_grad():
            training.local(grad).view(-1)[0] = value


def run_poisoned(layout: str, cases: tuple[tuple[str, str], ...], value: float) -> dict[str, Any]:
    """Ten clippings without an optimizer (so that a NaN stays where it was put), recorded as training.train does.

    `cases`: policies with a mode each; all clip the same gradients.
    """
    index = training.held(layout)
    setup = training.build(layout, torch.float32)
    names, params = zip(*setup.named, strict=True)
    clippers = {case: training.make_clipper(setup, POLICIES[case[0]].ours(), nonfinite=case[1]) for case in cases}
    records = []
    for step in range(1, STEPS + 1):
        for module in setup.modules:
            module.zero_grad(set_to_none=True)
        setup.backward(step)
        if step in AT:
            poison(layout, setup, NAMES.get(layout, "blocks.0.up.weight"), value)
        records.append(training.clip_with_each(setup, clippers, functools.partial(clip_or_refuse, poisoned=step in AT)))
    dtypes = [training.local(param).dtype for param in params]
    return {"names": names, "index": index, "grad_dtypes": dtypes, "records": records}


def clip_or_refuse(clipper: dist_clip.GradClipper, poisoned: bool) -> dict[str, Any]:
    before = clipper.state_dict() if poisoned else None
    out: dict[str, Any] = {}
    try:
        out["report"] = training.plain_report(clipper.clip_())
    except dist_clip.NonFiniteGradError as error:
        out["error"] = str(error)
    after = clipper.state_dict()
    # Looked at here: states are much slower to send than what is to be said of them.
    out["bad_state"] = not_finite(after)
    out["same_state"] = poisoned and same_state(before, after)
    out["tensors"], out["global"] = training.state_of(clipper)
    return out


def same_state(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a.nan_to_num(nan=-1.0), b.nan_to_num(nan=-1.0))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same_state(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_modes(layout: str, pytestconfig: pytest.Config) -> None:
    # Each value meets each mode and policy in two layouts, each policy every mode in half the layouts.
    turn = LAYOUT_NAMES.index(layout)
    every = pytestconfig.getoption("every_policy")
    cases = tuple(
        (policy, mode)
        for number, mode in enumerate(MODES)
        for policy in training.MAIN_POLICIES[0 if every else (turn + number) % 2 :: 1 if every else 2]
    )
    ranks = pool(WORLD).run(run_poisoned, layout, cases, (math.nan, math.inf, -math.inf)[turn % 3])
    for policy, mode in cases:
        check(training.Run(training.of_policy(ranks, (policy, mode)), LAYOUTS[layout]), layout, policy, mode)


def check(run: training.Run, layout: str, policy_name: str, mode: str) -> None:
    policy = POLICIES[policy_name]
    rule = policy.theirs()
    name = NAMES.get(layout, "blocks.0.up.weight")
    for step in range(1, STEPS + 1):
        for rank, entry in enumerate(run.ranks):
            record = entry["records"][step - 1]
            where = f"rank {rank}, step {step}"
            assert not record["bad_state"], f"{where}: {record['bad_state']}"
            if step not in AT:
                assert "error" not in record, f"{where}: {record.get('error')}"
                assert not record["report"]["nonfinite"], where
            elif mode == "raise":
                check_error(record, name, holders(run, name), where)
            elif mode == "skip" or name in entry["names"]:
                holds_it = policy.scope != "shard" or rank in holders(run, name)
                if mode == "skip" or holds_it:
                    assert record["report"]["nonfinite"], f"{where}: report.nonfinite"
            if step in AT and mode in ("skip", "raise"):
                assert torch.equal(record["before"].nan_to_num(7.0), record["after"].nan_to_num(7.0)), where
                assert record["same_state"], f"{where}: the state has changed"
        if step in AT and mode in ("skip", "raise"):
            assert len({r["records"][step - 1].get("error") for r in run.ranks}) == 1, "ranks tell different stories"
            continue
        whole = join_with_nan(run, step)
        grads: dict[Any, Any] = dict(run.cut(whole)) if policy.scope == "shard" else dict(whole)
        outcome = reference.clip(rule, grads, mode)
        for rank in range(len(run.ranks)):
            check_clipped(run, rank, step, policy, outcome)
            training.check_state(run, rank, step, policy, rule)
        if step not in AT:
            training.check_agreement(run, step, policy)


def join_with_nan(run: training.Run, step: int) -> dict[str, torch.Tensor]:
    """Run.join insists on equal copies, and NaN equals nothing: hide the non-finite values from it."""
    parts = run.local_grads(step, "before")
    codes = {math.nan: 12345.0, math.inf: 23456.0, -math.inf: 34567.0}
    hidden = []
    for part in parts:
        hidden.append(
            {
                n: None if t is None else t.nan_to_num(codes[math.nan], codes[math.inf], codes[-math.inf])
                for n, t in part.items()
            }
        )
    whole = run.join(hidden)
    for tensor in whole.values():
        for value, code in ((math.nan, 12345.0), (math.inf, 23456.0), (-math.inf, 34567.0)):
            tensor[tensor == code] = value
    return whole


def check_clipped(run: training.Run, rank: int, step: int, policy: Any, outcome: reference.Outcome) -> None:
    entry = run.ranks[rank]
    for name, tensor in run.split(rank, entry["records"][step - 1], "after").items():
        key: Any = run.piece_of[rank].get(name)
        if tensor is None or key is None:
            continue
        expected = outcome.grads[key] if policy.scope == "shard" else outcome.grads[name].flatten()[run.pieces[key]]
        where = f"rank {rank}, step {step}, {name}"
        rtol = training.CLIPPED_RTOL[torch.float32] - training.RTOL + policy.rtol
        training.assert_close(tensor, expected.double(), where, rtol=rtol, atol=1e-30, equal_nan=True)


def holders(run: training.Run, name: str) -> set[int]:
    """The ranks with a copy of the poisoned shard."""
    piece = run.piece_of[POISONED][name]
    return {rank for rank, pieces in enumerate(run.piece_of) if pieces.get(name) == piece}


def check_error(record: dict[str, Any], name: str, ranks: set[int], where: str) -> None:
    """The error names the tensor, and one at least of the ranks that hold the bad shard, and none that does not."""
    assert "error" in record, f"{where}: nothing was raised"
    assert name in record["error"], f"{where}: {record['error']}"
    named = re.search(r"\branks?\b ([\d, and]+)", record["error"])
    assert named, f"{where}: {record['error']}"
    assert set(map(int, re.findall(r"\d+", named[1]))) <= ranks, f"{where}: {record['error']}, not on {ranks}"


def not_finite(state: dict[str, Any]) -> list[str]:
    """What of the state is NaN or Inf."""
    entries = [(name, entry) for kind in ("tensors", "global") for name, entry in state[kind].items()]
    return [
        f"{name}: {key} = {value}"
        for name, entry in entries
        for key, value in entry.items()
        # Slots of the warm-up's record that hold nothing yet may be anything.
        if key != "history" and not torch.isfinite(torch.as_tensor(value)).all()
    ]


def everybody_lacks(layout: str, cases: tuple[tuple[str, str], ...], ranks: tuple[int, ...]) -> list[dict[str, Any]]:
    """All gradients are None on some ranks, from the first step on. What became of each policy and mode of `cases`."""
    setup = training.build(layout, torch.float32)
    # A copy without a gradient beside copies that have one is an error, unless it is not looked for.
    clippers = [
        training.make_clipper(setup, POLICIES[policy].ours(), nonfinite=mode, check_replicas=False)
        for policy, mode in cases
    ]
    reports: list[list[Any]] = [[] for _ in cases]
    for step in range(1, WARMUP + 3):
        for module in setup.modules:
            module.zero_grad(set_to_none=True)
        setup.backward(step)
        if dist.get_rank() in ranks:
            for module in setup.modules:
                module.zero_grad(set_to_none=True)
        restore = training.remember_gradients(setup.modules)
        for mine, clipper in zip(reports, clippers, strict=True):
            restore()
            mine.append(training.plain_report(clipper.clip_()))
            if dist.get_rank() in ranks:
                assert all(param.grad is None for _, param in setup.named)
    return [
        {"reports": mine, "state": snapshot(clipper.memory)} for mine, clipper in zip(reports, clippers, strict=True)
    ]


@pytest.mark.parametrize("layout", ["fsdp-uneven", "tp-fsdp", "pp", "pp-fsdp"])
def test_a_rank_without_any_gradient(layout: str) -> None:
    cases = tuple(itertools.product(("global_norm", "adagc", "adagc-shard"), ("propagate", "raise")))
    everything = pool(WORLD).run(everybody_lacks, layout, cases, (2,))
    for (policy, _), results in zip(cases, zip(*everything, strict=True), strict=True):
        check_one_rank_lacks(layout, policy, results)


def check_one_rank_lacks(layout: str, policy: str, results: tuple[dict[str, Any], ...]) -> None:
    if not layout.startswith("pp") and policy != "adagc-shard":
        for reports in zip(*(result["reports"] for result in results), strict=True):
            assert all(report["scales"] == reports[0]["scales"] for report in reports), "ranks disagree"
    for rank, result in enumerate(results):
        for report in result["reports"]:
            assert report["empty"] == (rank == 2)
            assert (report["num_grads"] == 0) == (rank == 2)
            assert not report["nonfinite"]
            assert all(map(math.isfinite, report["scales"]))


@pytest.mark.parametrize("layout", ["ddp", "fsdp-uneven", "tp-fsdp", "pp"])
def test_no_gradient_anywhere(layout: str) -> None:
    """A clip before any backward clips nothing, observes nothing, and says so."""
    cases = tuple((policy, "propagate") for policy in training.MAIN_POLICIES)
    for results in pool(WORLD).run(everybody_lacks, layout, cases, tuple(range(WORLD))):
        for result in results:
            for report in result["reports"]:
                assert report["empty"]
                assert report["num_grads"] == 0
                assert report["clipped_fraction"] == 0
                assert not report["nonfinite"]
            assert not any(value for entry in result["state"]["tensors"].values() for value in entry.values())
