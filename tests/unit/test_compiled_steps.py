"""Compiled training steps: a clip is no part of what torch.compile traces, and clips as it does without."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import dist_clip

MAX_NORM = 0.1


class Graphs:
    """A backend that runs what was traced as it is, and keeps the names of its operators."""

    def __init__(self) -> None:
        self.operators: list[set[str]] = []

    def __call__(self, module: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.operators.append({str(node.target) for node in module.graph.nodes})
        return module.forward


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def net() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def attached(graphs: Graphs) -> tuple[nn.Module, Callable[[], Any]]:
    model, optimizer = net()
    dist_clip.GradClipper(model, dist_clip.GlobalNorm(MAX_NORM)).attach(optimizer)
    return model, torch.compile(optimizer.step, backend=graphs)


def attached_to_a_compiled_step(graphs: Graphs) -> tuple[nn.Module, Callable[[], Any]]:
    model, optimizer = net()
    optimizer.step = torch.compile(optimizer.step, backend=graphs)  # type: ignore[method-assign]
    dist_clip.GradClipper(model, dist_clip.GlobalNorm(MAX_NORM)).attach(optimizer)
    return model, optimizer.step


def by_hand(graphs: Graphs) -> tuple[nn.Module, Callable[[], Any]]:
    model, optimizer = net()
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(MAX_NORM))

    def step() -> None:
        clipper.clip_()
        optimizer.step()

    return model, torch.compile(step, backend=graphs)


def by_function(graphs: Graphs) -> tuple[nn.Module, Callable[[], Any]]:
    model, optimizer = net()
    params = list(model.parameters())

    def step() -> None:
        dist_clip.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()

    return model, torch.compile(step, backend=graphs)


@pytest.mark.parametrize("make", [attached, attached_to_a_compiled_step, by_hand, by_function])
def test_a_clip_is_not_traced(make: Callable[[Graphs], tuple[nn.Module, Callable[[], Any]]]) -> None:
    """Each step is clipped once, as torch does; only the optimizer is traced, in as many graphs as without a clip."""
    graphs, alone = Graphs(), Graphs()
    model, step = make(graphs)
    expected, optimizer = net()
    unclipped, other = net()
    compiled = torch.compile(other.step, backend=alone)
    x = torch.linspace(-1, 1, 12).view(3, 4)
    for _ in range(4):
        for each in (model, expected, unclipped):
            each.zero_grad()
            each(x).square().sum().backward()
        step()
        nn.utils.clip_grad_norm_(expected.parameters(), MAX_NORM)
        optimizer.step()
        compiled()
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert graphs.operators, "the optimizer is compiled"
    assert len(graphs.operators) <= len(alone.operators)
    assert not any("norm" in operator for graph in graphs.operators for operator in graph)


def test_importing_and_constructing_do_not_import_the_compiler() -> None:
    code = """
import sys, torch, dist_clip
dist_clip.GradClipper(torch.nn.Linear(2, 2), dist_clip.LogClip())
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
