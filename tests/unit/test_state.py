"""The state: one float32 scalar a tensor once the warm-up is over, and nothing loaded that a clipper could not have made."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dist_clip

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
    for entry in clipper.state_dict()["tensors"].values():
        assert {name: (value.dtype, value.numel()) for name, value in entry.items()} == {"gamma": (torch.float32, 1)}
    run(clipper, model, 1)
    assert sum(value.numel() for domain in clipper.domains for value in domain.state.values()) == 2


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
    "negative": (spoil_gamma(torch.tensor(-1.0)), r"(?s)bias.*gamma.*-1"),
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
    tensors: list[Tensor] = [domain.state["gamma"] for domain in clipper.domains]
    pointers = [tensor.data_ptr() for tensor in tensors]
    clipper.load_state_dict(clipper.state_dict())
    assert [domain.state["gamma"].data_ptr() for domain in clipper.domains] == pointers


def test_groups_that_cover_everything_leave_the_same_state() -> None:
    model = nn.Linear(3, 2)
    groups = {"w*": dist_clip.GlobalNorm(0.5), "b*": dist_clip.AdaGC(warmup_steps=1)}
    clipper = dist_clip.GradClipper(model, dist_clip.ZClip(), groups=groups)
    run(clipper, model, 3)
    again = dist_clip.GradClipper(nn.Linear(3, 2), dist_clip.ZClip(), groups=groups)
    again.load_state_dict(clipper.state_dict())
    assert str(again.state_dict()) == str(clipper.state_dict())
