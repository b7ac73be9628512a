"""What calls of ours leave on the user's model: nothing that keeps torch from moving, casting or copying it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import dist_clip

CALLS: dict[str, Callable[[nn.Module, torch.optim.Optimizer], Any]] = {
    "clip_": lambda model, optimizer: dist_clip.GradClipper(model, dist_clip.LogClip()).clip_(),
    "detect_desync": lambda model, optimizer: dist_clip.GradClipper(
        model, dist_clip.LogClip(), detect_desync=True
    ).clip_(),
    "clip_grad_norm_": lambda model, optimizer: dist_clip.clip_grad_norm_(model.parameters(), 1.0),
    "attach": lambda model, optimizer: attach_and_step(model, optimizer),
    "refresh": lambda model, optimizer: dist_clip.GradClipper(model, dist_clip.LogClip()).refresh(),
    "explain": lambda model, optimizer: dist_clip.GradClipper(model, dist_clip.LogClip()).explain(),
    "state": lambda model, optimizer: saved_and_loaded(model),
    "an error": lambda model, optimizer: clip_a_nan(model),
    "a wrapper": lambda model, optimizer: attach_and_step(model, Wrapper(optimizer)),
    "removed": lambda model, optimizer: attach_and_step(model, optimizer).attachment.remove(),  # type: ignore[union-attr]
}


class Wrapper:
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.inner, self.param_groups = optimizer, optimizer.param_groups

    def step(self) -> None:
        self.inner.step()


def saved_and_loaded(model: nn.Module) -> dist_clip.GradClipper:
    clipper = dist_clip.GradClipper(model, dist_clip.AdaGC())
    clipper.clip_()
    clipper.load_state_dict(clipper.state_dict())
    return clipper


def clip_a_nan(model: nn.Module) -> Exception:
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(), nonfinite="raise")
    grad = next(model.parameters()).grad
    assert grad is not None
    grad.mul_(torch.nan)
    with pytest.raises(dist_clip.NonFiniteGradError) as caught:
        clipper.clip_()
    return caught.value


def attach_and_step(model: nn.Module, optimizer: Any) -> dist_clip.GradClipper:
    clipper = dist_clip.GradClipper(model, dist_clip.LogClip(), nonfinite="skip")
    clipper.attach(optimizer)
    optimizer.step()
    return clipper


def made(sharded: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    if sharded:
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(2, 4)).sum().backward()
    return model, optimizer


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.usefixtures("world_of_one")
@pytest.mark.report(
    "pytorch/pytorch#187008",
    "pytorch/pytorch#157209",
    situation="a clip leaves weak references on parameters, so that FSDP2's `model.cpu()` fails from then on",
    right="the model can be moved and cast after every call",
)
def test_the_model_can_be_moved_and_cast(call: str, sharded: bool, gradients: bool) -> None:
    """torch swaps tensors to do it, which a weak reference forbids (pytorch#187008)."""
    model, optimizer = made(sharded)
    result = CALLS[call](model, optimizer)
    if not gradients:
        optimizer.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.cpu()
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert all(param.dtype == torch.float64 for param in model.parameters())
    del result


@pytest.mark.parametrize("call", CALLS)
def test_the_model_and_the_optimizer_can_be_saved_and_copied(call: str) -> None:
    model, optimizer = made(sharded=False)
    result = CALLS[call](model, optimizer)
    file = io.BytesIO()
    torch.save({"model": model, "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)["model"]
    for one, other in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one, other)
    copy.deepcopy(model)
    pickle.loads(pickle.dumps(optimizer))
    del result


def test_lists_of_parameters_are_told_apart() -> None:
    """What was found out about one list is not used for another one that begins with the same parameter."""
    weights = [nn.Parameter(torch.zeros(4)) for _ in range(3)]
    for chosen in (weights, weights[:2], weights, [weights[0], weights[2]]):
        for param in weights:
            param.grad = torch.ones(4)
        assert float(dist_clip.clip_grad_norm_(chosen, 1.0)) == pytest.approx((4 * len(chosen)) ** 0.5)


SENT: dict[str, tuple[dist_clip.Policy, dict[str, Any]]] = {
    "global": (dist_clip.GlobalNorm(), {}),
    "by shard": (dist_clip.AdaGC(scope="shard", warmup_steps=0), {}),
    "by tensor, no global norm": (dist_clip.LogClip(warmup_steps=0), {}),
    "skipped for its size": (dist_clip.ZClip(), {"guard": dist_clip.SkipAbove(1e-6)}),
    "skipped for a NaN": (dist_clip.AdaGC(), {"nonfinite": "skip"}),
    "without a gradient": (dist_clip.GlobalNorm(), {}),
}


@pytest.mark.parametrize(
    "how", [lambda report: pickle.loads(pickle.dumps(report)), copy.deepcopy], ids=["pickle", "copy"]
)
@pytest.mark.parametrize("kind", SENT)
def test_a_report_can_be_sent_to_another_process(kind: str, how: Callable[[Any], Any]) -> None:
    model, optimizer = made(sharded=False)
    if kind == "skipped for a NaN":
        next(model.parameters()).grad.mul_(torch.nan)  # type: ignore[union-attr]
    if kind == "without a gradient":
        optimizer.zero_grad()
    policy, options = SENT[kind]
    report = dist_clip.GradClipper(model, policy, **options).clip_()
    again = how(report)
    assert str(again) == str(report)
    assert bool(again.skip) is bool(report.skip) is kind.startswith("skipped")
    for name in ("scales", "tensor_norms", "global_norm", "clipped_global_norm", "num_grads", "empty", "names"):
        one, other = getattr(again, name), getattr(report, name)
        same = one.equal(other) or bool(one.isnan().any()) if isinstance(one, torch.Tensor) else one == other
        assert same, name
