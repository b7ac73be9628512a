"""Steps that frameworks take by themselves, with a closure and without one, can be left out whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_clip.optimizers import SkippableStep


class Restless(torch.optim.SGD):
    """Moves weights in each step, with gradients or without, as averages of weights do."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for param in self.param_groups[0]["params"]:
                param.mul_(0.5)
        return loss


def setup() -> tuple[nn.Parameter, Restless, SkippableStep]:
    weight = nn.Parameter(torch.ones(2))
    optimizer = Restless([weight], lr=0.1)
    return weight, optimizer, SkippableStep(optimizer)


def closure_of(weight: nn.Parameter, then: Callable[[], None]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        loss = weight.sum()
        weight.grad = None
        loss.backward()
        then()
        return loss.detach()

    return closure


@pytest.mark.parametrize("by_name", [False, True])
def test_a_step_is_left_out_from_inside_its_closure(by_name: bool) -> None:
    weight, optimizer, step = setup()

    def take(skip: bool) -> Tensor:
        closure = closure_of(weight, lambda: step.leave_out(skip))
        loss: Tensor = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
        return loss

    assert take(True) == 2, "the closure's result is returned"
    assert torch.equal(weight, torch.ones(2))
    assert weight.grad is not None
    take(False)
    assert torch.equal(weight, torch.full((2,), 0.45))


def test_a_step_without_a_closure_is_left_out_once() -> None:
    weight, optimizer, step = setup()
    weight.grad = torch.ones(2)
    step.leave_out(True)
    optimizer.step()
    assert torch.equal(weight, torch.ones(2))
    optimizer.step()
    assert torch.equal(weight, torch.full((2,), 0.45))
    step.remove()
    assert "step" not in vars(optimizer)


def test_an_error_in_the_closure_goes_through_and_leaves_nothing_behind() -> None:
    weight, optimizer, step = setup()

    def fail() -> None:
        step.leave_out(True)
        raise KeyError("of the user's")

    with pytest.raises(KeyError, match="of the user's"):
        optimizer.step(closure_of(weight, fail))
    optimizer.step(closure_of(weight, lambda: None))
    assert torch.equal(weight, torch.full((2,), 0.45))


def test_a_closure_that_is_evaluated_again_is_an_error() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.LBFGS([weight])
    step = SkippableStep(optimizer)
    with pytest.raises(RuntimeError, match="LBFGS evaluates its closure several times in a step"):
        optimizer.step(closure_of(weight, step.clips))
    sgd = torch.optim.SGD([weight], lr=0.1)
    step = SkippableStep(sgd)
    for _ in range(2):
        sgd.step(closure_of(weight, step.clips))
        step.clips()  # before a step that has no closure
        sgd.step()
