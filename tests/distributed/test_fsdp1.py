"""FSDP1: every sharding strategy, with the original parameters or flat ones, against the single-process reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel

import dist_clip
from tests.harness import WorkerError, pool

from . import training
from .layouts import LAYOUTS, Config, fsdp1
from .model import make_net

FSDP1 = [name for name in LAYOUTS if name.startswith("fsdp1")]


POLICY_NAMES = tuple(name for name in training.MAIN_POLICIES if not name.endswith("-global"))


@pytest.mark.parametrize("layout", FSDP1)
@pytest.mark.report(
    "Lightning-AI/pytorch-lightning#19235",
    situation="no clipping by norm under FSDP1",
    right="as in one process, for every sharding strategy",
)
def test_clipping(layout: str) -> None:
    """As in test_layouts.py: every policy on the same gradients, the optimizer follows one of them in turn."""
    number = FSDP1.index(layout)
    policies = training.in_turn(POLICY_NAMES, number)
    # By turns as users train, and in float64, where a single process's whole path can be followed.
    optimizer, dtype = (("adamw", torch.float32), ("sgd", torch.float64))[number % 2]
    ranks = pool(2 if "no-shard" in layout else 4).run(training.train, layout, policies, optimizer, dtype)
    training.check_policies(ranks, layout, policies, optimizer, dtype)


def real_loop(original: bool) -> dict[str, Any]:
    """A training loop as users write it: their optimizer on the model's parameters, attached, excluded names, explain()."""
    setup = fsdp1(make_net(Config()), Config(), original=original)
    model = setup.modules[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(1e-3), exclude=["*.bias"])
    clipper.attach(optimizer)
    setup.backward(1)
    optimizer.step()
    return {
        "names": clipper.layout.names,
        "explain": clipper.explain(),
        "clipped": float(clipper.last_report.clipped_global_norm),
        "grads": sum(tensor.grad() is not None for tensor in clipper.layout),
    }


@pytest.mark.parametrize("original", [True, False])
def test_names_are_those_of_the_model(original: bool) -> None:
    expected = {name for name, _ in make_net(Config()).named_parameters() if not name.endswith(".bias")}
    ranks = pool(2).run(real_loop, original)
    for rank in ranks:
        assert set(rank["names"]) == expected
        assert rank["clipped"] == pytest.approx(1e-3, rel=1e-2)
        assert "FULL_SHARD (FSDP1) over 2 ranks, from 0 of" in rank["explain"]
    # Each tensor is on one rank or on both.
    assert sum(rank["grads"] for rank in ranks) >= len(expected)


def accumulated(original: bool) -> str:
    """Gradients of no_sync are whole on every rank, and not reduced."""
    setup = fsdp1(make_net(Config()), Config(), original=original)
    model: Any = setup.modules[0]
    clipper = dist_clip.GradClipper(model, dist_clip.AdaGC())
    with model.no_sync():
        setup.backward(1)
    with pytest.raises(RuntimeError, match="was not reduced yet") as caught:
        clipper.clip_()
    setup.backward(1)
    assert clipper.clip_().num_grads > 0
    return str(caught.value)


@pytest.mark.parametrize("original", [True, False])
def test_gradients_that_were_not_reduced(original: bool) -> None:
    for rank, text in enumerate(pool(2).run(accumulated, original)):
        assert f"rank {rank}" in text


def parameters_alone(original: bool, how: str) -> None:
    model = FullyShardedDataParallel(make_net(Config()), device_id=torch.device("cpu"), use_orig_params=original)
    if how == "functional":
        dist_clip.clip_grad_norm_(model.parameters(), 1.0)
    target: Any = torch.optim.SGD(model.parameters(), lr=0.1) if how == "optimizer" else list(model.named_parameters())
    dist_clip.GradClipper(target, dist_clip.AdaGC())


@pytest.mark.parametrize("how", ["functional", "optimizer", "pairs"])
@pytest.mark.parametrize("original", [True, False])
def test_parameters_alone_are_refused(original: bool, how: str) -> None:
    """A shard does not say what it is a shard of: the norm would silently be wrong."""
    with pytest.raises(WorkerError) as caught:
        pool(2).run(parameters_alone, original, how)
    assert not caught.value.timed_out
    assert str(caught.value).count("pass the wrapped module") >= 2


def saved_state() -> dict[str, Any]:
    setup = fsdp1(make_net(Config()), Config(), original=dist.get_world_size() == 2)
    clipper = dist_clip.GradClipper(setup.modules[0], dist_clip.AdaGC(warmup_steps=2))
    for step in range(1, 5):
        setup.modules[0].zero_grad()
        setup.backward(step)
        clipper.clip_()
    return clipper.state_dict()


def test_the_state_is_free_of_the_layout() -> None:
    """Flat parameters of four ranks and original ones of two remember the same, under the same names."""
    two, four = pool(2).run(saved_state)[0], pool(4).run(saved_state)[0]
    assert two["names"] == four["names"]
    for name, entry in two["tensors"].items():
        torch.testing.assert_close(four["tensors"][name]["gamma"], entry["gamma"], rtol=1e-4, atol=0, msg=name)
