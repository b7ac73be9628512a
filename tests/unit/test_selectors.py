"""Selectors of overrides=: functions, optimizers and param_groups choose the tensors of a policy; MeasureOnly clips none."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dist_clip

NAMES = ("0.weight", "0.bias", "1.weight", "1.bias")


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def set_grads(model: nn.Module, seed: int, factor: float = 1.0) -> dict[str, torch.Tensor]:
    """Returns copies of the gradients by name."""
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator) * factor
    return {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}


def norm(grads: dict[str, torch.Tensor], *names: str) -> float:
    return math.hypot(*(float(grads[name].double().norm()) for name in names))


def matrices(name: str, param: torch.Tensor) -> bool:
    return param.ndim == 2


def muon_and_adam(model: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    params = list(model.parameters())
    return (
        torch.optim.SGD([p for p in params if p.ndim == 2], lr=0.1),
        torch.optim.AdamW([p for p in params if p.ndim < 2]),
    )


SELECTORS: dict[str, Callable[[nn.Module], Any]] = {
    "function": lambda model: matrices,
    "optimizer": lambda model: muon_and_adam(model)[0],
    "param_groups": lambda model: muon_and_adam(model)[0].param_groups,
    "one group": lambda model: torch.optim.SGD(
        [{"params": [p for p in model.parameters() if p.ndim == k]} for k in (1, 2)], lr=0.1
    ).param_groups[1],
    "named groups": lambda model: (
        torch.optim.SGD([(n, p) for n, p in model.named_parameters() if p.ndim == 2], lr=0.1).param_groups
    ),
    "pattern": lambda model: "*.weight",
}


@pytest.mark.parametrize("kind", SELECTORS)
def test_selected_tensors_have_a_policy_of_their_own(kind: str) -> None:
    model = net()
    overrides = [(SELECTORS[kind](model), dist_clip.GlobalNorm(0.2))]
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(0.1), overrides=overrides)
    before = set_grads(model, 1)
    report = clipper.clip_()
    heavy, light = norm(before, "0.weight", "1.weight"), norm(before, "0.bias", "1.bias")
    expected = [0.2 / (heavy + 1e-6), 0.1 / (light + 1e-6)] * 2
    assert report.names == NAMES
    assert report.scales.tolist() == pytest.approx(expected, rel=1e-6)


def test_measured_only() -> None:
    """Its norms are in the report, and in no norm that clips."""
    model = net()
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(1.0), overrides=[(matrices, dist_clip.MeasureOnly())])
    before = set_grads(model, 2, 1e3)
    report = clipper.clip_()
    rest = norm(before, "0.bias", "1.bias")
    assert report.scales.tolist() == pytest.approx([1.0, 1 / rest] * 2, rel=1e-5)
    for name, param in model.named_parameters():
        if param.ndim == 2:
            assert param.grad is not None
            assert torch.equal(param.grad, before[name])
    assert report.tensor_norms.tolist() == pytest.approx([norm(before, name) for name in NAMES], rel=1e-6)
    assert report.global_norm is not None
    assert report.global_norm.item() == pytest.approx(norm(before, *NAMES), rel=1e-6)
    assert report.clipped_global_norm is not None
    after = math.hypot(norm(before, "0.weight", "1.weight"), 1.0)
    assert report.clipped_global_norm.item() == pytest.approx(after, rel=1e-6)


@pytest.mark.parametrize("guarded", [True, False])
def test_guards_may_leave_out_what_is_only_measured(guarded: bool) -> None:
    """Each of the guards: a fixed threshold sees the rest's norm, and the median guard the rest's tensors."""
    seen: list[Any] = []

    class Watcher(dist_clip.SkipAbove):
        def tally(self, state: Any, norms: torch.Tensor) -> torch.Tensor:
            return (norms > 0).double().unsqueeze(0)

        def step(self, state: Any, inputs: dist_clip.GuardInputs) -> Any:
            seen.append((inputs.norms.tolist(), inputs.tallies.tolist(), float(inputs.global_norm or 0)))
            return super().step(state, inputs)

    model = net()
    clipper = dist_clip.GradClipper(
        model,
        dist_clip.GlobalNorm(1.0),
        overrides=[("*.weight", dist_clip.MeasureOnly(guarded=guarded))],
        guard=Watcher(100.0),
    )
    before = set_grads(model, 3)
    model[0].weight.grad.mul_(1e4)
    before["0.weight"] *= 1e4
    report = clipper.clip_()
    assert bool(report.skip) == guarded
    each = [norm(before, name) * (guarded or name.endswith("bias")) for name in NAMES]
    norms, tallies, together = seen[-1]
    assert norms == pytest.approx(each, rel=1e-6)
    assert tallies == [4.0 if guarded else 2.0]
    assert together == pytest.approx(math.hypot(*each), rel=1e-6)
    model[0].weight.grad.fill_(math.inf)
    assert bool(clipper.clip_().skip) == guarded, "an Inf is none of the guard's business either"


def test_everything_measured_only_with_a_guard() -> None:
    model = net()
    clipper = dist_clip.GradClipper(model, dist_clip.MeasureOnly(guarded=False), guard=dist_clip.SkipAbove(1e-3))
    set_grads(model, 4)
    assert not clipper.clip_().skip


def test_the_first_selector_wins() -> None:
    model = net()
    clipper = dist_clip.GradClipper(
        model,
        dist_clip.GlobalNorm(1.0),
        overrides=[("1.*", dist_clip.MeasureOnly()), (matrices, dist_clip.ZClip()), ("*.bias", dist_clip.AdaGC())],
    )
    policies = {name: type(clipper.memory.policy_for(name)).__name__ for name in NAMES}
    assert policies == dict(zip(NAMES, ["ZClip", "AdaGC", "MeasureOnly", "MeasureOnly"], strict=True))
    assert "'matrices': ZClip" in repr(clipper)


def test_state_and_labels() -> None:
    """States name a function by its qualified name, an optimizer by its class, and a second one of a name by its number."""

    def clipper(model: nn.Module) -> dist_clip.GradClipper:
        matrix, rest = muon_and_adam(model)
        first, second = torch.optim.SGD([model[0].bias], lr=1.0), rest.param_groups  # type: ignore[index]
        overrides = [
            (functools.partial(ends, end="0.weight"), dist_clip.ZClip(warmup_steps=2)),
            (matrix, dist_clip.ZClip()),
        ]
        overrides += [(first, dist_clip.ZClip()), (second, dist_clip.ZClip())]
        return dist_clip.GradClipper(model, dist_clip.AdaGC(), overrides=overrides)

    model = net()
    one = clipper(model)
    for seed in range(4):
        set_grads(model, seed)
        one.clip_()
    state = one.state_dict()
    assert list(state["global"]) == ["partial", "SGD", "SGD 2", "param_groups"]
    again = clipper(net(1))
    again.load_state_dict(state)
    assert again.state_dict()["global"] == state["global"]
    other = dist_clip.GradClipper(net(), dist_clip.AdaGC(), overrides={"*.weight": dist_clip.ZClip()})
    with pytest.raises(ValueError, match=r"made by other policies: it has .*'partial'"):
        other.load_state_dict(state)


def ends(name: str, param: torch.Tensor, end: str) -> bool:
    return name.endswith(end)


def test_refresh_reads_the_optimizer_again() -> None:
    model = net()
    optimizer = torch.optim.SGD([model[0].weight], lr=0.1)
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(), overrides=[(optimizer, dist_clip.MeasureOnly())])
    optimizer.add_param_group({"params": [model[1].bias]})
    assert type(clipper.memory.policy_for("1.bias")).__name__ == "GlobalNorm"
    clipper.refresh()
    assert type(clipper.memory.policy_for("1.bias")).__name__ == "MeasureOnly"


def fails(name: str, param: torch.Tensor) -> bool:
    raise KeyError(name)


def says_a_tensor(name: str, param: torch.Tensor) -> Any:
    return param.sum() > 0


BAD: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "no pair": (
        lambda m: [(matrices, dist_clip.ZClip(), 1)],
        "overrides must map FQN patterns to policies, or be a list",
    ),
    "a function in a dict": (lambda m: {matrices: dist_clip.ZClip()}, "other selectors go into a list"),
    "a class": (lambda m: [(torch.optim.AdamW, dist_clip.ZClip())], "a selector must be an FQN pattern, a function"),
    "a module": (lambda m: [(m[0], dist_clip.ZClip())], "a selector must be an FQN pattern, a function"),
    "parameters": (
        lambda m: [(list(m.parameters()), dist_clip.ZClip())],
        "a selector must be an FQN pattern, a function",
    ),
    "no policy": (lambda m: [(matrices, 1.0)], "overrides: 'matrices' must be a dist_clip policy"),
    "everything": (lambda m: [("*", dist_clip.ZClip())], "the pattern '\\*' would leave nothing"),
    "a pattern twice": (lambda m: [("0.*", dist_clip.ZClip())] * 2, "two selectors are called '0.\\*'"),
    "a label that is a pattern": (
        lambda m: [("matrices", dist_clip.ZClip()), (matrices, dist_clip.ZClip())],
        "two selectors are called 'matrices'",
    ),
    "an error": (lambda m: [(fails, dist_clip.ZClip())], "overrides: fails failed on '0.weight': KeyError"),
    "no bool": (lambda m: [(says_a_tensor, dist_clip.ZClip())], "says_a_tensor returned tensor.* for '0.weight'"),
    "nothing": (lambda m: [(no_tensor, dist_clip.ZClip())], "matches.*no_tensor"),
    "another model": (
        lambda m: [(torch.optim.SGD(net().parameters(), lr=1.0), dist_clip.ZClip())],
        r"SGD holds a parameter of shape \[3, 4\] that is none of the clipper's",
    ),
}


def no_tensor(name: str, param: torch.Tensor) -> bool:
    return False


@pytest.mark.parametrize("case", BAD)
def test_bad_selectors(case: str) -> None:
    overrides, message = BAD[case]
    model = net()
    with pytest.raises((TypeError, ValueError), match=message):
        dist_clip.GradClipper(model, dist_clip.GlobalNorm(), overrides=overrides(model))


def test_guarded_must_be_a_bool() -> None:
    with pytest.raises(TypeError, match="guarded must be a bool, got 1"):
        dist_clip.MeasureOnly(guarded=1)  # type: ignore[arg-type]


# ---- the recipes of docs/muon.md -------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "muon.md").read_text(encoding="utf-8")


def recipe(heading: str, **names: Any) -> dict[str, Any]:
    """Run the block under a heading of the page."""
    block = re.search(rf"^## {heading}.*?^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert block is not None
    names |= {"torch": torch, "dist_clip": dist_clip}
    exec(block[1], names)
    return names


def test_the_recipe_for_plain_torch() -> None:
    model = net()
    made = recipe("Plain torch", model=model)
    before = set_grads(model, 5, 100.0)
    made["muon"].step()
    report = made["clipper"].last_report
    assert report.scales.tolist() == pytest.approx([1.0, 1 / norm(before, "0.bias", "1.bias")] * 2, rel=1e-5)
    made["adamw"].step()
    assert made["clipper"].last_report is report, "one clip a round"


def test_the_recipe_for_one_optimizer_of_two_algorithms() -> None:
    model = net()
    groups = [{"params": [p for p in model.parameters() if (p.ndim == 2) == muon]} for muon in (True, False)]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    for group, algorithm in zip(optimizer.param_groups, ("muon", "adamw"), strict=True):
        group["algorithm"] = algorithm
    made = recipe("OLMo-core#812", model=model, optimizer=optimizer)
    before = set_grads(model, 6, 100.0)
    report = made["clipper"].clip_()
    assert report.scales.tolist() == pytest.approx([1.0, 1 / norm(before, "0.bias", "1.bias")] * 2, rel=1e-5)
