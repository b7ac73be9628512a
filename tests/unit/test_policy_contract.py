"""The contract of a policy: its defaults are right for a user's own, and what is not allowed is an error at construction."""

from __future__ import annotations

import dataclasses
import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dist_clip
from dist_clip.policies import options_of
from dist_clip.policies.base import State


@dataclasses.dataclass(frozen=True)
class LogLevel(dist_clip.Policy):
    """Follows the logarithm of each norm, which is negative for small ones; declares nothing but what it must.

    Args:
        ratio: how far above its level a norm may go.
        levels: a tuple, which JSON makes a list.
    """

    ratio: float = 2.0
    levels: tuple[float, ...] = (0.5, 0.25)
    scope: dist_clip.Scope = "tensor"

    def init_state(self, n: int, device: torch.device) -> State:
        return {"log_level": torch.zeros(n, device=device), "count": torch.zeros(n, dtype=torch.int64, device=device)}

    def step(self, state: State, inputs: dist_clip.StepInputs) -> tuple[Tensor, State]:
        seen = dist_clip.observed(inputs.norms)
        log_norm = torch.where(seen, inputs.norms, 1.0).log()
        known = state["count"] > 0
        scales = torch.where(known & seen, (state["log_level"] + math.log(self.ratio) - log_norm).exp(), 1.0)
        level = torch.where(known, 0.5 * state["log_level"] + 0.5 * log_norm, log_norm).float()
        new = {"log_level": torch.where(seen, level, state["log_level"]), "count": state["count"] + seen}
        return scales.clamp(max=1.0), new


def model_of(*sizes: int) -> nn.Module:
    return nn.ParameterDict({f"p{i}": nn.Parameter(torch.zeros(size)) for i, size in enumerate(sizes)})


def run(clipper: dist_clip.GradClipper, model: nn.Module, *values: float) -> dist_clip.ClipReport:
    for value in values:
        for k, param in enumerate(model.parameters()):
            param.grad = torch.full_like(param, value / (k + 1))
        report = clipper.clip_()
    return report


def resumed(policy: dist_clip.Policy, saved: dict[str, Any]) -> tuple[dist_clip.GradClipper, nn.Module]:
    model = model_of(4, 9)
    clipper = dist_clip.GradClipper(model, policy)
    clipper.load_state_dict(saved)
    return clipper, model


@pytest.mark.parametrize("scope", ["tensor", "shard", "global"])
def test_a_state_that_is_declared_nowhere_survives_a_restart(scope: Any) -> None:
    """All slots of init_state are saved; values may be negative; hyper-parameters may be tuples."""
    model = model_of(4, 9)
    clipper = dist_clip.GradClipper(model, LogLevel(scope=scope))
    run(clipper, model, 0.01, 0.02)
    again, other = resumed(LogLevel(scope=scope), clipper.state_dict())
    state = again.memory.groups[0].state
    assert bool((state["log_level"] < 0).all())
    assert bool((state["count"] == 2).all())
    assert torch.equal(run(again, other, 5.0).scales, run(clipper, model, 5.0).scales)
    assert bool((again.last_report.scales < 0.1).all())  # type: ignore[union-attr]


def test_a_changed_tuple_is_seen() -> None:
    clipper = dist_clip.GradClipper(model_of(4, 9), LogLevel())
    with pytest.raises(ValueError, match=r"levels was \[0.5, 0.25\] and is \[0.5\]"):
        resumed(LogLevel(levels=(0.5,)), clipper.state_dict())


@pytest.mark.parametrize(("scope", "elements"), [("tensor", 2), ("shard", 2), ("global", 1)])
def test_a_scope_field_is_honoured(scope: Any, elements: int) -> None:
    model = model_of(4, 9)
    clipper = dist_clip.GradClipper(model, LogLevel(scope=scope))
    assert len(clipper.memory.groups[0].state["log_level"]) == elements
    run(clipper, model, 1.0)
    model["p0"].grad, model["p1"].grad = torch.full((4,), 100.0), torch.full((9,), 0.5)  # type: ignore[index]
    first, second = clipper.clip_().scales.tolist()
    assert first < 0.1
    assert second == (first if scope == "global" else 1.0)


@dataclasses.dataclass(frozen=True)
class Relative(dist_clip.Policy):
    """At most `ratio` of the weights' norm, and the norm of one step for each number."""

    ratio: float = 0.1
    scope: dist_clip.Scope = "tensor"

    def needs(self, step: int) -> Any:
        return ("weight_norms",)

    def step(self, state: State, inputs: dist_clip.StepInputs) -> tuple[Tensor, State]:
        assert inputs.weight_norms is not None
        limit = self.ratio * inputs.weight_norms / inputs.numel
        return (limit / inputs.norms).nan_to_num(1.0).clamp(max=1.0), state


@pytest.mark.parametrize("scope", ["tensor", "shard", "global"])
def test_what_a_policy_needs_is_measured(scope: Any) -> None:
    model = model_of(4, 9)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(3.0)
    clipper = dist_clip.GradClipper(model, Relative(scope=scope))
    report = run(clipper, model, 8.0)
    if scope == "global":  # weights 3 in 13 elements; gradients 8 in four of them and 4 in nine
        weights, grads = 3 * 13**0.5, (4 * 64 + 9 * 16) ** 0.5
        expected = [0.1 * weights / 13 / grads] * 2
    else:
        expected = [0.1 * 3 / 8 / 4, 0.1 * 3 / 4 / 9]
    assert report.scales.tolist() == pytest.approx(expected)


def test_nothing_is_measured_that_nobody_needs() -> None:
    seen: list[dist_clip.StepInputs] = []

    @dataclasses.dataclass(frozen=True)
    class Watcher(dist_clip.Policy):
        def step(self, state: State, inputs: dist_clip.StepInputs) -> tuple[Tensor, State]:
            seen.append(inputs)
            return torch.ones_like(inputs.norms), state

    model = model_of(4, 9)
    clipper = dist_clip.GradClipper(model, Watcher())
    seen.clear()
    run(clipper, model, 1.0, 1.0)
    assert [(x.global_norm, x.weight_norms, x.numel.tolist(), int(x.t), x.steps_done) for x in seen] == [
        (None, None, [4, 9], 1, 0),
        (None, None, [4, 9], 2, 1),
    ]


def test_different_scales_beside_a_global_norm_are_reported_as_they_are() -> None:
    """A policy that asks for the global norm need not scale all tensors alike."""

    @dataclasses.dataclass(frozen=True)
    class Share(dist_clip.Policy):
        post_max_norm = 1e9

        def needs(self, step: int) -> Any:
            return ("global_norm",)

        def step(self, state: State, inputs: dist_clip.StepInputs) -> tuple[Tensor, State]:
            return (inputs.norms / inputs.global_norm).nan_to_num(0.0), state

    model = model_of(9, 16)
    report = run(dist_clip.GradClipper(model, Share()), model, 2.0)
    norms = torch.tensor([6.0, 4.0])
    assert report.scales.tolist() == pytest.approx((norms / norms.norm()).tolist())
    assert float(report.clipped_global_norm) == pytest.approx(float((norms.square() / norms.norm()).norm()))  # type: ignore[arg-type]


# ---- what is refused -------------------------------------------------------------------------------------------------


def policy_with(**methods: Any) -> Any:
    """An instance of a policy that is `LogLevel` but for `methods`."""
    return dataclasses.dataclass(frozen=True)(type("Own", (LogLevel,), methods))()


def in_place(self: Any, state: State, inputs: Any) -> Any:
    state["count"] += 1
    return torch.ones_like(inputs.norms), state


def keeps_nan(self: Any, state: State, inputs: Any) -> Any:
    kept = torch.where(inputs.norms == math.inf, math.nan, inputs.norms)
    return torch.ones_like(inputs.norms), {**state, "log_level": kept.float()}


class Plain(dist_clip.Policy):
    def step(self, state: State, inputs: Any) -> Any:
        return torch.ones_like(inputs.norms), state


class Undecorated(LogLevel):
    more: int = 3


@dataclasses.dataclass(frozen=True)
class Unstorable(LogLevel):
    device: Any = dataclasses.field(default_factory=lambda: torch.device("cpu"))


@dataclasses.dataclass(frozen=True)
class Stepless(dist_clip.Policy):
    pass


REFUSED: dict[str, tuple[Any, str]] = {
    "no dataclass": (Plain, "Plain must be a frozen dataclass"),
    "a subclass that is none": (Undecorated, "Undecorated derives from a dataclass but is none itself, so more"),
    "no step": (Stepless, "Stepless must define step"),
    "a hyper-parameter that JSON has not": (
        Unstorable,
        r"Unstorable: the hyper-parameter device = device\(type='cpu'\)",
    ),
    "an unknown scope": (lambda: LogLevel(scope="layer"), "LogLevel: scope must be one of .* got 'layer'"),  # type: ignore[arg-type]
    "an unknown need": (lambda: policy_with(needs=lambda self, step: ("loss",)), r"Own.needs\(1\) asks for \['loss'\]"),
    "the signature of 0.1.0": (
        lambda: policy_with(step=lambda self, state, norms, global_norm, t: (norms, state)),
        r"Own.step, tried out on .*TypeError.*The contract is step\(self, state, inputs\)",
    ),
    "a need that is not declared": (
        lambda: policy_with(step=lambda self, state, inputs: (inputs.norms / inputs.global_norm, state)),
        r"global_norm and weight_norms is None, for needs\(\) does not ask for it",
    ),
    "no pair": (
        lambda: policy_with(step=lambda self, state, inputs: inputs.norms),
        r"must return \(scales, new state\)",
    ),
    "one scale for all": (
        lambda: policy_with(step=lambda self, state, inputs: (torch.ones(()), state)),
        r"must return one float scale an element, \[5\], got torch.float32 \[\]",
    ),
    "a state changed in place": (lambda: policy_with(step=in_place), "changed an argument in place"),
    "NaN in the state": (lambda: policy_with(step=keeps_nan), "put .*nan.* into slot 'log_level'"),
    "a slot of another shape": (
        lambda: policy_with(step=lambda self, s, x: (x.norms, {**s, "count": s["count"].sum()})),
        "made slot 'count' torch.int64",
    ),
    "a new slot": (lambda: policy_with(step=lambda self, s, x: (x.norms, {**s, "new": x.t})), "returned slot 'new'"),
    "a state that is no vector": (
        lambda: policy_with(init_state=lambda self, n, device: {"a": torch.zeros(())}),
        r"slot 'a' has shape \[\]",
    ),
    "a state that starts at NaN": (
        lambda: policy_with(init_state=lambda self, n, device: {"a": torch.full((n,), math.nan)}),
        "slot 'a' starts with NaN",
    ),
    "a slot that is none": (
        lambda: policy_with(slots_after=lambda self, step: ("b",)),
        r"slots_after\(0\) names \['b'\]",
    ),
    "scales that differ, declared alike": (
        lambda: policy_with(
            one_scale=lambda self, step: True, step=lambda self, s, x: (torch.arange(len(x.norms)).double(), s)
        ),
        "scaled elements differently",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_at_construction(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises((TypeError, ValueError), match=message):
        dist_clip.GradClipper(model_of(4), make())
    with pytest.raises((TypeError, ValueError), match=message):
        dist_clip.GradClipper(model_of(4), dist_clip.GlobalNorm(), overrides={"p0": make()})


def test_a_registered_class_that_is_no_dataclass_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = importlib.import_module("dist_clip.policies.registry")
    monkeypatch.setattr(registry, "_registered", {**registry._registered})
    dist_clip.register("plain")(Plain)
    for call in (lambda: dist_clip.policy("plain"), dist_clip.policies.modes):
        with pytest.raises(TypeError, match="Plain must be a frozen dataclass"):
            call()


def test_nan_is_a_value_where_the_policy_says_so() -> None:
    policy = policy_with(step=keeps_nan, nan_slots=("log_level",))
    model = model_of(4, 9)
    clipper = dist_clip.GradClipper(model, policy)
    run(clipper, model, math.nan)
    again, _ = resumed(policy, clipper.state_dict())
    assert bool(again.memory.groups[0].state["log_level"].isnan().all())


def test_inf_is_no_value_anywhere() -> None:
    """It would be refused when the state is loaded: said at construction, where a step with an infinite norm is tried."""
    with pytest.raises(ValueError, match=r"put .*inf.* into slot 'log_level'.*NaN \(not Inf\)"):
        dist_clip.GradClipper(
            model_of(4),
            policy_with(
                nan_slots=("log_level",),
                step=lambda self, s, x: (torch.ones_like(x.norms), {**s, "log_level": x.norms.float()}),
            ),
        )


def test_an_infinite_state_is_a_warning_when_it_is_saved_and_an_error_when_it_is_loaded() -> None:
    clipper = dist_clip.GradClipper(model_of(4, 9), LogLevel())
    clipper.memory.groups[0].state["log_level"].fill_(math.inf)
    with pytest.warns(UserWarning, match="has NaN or Inf in 'log_level'"):
        saved = clipper.state_dict()
    with pytest.raises(ValueError, match="log_level = inf: it must be finite"):
        resumed(LogLevel(), saved)


def test_options_come_from_the_dataclass() -> None:
    ratio, _ = options_of(LogLevel)
    assert (ratio.name, ratio.type, ratio.default, ratio.help) == (
        "ratio",
        float,
        2.0,
        "how far above its level a norm may go.",
    )
