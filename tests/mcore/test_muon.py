"""Megatron's own Muon against a single process: norms, scales, state and parameters after 20 steps.

The ids say what Muon was made of: "real", the package from which Megatron takes it, or "stand-in" (`emerging`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from . import emerging, muon, training
from .setups import Config, Setup, megatron_version

STEPS = 20
DUPLICATED = (("muon_tp_mode", "duplicated"),)
DISTRIBUTED = (("muon_tp_mode", "distributed"),)
WITH_ZERO = "layer-wise + ZeRO-1"


@dataclass(frozen=True)
class Case:
    """`select` makes the overrides that leave Muon's matrices alone; None: the policies clip all tensors."""

    world: int
    config: Config
    policies: tuple[str, ...] = ("adagc-rest",)
    select: Callable[[Setup], Any] | None = muon.by_function


EVERYTHING: dict[str, Any] = {"policies": ("adagc-median",), "select": None}
MOE = {"experts": 4, "sequence_parallel": True}
CASES: dict[str, Case] = {
    "plain-tp2-sp-distributed": Case(
        2, Config(muon="plain", tp=2, sequence_parallel=True, options=DISTRIBUTED), **EVERYTHING
    ),
    "plain-tp2-pp2-tied": Case(4, Config(muon="plain", tp=2, pp=2, tied=True), ("zclip-rest",), muon.by_optimizer),
    "layer-wise-bf16": Case(2, Config(muon="layer-wise", bf16=True), ("global-rest", "adagc-rest"), muon.by_groups),
    "layer-wise-tp2-ep2-etp1-bf16": Case(
        4, Config(muon="layer-wise", tp=2, ep=2, etp=1, bf16=True, **MOE), select=muon.by_optimizer
    ),
}
OLDER: dict[str, Case] = {
    "layer-wise": Case(2, Config(muon="layer-wise"), ("global-rest", "zclip-rest", "adagc-rest"), muon.by_optimizer),
}
"""Newer versions of Megatron have their layer-wise optimizer in bf16 alone."""
FURTHER: dict[str, Case] = {
    "plain": Case(2, Config(muon="plain")),
    "plain-bf16": Case(2, Config(muon="plain", bf16=True), **EVERYTHING),
    "plain-tp2-duplicated": Case(2, Config(muon="plain", tp=2, options=DUPLICATED), **EVERYTHING),
    "plain-tp2-blockwise": Case(2, Config(muon="plain", tp=2, sequence_parallel=True), **EVERYTHING),
    "plain-ep2": Case(4, Config(muon="plain", ep=2, experts=4), select=muon.by_optimizer),
    "plain-pp2-interleaved-tied": Case(2, Config(muon="plain", pp=2, vpp=2, tied=True, layers=4)),
    "layer-wise-bf16-all": Case(2, Config(muon="layer-wise", bf16=True), **EVERYTHING),
    "layer-wise-pp2-ep2-bf16": Case(4, Config(muon="layer-wise", pp=2, ep=2, experts=4, bf16=True)),
    "layer-wise-tp2-sp-distributed-bf16": Case(
        4, Config(muon="layer-wise", tp=2, sequence_parallel=True, bf16=True, options=DISTRIBUTED)
    ),
    "layer-wise-cp2-bf16": Case(4, Config(muon="layer-wise", cp=2, bf16=True)),
    "layer-wise-tp4-ep2-etp1-bf16": Case(4, Config(muon="layer-wise", tp=4, ep=2, etp=1, bf16=True, **MOE)),
    "layer-wise-pp2-interleaved-tied-bf16": Case(
        4, Config(muon="layer-wise", pp=2, vpp=2, tied=True, layers=4, bf16=True), ("zclip-rest",)
    ),
}
NEWER: dict[str, Case] = {
    "with-zero-bf16": Case(2, Config(muon=WITH_ZERO, bf16=True), ("zclip-rest", "adagc-rest"), muon.by_optimizer),
    "with-zero-bf16-all": Case(2, Config(muon=WITH_ZERO, bf16=True), **EVERYTHING),
    "with-zero-overlap-bf16": Case(2, Config(muon=WITH_ZERO, bf16=True, overlap=True), select=muon.by_groups),
    "with-zero-tp2-sp-duplicated-bf16": Case(
        4, Config(muon=WITH_ZERO, tp=2, sequence_parallel=True, bf16=True, options=DUPLICATED), select=muon.by_groups
    ),
    "with-zero-pp2-tied-bf16": Case(4, Config(muon=WITH_ZERO, pp=2, tied=True, bf16=True)),
    "with-zero-ep2-bf16": Case(4, Config(muon=WITH_ZERO, ep=2, experts=4, bf16=True)),
}
needs_0_19 = pytest.mark.skipif(
    megatron_version() < (0, 19), reason="run on megatron-core 0.19 (scripts/test_megatron_latest.sh)"
)
HERE = {**CASES, **({} if megatron_version() >= (0, 18) else OLDER)}
MADE_OF = emerging.kind() if megatron_version() else ""


def named(cases: dict[str, Case]) -> list[Any]:
    return [pytest.param(case, id=f"{name}-{MADE_OF}") for name, case in cases.items()]


def check(case: Case) -> None:
    ranks = training.run(case.config, case.world, case.policies, steps=STEPS, select=case.select)
    training.check(case.config, ranks, case.policies)


@pytest.mark.parametrize("case", named(HERE))
def test_training(case: Case) -> None:
    check(case)


@needs_0_19
@pytest.mark.parametrize("case", named({**FURTHER, **NEWER}))
def test_training_on_0_19(case: Case) -> None:
    check(case)
