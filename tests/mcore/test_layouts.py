"""Every parallel configuration and optimizer of Megatron against a single process; 15 optimizer steps, warm-up of 5."""

from __future__ import annotations

import pytest

from . import training
from .setups import Config, megatron_version

CONFIGS: dict[str, tuple[int, Config]] = {
    "single": (1, Config()),
    "tp2": (2, Config(tp=2)),
    "tp2-sp": (2, Config(tp=2, sequence_parallel=True)),
    "pp2": (2, Config(pp=2)),
    "pp2-tied": (2, Config(pp=2, tied=True)),
    "pp2-interleaved-tied": (2, Config(pp=2, vpp=2, tied=True, layers=4)),
    "tp2-pp2-tied-sp": (4, Config(tp=2, pp=2, tied=True, sequence_parallel=True)),
    "dp2": (2, Config()),
    "zero": (2, Config(zero=True)),
    "tp2-sp-zero-tied": (4, Config(tp=2, sequence_parallel=True, zero=True, tied=True)),
    "pp2-zero-tied": (4, Config(pp=2, zero=True, tied=True)),
    "zero-instances": (4, Config(zero=True, instances=2)),
    "cp2": (2, Config(cp=2)),
    "ep2": (2, Config(ep=2, experts=4)),
    "ep2-zero": (4, Config(ep=2, experts=4, zero=True)),
    "tp2-ep2-etp1": (4, Config(tp=2, ep=2, etp=1, experts=4, sequence_parallel=True)),
    "tp2-ep2-etp2": (4, Config(tp=2, ep=2, etp=2, experts=4, sequence_parallel=True)),
    "tp2-ep2-etp1-zero": (4, Config(tp=2, ep=2, etp=1, experts=4, sequence_parallel=True, zero=True)),
    "pp2-ep2-zero": (4, Config(pp=2, ep=2, experts=4, zero=True)),
    "layer-wise": (2, Config(layer_wise=True)),
    "bf16": (2, Config(bf16=True)),
    "tp2-pp2-tied-bf16": (4, Config(tp=2, pp=2, tied=True, bf16=True)),
    "zero-overlap-bf16": (2, Config(zero=True, overlap=True, bf16=True)),
    "layer-wise-bf16": (2, Config(layer_wise=True, bf16=True)),
}
# Older versions leave the gradients of such experts on each rank as they are; attach refuses them there.
NEWER: dict[str, tuple[int, Config]] = {
    "tp2-etp1": (2, Config(tp=2, etp=1, experts=4, sequence_parallel=True)),
    "tp2-etp1-zero": (4, Config(tp=2, etp=1, experts=4, sequence_parallel=True, zero=True)),
    "etp2": (2, Config(etp=2, experts=4)),
    "tp2-etp4": (4, Config(tp=2, etp=4, experts=4, sequence_parallel=True)),
}


# Where tensors are reduced differently: whole, split by TP, by ZeRO-1, by both with experts, across stages. There all
# policies clip the same gradients, and the optimizer follows another one in each configuration.
SOME = ["tp2-sp", "zero", "tp2-sp-zero-tied", "pp2-zero-tied", "tp2-ep2-etp1-zero"]
OTHERS = ["global", "adagc-shard", "adagc-global", "logclip", "zclip"]


def policies_of(name: str) -> tuple[str, ...]:
    if name not in SOME:
        return ("adagc-median",)
    turn = SOME.index(name)
    return ("adagc-median", *OTHERS[turn + 1 :], *OTHERS[: turn + 1])


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.fast) if n == "tp2-sp" else n for n in CONFIGS])
@pytest.mark.report("NVIDIA/Megatron-LM#5916")
def test_training(name: str) -> None:
    world, config = CONFIGS[name]
    policies = policies_of(name)
    training.check(config, training.run(config, world, policies), policies)


@pytest.mark.skipif(megatron_version() < (0, 19), reason="before megatron-core 0.19 the gradients themselves are wrong")
@pytest.mark.parametrize("name", NEWER)
def test_experts_whose_tensor_parallelism_differs_without_expert_parallelism(name: str) -> None:
    world, config = NEWER[name]
    policies = policies_of(name)
    training.check(config, training.run(config, world, policies), policies)
