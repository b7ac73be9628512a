"""Megatron's own Muon against a single process."""

from __future__ import annotations

import pytest

from . import emerging, muon, training
from .setups import Config, megatron_version

STEPS = 20
CONFIGS = {
    "dp2": (2, Config(muon="plain")),
    "dp2-lw": (2, Config(muon="layer-wise")),
    "tp2-block": (2, Config(muon="plain", tp=2, sequence_parallel=True)),
    "tp2-dup": (2, Config(muon="plain", tp=2, options=(("muon_tp_mode","duplicated"),))),
    "tp2-dist": (2, Config(muon="plain", tp=2, options=(("muon_tp_mode","distributed"),))),
    "pp2": (2, Config(muon="plain", pp=2, tied=True)),
    "ep2": (2, Config(muon="plain", ep=2, experts=4)),
    "dp2-bf16": (2, Config(muon="plain", bf16=True)),
    "dp2-lw-bf16": (2, Config(muon="layer-wise", bf16=True)),
    "dp2-lwz-bf16": (2, Config(muon="layer-wise + ZeRO-1", bf16=True)),
    "dp2-lwz": (2, Config(muon="layer-wise + ZeRO-1")),
    "tp2-dist-lwz-bf16": (4, Config(muon="layer-wise + ZeRO-1", tp=2, sequence_parallel=True, bf16=True, options=(("muon_tp_mode","distributed"),))),
    "pp2-lw-ep2-bf16": (4, Config(muon="layer-wise", pp=2, ep=2, experts=4, bf16=True)),
    "tp2-ep2-etp1-lw-bf16": (4, Config(muon="layer-wise", tp=2, ep=2, etp=1, experts=4, sequence_parallel=True, bf16=True)),
    "tp4-ep2-etp1-lw-bf16": (4, Config(muon="layer-wise", tp=4, ep=2, etp=1, experts=4, sequence_parallel=True, bf16=True)),
    "cp2-lw-bf16": (2, Config(muon="layer-wise", cp=2, bf16=True)),
}

@pytest.mark.parametrize("name", CONFIGS)
def test_training(name: str) -> None:
    world, config = CONFIGS[name]
    policies = ("adagc-median",)
    training.check(config, training.run(config, world, policies, steps=STEPS), policies)
