"""Every layout, every policy, at 2 and 4 gloo processes, against the single-process reference.

30 optimizer steps with loss spikes after a warm-up of 5. A layout's policies clip the same gradients (half of them at each
of its world sizes, all at both with --every-policy); whose clipped gradients the optimizer takes, so that the whole path is
compared too, goes in turn from layout to layout. What is compared and why the tolerances are what they are is said in
training.py. AdamW runs are in float32, as users train; SGD runs in float64,
where the whole path of a single process can be followed to 1e-6, which float32 rounding would hide.
"""

from __future__ import annotations

import pytest
import torch

from tests.harness import pool

from . import training
from .layouts import CASES, LAYOUTS

IDS = [f"{name}-{world}" for name, world in CASES]
# Low precision or missing gradients elsewhere: there a single process has nothing to compare with.
EXACT = [(name, world) for name, world in CASES if LAYOUTS[name].trajectory]


@pytest.mark.parametrize(("layout", "world"), EXACT, ids=[f"{name}-{world}" for name, world in EXACT])
def test_layout_itself(layout: str, world: int) -> None:
    """Gradients of the layout are those of one process on the whole batch: the tests below stand on it."""
    dtype = LAYOUTS[layout].dtype or torch.float64
    ranks = pool(world).run(training.train, layout, (), "sgd", dtype, steps=4)
    training.check_gradients(training.Run(ranks, LAYOUTS[layout]), layout, dtype)


@pytest.mark.parametrize(("layout", "world"), CASES, ids=IDS)
def test_adamw(layout: str, world: int, pytestconfig: pytest.Config) -> None:
    policies = training.MAIN_POLICIES if pytestconfig.getoption("every_policy") else policies_of(layout, world)
    run(layout, world, training.in_turn(policies, CASES.index((layout, world))), "adamw", torch.float32)


def policies_of(layout: str, world: int) -> tuple[str, ...]:
    """Every policy once for each layout: half of them at each of two world sizes, another half from layout to layout."""
    worlds = LAYOUTS[layout].worlds
    if len(worlds) == 1:
        return training.MAIN_POLICIES
    turn = list(LAYOUTS).index(layout) + worlds.index(world)
    return training.MAIN_POLICIES[turn % len(worlds) :: len(worlds)]


def test_every_policy_has_its_turn() -> None:
    for name in {name for name, _ in CASES}:
        layout = LAYOUTS[name]
        turns = [policy for world in layout.worlds for policy in policies_of(name, world)]
        assert sorted(turns) == sorted(training.MAIN_POLICIES), name


@pytest.mark.parametrize("layout", sorted({name for name, world in EXACT if world == 4}))
def test_sgd(layout: str) -> None:
    run(layout, 4, ("adagc-median",), "sgd", torch.float64)


@pytest.mark.parametrize("layout", ["fsdp-uneven", "tp-fsdp", "pp"])
def test_other_options(layout: str) -> None:
    """Choices that only change the pure maths need fewer layouts."""
    run(layout, 4, ("adagc-mean", "adagc-last", "zclip-percentile"), "sgd", torch.float64)


def test_three_mesh_dimensions() -> None:
    """HSDP with tensor parallelism inside, uneven shards (_StridedShard): eight ranks."""
    run("hsdp-tp", 8, ("zclip", "adagc"), "adamw", torch.float32)


def run(layout: str, world: int, policies: tuple[str, ...], optimizer: str, dtype: torch.dtype) -> None:
    ranks = pool(world).run(training.train, layout, policies, optimizer, dtype)
    training.check_policies(ranks, layout, policies, optimizer, dtype)
