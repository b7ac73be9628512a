"""The state: one float32 scalar a tensor once the warm-up is over, and nothing loaded that a clipper could not have made."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dist_clip
from dist_clip.memory.snapshot import snapshot

WARMUP = 4


def run(clipper: dist_clip.GradClipper, model: nn.Module, steps: int) -> None:
    for step in range(steps):
        for i, param in enumerate(model.parameters()):
            param.grad = torch.full_like(param, 1.0 + math.sin(step + i))
        clipper.clip_()


@pytest.mark.parametrize("scope", ["tensor", "shard"])
@pytest.mark.parametrize("gamma_init", ["min", "median", "mean", "last"])
def test_one_scalar_a_tensor_after_the_warm_up(gamma_init: Any, scope: Any) -> None:
    """The record that the median needs is neither saved nor kept in memory once it has served."""
    model = nn.Linear(3, 2)
    clipper = dist_clip.GradClipper(model, dist_clip.AdaGC(warmup_steps=WARMUP, gamma_init=gamma_init, scope=scope))
    run(clipper, model, WARMUP)
    for entry in snapshot(clipper.memory)["tensors"].values():
        assert {name: (value.dtype, value.numel()) for name, value in entry.items()} == {"gamma": (torch.float32, 1)}
    saved = clipper.state_dict()["tensors" if scope == "tensor" else "shards"]
    for entry in saved.values():
        entry = entry if scope == "tensor" else entry["0 of 1"]
        assert all(value == [] for slot, value in entry.items() if slot != "gamma")
    run(clipper, model, 1)
    assert sum(value.numel() for domain in clipper.memory.groups for value in domain.state.values()) == 2


def test_a_state_from_the_warm_up_loads_into_a_clipper_that_is_past_it() -> None:
    policy = dist_clip.AdaGC(warmup_steps=WARMUP, gamma_init="median")
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    young, old = dist_clip.GradClipper(model, policy), dist_clip.GradClipper(other, policy)
    run(young, model, 2)
    run(old, other, WARMUP + 3)
    old.load_state_dict(young.state_dict())
    for clipper, net in ((young, model), (old, other)):
        run(clipper, net, 6)
    assert str(old.state_dict()) == str(young.state_dict())


def spoil(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.__setitem__(key, value)


def spoil_gamma(value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state: state["tensors"]["bias"].__setitem__("gamma", value)


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "step of another type": (spoil("step", "x"), "step.*'x'"),
    "negative step": (spoil("step", -5), "step.*-5"),
    "tensors of another type": (spoil("tensors", [1]), "tensors.*list"),
    "NaN": (spoil_gamma(torch.tensor(math.nan)), r"(?s)bias.*gamma.*nan"),
    "Inf": (spoil_gamma(torch.tensor(math.inf)), r"(?s)bias.*gamma.*inf"),
    "a float": (spoil_gamma(0.5), r"(?s)bias.*gamma.*0\.5"),
    "a vector": (spoil_gamma(torch.ones(2)), r"(?s)bias.*gamma.*\[2\]"),
    "another slot": (lambda state: state["tensors"]["bias"].__setitem__("mean", torch.ones(())), r"(?s)bias.*mean"),
    "no slot": (lambda state: state["tensors"]["bias"].clear(), "bias"),
    "no tensor": (lambda state: state["tensors"].pop("bias"), r"missing \['bias'\]"),
    "unknown tensor": (
        lambda state: state["tensors"].__setitem__("new", {"gamma": torch.ones(())}),
        r"unknown \['new'\]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_changes_nothing(damage: str) -> None:
    spoiler, message = DAMAGE[damage]
    model = nn.Linear(3, 2)
    clipper = dist_clip.GradClipper(model, dist_clip.AdaGC(warmup_steps=2))
    run(clipper, model, 5)
    state = clipper.state_dict()
    run(clipper, model, 3)
    before = str(clipper.state_dict())
    spoiler(state)
    with pytest.raises(ValueError, match=message):
        clipper.load_state_dict(state)
    assert str(clipper.state_dict()) == before


@pytest.mark.parametrize("state", [None, [], "state", {}], ids=str)
def test_what_is_no_state(state: Any) -> None:
    clipper = dist_clip.GradClipper(nn.Linear(3, 2), dist_clip.GlobalNorm())
    with pytest.raises(ValueError, match="not a state"):
        clipper.load_state_dict(state)


def test_loading_leaves_the_memory_in_place() -> None:
    """A captured CUDA graph reads and writes the state where it was."""
    model = nn.Linear(3, 2)
    clipper = dist_clip.GradClipper(model, dist_clip.AdaGC(warmup_steps=2))
    run(clipper, model, 3)
    tensors: list[Tensor] = [domain.state["gamma"] for domain in clipper.memory.groups]
    pointers = [tensor.data_ptr() for tensor in tensors]
    clipper.load_state_dict(clipper.state_dict())
    assert [domain.state["gamma"].data_ptr() for domain in clipper.memory.groups] == pointers


def test_groups_that_cover_everything_leave_the_same_state() -> None:
    model = nn.Linear(3, 2)
    groups = {"w*": dist_clip.GlobalNorm(0.5), "b*": dist_clip.AdaGC(warmup_steps=1)}
    clipper = dist_clip.GradClipper(model, dist_clip.ZClip(), overrides=groups)
    run(clipper, model, 3)
    again = dist_clip.GradClipper(nn.Linear(3, 2), dist_clip.ZClip(), overrides=groups)
    again.load_state_dict(clipper.state_dict())
    assert str(again.state_dict()) == str(clipper.state_dict())


# ---- strict and not ----------------------------------------------------------------------------------------------------


class Three(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.zeros(3)))


def trained(policy: dist_clip.Policy, *names: str, steps: int = 6) -> dist_clip.GradClipper:
    model = Three(*names)
    clipper = dist_clip.GradClipper(model, policy)
    run(clipper, model, steps)
    return clipper


def gammas(clipper: dist_clip.GradClipper) -> dict[str, float]:
    return {name: float(entry["gamma"]) for name, entry in snapshot(clipper.memory)["tensors"].items()}


def test_missing_unknown_and_renamed_tensors_are_named() -> None:
    policy = dist_clip.AdaGC(warmup_steps=2)
    old, new = trained(policy, "kept", "gone"), trained(policy, "kept", "new", steps=3)
    before = str(new.state_dict())
    with pytest.raises(ValueError, match=r"missing \['new'\], unknown \['gone'\].*renamed.*strict=False"):
        new.load_state_dict(old.state_dict())
    assert str(new.state_dict()) == before
    with pytest.warns(UserWarning, match=r"missing \['new'\], unknown \['gone'\]"):
        new.load_state_dict(old.state_dict(), strict=False)
    assert gammas(new) == {"kept": gammas(old)["kept"], "new": 0.0}
    assert new.steps == old.steps


def test_a_renamed_tensor_can_be_renamed_in_the_state() -> None:
    policy = dist_clip.AdaGC(warmup_steps=2)
    old, new = trained(policy, "kept", "gone"), trained(policy, "kept", "new", steps=3)
    state = old.state_dict()
    state["names"] = ["kept", "new"]
    state["tensors"]["new"] = state["tensors"].pop("gone")
    new.load_state_dict(state)
    assert gammas(new) == {"kept": gammas(old)["kept"], "new": gammas(old)["gone"]}


def test_changed_hyper_parameters() -> None:
    old = trained(dist_clip.AdaGC(warmup_steps=2, beta=0.9), "w")
    new = trained(dist_clip.AdaGC(warmup_steps=2, beta=0.99, lambda_rel=1.1), "w", steps=0)
    with pytest.raises(ValueError, match=r"beta was 0\.9 and is 0\.99 .*lambda_rel was 1\.04 and is 1\.1"):
        new.load_state_dict(old.state_dict())
    assert new.steps == 0
    with pytest.warns(UserWarning, match=r"beta was 0\.9 and is 0\.99"):
        new.load_state_dict(old.state_dict(), strict=False)
    assert gammas(new) == gammas(old)
    assert new.steps == 6


@pytest.mark.parametrize(
    "policy", [dist_clip.ZClip(), dist_clip.AdaGC(scope="global"), dist_clip.GlobalNorm()], ids=str
)
def test_other_rules_start_afresh(policy: dist_clip.Policy) -> None:
    """Nothing that one rule remembers is of use to another: with strict=False it is a new warm-up."""
    old, new = trained(dist_clip.AdaGC(warmup_steps=2), "w"), trained(policy, "w", steps=3)
    with pytest.raises(ValueError, match="other policies"):
        new.load_state_dict(old.state_dict())
    assert new.steps == 3
    with pytest.warns(UserWarning, match="other policies"):
        new.load_state_dict(old.state_dict(), strict=False)
    assert new.steps == 0
    assert str(new.state_dict()) == str(trained(policy, "w", steps=0).state_dict())


@pytest.mark.parametrize("steps", [2, 3, 4, 6])
@pytest.mark.parametrize("warmup", [3, 5])
@pytest.mark.parametrize("gamma_init", ["median", "mean", "min"])
def test_a_warm_up_of_another_length(gamma_init: Any, warmup: int, steps: int) -> None:
    """As much of the record as there is; and training goes on."""
    old = trained(dist_clip.AdaGC(warmup_steps=4, gamma_init="median"), "w", steps=steps)
    policy = dist_clip.AdaGC(warmup_steps=warmup, gamma_init=gamma_init)
    model = Three("w")
    new = dist_clip.GradClipper(model, policy)
    with pytest.warns(UserWarning, match=r"warmup_steps was 4"):
        new.load_state_dict(old.state_dict(), strict=False)
    assert gammas(new) == gammas(old)
    assert new.steps == steps
    if gamma_init == "median" and steps < min(4, warmup):
        known, record = snapshot(old.memory)["tensors"]["w"]["history"], snapshot(new.memory)["tensors"]["w"]["history"]
        assert torch.equal(record[:steps], known[:steps])
        assert record[steps:].isnan().all()
    run(new, model, 4)
    assert 0 < gammas(new)["w"] < math.inf


def test_the_keys_do_not_depend_on_the_step() -> None:
    """`torch.distributed.checkpoint` loads into the keys that a clipper has before it knows the step."""

    def keys(value: Any) -> Any:
        return {key: keys(each) for key, each in value.items()} if isinstance(value, dict) else None

    for policy in (dist_clip.AdaGC(warmup_steps=2, gamma_init="median"), dist_clip.ZClip(), dist_clip.GlobalNorm()):
        clippers = [trained(policy, "a", "b", steps=steps) for steps in (0, 1, 2, 5)]
        assert len({str(keys(clipper.state_dict())) for clipper in clippers}) == 1


def test_a_damaged_record() -> None:
    clipper = trained(dist_clip.AdaGC(warmup_steps=9, gamma_init="median"), "w", steps=3)
    state = clipper.state_dict()
    state["tensors"]["w"]["history"][1] = "x"
    with pytest.raises(ValueError, match="history must be a list of numbers"):
        clipper.load_state_dict(state)
    with pytest.raises(ValueError, match="names"):
        clipper.load_state_dict({**clipper.state_dict(), "names": [3]})


@pytest.mark.parametrize("line", [3, "{", '{"pattern": "*"}', "[]"], ids=str)
def test_damaged_policies(line: Any) -> None:
    clipper = trained(dist_clip.AdaGC(warmup_steps=2), "w")
    state = clipper.state_dict()
    with pytest.raises(ValueError, match="policies are damaged"):
        clipper.load_state_dict({**state, "policies": [line]}, strict=False)


def test_a_hyper_parameter_that_the_state_does_not_know_had_its_default() -> None:
    """As in states of format version 1: the global ZClip's had no scope."""
    old = trained(dist_clip.ZClip(), "w")
    state = old.state_dict()
    line, _ = state["policies"]
    policy = json.loads(line)
    del policy["scope"], policy["eps"]
    state |= {"format_version": 1, "policies": [json.dumps(policy)]}
    new = trained(dist_clip.ZClip(), "w", steps=0)
    new.load_state_dict(state)
    assert str(new.state_dict()) == str(old.state_dict())
    for other in (dist_clip.ZClip(scope="tensor"), dist_clip.ZClip(eps=1e-3)):
        with pytest.raises(ValueError, match="made by other policies"):
            trained(other, "w", steps=0).load_state_dict(state)


def bare(*shapes: tuple[int, ...], steps: int = 6) -> tuple[dist_clip.GradClipper, list[nn.Parameter]]:
    """A clipper of parameters without names, whose gradients have norms of their own."""
    params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    clipper = dist_clip.GradClipper(params, dist_clip.AdaGC(warmup_steps=2, max_norm=1e6))
    for _ in range(steps):
        for param in params:
            param.grad = torch.ones_like(param)
        clipper.clip_()
    return clipper, params


def test_numbered_tensors_of_other_shapes_are_refused() -> None:
    """Their names say nothing: without shapes the first tensor's gamma would have clipped the second to .04 of its norm."""
    old, _ = bare((2, 2), (50, 50))
    new, params = bare((50, 50), (2, 2), steps=0)
    before = str(new.state_dict())
    with pytest.raises(
        ValueError, match=r"'param_0' had shape \[2, 2\] and has \[50, 50\], 'param_1' had shape \[50, 50\]"
    ):
        new.load_state_dict(old.state_dict())
    assert str(new.state_dict()) == before
    with pytest.warns(UserWarning, match="'param_0' had shape.*What fits is loaded"):
        new.load_state_dict(old.state_dict(), strict=False)
    assert new.steps == 6
    for param in params:
        param.grad = torch.ones_like(param)
    assert new.clip_().scales.tolist() == [1.0, 1.0]


def test_tensors_whose_shape_is_the_same_are_loaded_beside_one_whose_shape_is_not() -> None:
    old, _ = bare((2, 2), (3,), (4,))
    new, _ = bare((2, 2), (5,), (4,), steps=0)
    with pytest.warns(UserWarning, match="'param_1' had shape"):
        new.load_state_dict(old.state_dict(), strict=False)
    assert gammas(new) == pytest.approx({"param_0": 2.0, "param_1": 0.0, "param_2": 2.0})


def test_a_state_without_shapes_loads_as_before() -> None:
    """As one of 0.1.0, or one whose tensors were renamed by hand."""
    old, _ = bare((2, 2), (3,))
    state = old.state_dict()
    state["policies"] = state["policies"][:1]
    new, _ = bare((2, 2), (3,), steps=0)
    new.load_state_dict(state)
    assert gammas(new) == gammas(old)


# ---- packed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 2, 6])
@pytest.mark.parametrize(
    "policy",
    [
        dist_clip.AdaGC(warmup_steps=4, gamma_init="median"),
        dist_clip.LogClip(warmup_steps=4),
        dist_clip.ZClip(),
        dist_clip.GlobalNorm(),
    ],
    ids=repr,
)
def test_a_packed_state_is_the_state(policy: dist_clip.Policy, steps: int) -> None:
    old, new = trained(policy, "a", "b", steps=steps), trained(policy, "a", "b", steps=1)
    new.packed().load_state_dict(old.packed().state_dict())
    assert str(new.state_dict()) == str(old.state_dict())


def test_a_packed_state_of_another_model() -> None:
    policy = dist_clip.AdaGC(warmup_steps=2)
    old, new = trained(policy, "kept", "gone"), trained(policy, "kept", "new", steps=3)
    with pytest.raises(ValueError, match=r"missing \['new'\], unknown \['gone'\]"):
        new.packed().load_state_dict(old.packed().state_dict())
    with pytest.warns(UserWarning, match="What fits is loaded"):
        new.packed(strict=False).load_state_dict(old.packed().state_dict())
    assert gammas(new) == {"kept": gammas(old)["kept"], "new": 0.0}


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"x" + b], ids=["cut", "no", "x"]
)
def test_a_damaged_packed_state_changes_nothing(damage: Callable[[bytes], bytes]) -> None:
    clipper = trained(dist_clip.LogClip(), "w")
    before = str(clipper.state_dict())
    state = clipper.packed().state_dict()
    with pytest.raises(ValueError, match="not a packed state of GradClipper, or a damaged one"):
        clipper.packed().load_state_dict({"packed": damage(state["packed"])})
    assert str(clipper.state_dict()) == before


def test_the_state_of_shards_is_not_packed() -> None:
    with pytest.raises(ValueError, match="with scope 'shard' save the clipper itself"):
        trained(dist_clip.AdaGC(scope="shard"), "w").packed()


# ---- states of 0.1.0 ---------------------------------------------------------------------------------------------------

STATES_V1 = Path(__file__).parents[1] / "data" / "states_v1.pt"
"""Written by 0.1.0, in format version 1: {"RULE after STEPS": {"state": ..., "scales": of the four steps after it}}."""

POLICIES_V1: dict[str, dist_clip.Policy] = {
    "global": dist_clip.GlobalNorm(1.0),
    "adagc-min": dist_clip.AdaGC(warmup_steps=4),
    "adagc-median": dist_clip.AdaGC(warmup_steps=4, gamma_init="median"),
    "adagc-mean": dist_clip.AdaGC(warmup_steps=4, gamma_init="mean"),
    "adagc-last": dist_clip.AdaGC(warmup_steps=4, gamma_init="last"),
    "adagc-shard": dist_clip.AdaGC(warmup_steps=4, gamma_init="median", scope="shard"),
    "adagc-global": dist_clip.AdaGC(warmup_steps=4, scope="global"),
    "zclip": dist_clip.ZClip(warmup_steps=4),
    "zclip-tensor": dist_clip.ZClip(warmup_steps=4, scope="tensor"),
    "logclip": dist_clip.LogClip(warmup_steps=4, post_max_norm=1.0),
}


@pytest.mark.parametrize("steps", [2, 7])
@pytest.mark.parametrize("rule", POLICIES_V1)
def test_a_state_of_0_1_0_goes_on(rule: str, steps: int) -> None:
    """In its warm-up and after it: the next scales are those of 0.1.0, to the last bit."""
    written = torch.load(STATES_V1)[f"{rule} after {steps}"]
    assert written["state"]["format_version"] == 1
    model = nn.Linear(3, 2)
    clipper = dist_clip.GradClipper(model, POLICIES_V1[rule])
    clipper.load_state_dict(written["state"])
    for step, expected in enumerate(written["scales"], start=steps):
        for k, param in enumerate(model.parameters()):
            value = (1.0 + 0.5 * math.sin(3 * step + k)) * (k + 1)
            param.grad = torch.full_like(param, value) if (step + k) % 5 else None
        assert clipper.clip_().scales.tolist() == expected


# ---- what it costs -----------------------------------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("policy", [dist_clip.LogClip(), dist_clip.AdaGC(warmup_steps=2, gamma_init="median")], ids=str)
def test_a_state_dict_takes_operators_for_each_slot_and_not_for_each_tensor(
    policy: dist_clip.Policy, steps: int
) -> None:
    params = [(f"p{i}", nn.Parameter(torch.zeros(1))) for i in range(2000)]
    clipper = dist_clip.GradClipper(params, policy)
    for _ in range(steps):
        clipper.clip_()
    with Operators() as operators:
        state = clipper.state_dict()
    assert len(state["tensors"]) == 2000
    assert len(operators.seen) < 50, operators.seen


def test_a_policy_without_tensors_has_a_state_in_its_warm_up() -> None:
    """A pipeline stage may hold nothing that an override matches; here another override took all of it."""
    model = nn.Linear(3, 2)
    overrides: dict[str, dist_clip.Policy] = {
        "weight": dist_clip.GlobalNorm(),
        "bias": dist_clip.GlobalNorm(),
    }
    rest = dist_clip.AdaGC(warmup_steps=5, gamma_init="median")
    clipper = dist_clip.GradClipper(model, rest, overrides=overrides)
    run(clipper, model, 2)
    dist_clip.GradClipper(nn.Linear(3, 2), rest, overrides=overrides).load_state_dict(clipper.state_dict())
