"""attach(): which steps clip, and what a step that is to be skipped does.

Rounds are told by the order of steps and by the gradients themselves, so that optimizers that take turns, or one that a
GradScaler leaves out, are never stepped with gradients that nobody clipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dist_clip

MAX_NORM = 1.0


def pair(value: float = 0.0) -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.full((4,), value)), nn.Parameter(torch.full((4,), value))


def set_grads(*params: nn.Parameter, value: float = 10.0) -> None:
    for param in params:
        param.grad = torch.full_like(param, value)


def norm_of(*params: nn.Parameter) -> float:
    return math.hypot(*(param.grad.norm().item() for param in params if param.grad is not None))


def record_norms(optimizer: torch.optim.Optimizer, norms: list[float]) -> None:
    """What the optimizer steps with."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    optimizer.register_step_post_hook(lambda *_: norms.append(norm_of(*params)))


def test_an_optimizer_that_steps_every_other_time_and_first() -> None:
    a, b = pair()
    clipper = dist_clip.GradClipper([("a", a), ("b", b)], dist_clip.GlobalNorm(MAX_NORM))
    one, two = torch.optim.SGD([a], lr=0.1), torch.optim.SGD([b], lr=0.1)
    clipper.attach(one, two)
    norms: list[float] = []
    record_norms(one, norms)
    record_norms(two, norms)
    for iteration in range(1, 7):
        set_grads(a, b)
        if iteration % 2 == 0:
            two.step()
        one.step()
        assert clipper.steps == iteration, "clipped once an iteration"
    assert len(norms) == 9
    assert max(norms) <= MAX_NORM


def test_an_optimizer_that_a_grad_scaler_leaves_out_once() -> None:
    a, b = pair()
    clipper = dist_clip.GradClipper([("a", a), ("b", b)], dist_clip.GlobalNorm(MAX_NORM))
    one, two = torch.optim.SGD([a], lr=0.1), torch.optim.SGD([b], lr=0.1)
    clipper.attach(one, two)
    norms: list[float] = []
    record_norms(one, norms)
    record_norms(two, norms)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    for iteration in range(6):
        set_grads(a, b, value=80.0)
        if iteration == 1:
            a.grad[0] = math.inf
        for optimizer in (one, two):
            scaler.unscale_(optimizer)
        for optimizer in (one, two):
            scaler.step(optimizer)
        scaler.update(8.0)
    assert len(norms) == 11
    assert max(norms) <= MAX_NORM


def test_gradients_accumulated_after_the_clip_are_clipped_again() -> None:
    """In place, into the same gradient tensor: a version of it that was not clipped."""
    a, b = pair()
    clipper = dist_clip.GradClipper([("a", a), ("b", b)], dist_clip.GlobalNorm(MAX_NORM))
    one, two = torch.optim.SGD([a], lr=0.1), torch.optim.SGD([b], lr=0.1)
    clipper.attach(one, two)
    set_grads(a, b)
    one.step()
    b.grad += 10.0
    two.step()
    assert clipper.steps == 2
    assert norm_of(b) <= MAX_NORM


def test_gradients_that_need_no_clipping_are_not_clipped_twice() -> None:
    """A gradient that the clip let through is not written to: it must not be taken for a new one."""
    a, b = pair()
    clipper = dist_clip.GradClipper([("a", a), ("b", b)], dist_clip.GlobalNorm(1e6))
    one, two = torch.optim.SGD([a], lr=0.1), torch.optim.SGD([b], lr=0.1)
    clipper.attach(one, two)
    for iteration in range(1, 4):
        set_grads(a, b)
        one.step()
        two.step()
        assert clipper.steps == iteration


# ---- steps to be skipped -----------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=1.0),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1, foreach=True),
    "sgd-fused": lambda params: torch.optim.SGD(params, lr=1.0, momentum=0.9, fused=True),
    "adamw-fused": lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
}


def adam_steps(optimizer: torch.optim.Optimizer) -> list[float]:
    return [state["step"].item() for state in optimizer.state.values() if "step" in state]


@pytest.mark.parametrize(
    "kwargs", [{"nonfinite": "skip"}, {"guard": dist_clip.SkipAbove(1000.0)}], ids=lambda k: next(iter(k))
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_skipped_step_changes_nothing(optimizer: str, kwargs: dict[str, object]) -> None:
    """Neither clipped tensors nor excluded ones, nor the optimizer's state, nor the clipper's."""
    a, excluded = pair(1.0)
    clipper = dist_clip.GradClipper(
        [("a", a), ("excluded", excluded)],
        dist_clip.AdaGC(warmup_steps=1),
        exclude=["excluded"],
        **kwargs,  # type: ignore[arg-type]
    )
    opt = OPTIMIZERS[optimizer]([a, excluded])
    clipper.attach(opt)
    set_grads(a, excluded, value=0.5)
    opt.step()
    before = a.detach().clone(), excluded.detach().clone(), adam_steps(opt), clipper.state_dict()
    assert not torch.equal(before[0], torch.ones(4))

    set_grads(a, excluded, value=0.5)
    a.grad[1] = math.nan if "nonfinite" in kwargs else 1e6
    opt.step()
    assert bool(clipper.last_report.skip)
    assert torch.equal(a, before[0])
    assert torch.equal(excluded, before[1])
    assert adam_steps(opt) == before[2]
    assert clipper.steps == before[3]["step"] == 1
    assert torch.equal(clipper.state_dict()["tensors"]["a"]["gamma"], before[3]["tensors"]["a"]["gamma"])

    set_grads(a, excluded, value=0.5)
    opt.step()
    assert not bool(clipper.last_report.skip)
    assert not torch.equal(a, before[0]), "the flag of the skipped step must not stay"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_all_optimizers_of_a_round_skip(order: tuple[int, int]) -> None:
    a, b = pair(1.0)
    clipper = dist_clip.GradClipper([("a", a), ("b", b)], dist_clip.GlobalNorm(), nonfinite="skip")
    opts = torch.optim.SGD([a], lr=1.0), torch.optim.AdamW([b], lr=1.0, fused=True)
    clipper.attach(*opts)
    set_grads(a, b)
    b.grad[0] = math.inf
    for i in order:
        opts[i].step()
    assert torch.equal(a, torch.ones(4))
    assert torch.equal(b, torch.ones(4))
    assert clipper.steps == 0


@pytest.mark.parametrize("fused", [False, True])
def test_with_a_grad_scaler_of_its_own_mind(fused: bool) -> None:
    """The scaler's found_inf and the clipper's flag: either one skips, and the scaler finds its own as it left it."""
    a, _ = pair(1.0)
    clipper = dist_clip.GradClipper([("a", a)], dist_clip.GlobalNorm(1e9), guard=dist_clip.SkipAbove(100.0))
    opt = torch.optim.SGD([a], lr=1.0, fused=fused)
    clipper.attach(opt)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    scaler.scale(torch.ones(()))
    steps: list[tuple[float, bool]] = [(0.5, True), (1e4, False), (math.inf, False), (0.25, True)]
    for value, moves in steps:
        before = a.detach().clone()
        a.grad = torch.full_like(a, value) * scaler.get_scale()
        scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        assert torch.equal(a, before) is not moves, value
    assert torch.equal(a, torch.full((4,), 1.0 - 0.5 - 0.25))
    assert not hasattr(opt, "grad_scale")


def test_a_fused_optimizer_is_told_without_a_host_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    a, _ = pair(1.0)
    clipper = dist_clip.GradClipper([("a", a)], dist_clip.GlobalNorm(), nonfinite="skip")
    fused = torch.optim.AdamW([a], lr=0.1, fused=True)
    plain = torch.optim.AdamW([a], lr=0.1)
    flags: list[Tensor] = []
    truth = Tensor.__bool__

    def watched(self: Tensor) -> bool:
        flags.append(self)
        return truth(self)

    monkeypatch.setattr(Tensor, "__bool__", watched)
    for optimizer, reads in ((fused, 0), (plain, 1)):
        handle = clipper.attach(optimizer)
        set_grads(a)
        flags.clear()
        optimizer.step()
        assert sum(flag is clipper.last_report.skip for flag in flags) == reads
        handle.remove()
