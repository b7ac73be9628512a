"""attach() on optimizers whose step is not what torch makes of it: each taken step is clipped once, or refused by name.

The situations are from public reports: steps that call their parent's step, wrappers whose step runs no hooks, optimizers
that step without gradients, and checkpoint functions that step to make an optimizer's state.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer, _apply_optimizer_in_backward

import dist_clip

pytorch_optimizer = pytest.importorskip("pytorch_optimizer")


def param(value: float = 0.0) -> nn.Parameter:
    return nn.Parameter(torch.full((4,), value))


def moved(optimizer: Any, weight: nn.Parameter, grad: float, zero_grad: Callable[[], None] | None = None) -> float:
    """How far one step with a gradient of `grad` in each element moves the weight."""
    before = weight.detach().clone()
    (zero_grad or optimizer.zero_grad)()
    weight.grad = torch.full_like(weight, grad)
    optimizer.step()
    return float((weight.detach() - before).norm())


class Sub(torch.optim.AdamW):
    """Calls its parent's step, in which torch's hooks run as well once a plain AdamW exists."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return super().step(closure)


class SubSub(Sub):
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return super().step(closure)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("cls", [Sub, SubSub])
@pytest.mark.report(
    "pytorch/pytorch#47655",
    situation="a subclass's step calls its parent's: hooks run in both",
    right="one clip a step, and a skip skips that step alone",
)
def test_a_step_that_calls_its_parents_is_one_step(cls: type[torch.optim.AdamW], fused: bool) -> None:
    """Third of six steps 1000 times too large: it is skipped, and no other; the reports are those of the steps."""
    torch.optim.AdamW([param()])  # marks AdamW's own step as one that runs hooks
    weight, twin = param(), param()
    clipper = dist_clip.GradClipper([("w", weight)], dist_clip.GlobalNorm(1.0), guard=dist_clip.SkipAbove(50.0))
    optimizer = cls([weight], lr=0.1, fused=fused)
    plain = torch.optim.AdamW([twin], lr=0.1, fused=fused)
    clipper.attach(optimizer)
    steps, skips = [], []
    for grad in (1.0, 1.0, 1000.0, 1.0, 1.0, 1.0):
        distance = moved(optimizer, weight, grad)
        steps.append(clipper.steps)
        skips.append(bool(clipper.last_report.skip))  # type: ignore[union-attr]
        if grad == 1.0:
            assert float(clipper.last_report.global_norm) == 2.0  # type: ignore[arg-type, union-attr]
            assert distance == pytest.approx(moved(plain, twin, 0.5), rel=1e-5)
        else:
            assert distance == 0.0
    assert steps == [1, 2, 2, 3, 4, 5]
    assert skips == [False, False, True, False, False, False]
    assert not hasattr(optimizer, "found_inf")


class NoHooks:
    """A wrapper with a step of its own, of no class of torch's, and without any hooks."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        self.param_groups = inner.param_groups

    def zero_grad(self) -> None:
        self.inner.zero_grad()

    def step(self) -> None:
        self.inner.step()


def lookahead(weight: nn.Parameter) -> Any:
    return pytorch_optimizer.Lookahead(torch.optim.SGD([weight], lr=1.0), k=100)


WRAPPERS: dict[str, Callable[[nn.Parameter], Any]] = {
    "Lookahead": lookahead,
    "without hooks": lambda weight: NoHooks(torch.optim.SGD([weight], lr=1.0)),
    "a wrapped wrapper": lambda weight: NoHooks(lookahead(weight)),
    "PostLocalSGD": lambda weight: PostLocalSGDOptimizer(
        torch.optim.SGD([weight], lr=1.0), PeriodicModelAverager(period=100, warmup_steps=100)
    ),
    "ZeroRedundancy": lambda weight: ZeroRedundancyOptimizer([weight], torch.optim.SGD, lr=1.0),
}


@pytest.mark.parametrize("zero_grad", ["the optimizer's", "the model's"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.usefixtures("world_of_one")
@pytest.mark.report(
    "kozistr/pytorch_optimizer#122",
    "kozistr/pytorch_optimizer#484",
    situation="wrappers (Lookahead, PostLocalSGDOptimizer) whose step runs no hooks, or which have no dictionary for them",
    right="each step is clipped, from the first on",
)
def test_a_wrappers_steps_are_clipped_from_the_first(wrapper: str, zero_grad: str) -> None:
    model = nn.ParameterDict({"w": param()})
    weight: nn.Parameter = model["w"]  # type: ignore[assignment]
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(0.001))
    optimizer = WRAPPERS[wrapper](weight)
    handle = clipper.attach(optimizer)
    zero = model.zero_grad if zero_grad == "the model's" else None
    for step in range(1, 4):
        assert moved(optimizer, weight, 447.2, zero) == pytest.approx(0.001, rel=1e-3)
        assert clipper.steps == step
    handle.remove()
    assert moved(optimizer, weight, 447.2, zero) == pytest.approx(894.4)
    assert clipper.steps == 3


class Scaled(torch.optim.Optimizer):
    """As Accelerate's with a GradScaler: it keeps the step that the optimizer had, and puts it back each time."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.kept = optimizer, optimizer.step
        self.param_groups = optimizer.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step = lambda *args: self.kept(*args)  # type: ignore[method-assign]
        self.optimizer.step(closure)
        self.optimizer.step = self.kept  # type: ignore[method-assign]


@pytest.mark.parametrize("attach_first", [False, True])
def test_a_wrapper_that_keeps_the_step_it_found(attach_first: bool) -> None:
    weight = param()
    clipper = dist_clip.GradClipper([("w", weight)], dist_clip.GlobalNorm(1.0))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    if attach_first:
        clipper.attach(optimizer)
    wrapper = type("AcceleratedOptimizer", (Scaled,), {"__module__": "accelerate.optimizer"})(optimizer)
    if attach_first:
        for step in range(1, 4):
            assert moved(wrapper, weight, 10.0, lambda: None) == pytest.approx(1.0)
            assert clipper.steps == step
        return
    clipper.attach(wrapper)
    with pytest.raises(RuntimeError, match=r"past the attached clipper.* attach before accelerator\.prepare\(\)"):
        moved(wrapper, weight, 10.0, lambda: None)
    assert float(weight.detach().norm()) == 0.0


class Accumulating(torch.optim.Optimizer):
    """Steps the optimizer inside every other time only."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.calls = optimizer, 0

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.calls += 1
        if self.calls % 2 == 0:
            self.optimizer.step(closure)


Accelerated = type("AcceleratedOptimizer", (Accumulating,), {"__module__": "accelerate.optimizer"})


class ZeroesAfterwards(NoHooks):
    def step(self) -> None:
        super().step()
        self.zero_grad()


def test_a_wrapper_that_takes_the_gradients_away_after_its_step() -> None:
    weight = param()
    clipper = dist_clip.GradClipper([("w", weight)], dist_clip.GlobalNorm(1.0))
    optimizer = ZeroesAfterwards(torch.optim.SGD([weight], lr=1.0))
    clipper.attach(optimizer)
    for step in range(1, 3):
        assert moved(optimizer, weight, 10.0) == pytest.approx(1.0)
        assert clipper.steps == step


class Combined:
    """Two optimizers that step as one, as for Muon and AdamW."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    @property
    def param_groups(self) -> Any:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def test_optimizers_that_step_as_one_are_clipped_once() -> None:
    a, b = param(), param()
    clipper = dist_clip.GradClipper([("a", a), ("b", b)], dist_clip.GlobalNorm(1.0), guard=dist_clip.SkipAbove(50.0))
    optimizer = Combined(torch.optim.SGD([a], lr=1.0), torch.optim.AdamW([b], lr=0.1, fused=True))
    clipper.attach(optimizer)
    for grad, skipped in ((3.0, False), (1000.0, True), (3.0, False)):
        before = a.detach().clone(), b.detach().clone()
        a.grad, b.grad = torch.full((4,), grad), torch.full((4,), grad)
        optimizer.step()
        assert float((a.detach() - before[0]).norm()) == pytest.approx(0.0 if skipped else 0.5**0.5)
        assert torch.equal(b, before[1]) is skipped
    assert clipper.steps == 2
    for inner in optimizer.optimizers:
        with pytest.raises(RuntimeError, match="was called past the attached clipper"):
            inner.step()


def test_a_wrapper_that_only_decides_whether_to_step_is_unwrapped() -> None:
    """Accelerate's and Lightning's: they step only where gradients are complete."""
    weight = param()
    clipper = dist_clip.GradClipper([("w", weight)], dist_clip.GlobalNorm(1.0))
    wrapper = Accelerated(torch.optim.SGD([weight], lr=1.0))
    clipper.attach(wrapper)
    for _ in range(4):
        weight.grad = torch.ones(4)
        wrapper.step()
    assert clipper.steps == 2
    assert float(weight.detach().norm()) == pytest.approx(2.0)


def test_another_wrapper_that_does_not_step_is_an_error_that_says_what_to_attach() -> None:
    weight = param()
    wrapper = Accumulating(torch.optim.SGD([weight], lr=1.0))
    handle = dist_clip.GradClipper([("w", weight)], dist_clip.GlobalNorm(1.0)).attach(wrapper)
    weight.grad = torch.ones(4)
    with pytest.raises(RuntimeError, match=r"Accumulating\.step took no step, .* Attach the SGD that it wraps"):
        wrapper.step()
    handle.remove()
    clipper = dist_clip.GradClipper([("w", weight)], dist_clip.GlobalNorm(1.0))
    clipper.attach(wrapper.optimizer)
    for _ in range(3):
        weight.grad = torch.ones(4)
        wrapper.step()
    assert clipper.steps == 2
    assert float(weight.detach().norm()) == pytest.approx(2.0)


class Decays(torch.optim.AdamW):
    """A subclass with work of its own after the parent's step."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                torch._foreach_mul_(group["params"], 0.5)
        return loss


class PassesOn:
    """A wrapper that passes on every attribute, also that of a fused step."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.calls = inner, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def step(self) -> None:
        self.calls += 1
        self.inner.step()


def with_a_step_of_its_own(weight: nn.Parameter) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    taken = optimizer.step

    def step(closure: Any = None) -> None:
        taken(closure)
        weight.data.mul_(0.5)

    optimizer.step = step  # type: ignore[method-assign]
    return optimizer


MORE_THAN_FUSED: dict[str, Callable[[nn.Parameter], Any]] = {
    "a subclass": lambda weight: Decays([weight], lr=0.1, fused=True),
    "a wrapper": lambda weight: PassesOn(torch.optim.AdamW([weight], lr=0.1, fused=True)),
    "a step of its own": with_a_step_of_its_own,
}


@pytest.mark.parametrize("kind", MORE_THAN_FUSED)
def test_a_skip_skips_what_is_done_around_a_fused_step(kind: str) -> None:
    weight = param(1.0)
    clipper = dist_clip.GradClipper([("w", weight)], dist_clip.GlobalNorm(), guard=dist_clip.SkipAbove(50.0))
    optimizer = MORE_THAN_FUSED[kind](weight)
    clipper.attach(optimizer)
    for grad in (1.0, 1000.0, 1.0, 1000.0):
        assert (moved(optimizer, weight, grad) == 0.0) is (grad == 1000.0)
    assert clipper.steps == 2


# ---- optimizers whose gradients are not complete before their step -------------------------------------------------------


@pytest.mark.parametrize("how", ["torch's", "a hook"])
def test_a_step_inside_backward_is_an_error(how: str) -> None:
    """The other tensors' gradients are not there yet, so that the norm would be that of some of them."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(0.01))
    if how == "torch's":
        _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 1.0})
        optimizers = [optimizer for param in model.parameters() for optimizer in param._in_backward_optimizers]
    else:
        optimizers = [torch.optim.SGD([param], lr=1.0) for param in model.parameters()]
        for param, optimizer in zip(model.parameters(), optimizers, strict=True):
            param.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
    clipper.attach(*optimizers)
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(RuntimeError, match=r"SGD\.step was called inside backward\(\)"):
        model(torch.ones(2, 3)).sum().backward()
    assert all(torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))


class Horovod(torch.optim.SGD):
    """Averages gradients in its step, as horovod's DistributedOptimizer."""

    def synchronize(self) -> None: ...

    def skip_synchronize(self) -> Any: ...


REFUSED: dict[str, tuple[Callable[[nn.Parameter], Any], str]] = {
    "averages in its step": (lambda weight: Horovod([weight], lr=1.0), r"Horovod averages .* clipper\.clip_\(\)"),
    "steps in backward": (
        lambda weight: ZeroRedundancyOptimizer([weight], torch.optim.SGD, lr=1.0, overlap_with_ddp=True),
        r"ZeroRedundancyOptimizer with overlap_with_ddp=True",
    ),
    "no optimizer": (lambda weight: torch.optim.lr_scheduler.LRScheduler, r"clip by hand instead: clipper\.clip_\(\)"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.usefixtures("world_of_one")
@pytest.mark.report(
    "horovod/horovod#1099",
    situation="an optimizer averages gradients inside its step, after the clip",
    right="clip between its `synchronize()` and its step",
    here="error by name",
)
def test_what_cannot_be_attached_to_is_refused_by_name(kind: str) -> None:
    weight = param()
    clipper = dist_clip.GradClipper([("w", weight)], dist_clip.GlobalNorm(1.0))
    make, message = REFUSED[kind]
    with pytest.raises(TypeError, match=message):
        clipper.attach(make(weight))
    assert clipper.attachment is None


def test_a_copy_of_an_attached_wrapper_steps_itself() -> None:
    weight = param()
    clipper = dist_clip.GradClipper([("w", weight)], dist_clip.GlobalNorm(1.0))
    optimizer = NoHooks(torch.optim.SGD([weight], lr=1.0))
    clipper.attach(optimizer)
    twin = copy.deepcopy(optimizer)
    (copied,) = twin.param_groups[0]["params"]
    assert moved(twin, copied, 1.0) == pytest.approx(2.0)
    assert clipper.steps == 0
    assert float(weight.detach().norm()) == 0.0


class MovesAnyway(torch.optim.Optimizer):
    """As Muon's authors publish it: a missing gradient is zeros, and momentum and weight decay go on."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 0.05)
                p.mul_(0.9).add_(p.grad.lerp(buffer, 0.95), alpha=-group["lr"])


def test_a_skip_is_a_skip_for_an_optimizer_that_moves_without_gradients() -> None:
    weight = param(1.0)
    clipper = dist_clip.GradClipper([("w", weight)], dist_clip.GlobalNorm(), guard=dist_clip.SkipAbove(50.0))
    optimizer = MovesAnyway([weight])
    clipper.attach(optimizer)
    assert moved(optimizer, weight, 1.0) > 0
    state = copy.deepcopy(optimizer.state_dict())
    assert moved(optimizer, weight, 1000.0) == 0.0
    assert torch.equal(weight.grad, torch.full((4,), 1000.0)), "the gradients are the user's"  # type: ignore[arg-type]
    assert str(optimizer.state_dict()) == str(state)
    assert moved(optimizer, weight, 1.0) > 0


@pytest.mark.parametrize("bad", ["an unknown parameter", "no optimizer", "a step that stays"])
def test_an_attach_that_fails_leaves_nothing_behind(bad: str) -> None:
    class Stubborn(torch.optim.SGD):
        def __setattr__(self, name: str, value: Any) -> None:
            if name != "step":
                super().__setattr__(name, value)

    weight, other = param(), param()
    clipper = dist_clip.GradClipper([("w", weight), ("other", other)], dist_clip.GlobalNorm(1.0))
    good = torch.optim.SGD([weight], lr=1.0)
    before = dict(vars(good))
    wrong: Any = {
        "an unknown parameter": lambda: torch.optim.SGD([param()], lr=1.0),
        "no optimizer": lambda: object(),
        "a step that stays": lambda: Stubborn([other], lr=1.0),
    }[bad]()
    with pytest.raises((TypeError, ValueError)) as caught:
        clipper.attach(good, wrong)
    if bad == "a step that stays":
        assert "cannot replace the step of Stubborn; clip by hand instead: clipper.clip_()" in str(caught.value)
    assert vars(good).keys() == before.keys()
    assert not good._optimizer_step_pre_hooks
    assert clipper.attachment is None
    assert moved(good, weight, 10.0) == pytest.approx(20.0)
    clipper.attach(good)
    assert moved(good, weight, 10.0) == pytest.approx(1.0)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_raises_leaves_no_flag_and_no_step_under_way(fused: bool) -> None:
    class Raises(torch.optim.SGD):
        fail = False

        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            if self.fail:
                raise ArithmeticError
            return super().step(closure)

    weight = param()
    clipper = dist_clip.GradClipper([("w", weight)], dist_clip.GlobalNorm(1.0), guard=dist_clip.SkipAbove(50.0))
    optimizer = Raises([weight], lr=1.0, fused=fused)
    clipper.attach(optimizer)
    optimizer.fail = True
    with pytest.raises(ArithmeticError):
        moved(optimizer, weight, 10.0)
    assert not hasattr(optimizer, "found_inf")
    optimizer.fail = False
    assert moved(optimizer, weight, 10.0) == pytest.approx(1.0)


def test_a_step_past_the_attached_clipper_is_an_error() -> None:
    weight = param()
    clipper = dist_clip.GradClipper([("w", weight)], dist_clip.GlobalNorm(1.0))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    step = optimizer.step
    handle = clipper.attach(optimizer)
    weight.grad = torch.ones(4)
    for taken in (step, lambda: torch.optim.SGD.step(optimizer)):
        with pytest.raises(RuntimeError, match=r"SGD\.step was called past the attached clipper"):
            taken()
    assert float(weight.detach().norm()) == 0.0
    handle.remove()
    step()
    assert float(weight.detach().norm()) == 2.0


@pytest.mark.parametrize("wrapper", ["Lookahead", "without hooks", "a wrapped wrapper", "PostLocalSGD"])
@pytest.mark.usefixtures("world_of_one")
def test_a_step_of_the_optimizer_inside_an_attached_wrapper_is_an_error(wrapper: str) -> None:
    weight = param()
    optimizer = WRAPPERS[wrapper](weight)
    inner = optimizer
    while not isinstance(inner, torch.optim.SGD):
        inner = next(v for name, v in vars(inner).items() if name in ("inner", "optimizer", "optim"))
    clipper = dist_clip.GradClipper([("w", weight)], dist_clip.GlobalNorm(1.0))
    handle = clipper.attach(optimizer)
    weight.grad = torch.ones(4)
    with pytest.raises(RuntimeError, match=r"SGD\.step was called past the attached clipper"):
        inner.step()
    assert float(weight.detach().norm()) == 0.0
    optimizer.step()
    assert clipper.steps == 1
    handle.remove()
    inner.step()


def test_the_state_of_the_optimizer_inside_a_wrapper_can_be_made() -> None:
    """By torch.distributed.checkpoint, which steps it with gradients of zeros at a learning rate of 0."""
    model = nn.Linear(3, 2)
    inner = torch.optim.AdamW(model.parameters(), lr=0.1)
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(1.0))
    clipper.attach(NoHooks(inner))
    get_optimizer_state_dict(model, inner)
    assert clipper.steps == 0
    assert len(inner.state) == 2


class Offloads(torch.optim.Optimizer):
    """Takes each gradient away as soon as it is there, as optimizers on the host do."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {"lr": 1.0})
        for p in params:
            p.register_post_accumulate_grad_hook(self.take)

    def take(self, p: torch.Tensor) -> None:
        self.state[p]["taken"], p.grad = p.grad, None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p, state in self.state.items():
            p.sub_(state["taken"])


def test_gradients_that_are_kept_elsewhere_are_an_error_at_the_first_step() -> None:
    weight = param()
    clipper = dist_clip.GradClipper([("w", weight)], dist_clip.GlobalNorm(1.0))
    optimizer = Offloads([weight])
    clipper.attach(optimizer)
    (100 * weight).sum().backward()
    with pytest.raises(
        RuntimeError, match=r"Offloads\.step moved parameters, but none of them has a gradient in \.grad"
    ):
        optimizer.step()


def test_a_step_without_gradients_that_moves_nothing_is_a_step() -> None:
    """As of a network that is frozen for a while; and of Muon, which fills the gradients with zeros."""
    weight = param(1.0)
    clipper = dist_clip.GradClipper([("w", weight)], dist_clip.GlobalNorm(1.0))
    for number, optimizer in enumerate((torch.optim.AdamW([weight]), MovesAnyway([weight])), start=1):
        handle = clipper.attach(optimizer)
        weight.grad = None
        optimizer.step()
        assert clipper.steps == number
        handle.remove()


@pytest.mark.parametrize("order", ["scheduler first", "attach first"])
def test_schedulers_before_and_after(order: str) -> None:
    """A scheduler replaces the step as well; each is there once, and remove() takes off ours alone."""
    weight = param()
    clipper = dist_clip.GradClipper([("w", weight)], dist_clip.GlobalNorm(1.0))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    if order == "scheduler first":
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        handle = clipper.attach(optimizer)
    else:
        handle = clipper.attach(optimizer)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for step, lr in enumerate((1.0, 0.5, 0.25), start=1):
        assert moved(optimizer, weight, 10.0) == pytest.approx(lr)
        scheduler.step()
        assert clipper.steps == step
    handle.remove()
    assert moved(optimizer, weight, 10.0) == pytest.approx(0.125 * 20)
    clipper.attach(optimizer)
    scheduler.step()
    assert moved(optimizer, weight, 10.0) == pytest.approx(0.0625)
    assert clipper.steps == 4


# ---- steps of checkpoint functions -------------------------------------------------------------------------------------


def fresh() -> tuple[nn.Linear, torch.optim.Optimizer, dist_clip.GradClipper]:
    model = nn.Linear(3, 2)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1), dist_clip.GradClipper(model, dist_clip.AdaGC())


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("clipper_first", [False, True])
@pytest.mark.report(
    "pytorch/pytorch#164929",
    situation="torch's checkpoint functions step a fresh optimizer, with gradients of zeros, to make its state",
    right="no clip: the state of the clipper stays as it is",
)
def test_a_checkpoint_functions_step_is_none(clipper_first: bool, scaled: bool) -> None:
    model, optimizer, clipper = fresh()
    clipper.attach(optimizer)
    for _ in range(4):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    state = clipper.state_dict()
    assert state["step"] == 4

    model, optimizer, clipper = fresh()
    if scaled:
        scaler = torch.amp.GradScaler("cpu")
        clipper = dist_clip.GradClipper(model, dist_clip.AdaGC(), scaler=scaler)
    clipper.attach(optimizer)
    if clipper_first:
        clipper.load_state_dict(state)
    set_optimizer_state_dict(model, optimizer, saved, options=StateDictOptions(full_state_dict=True))
    if not clipper_first:
        assert clipper.steps == 0
        clipper.load_state_dict(state)
    assert clipper.steps == 4
    assert all(param.grad is None for param in model.parameters())


def test_a_first_step_at_learning_rate_0_is_a_step() -> None:
    """As a warm-up of the learning rate begins, also where the loop passes closure=None itself."""
    model, optimizer, clipper = fresh()
    clipper.attach(optimizer)
    optimizer.param_groups[0]["lr"] = 0.0
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step(closure=None)
    assert clipper.steps == 1


# ---- two networks ------------------------------------------------------------------------------------------------------


def test_two_networks_with_a_clipper_each() -> None:
    """The discriminator's loss leaves gradients on the generator; each clipper looks at its own network only."""
    g, d = param(), param()
    nets = {"g": g, "d": d}
    clippers = {k: dist_clip.GradClipper([(k, p)], dist_clip.GlobalNorm(1.0)) for k, p in nets.items()}
    optimizers = {k: torch.optim.SGD([p], lr=1.0) for k, p in nets.items()}
    for k, optimizer in optimizers.items():
        clippers[k].attach(optimizer)
    for step in range(1, 4):
        g.grad = torch.full((4,), 1e3)
        assert moved(optimizers["d"], d, 10.0) == pytest.approx(1.0)
        assert moved(optimizers["g"], g, 10.0) == pytest.approx(1.0)
        assert clippers["g"].steps == clippers["d"].steps == step


def test_the_two_halves_of_sam_are_clipped_in_the_step_alone() -> None:
    """first_step climbs, second_step goes back and lets the base optimizer step: with the clipped gradient of there."""

    class SAM(torch.optim.Optimizer):
        def __init__(self, params: list[nn.Parameter]) -> None:
            super().__init__(params, {})
            self.base_optimizer = torch.optim.SGD(self.param_groups, lr=1.0)

        @torch.no_grad()
        def first_step(self) -> None:
            for p in self.param_groups[0]["params"]:
                self.state[p]["old"] = p.detach().clone()
                p.add_(p.grad / p.grad.norm())

        @torch.no_grad()
        def second_step(self) -> None:
            for p in self.param_groups[0]["params"]:
                p.copy_(self.state[p]["old"])
            self.base_optimizer.step()

    weight = param()
    clipper = dist_clip.GradClipper([("w", weight)], dist_clip.GlobalNorm(1.0))
    sam = SAM([weight])
    clipper.attach(sam.base_optimizer)
    for step in range(1, 4):
        before = weight.detach().clone()
        weight.grad = torch.full((4,), 5.0)
        sam.first_step()
        weight.grad = torch.full((4,), 10.0)
        sam.second_step()
        assert float((weight.detach() - before).norm()) == pytest.approx(1.0)
        assert clipper.steps == step


def test_one_optimizer_a_parameter() -> None:
    """As optimizers inside backward have it: all are of one round."""
    params = [param() for _ in range(3)]
    clipper = dist_clip.GradClipper(params, dist_clip.GlobalNorm(1.0))
    optimizers = [torch.optim.SGD([p], lr=1.0) for p in params]
    clipper.attach(*optimizers)
    for step in range(1, 4):
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.full((4,), 10.0)
        for optimizer in optimizers:
            optimizer.step()
        distance = math.hypot(*(float((p.detach() - b).norm()) for p, b in zip(params, before, strict=True)))
        assert distance == pytest.approx(1.0)
        assert clipper.steps == step
