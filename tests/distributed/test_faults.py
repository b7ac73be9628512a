"""Faults that a long run meets, injected: what docs/faults.md promises of each.

NaN and Inf: test_nonfinite.py. Damaged checkpoints: test_checkpoints.py. Layouts that differ: test_bad_layouts.py. Ranks out
of step: test_desync.py. fp16 and its scaler: test_mixed_precision.py.
"""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

import dist_clip
from dist_clip.memory.snapshot import snapshot
from tests import reference
from tests.harness import WorkerError, pool

from . import training
from .layouts import LAYOUTS
from .test_checkpoints import DENSE, END, SAVED_AT, Training, load_and_go_on, merged, save_and_go_on
from .training import POLICIES, WARMUP

WORLD = 4
HIT = 8  # the step of the fault, after the warm-up
HIT_AGAIN = 10  # with a gradient that is too small by as much
STEPS = 12
NAMES = {"pp": "blocks.1.up.weight", "pp-fsdp": "blocks.0.up.weight"}


def with_flip(layout: str, policies: tuple[str, ...], factor: float) -> dict[str, Any]:
    """Clippings, recorded as training.train does; a tensor's gradient is `factor` times too large once, then too small."""
    index = training.held(layout)
    setup = training.build(layout, torch.float32)
    names, params = zip(*setup.named, strict=True)
    clippers = {policy: training.make_clipper(setup, POLICIES[policy].ours()) for policy in policies}
    victim = dict(setup.named).get(NAMES.get(layout, "blocks.0.up.weight"))
    records = []
    for step in range(1, STEPS + 1):
        for module in setup.modules:
            module.zero_grad(set_to_none=True)
        setup.backward(step)
        if victim is not None and step in (HIT, HIT_AGAIN):
            training.local(victim.grad).mul_(factor if step == HIT else 1 / factor)
        records.append(training.clip_with_each(setup, clippers, training.clip_once))
    dtypes = [training.local(param).dtype for param in params]
    return {"names": names, "index": index, "grad_dtypes": dtypes, "records": records}


@pytest.mark.parametrize("layout", ["ddp", "fsdp-uneven", "hsdp", "tp-fsdp", "pp-fsdp"])
def test_a_flipped_exponent_bit(layout: str) -> None:
    """A tensor 1e30 times too large, and then too small, so that its square leaves fp32: norms, scales, state are the
    rule's, then and after."""
    policies = training.MAIN_POLICIES
    ranks = pool(WORLD).run(with_flip, layout, policies, 1e30)
    for policy in policies:
        run = training.Run(training.of_policy(ranks, policy), LAYOUTS[layout])
        chosen = POLICIES[policy]
        rule = chosen.theirs()
        for step in range(1, STEPS + 1):
            whole = run.whole_grads(step)
            outcome = reference.clip(rule, dict(run.cut(whole)) if chosen.scope == "shard" else dict(whole))
            for rank in range(WORLD):
                training.check_report(run, rank, step, chosen, outcome, rule)
                training.check_clipped(run, rank, step, chosen, outcome)
            training.check_agreement(run, step, chosen)


@pytest.mark.parametrize("layout", ["fsdp-uneven", "tp-fsdp", "pp-fsdp"])
def test_what_a_flipped_bit_does_to_the_other_tensors(layout: str) -> None:
    """Under AdaGC nothing: their gradients are bitwise those of the run without it, and the tensor's own memory moves by
    at most (1 - beta)(lambda - 1) = 0.04 %. Under GlobalGC they come to nothing: the whole step is lost."""
    name = NAMES.get(layout, "blocks.0.up.weight")
    ranks, healthy_ranks = (
        pool(WORLD).run(with_flip, layout, ("adagc", "global_norm"), factor) for factor in (1e30, 1.0)
    )
    faulty, healthy, lost = (
        training.Run(training.of_policy(records, policy), LAYOUTS[layout])
        for records, policy in ((ranks, "adagc"), (healthy_ranks, "adagc"), (ranks, "global_norm"))
    )
    a, b, c = (run.whole_grads(HIT, "after") for run in (faulty, healthy, lost))
    assert all(torch.equal(a[other], b[other]) for other in a if other != name)
    for rank in range(WORLD):
        before, after = (faulty.ranks[rank]["records"][step - 1]["tensors"] for step in (HIT - 1, HIT))
        if name in before:
            old, new = before[name]["gamma"], after[name]["gamma"]
            assert old <= new <= old * (1 + 0.01 * 0.04 + 1e-6)
            assert float(a[name].norm()) == pytest.approx(1.04 * old, rel=1e-5)
    assert max(float(c[other].norm()) for other in c if other != name) < 1e-20


def overflow() -> dict[str, Any]:
    """A norm that float32 cannot hold, of elements that it can, in one shard of one rank."""
    setup = training.build("fsdp", torch.float32)
    clipper = training.make_clipper(setup, POLICIES["adagc"].ours())
    name, param = next((n, p) for n, p in setup.named if n == "blocks.0.up.weight")
    for step in range(1, WARMUP + 2):
        for module in setup.modules:
            module.zero_grad(set_to_none=True)
        setup.backward(step)
        clipper.clip_()
    gamma = snapshot(clipper.memory)["tensors"][name]["gamma"].item()
    for module in setup.modules:
        module.zero_grad(set_to_none=True)
    setup.backward(WARMUP + 2)
    if dist.get_rank() == 1:
        training.local(param.grad).fill_(3e38)
    report = clipper.clip_()
    whole = param.grad.full_tensor() if isinstance(param.grad, DTensor) else param.grad
    return {
        "norm": float(report.tensor_norms[report.names.index(name)]),
        "nonfinite": bool(report.nonfinite),
        "limit": 1.04 * gamma,
        "clipped": float(whole.double().norm()),
        "gamma": snapshot(clipper.memory)["tensors"][name]["gamma"].item() / gamma,
    }


def test_a_norm_that_overflows_float32() -> None:
    """Measured in float64, so clipped like any other; only the report, in float32, says inf."""
    for rank in pool(WORLD).run(overflow):
        assert math.isinf(rank["norm"])
        assert not rank["nonfinite"]
        assert rank["clipped"] == pytest.approx(rank["limit"], rel=1e-3)  # the scale, 1e-39, is a subnormal float32
        assert 1 < rank["gamma"] <= 1.0004 + 1e-6


def unfrozen_late(layout: str) -> dict[str, Any]:
    """A tensor frozen for 499 steps, then trained, then without a gradient again. Its gamma over the steps."""
    setup = training.build(layout, torch.float32)
    name, param = next((n, p) for n, p in setup.named if n == "blocks.0.up.weight")
    param.requires_grad_(False)
    clipper = training.make_clipper(setup, dist_clip.AdaGC(warmup_steps=WARMUP))
    gammas, scales, norms = {}, {}, {}
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 513):
        param.requires_grad_(step >= 500)
        for _, each in setup.named:
            local = training.local(each.detach())
            noise = torch.randn(local.shape, generator=generator) * (1 + step % 5)
            each.grad = None
            if each is not param or 500 <= step < 508:
                each.grad = DTensor.from_local(noise, each.device_mesh, each.placements, run_check=False)
        report = clipper.clip_()
        if step >= 498:
            position = report.names.index(name)
            gammas[step] = snapshot(clipper.memory)["tensors"][name]["gamma"].item()
            scales[step], norms[step] = report.scales[position].item(), report.tensor_norms[position].item()
    return {"gamma": gammas, "scale": scales, "norm": norms}


def test_a_tensor_that_is_unfrozen_at_step_500_and_goes_away_again() -> None:
    results = pool(WORLD).run(unfrozen_late, "fsdp")
    assert all(result == results[0] for result in results), "ranks disagree"
    gamma, scale, norm = (results[0][key] for key in ("gamma", "scale", "norm"))
    assert gamma[499] == 0
    assert gamma[500] == pytest.approx(norm[500], rel=1e-6)
    assert scale[500] == 1, "the first gradient sets the threshold and is not clipped"
    expected = gamma[500]
    for step in range(501, 508):
        limit = 1.04 * expected
        assert scale[step] == pytest.approx(min(1.0, limit / (norm[step] + 1e-6)), rel=1e-6)
        expected = 0.99 * expected + 0.01 * min(norm[step], limit)
        assert gamma[step] == pytest.approx(expected, rel=1e-6)
    assert {gamma[step] for step in range(508, 513)} == {gamma[507]}, "without a gradient nothing is forgotten"


def die_between_clip_and_step(layout: str, path: str, rank: int) -> None:
    """Save, go on, and lose one process where the clipper has moved on and the parameters have not."""
    run = Training(layout, DENSE, ("adagc",))
    run.steps(1, SAVED_AT)
    dcp.save(run.checkpoint(), checkpoint_id=path)
    run.optimizer.zero_grad()
    run.setup.backward(SAVED_AT + 1)
    run.clipper.clip_()
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    run.optimizer.step()
    run.steps(SAVED_AT + 2, END)


@pytest.mark.parametrize("layout", ["tp-fsdp", "pp-fsdp"])
def test_killed_between_clip_and_step(layout: str, tmp_path: Path) -> None:
    """The other ranks end, too, and the run goes on from its checkpoint to the same bits as if nothing had happened."""
    started = time.monotonic()
    with pytest.raises(WorkerError, match="exit code -9") as caught:
        pool(WORLD, patience=5).run(die_between_clip_and_step, layout, str(tmp_path / "cut"), 1)
    assert not caught.value.timed_out, "a rank had to be killed"
    assert time.monotonic() - started < 60
    resumed = pool(WORLD).run(load_and_go_on, layout, DENSE, ("adagc",), str(tmp_path / "cut"))
    whole = pool(WORLD).run(save_and_go_on, layout, DENSE, ("adagc",), str(tmp_path / "whole"))
    assert merged(resumed, "loaded") == merged(whole, "saved")
    assert merged(resumed, "state") == merged(whole, "state")
    for a, b in zip(resumed, whole, strict=True):
        assert all(torch.equal(a["params"][name], b["params"][name]) for name in b["params"])


def one_clip_more(layout: str) -> None:
    """One rank clips twice in a step of real training."""
    setup = training.build(layout, torch.float32)
    clipper = training.make_clipper(setup, POLICIES["adagc"].ours(), detect_desync=True)
    for step in range(1, 5):
        for module in setup.modules:
            module.zero_grad(set_to_none=True)
        setup.backward(step)
        clipper.clip_()
        if step == 2 and dist.get_rank() == 1:
            clipper.clip_()
    dist.barrier()


@pytest.mark.parametrize("layout", ["tp-fsdp", "pp-fsdp"])
def test_one_clip_more_on_one_rank_ends_every_rank(layout: str) -> None:
    """The clipper's reduction meets a collective of the framework. Who sees that first depends; nobody waits for ever."""
    with pytest.raises(WorkerError) as caught:
        pool(WORLD, patience=5).run(one_clip_more, layout)
    assert not caught.value.timed_out, str(caught.value)
    for rank in range(WORLD):
        assert f"--- rank {rank} of {WORLD} ---" in str(caught.value), "every rank must end with an error"
