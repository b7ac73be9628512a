"""attach() on optimizers of other authors, as they publish them: a clip a step, a skip that changes nothing, a saved state.

The reference is a twin of the optimizer, which gets gradients that torch has clipped and never sees those to be skipped.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import dist_clip

MAX_NORM = 1.0
SKIP_ABOVE = 1000.0

Make = Callable[[list[nn.Parameter]], Any]


def timm(name: str) -> ModuleType:
    """A module of timm.optim. The package as a whole imports torchvision, which has to be built for this very torch."""
    if "timm_optim" not in sys.modules:
        found = importlib.util.find_spec("timm")
        if found is None or found.origin is None:
            pytest.skip("timm is not installed")
        package = ModuleType("timm_optim")
        package.__path__ = [str(Path(found.origin).parent / "optim")]
        sys.modules["timm_optim"] = package
    return importlib.import_module(f"timm_optim.{name}")


def of(package: str, name: str) -> Any:
    module = pytest.importorskip(package)
    if not hasattr(module, name):
        pytest.skip(f"this version of {package} has no {name}")
    return getattr(module, name)


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.1, fused=True)


def muon_and_adam(params: list[nn.Parameter]) -> Any:
    groups = [{"params": params[:1], "use_muon": True}, {"params": params[1:], "use_muon": False}]
    return of("muon", "SingleDeviceMuonWithAuxAdam")(groups)


OPTIMIZERS: dict[str, Make] = {
    "timm Lookahead": lambda params: timm("lookahead").Lookahead(sgd(params), k=2),
    "timm Lookahead, fused": lambda params: timm("lookahead").Lookahead(adamw(params), k=2),
    "timm Lamb": lambda params: timm("lamb").Lamb(params, lr=0.1, max_grad_norm=None),
    "timm Lion": lambda params: timm("lion").Lion(params, lr=0.1),
    "timm LARS": lambda params: timm("lars").Lars(params, lr=0.1),
    "timm Adan": lambda params: timm("adan").Adan(params, lr=0.1),
    "pytorch_optimizer Lookahead": lambda params: of("pytorch_optimizer", "Lookahead")(sgd(params), k=2),
    "pytorch_optimizer Lookahead, fused": lambda params: of("pytorch_optimizer", "Lookahead")(adamw(params), k=2),
    "pytorch_optimizer ScheduleFree": lambda params: of("pytorch_optimizer", "ScheduleFreeWrapper")(sgd(params)),
    "pytorch_optimizer TRAC": lambda params: of("pytorch_optimizer", "TRAC")(sgd(params)),
    "pytorch_optimizer OrthoGrad": lambda params: of("pytorch_optimizer", "OrthoGrad")(sgd(params)),
    "pytorch_optimizer Lion": lambda params: of("pytorch_optimizer", "Lion")(params),
    "pytorch_optimizer SOAP": lambda params: of("pytorch_optimizer", "SOAP")(params),
    "pytorch_optimizer Prodigy": lambda params: of("pytorch_optimizer", "Prodigy")(params),
    "schedulefree SGD": lambda params: of("schedulefree", "SGDScheduleFree")(params, lr=0.1),
    "schedulefree AdamW": lambda params: of("schedulefree", "AdamWScheduleFree")(params, lr=0.1),
    "schedulefree RAdam": lambda params: of("schedulefree", "RAdamScheduleFree")(params, lr=0.1),
    "schedulefree wrapper": lambda params: of("schedulefree", "ScheduleFreeWrapper")(sgd(params)),
    "Muon": lambda params: of("muon", "SingleDeviceMuon")(params[:1]),
    "Muon and Adam": muon_and_adam,
}


def weights() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3, 3))]


def gradients(step: int, size: float) -> list[torch.Tensor]:
    torch.manual_seed(step)
    return [size * torch.randn(4, 3), size * torch.randn(3, 3)]


def made(name: str) -> tuple[list[nn.Parameter], Any]:
    params = weights()
    optimizer = OPTIMIZERS[name](params)
    if hasattr(optimizer, "train"):
        optimizer.train()  # schedule-free optimizers want to be told
    stepped = {id(param) for group in optimizer.param_groups for param in group["params"]}
    return [param for param in params if id(param) in stepped], optimizer


def attached(name: str) -> tuple[list[nn.Parameter], Any, dist_clip.GradClipper]:
    params, optimizer = made(name)
    named = [(f"w{i}", param) for i, param in enumerate(params)]
    clipper = dist_clip.GradClipper(named, dist_clip.GlobalNorm(MAX_NORM), guard=dist_clip.SkipAbove(SKIP_ABOVE))
    clipper.attach(optimizer)
    return params, optimizer, clipper


def step_with(params: list[nn.Parameter], optimizer: Any, step: int, size: float) -> None:
    for param, grad in zip(params, gradients(step, size), strict=False):
        param.grad = grad
    optimizer.step()


def facts(params: list[nn.Parameter], optimizer: Any) -> list[str]:
    """Everything a step could have changed, as text."""
    return [str(param.tolist()) for param in params] + [str(optimizer.state_dict())]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.report("kozistr/pytorch_optimizer#122")
def test_steps_are_clipped_once_and_a_skip_changes_nothing(name: str) -> None:
    params, optimizer, clipper = attached(name)
    twins, plain = made(name)
    taken = 0
    for step, size in enumerate((10.0, 0.01, 1e5, 10.0, 1e5, 1e5, 10.0, 10.0)):
        before = facts(params, optimizer)
        step_with(params, optimizer, step, size)
        skipped = size > SKIP_ABOVE
        assert bool(clipper.last_report.skip) is skipped  # type: ignore[union-attr]
        if skipped:
            assert facts(params, optimizer) == before
            continue
        taken += 1
        for twin, grad in zip(twins, gradients(step, size), strict=False):
            twin.grad = grad
        norm = nn.utils.clip_grad_norm_(twins, MAX_NORM)
        plain.step()
        torch.testing.assert_close(clipper.last_report.global_norm, norm, rtol=1e-6, atol=0)  # type: ignore[union-attr]
        assert clipper.steps == taken
        for param, twin in zip(params, twins, strict=True):
            torch.testing.assert_close(param, twin, rtol=1e-4, atol=1e-5)
    assert taken == 5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_saved_state_goes_on(name: str) -> None:
    """Saved with an attached clipper, and loaded into a fresh optimizer before another clipper is attached to it."""
    params, optimizer, clipper = attached(name)
    for step in range(3):
        step_with(params, optimizer, step, 10.0)
    state, clips = copy.deepcopy(optimizer.state_dict()), clipper.state_dict()
    others, resumed = made(name)
    with torch.no_grad():
        for other, param in zip(others, params, strict=True):
            other.copy_(param)
    resumed.load_state_dict(state)
    named = [(f"w{i}", other) for i, other in enumerate(others)]
    again = dist_clip.GradClipper(named, dist_clip.GlobalNorm(MAX_NORM), guard=dist_clip.SkipAbove(SKIP_ABOVE))
    again.load_state_dict(clips)
    again.attach(resumed)
    for step in range(3, 6):
        step_with(params, optimizer, step, 10.0)
        step_with(others, resumed, step, 10.0)
    assert again.steps == clipper.steps == 6
    for other, param in zip(others, params, strict=True):
        torch.testing.assert_close(other, param, rtol=1e-5, atol=1e-6)


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    """SafeFP16Optimizer steps float32 copies of its own, whose gradients nobody would clip."""
    params = weights()
    clipper = dist_clip.GradClipper(params, dist_clip.GlobalNorm(MAX_NORM))
    with pytest.raises(dist_clip.LayoutError, match=r"SGD holds a parameter the clipper does not know"):
        clipper.attach(of("pytorch_optimizer", "SafeFP16Optimizer")(sgd(params)))


def test_an_optimizer_that_computes_gradients_in_its_step_is_refused_at_its_first() -> None:
    params = weights()
    clipper = dist_clip.GradClipper(params, dist_clip.GlobalNorm(MAX_NORM))
    optimizer = of("pytorch_optimizer", "SAM")(params, base_optimizer=torch.optim.SGD, lr=0.1)
    clipper.attach(optimizer)
    before = [param.detach().clone() for param in params]
    for param, grad in zip(params, gradients(0, 10.0), strict=True):
        param.grad = grad
    with pytest.raises(RuntimeError, match=r"clipper\.clip_\(\) at the end of the closure"):
        optimizer.step(lambda: torch.zeros(()))
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
