"""The guards: each against a plain-Python reference, what MedianGuard promises, patience, the loss, and skipped steps."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dist_clip
from dist_clip.guards import registry
from dist_clip.guards.base import Guard
from dist_clip.policies.base import State
from tests import reference

NAN, INF = math.nan, math.inf
CPU = torch.device("cpu")


class Alone:
    """A guard without a clipper: counts the skips in a row and adds up the tallies, as the clipper does."""

    def __init__(self, guard: Guard, n: int = 1) -> None:
        self.guard, self.state = guard, guard.init_state(n, CPU)
        self.in_a_row = self.t = 0

    def skips(self, norms: Sequence[float], loss: float = 0.0) -> bool:
        values = torch.tensor(norms, dtype=torch.float64)
        inputs = dist_clip.GuardInputs(
            values,
            torch.tensor(self.t + 1),
            torch.tensor(self.in_a_row, dtype=torch.int32),
            self.guard.tally(self.state, values).sum(dim=1),
            values.square().sum().sqrt(),
            torch.tensor(loss, dtype=torch.float64),
        )
        skip, self.state = self.guard.step(self.state, inputs)
        taken = not bool(skip) or (bool(self.guard.overdue(inputs)) and math.isfinite(float(values.sum())))
        self.in_a_row = 0 if taken else self.in_a_row + 1
        self.t += taken
        assert all(bool(value.isfinite().all()) for value in self.state.values())
        return not taken


def noisy(seed: int, steps: int) -> Iterator[tuple[float, float]]:
    """Norms and losses that fall slowly, with spikes, a lasting rise, and values that no state may take in."""
    rng = random.Random(seed)
    for step in range(steps):
        norm = 3 * math.exp(-step / 400) * rng.lognormvariate(0, 0.2) * (40 if step > 0.7 * steps else 1)
        loss = 2 * math.exp(-step / 600) + rng.gauss(0, 0.05)
        dice = rng.random()
        if dice < 0.04:
            norm, loss = norm * rng.choice((5, 30, 1000)), loss + rng.choice((0, 3))
        elif dice < 0.08:
            norm = rng.choice((NAN, INF, 0.0))
        elif dice < 0.1:
            loss = rng.choice((NAN, INF, -INF))
        yield norm, loss


def text(value: object) -> str | None:
    """Name a test by a parameter's text, the same in every process: not where it is an address."""
    return None if callable(value) or " at 0x" in str(value) else str(value)


# ---- equal to the references ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guard", "expected"),
    [
        (dist_clip.SkipStep(window=32), lambda: reference.SkipStep(32)),
        (dist_clip.SkipStep(window=5, sigma=2.5), lambda: reference.SkipStep(5, 2.5)),
        (dist_clip.SkipStep(loss=False), lambda: reference.SkipStep(loss=False)),
        (dist_clip.DropNorm(), reference.DropNorm),
        (
            dist_clip.DropNorm(factor=4.0, decay=0.9, max_skips_in_a_row=7),
            lambda: reference.DropNorm("mean", 4, 0.9, most=7),
        ),
        (dist_clip.DropNorm("std", 6.0, min_steps=60), lambda: reference.DropNorm("std", 6.0, min_steps=60)),
        (dist_clip.DropNorm("std", 9.0, decay=0.5, min_steps=2), lambda: reference.DropNorm("std", 9.0, 0.5, 2)),
    ],
    ids=text,
)
@pytest.mark.parametrize("seed", [0, 1])
def test_equal_to_the_reference(guard: Guard, expected: Callable[[], Any], seed: int) -> None:
    ours, theirs = Alone(guard), expected()
    skipped = []
    for step, (norm, loss) in enumerate(noisy(seed, 500)):
        skip = ours.skips([norm], loss)
        assert skip == theirs.skips(norm, loss), f"step {step}: norm {norm}, loss {loss}"
        skipped.append(skip)
    assert 10 < sum(skipped) < 300


@pytest.mark.parametrize("tensors", [1, 2, 7])
def test_median_guard_equals_the_reference(tensors: int) -> None:
    guard = dist_clip.MedianGuard(warmup_steps=20, window=30, max_skips_in_a_row=12)
    ours, theirs = Alone(guard, tensors), reference.MedianGuard(warmup=20, window=30, most=12)
    rng, skipped = random.Random(tensors), []
    for step, (norm, _) in enumerate(noisy(tensors, 500)):
        lows = 0.02 if 250 < step < 280 else 1.0
        norms = [norm * lows * rng.lognormvariate(0, 0.3) * 10**i for i in range(tensors)]
        if step % 9 == 0:  # a bad tensor, and one without a gradient
            norms[rng.randrange(tensors)] = rng.choice((0.0, 1e6, NAN))
        skip = ours.skips(norms)
        assert skip == theirs.skips(dict(enumerate(norms))), f"step {step}: {norms}"
        skipped.append(skip)
        for slot, expected in (("level", theirs.level), ("observations", theirs.count)):
            values = [expected.get(i, 0.0) for i in range(tensors)]
            assert ours.state[slot].tolist() == pytest.approx(values, rel=1e-5)
        for slot, value in (("drift", theirs.drift), ("scatter", theirs.scatter), ("moves", len(theirs.moves))):
            assert ours.state[slot].item() == pytest.approx(value, rel=1e-4, abs=1e-7)
    assert 8 < sum(skipped) < 250


def test_median_guard_remembers_nothing_that_it_skips() -> None:
    ours = Alone(dist_clip.MedianGuard(warmup_steps=5), 3)
    for _ in range(10):
        assert not ours.skips([1.0, 2.0, 3.0])
    before = {slot: ours.state[slot].clone() for slot in (*ours.guard.tensor_slots, "clock")}
    for norms in ([9.0, 9.0, 100.0], [NAN, INF, 3.0], [50.0, 50.0, 0.0]):
        assert ours.skips(norms)
    assert all(torch.equal(ours.state[slot], value) for slot, value in before.items())


# ---- what MedianGuard promises: the table of docs/guards.md, line by line -------------------------------------------------


class Norms:
    """Norms of `n` tensors of very different size, each with noise of its own and a noise that all share."""

    def __init__(self, n: int = 40, seed: int = 0, noise: float = 0.2) -> None:
        self.rng, self.noise = random.Random(seed), noise
        self.sizes = [10 ** self.rng.uniform(-3, 1) for _ in range(n)]

    def step(self, factor: float = 1.0, *, tensors: int | None = None) -> list[float]:
        """Return the norms of a step, times `factor`: of all, or of the first `tensors`."""
        shared = self.rng.lognormvariate(0, self.noise)
        norms = [size * shared * self.rng.lognormvariate(0, self.noise) for size in self.sizes]
        return [norm * factor if tensors is None or i < tensors else norm for i, norm in enumerate(norms)]


def settled(n: int = 40, steps: int = 300, **kwargs: Any) -> tuple[Alone, Norms]:
    ours, norms = Alone(dist_clip.MedianGuard(), n), Norms(n, **kwargs)
    assert not any(ours.skips(norms.step()) for _ in range(steps))
    return ours, norms


def test_promise_nothing_without_a_fault() -> None:
    for n in (1, 40):
        ours, norms = Alone(dist_clip.MedianGuard(), n), Norms(n, noise=0.3 if n > 2 else 0.2)
        assert not any(ours.skips(norms.step(math.exp(-step / 1000))) for step in range(1000))


@pytest.mark.parametrize("factor", [6.0, 1e4, INF])
@pytest.mark.parametrize("length", [1, 12, 50])
def test_promise_bad_batches_of_1_to_50_steps_are_skipped(length: int, factor: float) -> None:
    ours, norms = settled()
    assert all(ours.skips(norms.step(factor)) for _ in range(length))
    assert not any(ours.skips(norms.step()) for _ in range(200))


def test_promise_bad_tensors_are_left_to_the_policy() -> None:
    ours, norms = settled()
    assert not any(ours.skips(norms.step(1e4, tensors=16)) for _ in range(100))
    assert ours.skips(norms.step(1e4, tensors=21))


@pytest.mark.parametrize("factor", [2.5, 4.5, 8.0, 1e3])
def test_promise_a_lasting_rise_is_skipped_for_50_steps(factor: float) -> None:
    ours, norms = settled()
    skips = [ours.skips(norms.step(factor)) for _ in range(600)]
    assert sum(skips) <= 50 + 1
    assert not any(skips[150:])
    assert all(ours.skips(norms.step(factor * 8)) for _ in range(9))  # it is on guard again, as far as the budget goes


@pytest.mark.parametrize("every", [2, 10])
def test_promise_a_lasting_mixture_is_skipped_for_no_more_than_the_budget(every: int) -> None:
    """One batch in a few comes from other data, with norms 8 times as large, for good."""
    ours, norms = settled()
    skips = [ours.skips(norms.step(8.0 if step % every == 0 else 1.0)) for step in range(1500)]
    assert sum(skips) <= 50 + 1500 / 50


@pytest.mark.parametrize("factor", [1e-6, 0.02, 0.15])
@pytest.mark.parametrize("length", [40, 128])
def test_promise_the_return_from_low_norms_is_no_fault(length: int, factor: float) -> None:
    ours, norms = settled()
    assert not any(ours.skips(norms.step(factor)) for _ in range(length))
    # They may also return to more than what was usual, for the model has changed meanwhile.
    assert not any(ours.skips(norms.step(4.0 if step < 30 else 1.0)) for step in range(160))
    assert ours.skips(norms.step(10.0))


def test_promise_the_return_from_very_long_low_norms_costs_the_budget_at_most() -> None:
    ours, norms = settled()
    skips = [ours.skips(norms.step(0.02 if step < 500 else 1.0)) for step in range(800)]
    assert sum(skips) <= 50


@pytest.mark.parametrize("n", [1, 40])
def test_promise_nothing_in_the_first_steps(n: int) -> None:
    """Norms of every size, and a learning-rate warm-up over which they rise thirtyfold or fall."""
    ours, norms = Alone(dist_clip.MedianGuard(), n), Norms(n, noise=0.2 if n > 2 else 0.1)
    rng = random.Random(1)
    assert not any(ours.skips(norms.step(10 ** rng.uniform(-3, 3))) for _ in range(100))
    for sign in (1, -1):
        ours = Alone(dist_clip.MedianGuard(), n)
        assert not any(ours.skips(norms.step(30 ** (sign * min(1.0, step / 400)))) for step in range(500))


def test_promise_norms_that_scatter_are_usual() -> None:
    """As early under Lion: the whole model's norms are 4 times their usual size now and then, and others always."""
    ours, norms, rng = Alone(dist_clip.MedianGuard(), 40), Norms(40), random.Random(3)
    assert not any(ours.skips(norms.step(rng.lognormvariate(0, 0.5))) for _ in range(600))
    assert all(ours.skips(norms.step(60.0)) for _ in range(12))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("noise", [0.05, 0.1, 0.2])
def test_promise_another_batch_size_is_no_fault(noise: float, seed: int) -> None:
    """Four times the batch halves norms that noise dominates; a quarter doubles them, which is near the threshold."""
    ours, norms = settled(noise=noise, seed=seed)
    assert not any(ours.skips(norms.step(0.5)) for _ in range(300))
    ours, norms = settled(noise=noise, seed=seed)
    assert sum(ours.skips(norms.step(2.0)) for _ in range(300)) <= 10


def test_promise_what_tensors_do_one_by_one_hides_no_fault() -> None:
    """As under Muon: each tensor's norm scatters widely by itself, and their median hardly moves."""
    ours, norms, rng = Alone(dist_clip.MedianGuard(), 40), Norms(40, noise=0.1), random.Random(4)

    def step(factor: float) -> bool:
        return ours.skips([norm * rng.lognormvariate(0, 0.6) for norm in norms.step(factor)])

    assert not any(step(math.exp(-i / 1000)) for i in range(300))
    assert all(step(3.5) for _ in range(12))


def test_promise_idle_experts_do_not_count() -> None:
    """Most tensors have no gradient on most steps: those that have one decide."""
    ours, norms, rng = Alone(dist_clip.MedianGuard(), 40), Norms(40), random.Random(2)

    def step(factor: float = 1.0) -> bool:
        busy = set(rng.sample(range(8, 40), 6)) | set(range(8))
        return ours.skips([norm if i in busy else 0.0 for i, norm in enumerate(norms.step(factor))])

    assert not any(step() for _ in range(600))
    assert all(step(8.0) for _ in range(12))
    assert not ours.skips([0.0] * 40)  # no gradient at all


def test_promise_a_nan_is_no_reason_to_take_a_step() -> None:
    """Patience never takes a step whose norm is NaN or Inf."""
    ours, norms = settled()
    assert all(ours.skips(norms.step(NAN)) for _ in range(200))
    assert not any(ours.skips(norms.step()) for _ in range(100))
    assert not ours.skips([NAN, *norms.step()[1:]])  # of one tensor: nonfinite= decides


# ---- a clipper with guards -----------------------------------------------------------------------------------------------


def model_of(*sizes: int) -> nn.ParameterDict:
    return nn.ParameterDict({f"p{i}": nn.Parameter(torch.ones(size)) for i, size in enumerate(sizes)})


def clip(clipper: dist_clip.GradClipper, model: nn.Module, value: float, loss: Any = None) -> dist_clip.ClipReport:
    for param in model.parameters():
        param.grad = torch.full_like(param, value)
    return clipper.clip_(loss)


@dataclasses.dataclass(frozen=True)
class SkipOdd(dist_clip.Guard):
    """Skips the steps that have an odd number, of all that it saw."""

    max_skips_in_a_row: int | None = None
    when_stuck: dist_clip.WhenStuck = "step"

    def init_state(self, n: int, device: torch.device) -> State:
        return {"seen": torch.zeros((), dtype=torch.int64, device=device)}

    def step(self, state: State, inputs: dist_clip.GuardInputs) -> tuple[Tensor, State]:
        return torch.remainder(state["seen"], 2) == 0, {"seen": state["seen"] + 1}


def test_any_guard_of_a_list_skips_and_their_states_go_on() -> None:
    model = model_of(4)
    clipper = dist_clip.GradClipper(model, dist_clip.AdaGC(), guard=[SkipOdd(), dist_clip.SkipAbove(10.0)])
    skips = [bool(clip(clipper, model, value).skip) for value in (1.0, 1.0, 1.0, 9.0, 9.0, 1.0)]
    assert skips == [True, False, True, True, True, False]
    assert clipper.steps == 2
    assert int(clipper.memory.guards[0].state["seen"]) == 6


def test_explain_names_the_guards() -> None:
    clipper = dist_clip.GradClipper(
        model_of(4), dist_clip.LogClip(), guard=[dist_clip.SkipAbove(3.0), dist_clip.DropNorm()]
    )
    lines = clipper.explain().splitlines()[-2:]
    assert lines[0] == "guard SkipAbove(max_norm=3.0, max_skips_in_a_row=None, when_stuck='step'): no collective more"
    assert lines[1].startswith("guard DropNorm(variant='mean'")


@pytest.mark.parametrize("scope", ["tensor", "shard", "global"])
@pytest.mark.parametrize("nonfinite", ["propagate", "zero", "skip"])
def test_guards_go_with_every_scope_and_mode(scope: Any, nonfinite: Any) -> None:
    model = model_of(4, 9, 16)
    guard = dist_clip.MedianGuard(warmup_steps=3)
    clipper = dist_clip.GradClipper(model, dist_clip.LogClip(scope=scope), guard=guard, nonfinite=nonfinite)
    for value in (1.0, 1.1, 0.9, 1.0):
        assert not bool(clip(clipper, model, value).skip)
    before = str(clipper.memory.groups[0].state)
    assert bool(clip(clipper, model, 5.0).skip)
    assert str(clipper.memory.groups[0].state) == before
    assert model["p0"].grad.eq(5.0).all()
    assert bool(clip(clipper, model, NAN).skip) == (nonfinite != "zero")  # with "zero" there is nothing to judge
    assert all(bool(value.isfinite().all()) for value in clipper.memory.guards[0].state.values())


def test_patience_takes_a_step_but_none_that_is_not_finite() -> None:
    model = model_of(4)
    clipper = dist_clip.GradClipper(
        model, dist_clip.GlobalNorm(), guard=dist_clip.SkipAbove(10.0, max_skips_in_a_row=3)
    )
    values = (100.0,) * 9 + (INF,) * 5 + (100.0, 100.0)
    skips = [bool(clip(clipper, model, value).skip) for value in values]
    assert skips == [True] * 3 + [False] + [True] * 3 + [False] + [True] + [True] * 5 + [False, True]


def test_a_stuck_guard_raises_if_asked_to_and_changes_nothing() -> None:
    model = model_of(4)
    guard = dist_clip.SkipAbove(10.0, max_skips_in_a_row=3, when_stuck="raise")
    clipper = dist_clip.GradClipper(model, dist_clip.AdaGC(), guard=guard)
    for _ in range(3):
        assert bool(clip(clipper, model, 100.0).skip)
    before = str(clipper.state_dict())
    for _ in range(2):
        with pytest.raises(dist_clip.StuckError, match=r"SkipAbove\(max_norm=10.0.*has skipped as many steps in a row"):
            clip(clipper, model, 100.0)
        assert str(clipper.state_dict()) == before
        assert model["p0"].grad.eq(100.0).all()
    assert not bool(clip(clipper, model, 1.0).skip)


def test_a_stuck_guard_raises_late_where_the_host_must_not_wait() -> None:
    """As on an accelerator: the host looks at every 32nd clip, at what it asked for at the one before."""
    model = model_of(4)
    guard = dist_clip.SkipAbove(10.0, max_skips_in_a_row=3, when_stuck="raise")
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(), guard=guard)
    clipper._guards._at_once = False
    for _ in range(63):
        assert bool(clip(clipper, model, 100.0).skip)  # nothing is stepped with meanwhile
    with pytest.raises(dist_clip.StuckError):
        clip(clipper, model, 100.0)
    assert not bool(clip(clipper, model, 1.0).skip)


def test_a_guard_does_not_lower_a_grad_scalers_scale() -> None:
    model = model_of(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(1e9), guard=dist_clip.SkipAbove(50.0), scaler=scaler)
    scales, moved = [], []
    for value in (1.0, 100.0, 100.0, INF, 100.0, 1.0):
        optimizer.zero_grad()
        scaler.scale((model["p0"] * value).sum()).backward()
        before = model["p0"].detach().clone()
        scaler.unscale_(optimizer)
        clipper.clip_()
        scaler.step(optimizer)  # which skips by itself
        scaler.update()
        scales.append(scaler.get_scale())
        moved.append(not torch.equal(before, model["p0"]))
    assert moved == [True, False, False, False, False, True]
    assert scales == [1024.0] * 3 + [512.0] * 3


# ---- the loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", [2.0, torch.tensor(2.0), torch.tensor([2.0]), torch.tensor(2.0, requires_grad=True), 2]
)
def test_what_a_loss_may_be(given: Any) -> None:
    model = model_of(4)
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(), guard=dist_clip.SkipStep(window=4))
    clip(clipper, model, 1.0, given)
    clipper.observe_loss(given)
    clipper.observe_loss(given * 2)
    clip(clipper, model, 1.0)
    assert clipper.memory.guards[0].state["losses"].tolist() == [0.0, 0.0, 2.0, 3.0]


def test_a_loss_that_is_not_finite_skips_and_is_not_recorded() -> None:
    model = model_of(4)
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(), guard=dist_clip.SkipStep(window=4))
    assert [bool(clip(clipper, model, 1.0, loss).skip) for loss in (1.0, NAN, INF, -INF, 1.0)] == [
        False,
        *[True] * 3,
        False,
    ]
    assert int(clipper.memory.guards[0].state["num_losses"]) == 2


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (None, ValueError, "SkipStep looks at the loss, but it was not passed"),
        (torch.ones(2), ValueError, r"loss must be a number or a tensor of one element, got torch.float32 \[2\]"),
        ("2.0", TypeError, "loss must be a number or a tensor of one element, got str"),
        (True, TypeError, "got bool"),
        (torch.tensor(1j), ValueError, "got torch.complex64"),
    ],
    ids=text,
)
def test_no_loss_or_no_scalar(loss: Any, error: Any, message: str) -> None:
    model = model_of(4)
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(0.5), guard=dist_clip.SkipStep())
    with pytest.raises(error, match=message):
        clip(clipper, model, 1.0, loss)
    assert model["p0"].grad.eq(1.0).all()
    clip(clipper, model, 1.0, 1.0)


def test_a_clipper_that_needs_no_loss_ignores_it() -> None:
    model = model_of(4)
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(), guard=dist_clip.SkipStep(loss=False))
    for _ in range(3):
        clipper.observe_loss("nothing")  # type: ignore[arg-type]
        clip(clipper, model, 1.0, torch.ones(7))


# ---- state ---------------------------------------------------------------------------------------------------------------


GUARDS = [
    dist_clip.MedianGuard(warmup_steps=3, max_skips_in_a_row=5),
    dist_clip.SkipStep(window=6, sigma=3.0),
    dist_clip.DropNorm(),
]


def guarded(guards: Any = GUARDS, *sizes: int) -> tuple[dist_clip.GradClipper, nn.Module]:
    model = model_of(*(sizes or (4, 9, 16)))
    return dist_clip.GradClipper(model, dist_clip.LogClip(), guard=guards), model


def train(clipper: dist_clip.GradClipper, model: nn.Module, seed: int, steps: int = 12) -> list[bool]:
    rng = random.Random(seed)
    return [
        bool(clip(clipper, model, rng.choice((1.0, 1.1, 1.2, 1.3, 30.0)), rng.gauss(2, 0.1)).skip) for _ in range(steps)
    ]


def test_a_state_goes_on_where_it_was() -> None:
    clipper, model = guarded()
    train(clipper, model, 0)
    again, other = guarded()
    again.load_state_dict(clipper.state_dict())
    assert str(again.state_dict()) == str(clipper.state_dict())
    skips = train(clipper, model, 1, 40)
    assert train(again, other, 1, 40) == skips
    assert True in skips
    assert str(again.state_dict()) == str(clipper.state_dict())


def test_a_packed_state_goes_on_where_it_was() -> None:
    clipper, model = guarded()
    train(clipper, model, 0)
    again, _ = guarded()
    again.packed().load_state_dict(clipper.packed().state_dict())
    assert str(again.state_dict()) == str(clipper.state_dict())


def test_a_state_without_guards_loads_and_they_start_afresh() -> None:
    clipper, model = guarded(None)
    train(clipper, model, 0)
    again, other = guarded()
    train(again, other, 3)
    with pytest.warns(UserWarning, match="the state has nothing about MedianGuard, as it was saved without"):
        again.load_state_dict(clipper.state_dict())
    fresh, _ = guarded()
    assert str(again.state_dict()["guards"]) == str(fresh.state_dict()["guards"])
    assert "guards" not in clipper.state_dict()
    with pytest.warns(UserWarning, match="the state is one of 3 guards and the clipper has 0 that remember"):
        clipper.load_state_dict(again.state_dict())


def test_a_state_of_other_guards_is_refused_or_starts_afresh() -> None:
    clipper, model = guarded()
    train(clipper, model, 0)
    saved = clipper.state_dict()
    changed, _ = guarded([GUARDS[0], dist_clip.SkipStep(window=6, sigma=4.0), dist_clip.SkipAbove(9.0, 3)])
    before = str(changed.state_dict())
    with pytest.raises(ValueError, match=r"the state was made by another SkipStep: sigma was 3\.0 and is 4\.0"):
        changed.load_state_dict(saved)
    assert str(changed.state_dict()) == before
    with pytest.warns(UserWarning, match="the state was made by another") as caught:
        changed.load_state_dict(saved, strict=False)
    assert ["sigma was 3.0" in str(w.message) or "another guard: it has" in str(w.message) for w in caught] == [
        True
    ] * 2
    assert str(changed.state_dict()["guards"]["1"]["model"]) == str(saved["guards"]["1"]["model"])
    longer, _ = guarded([GUARDS[0], dist_clip.SkipStep(window=7, sigma=3.0), GUARDS[2]])
    with pytest.warns(UserWarning, match="window was 6 and is 7"):
        longer.load_state_dict(saved, strict=False)
    assert int(longer.memory.guards[1].state["num_norms"]) == 0


def test_a_tensor_that_the_state_lacks_starts_afresh() -> None:
    clipper, model = guarded()
    train(clipper, model, 0)
    more, _ = guarded(GUARDS, 4, 9, 16, 25)
    with pytest.raises(ValueError, match=r"missing \['p3'\]"):
        more.load_state_dict(clipper.state_dict())
    with pytest.warns(UserWarning, match=r"missing \['p3'\]"):
        more.load_state_dict(clipper.state_dict(), strict=False)
    observations = clipper.memory.guards[0].state["observations"].tolist()
    assert observations[0] > 0
    assert more.memory.guards[0].state["observations"].tolist() == [*observations, 0]


def damage(saved: dict[str, Any], how: str) -> None:
    entry = saved["guards"]["0"]
    if how == "nan":
        entry["tensors"]["p1"]["level"] = torch.tensor(NAN)
    elif how == "shape":
        entry["model"]["lows"] = torch.zeros(3)
    elif how == "lacks":
        del entry["tensors"]["p1"]["peak"]
    elif how == "no guard":
        entry["guard"] = "{}"
    else:
        saved["guards"] = [entry]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("nan", "MedianGuard: level has nan: it must be finite"),
        ("shape", r"MedianGuard: lows has shape \[3\], expected a tensor of shape \[\]"),
        ("lacks", "MedianGuard: peak has None"),
        ("no guard", "the state's guards are damaged: '{}' is none"),
        ("list", "the state's guards are damaged: they must be a dict"),
    ],
)
def test_a_damaged_state_changes_nothing(how: str, message: str) -> None:
    clipper, model = guarded()
    train(clipper, model, 0)
    saved = copy.deepcopy(clipper.state_dict())
    damage(saved, how)
    again, _ = guarded()
    before = str(again.state_dict())
    with pytest.raises(ValueError, match=message):
        again.load_state_dict(saved)
    assert str(again.state_dict()) == before


def test_refresh_keeps_the_guards_states() -> None:
    clipper, model = guarded()
    train(clipper, model, 0)
    before = clipper.state_dict()["guards"]
    model["p3"] = nn.Parameter(torch.ones(2))  # type: ignore[index]
    clipper.refresh()
    after = clipper.state_dict()["guards"]
    assert str(after["0"]["tensors"]["p1"]) == str(before["0"]["tensors"]["p1"])
    assert str(after["1"]["model"]) == str(before["1"]["model"])
    assert int(after["0"]["tensors"]["p3"]["observations"]) == 0


# ---- a skipped step changes nothing --------------------------------------------------------------------------------------


def lion(params: Any) -> torch.optim.Optimizer:
    from pytorch_optimizer import Lion

    return Lion(params, lr=1e-2, weight_decay=0.1)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw-fused": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
    "adamw-foreach": lambda params: torch.optim.AdamW(params, lr=1e-2, foreach=True),
    "adamw-loop": lambda params: torch.optim.AdamW(params, lr=1e-2, foreach=False),
    "lion": lion,
    "muon": lambda params: torch.optim.Muon(params, lr=1e-2),
}


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_skipped_step_leaves_everything_as_it_was(kind: str, attached: bool) -> None:
    """Weights, moments, decay, step count and schedule, bitwise; and what follows is as if there had been no bad batch."""
    bad = {6, 7, 11}

    def run(shown: Sequence[int]) -> tuple[list[Tensor], list[str]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 4, bias=False), nn.Linear(4, 2, bias=False))
        optimizer = OPTIMIZERS[kind](model.parameters())
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        guards = [dist_clip.MedianGuard(warmup_steps=4), dist_clip.SkipStep(window=100)]
        clipper = dist_clip.GradClipper(model, dist_clip.LogClip(warmup_steps=3), guard=guards)
        if attached:
            clipper.attach(optimizer)
        states = []
        for i in shown:
            batch = torch.randn(5, 6, generator=torch.Generator().manual_seed(i)) * (1e3 if i in bad else 1.0)
            before = str((list(model.parameters()), optimizer.state_dict(), schedule.state_dict()))
            loss = model(batch).square().mean()
            loss.backward()
            if attached:
                clipper.observe_loss(loss)
                optimizer.step()
            elif not bool(clipper.clip_(loss=loss).skip):
                optimizer.step()
            optimizer.zero_grad()
            report = clipper.last_report
            assert report is not None
            assert bool(report.skip) == (i in bad)
            states.append(str((list(model.parameters()), optimizer.state_dict(), schedule.state_dict())))
            assert (states[-1] == before) == (i in bad)
            if i not in bad:
                schedule.step()
        return [param.detach() for param in model.parameters()], states

    with_bad, _ = run(range(14))
    without, _ = run([i for i in range(14) if i not in bad])
    assert all(torch.equal(a, b) for a, b in zip(with_bad, without, strict=True))


# ---- the contract --------------------------------------------------------------------------------------------------------


class Plain(dist_clip.Guard):
    def step(self, state: State, inputs: dist_clip.GuardInputs) -> tuple[Tensor, State]:
        return inputs.t > 0, state


@dataclasses.dataclass(frozen=True)
class Broken(dist_clip.Guard):
    """Does one thing wrong."""

    what: str = ""
    value: Any = 1.0
    max_skips_in_a_row: Any = None
    when_stuck: Any = "step"

    def needs(self) -> Any:
        return ("weather",) if self.what == "needs" else ()

    @property
    def tensor_slots(self) -> Any:
        return ("a", "b") if self.what == "slots" else ("a",) if self.what != "undeclared" else ()

    def init_state(self, n: int, device: torch.device) -> State:
        if self.what == "name":
            return {"a": torch.zeros(n), "skips_in_a_row": torch.zeros(())}
        if self.what == "shape":
            return {"a": torch.zeros(3)}
        if self.what == "start":
            return {"a": torch.full((n,), NAN)}
        return {"a": torch.zeros(n)}

    def tally(self, state: State, norms: Tensor) -> Tensor:
        return norms if self.what == "tally" else norms.new_zeros((0, norms.numel()))

    def step(self, state: State, inputs: dist_clip.GuardInputs) -> tuple[Tensor, State]:
        skip = inputs.t > 0
        if self.what == "loss":
            skip = inputs.loss > 1  # type: ignore[operator]
        if self.what == "many":
            skip = inputs.norms > 1
        if self.what == "nothing":
            return skip  # type: ignore[return-value]
        if self.what == "place":
            state["a"] += 1
        if self.what == "nan":
            return skip, {"a": state["a"] + inputs.norms.float()}
        if self.what == "dtype":
            return skip, {"a": state["a"].double()}
        return skip, {} if self.what == "drops" else {"a": state["a"] + 0}


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"what": "needs"}, ValueError, r"needs\(\) asks for \['weather'\]; there are global_norm, loss"),
        ({"what": "slots"}, ValueError, r"tensor_slots names \['b'\], which init_state lacks"),
        ({"what": "undeclared"}, ValueError, "the shape of slot 'a' depends on n: list it in tensor_slots"),
        ({"what": "name"}, ValueError, "the slot 'skips_in_a_row' is the clipper's"),
        ({"what": "shape"}, ValueError, r"slot 'a' has shape \[3\], not \[0\]"),
        ({"what": "start"}, ValueError, "slot 'a' starts with NaN or Inf"),
        ({"what": "tally"}, ValueError, r"must return a tally of shape \[k, 5\], got \[5\]"),
        ({"what": "loss"}, TypeError, "failed in step: .*loss is None, for needs"),
        ({"what": "many"}, ValueError, r"one bool, a tensor of shape \[\], got torch.bool \[5\]"),
        ({"what": "nothing"}, TypeError, r"must return \(skip, new state\), got Tensor"),
        ({"what": "place"}, ValueError, "changed an argument in place"),
        ({"what": "nan"}, ValueError, "into slot 'a': NaN and Inf must not enter the state"),
        ({"what": "dtype"}, ValueError, "made slot 'a' torch.float64"),
        ({"what": "drops"}, ValueError, r"returned the slots \[\], where init_state has \['a'\]"),
        ({"value": object()}, TypeError, "the hyper-parameter value = .* cannot be saved"),
        ({"max_skips_in_a_row": 0}, ValueError, "max_skips_in_a_row must be at least 1, got 0"),
        ({"when_stuck": "stop"}, ValueError, "when_stuck must be one of 'step', 'raise', got 'stop'"),
        ({"when_stuck": "raise"}, ValueError, 'when_stuck="raise" needs max_skips_in_a_row'),
    ],
    ids=text,
)
def test_a_guard_that_would_fail_later(kwargs: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        dist_clip.GradClipper(nn.Linear(2, 2), dist_clip.GlobalNorm(), guard=Broken(**kwargs))


def test_a_guard_that_is_no_frozen_dataclass_or_has_no_step() -> None:
    with pytest.raises(TypeError, match="Plain must be a frozen dataclass"):
        dist_clip.GradClipper(nn.Linear(2, 2), dist_clip.GlobalNorm(), guard=Plain())
    stepless = dataclasses.make_dataclass("Stepless", [], bases=(dist_clip.Guard,), frozen=True)
    with pytest.raises(TypeError, match="Stepless must define step"):
        dist_clip.GradClipper(nn.Linear(2, 2), dist_clip.GlobalNorm(), guard=stepless())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dist_clip.SkipAbove(0.0), "SkipAbove: max_norm must be above 0, got 0.0"),
        (lambda: dist_clip.SkipAbove(INF), "SkipAbove: max_norm must be finite, got inf"),
        (lambda: dist_clip.SkipAbove(NAN), "SkipAbove: max_norm must be above 0, got nan"),
        (lambda: dist_clip.SkipAbove("10"), "SkipAbove: max_norm must be a number, got '10'"),  # type: ignore[arg-type]
        (lambda: dist_clip.SkipStep(window=3), "SkipStep: window must be at least 4, got 3"),
        (lambda: dist_clip.SkipStep(sigma=0.0), "SkipStep: sigma must be above 0, got 0.0"),
        (lambda: dist_clip.SkipStep(loss=1), "SkipStep: loss must be a bool, got 1"),  # type: ignore[arg-type]
        (lambda: dist_clip.DropNorm("max"), "DropNorm: variant must be one of 'mean', 'std', got 'max'"),  # type: ignore[arg-type]
        (lambda: dist_clip.DropNorm(factor=1.0), "DropNorm: factor must be above 1, got 1.0"),
        (lambda: dist_clip.DropNorm(decay=1.0), "DropNorm: decay must be below 1"),
        (lambda: dist_clip.MedianGuard(threshold=1.0), "MedianGuard: threshold must be above 1, got 1.0"),
        (lambda: dist_clip.MedianGuard(deviations=-1.0), "MedianGuard: deviations must be at least 0, got -1.0"),
        (lambda: dist_clip.MedianGuard(rate=1.5), "MedianGuard: rate must be above 0 and at most 1, got 1.5"),
        (lambda: dist_clip.MedianGuard(window=0), "MedianGuard: window must be at least 1, got 0"),
        (lambda: dist_clip.guard("mean"), "no guard is called 'mean'; there are"),
        (lambda: dist_clip.guard("median", width=3), "the guard median has no option width; it has threshold"),
        (lambda: dist_clip.register_guard("Median"), "a guard's name must be lower-case letters"),
        (
            lambda: dist_clip.register_guard("median")(SkipOdd),
            "the guard name 'median' is taken by dist_clip.guards.median",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_hyper_parameter(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        make()
    assert message in str(error.value)


def test_the_guard_of_the_page_does_what_it_says() -> None:
    """The code is docs/guards.md's own."""
    page = Path(__file__).parents[2] / "docs" / "guards.md"
    (block,) = re.findall(r"^```python\n(@dist_clip.register_guard.*?)^```", page.read_text("utf-8"), re.M | re.S)
    scope: dict[str, Any] = {"dist_clip": dist_clip, "dataclasses": dataclasses, "torch": torch}
    try:
        exec(compile(block, "guards.md", "exec", dont_inherit=True), scope)
        model = model_of(4)
        clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(), guard=dist_clip.guard("quiet", factor=3.0))
    finally:
        registry._registered.pop("quiet", None)
    skips = [bool(clip(clipper, model, value).skip) for value in (1.0, 2.0, 7.0, NAN, 5.0, 1.0, *[9.0] * 22)]
    assert skips == [False, False, True, False, False, False, *[True] * 20, False, False]
