"""Loops that clip at the wrong place are told so, once; and no other loop is. A state that travels with the optimizer's."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    _init_optim_state,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import dist_clip
from dist_clip.optimizers import steps_taken

AGAIN = "gradients that were clipped are clipped again"
EMPTY = "3 clips in a row found no gradient"
UNSEEN = "were stepped with gradients that no clip saw"


def made(**options: Any) -> tuple[nn.Module, torch.optim.Optimizer, dist_clip.GradClipper]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    clipper = dist_clip.GradClipper(model, dist_clip.AdaGC(warmup_steps=4, gamma_init="median"), **options)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1), clipper


def backward(model: nn.Module, step: int = 0) -> None:
    model(torch.ones(2, 3) * (1 + step % 3)).square().mean().backward()


@pytest.fixture
def told() -> Iterator[Callable[[], list[str]]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [str(warning.message) for warning in caught]


# ---- clipping at the wrong place ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_clip_after_every_micro_batch_is_told_once(told: Any, set_to_none: bool) -> None:
    model, optimizer, clipper = made()
    for step in range(12):
        backward(model)
        clipper.clip_()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
    assert len(told()) == 1
    assert told()[0].startswith(AGAIN)
    assert "Call clip_() once a step, after the backward of the last micro-batch" in told()[0]


def test_two_clips_of_the_same_gradients_are_told(told: Any) -> None:
    model, optimizer, clipper = made()
    for _ in range(4):
        backward(model)
        clipper.clip_()
        clipper.clip_()
        optimizer.step()
        optimizer.zero_grad()
    assert [text[: len(AGAIN)] for text in told()] == [AGAIN]


def test_so_are_forty_micro_batches(told: Any) -> None:
    model, optimizer, clipper = made()
    for step in range(120):
        backward(model)
        clipper.clip_()
        if step % 40 == 39:
            optimizer.step()
            optimizer.zero_grad()
    assert [text[: len(AGAIN)] for text in told()] == [AGAIN]


def test_a_clip_beside_an_attached_optimizer_is_told(told: Any) -> None:
    model, optimizer, clipper = made()
    clipper.attach(optimizer)
    for _ in range(4):
        backward(model)
        clipper.clip_()
        optimizer.step()
        optimizer.zero_grad()
    assert len(told()) == 1
    assert "The attached optimizer's step clips already: leave clip_() out" in told()[0]


class PastTheCount(torch.optim.SGD):
    """Writes to weights in a way that torch does not count, as some authors' optimizers do."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.data.sub_(param.grad.data, alpha=group["lr"])


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize(
    "kind", ["plain", "accumulate", "fused", "foreach", "lr 0", "past the count", "skipped", "scaler"]
)
def test_no_other_loop_is(told: Any, kind: str, set_to_none: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    options = {"fused": {"fused": True}, "foreach": {"foreach": True}}.get(kind, {})
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0 if kind == "lr 0" else 0.1, **options
    )
    if kind == "past the count":
        optimizer = PastTheCount(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu") if kind == "scaler" else None
    guard = dist_clip.SkipAbove(1e-9) if kind == "skipped" else None
    clipper = dist_clip.GradClipper(model, dist_clip.LogClip(), guard=guard, scaler=scaler)
    for step in range(8):
        for _ in range(3 if kind == "accumulate" else 1):
            loss = model(torch.ones(2, 3)).square().mean()
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            if not clipper.clip_().skip:
                optimizer.step()
        else:
            scaler.unscale_(optimizer)
            if step == 3:
                next(model.parameters()).grad.fill_(torch.inf)  # type: ignore[union-attr]
            clipper.clip_()
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad(set_to_none=set_to_none)
    assert told() == []


def test_one_step_that_the_user_leaves_out_is_none(told: Any) -> None:
    model, optimizer, clipper = made()
    for step in range(10):
        backward(model)
        clipper.clip_()
        if step != 4:
            optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert told() == []


def test_steps_that_a_guard_leaves_out_are_none(told: Any) -> None:
    model, optimizer, _ = made()
    clipper = dist_clip.GradClipper(model, dist_clip.LogClip(), guard=dist_clip.SkipAbove(1.0))
    skipped = []
    for step in range(12):
        for param in model.parameters():
            grad = torch.full_like(param, 10.0 if step % 2 else 0.01)
            param.grad = grad if param.grad is None else param.grad.add_(grad)
        skipped.append(bool(clipper.clip_().skip))
        if not skipped[-1]:
            optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert skipped == [False, True] * 6
    assert told() == []


def test_a_write_to_weights_is_not_taken_for_a_step(told: Any) -> None:
    """As where an average of the weights is swapped in, beside an optimizer whose steps are not counted."""
    model, _, clipper = made()
    optimizer = PastTheCount(model.parameters(), lr=0.1)
    for step in range(10):
        backward(model)
        clipper.clip_()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        if step == 2:
            with torch.no_grad():
                for param in model.parameters():
                    param.mul_(1.0)
    assert told() == []


def test_an_attached_clipper_clips_once_and_is_told_nothing(told: Any) -> None:
    model, optimizer, clipper = made()
    clipper.attach(optimizer)
    for step in range(12):
        backward(model)
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert clipper.steps == 6
    assert told() == []


def test_clips_before_backward_are_told(told: Any) -> None:
    model, optimizer, clipper = made()
    for step in range(9):
        optimizer.zero_grad()
        if step == 4:
            backward(model)
        clipper.clip_()
        backward(model)
        optimizer.step()
    assert [UNSEEN in text for text in told()] == [True]


def test_a_step_without_gradients_now_and_then_is_not(told: Any) -> None:
    model, optimizer, clipper = made()
    for step in range(9):
        if step % 3 == 2:
            backward(model)
        clipper.clip_()
        optimizer.step()
        optimizer.zero_grad()
    assert told() == []


# ---- states that were lost, or travel along ----------------------------------------------------------------------------


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def resumed(steps: int, *, carried: bool, attached_late: bool = False) -> tuple[list[Tensor], dist_clip.GradClipper]:
    """Train, save, resume in fresh objects, train on."""
    model, optimizer, clipper = made()
    clipper.attach(optimizer, carry_state=carried)
    train(model, optimizer, range(steps))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    model, optimizer, clipper = made()
    if attached_late:
        optimizer.load_state_dict(saved[1])
    clipper.attach(optimizer, carry_state=carried)
    model.load_state_dict(saved[0])
    if not attached_late:
        optimizer.load_state_dict(saved[1])
    train(model, optimizer, range(steps, 12))
    return [param.detach() for param in model.parameters()], clipper


@pytest.mark.parametrize("steps", [2, 8])
def test_a_state_that_the_optimizer_carries_resumes_bit_for_bit(told: Any, steps: int) -> None:
    model, optimizer, clipper = made()
    clipper.attach(optimizer)
    train(model, optimizer, range(12))
    got, again = resumed(steps, carried=True)
    assert again.steps == 12
    assert all(map(torch.equal, got, model.parameters()))
    assert told() == []


@pytest.mark.parametrize(("carried", "attached_late"), [(False, False), (True, True)])
def test_a_state_that_was_lost_is_told(told: Any, carried: bool, attached_late: bool) -> None:
    resumed(4, carried=carried, attached_late=attached_late)
    assert len(told()) == 1
    assert "the optimizer has taken 4 steps, and the clipper begins at step 0 with its warm-up" in told()[0]


def test_a_state_that_was_loaded_is_not(told: Any) -> None:
    model, optimizer, clipper = made()
    clipper.attach(optimizer)
    train(model, optimizer, range(4))
    state, moments = clipper.state_dict(), optimizer.state_dict()
    model, optimizer, clipper = made()
    optimizer.load_state_dict(moments)
    clipper.attach(optimizer)
    clipper.load_state_dict(state)
    train(model, optimizer, range(4, 8))
    assert told() == []


def test_steps_are_read_where_only_some_parameters_count_them() -> None:
    """As of Muon for matrices and AdamW for the rest, in one optimizer."""
    model, optimizer, _ = made()
    train(model, optimizer, range(4))
    del optimizer.state[next(model.parameters())]["step"]
    assert steps_taken(optimizer) == 4
    assert steps_taken(torch.optim.SGD(model.parameters())) == 0
    assert steps_taken(object()) == 0


def test_an_entry_that_is_missing_is_told(told: Any) -> None:
    _, optimizer, clipper = made()
    moments = optimizer.state_dict()
    handle = clipper.attach(optimizer, carry_state=True)
    assert "dist_clip" in optimizer.state_dict()
    optimizer.load_state_dict(moments)
    assert "the optimizer's state has no entry 'dist_clip'" in told()[0]
    handle.remove()
    assert "dist_clip" not in optimizer.state_dict()
    optimizer.load_state_dict(moments)
    assert len(told()) == 1


def test_torchs_checkpoint_functions_drop_the_entry_which_is_told(told: Any) -> None:
    model, optimizer, clipper = made()
    clipper.attach(optimizer, carry_state=True)
    train(model, optimizer, range(4))
    saved = get_optimizer_state_dict(model, optimizer)
    assert set(saved) == {"state", "param_groups"}
    model, optimizer, clipper = made()
    clipper.attach(optimizer, carry_state=True)
    set_optimizer_state_dict(model, optimizer, saved)
    assert [text for text in told() if "has no entry 'dist_clip'" in text]
    assert clipper.steps == 0


def test_of_several_optimizers_the_first_carries_it() -> None:
    model, _, clipper = made()
    first, second = (torch.optim.AdamW(part.parameters()) for part in model)
    clipper.attach(first, second, carry_state=True)
    assert "dist_clip" in first.state_dict()
    assert "dist_clip" not in second.state_dict()


def test_what_has_no_hooks_cannot_carry() -> None:
    class Plain:
        def __init__(self, params: Any) -> None:
            self.param_groups = [{"params": list(params)}]

        def step(self) -> None:
            pass

    model, _, clipper = made()
    plain = Plain(model.parameters())
    with pytest.raises(TypeError, match="carry_state=True needs torch's hooks of state dicts, which Plain has not"):
        clipper.attach(plain, carry_state=True)  # type: ignore[arg-type]
    assert "step" not in vars(plain)
    assert clipper.attachment is None


# ---- what frameworks do ------------------------------------------------------------------------------------------------


class Accelerates:
    """Passes a closure on by position, as Accelerate's wrapper does; the name of its module has it unwrapped."""

    __module__ = "accelerate.optimizer"

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)

    def step(self, closure: Any = None) -> None:
        self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


def test_a_checkpoint_functions_step_through_accelerates_wrapper_is_none() -> None:
    model, optimizer, clipper = made()
    wrapper = Accelerates(optimizer)
    clipper.attach(wrapper)  # type: ignore[arg-type]
    _init_optim_state(wrapper)  # type: ignore[arg-type]
    assert optimizer.state
    assert clipper.steps == 0
    optimizer.param_groups[0]["lr"] = 0.0
    for step in range(1, 4):
        backward(model)
        wrapper.step()
        wrapper.zero_grad()
        assert clipper.steps == step


def test_a_first_step_through_it_at_learning_rate_0_is_a_step() -> None:
    model, optimizer, clipper = made()
    wrapper = Accelerates(optimizer)
    clipper.attach(wrapper)  # type: ignore[arg-type]
    optimizer.param_groups[0]["lr"] = 0.0
    backward(model)
    wrapper.step()
    assert clipper.steps == 1


def test_fabrics_wrapper_is_not_in_names() -> None:
    class Fabric(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self._forward_module = module
            self._original_module = module

    model, _, _ = made()
    wrapped = Fabric(nn.parallel.DataParallel(model))
    for target in (wrapped, dict(wrapped.named_parameters())):
        clipper = dist_clip.GradClipper(target, dist_clip.LogClip())
        assert [name.removeprefix("module.") for name in clipper.layout.names] == [
            n for n, _ in model.named_parameters()
        ]


def test_lightnings_closure_is_told_of_its_callback() -> None:
    _, optimizer, clipper = made()
    clipper.attach(optimizer)

    def closure() -> None:
        pass

    with pytest.raises(RuntimeError, match=r"call clipper\.clip_\(\) at the end of the closure"):
        optimizer.step(closure)  # type: ignore[arg-type]
    closure.__module__ = "lightning.pytorch.plugins.precision.precision"
    with pytest.raises(RuntimeError, match=r"callbacks=\[dist_clip\.lightning\.ClipCallback\(policy\)\]"):
        optimizer.step(functools.partial(closure))
