"""`detect_desync` under Megatron: no false alarm, and one flipped bit of the state is named on every rank that reduces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import dist_clip
from tests.harness import pool

from .setups import Config, build

WARMUP = 2
FAULTY = 1


def train(config: Config, flip: bool) -> tuple[int, str, str] | None:
    """The step at which the run stopped, the tensor whose state was changed, and the error."""
    setup = build(config)
    clipper = dist_clip.megatron.attach(
        setup.optimizer, dist_clip.AdaGC(warmup_steps=WARMUP), model=setup.chunks, detect_desync=True
    )
    for step in range(1, WARMUP + 4):
        if flip and step == WARMUP + 2 and dist.get_rank() == FAULTY:
            clipper.memory.groups[0].state["gamma"].view(torch.int32)[3] ^= 1
        setup.backward(step)
        try:
            setup.optimizer.step()
        except dist_clip.DesyncError as error:
            return step, clipper.layout.names[3], str(error)
    clipper.check_in_sync()
    return None


CONFIGS: dict[str, tuple[int, Config]] = {
    "tp2-sp": (2, Config(tp=2, sequence_parallel=True)),
    "zero": (2, Config(zero=True)),
    "tp2-sp-zero-tied": (4, Config(tp=2, sequence_parallel=True, zero=True, tied=True)),
    "tp2-ep2-etp1-zero": (4, Config(tp=2, ep=2, etp=1, experts=4, sequence_parallel=True, zero=True)),
    "layer-wise": (2, Config(layer_wise=True)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_detect_desync(name: str) -> None:
    world, config = CONFIGS[name]
    assert pool(world, "megatron").run(train, config, False) == [None] * world
    stopped: list[Any] = pool(world, "megatron").run(train, config, True)
    assert len(set(stopped)) == 1
    step, name, error = stopped[0]
    assert step == WARMUP + 2
    assert f"the first state that differs is that of {name!r}" in error
    assert f"rank {FAULTY}" in error
