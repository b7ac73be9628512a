"""Every layout, every policy, at 2 and 4 gloo processes, against the single-process reference.

14 optimizer steps: a warm-up of 5, then loss spikes, one alone and three in a row. A layout's policies clip the same
gradients, half of them in each of its two runs (all in both with --every-policy). The optimizer takes the clipped gradients
of one policy, another one from run to run, and so the whole path is compared too. training.py says what is compared and why
the tolerances are what they are.

Of a layout's two runs one is AdamW in float32, as users train. The other is SGD in float64, where a single process's path
can be followed to 1e-6, which rounding to float32 would hide. At which world size a layout has which turns from layout to
layout, as the halves do. A layout with one world size has both runs at that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from tests.harness import pool

from . import training
from .layouts import LAYOUTS

# adagc-median is as AdaGC is recommended. Others of a policy's options change only the maths: they need fewer layouts.
EVERYWHERE = (*training.MAIN_POLICIES, "adagc-median")
OPTIONS = ("adagc-mean", "adagc-last", "zclip-percentile")
WITH_OPTIONS = ("fsdp-uneven", "tp-fsdp", "pp")


@dataclass(frozen=True)
class Case:
    layout: str
    world: int
    optimizer: str
    number: int  # which half of the policies: 0 or 1

    def policies(self, every: bool = False) -> tuple[str, ...]:
        some = EVERYWHERE if every else EVERYWHERE[self.number :: 2]
        if self.layout in WITH_OPTIONS and self.optimizer == "sgd":
            some = (*some, *OPTIONS, *training.ON_FEW_LAYOUTS)
        return training.in_turn(some, CASES.index(self))

    def __str__(self) -> str:
        return f"{self.layout}-{self.world}-{self.optimizer}"


def cases() -> Iterator[Case]:
    for index, name in enumerate(name for name, layout in LAYOUTS.items() if layout.worlds):
        layout = LAYOUTS[name]
        worlds = layout.worlds if len(layout.worlds) == 2 else layout.worlds * 2
        for turn, world in enumerate(worlds):
            # Low precision or missing gradients elsewhere: there a single process has no path to compare with.
            optimizer = ("adamw", "sgd")[(index // 2 + turn) % 2] if layout.trajectory else "adamw"
            yield Case(name, world, optimizer, (index + turn) % 2)


CASES = list(cases())


FAST = {("ddp", 2), ("fsdp", 2), ("tp-fsdp", 4), ("pp", 2)}


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=str(c), marks=[pytest.mark.fast] * ((c.layout, c.world) in FAST)) for c in CASES],
)
@pytest.mark.report(
    "bluorion-com/ZClip#2",
    situation="ZClip follows the norm of one rank's shards",
    right="it follows the global norm: the same state on all ranks",
)
def test_training(case: Case, pytestconfig: pytest.Config) -> None:
    policies = case.policies(pytestconfig.getoption("every_policy"))
    dtype = torch.float32 if case.optimizer == "adamw" else torch.float64
    run(case.layout, case.world, policies, case.optimizer, dtype)


def test_every_policy_has_its_turn() -> None:
    for name, layout in LAYOUTS.items():
        mine = [case for case in CASES if case.layout == name]
        assert {case.world for case in mine} == set(layout.worlds), name
        assert {*EVERYWHERE} <= {policy for case in mine for policy in case.policies()} or not mine, name
        assert {case.optimizer for case in mine} == {"adamw", "sgd"} or not layout.trajectory or not mine, name


def test_no_policy_is_forgotten() -> None:
    missing = training.forgotten()
    assert not missing, (
        f"no test of a layout runs {', '.join(missing)}: write the rule once more in tests/reference.py, and add an entry "
        "to POLICIES and MAIN_POLICIES (or ON_FEW_LAYOUTS) in tests/distributed/training.py"
    )


def test_a_forgotten_policy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "MAIN_POLICIES", ("global_norm", "adagc", "zclip"))
    assert "adagc-shard" in training.forgotten()
    assert "logclip" in training.forgotten()
    assert "adagc" not in training.forgotten()


def test_three_mesh_dimensions() -> None:
    """HSDP with tensor parallelism inside, uneven shards (_StridedShard): eight ranks."""
    run("hsdp-tp", 8, ("zclip", "adagc"), "adamw", torch.float32)


def run(layout: str, world: int, policies: tuple[str, ...], optimizer: str, dtype: torch.dtype) -> None:
    ranks = pool(world).run(training.train, layout, policies, optimizer, dtype)
    training.check_policies(ranks, layout, policies, optimizer, dtype)
