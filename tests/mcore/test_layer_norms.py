"""`--log-layer-grad-norms`: the norms of layers go to Megatron's own writers, which a stand-in for megatron.training has."""

from __future__ import annotations

import argparse
import math
import sys
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

import dist_clip
from tests.distributed.counting import CollectiveLog
from tests.harness import WorkerError, pool

from .setups import Config, build

EVERY, STEPS = 3, 7


class Writers(ModuleType):
    """megatron.training.global_vars: only the last rank has writers; its loop counts iterations from 10."""

    def __init__(self) -> None:
        super().__init__("megatron.training.global_vars")
        self._GLOBAL_ARGS = argparse.Namespace(curr_iteration=9)
        self.scalars: list[tuple[str, float, int]] = []
        self.rows: list[dict[str, float]] = []
        here = dist.get_rank() == dist.get_world_size() - 1
        self.get_tensorboard_writer = lambda: self if here else None
        self.get_wandb_writer = lambda: self if here else None

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, value, step))

    def log(self, row: dict[str, float], commit: bool) -> None:
        assert not commit
        self.rows.append(row)


def logged(config: Config) -> dict[str, Any]:
    setup = build(config)
    flags = ["--grad-clip-mode", "adagc", "--adagc-warmup-steps", "2", "--log-layer-grad-norms", str(EVERY)]
    args = dist_clip.megatron.add_clip_args(argparse.ArgumentParser(), flags).parse_args(flags)
    out: dict[str, Any] = {"norms": {}, "collectives": []}
    with mock.patch.dict(sys.modules, {"megatron.training.global_vars": Writers()}):
        writers = sys.modules["megatron.training.global_vars"]
        clipper = dist_clip.megatron.attach_from_args(setup.optimizer, args, model=setup.chunks)
        for step in range(1, STEPS + 1):
            setup.backward(step)
            with CollectiveLog() as log:
                setup.optimizer.prepare_grads()
            out["collectives"].append(len(log.entries))
            report = clipper.last_report
            out["norms"][step + 9] = dict(zip(report.names, report.tensor_norms.tolist(), strict=True))
            writers._GLOBAL_ARGS.curr_iteration += 1
        return {**out, "scalars": writers.scalars, "rows": writers.rows}


@pytest.mark.parametrize(
    ("world", "config"), [(2, Config(pp=2, tied=True)), (2, Config(fsdp="optim_grads_params"))], ids=str
)
def test_layers_norms_in_megatrons_log(world: int, config: Config) -> None:
    *others, last = pool(world, "megatron").run(logged, config)
    assert all(not rank["scalars"] and not rank["rows"] for rank in others)
    expected = []
    for iteration in (12, 15):
        norms = {name: norm for rank in (*others, last) for name, norm in rank["norms"][iteration].items()}
        layers: dict[str, list[float]] = {}
        for name, norm in norms.items():
            layer = ".".join(name.split(".")[:3]) if name.startswith("decoder.layers.") else name
            layers.setdefault(f"grad-norm/{layer}", []).append(norm)
        expected.append({tag: math.hypot(*each) for tag, each in layers.items()})
        found = {tag: value for tag, value, step in last["scalars"] if step == iteration}
        assert found == pytest.approx(expected[-1], rel=1e-6)
        assert {"grad-norm/decoder.layers.0", "grad-norm/decoder.layers.1"} < found.keys()
    assert {step for *_, step in last["scalars"]} == {12, 15}
    assert last["rows"] == [pytest.approx(row, rel=1e-6) for row in expected]
    # At an iteration that is logged, and only there: the sum of the shared numbers, and the stages' gather. (The fourth
    # clip compares replicas.)
    usual, more = last["collectives"][4], 1 + (config.pp > 1)
    assert [last["collectives"][step - 10] for step in (12, 14, 15, 16)] == [usual + more, usual, usual + more, usual]


def refused(every: int, training: bool) -> None:
    setup = build(Config())
    clipper = dist_clip.megatron.attach(setup.optimizer, dist_clip.GlobalNorm(), model=setup.chunks)
    modules = {"megatron.training.global_vars": Writers()} if training else {}
    with mock.patch.dict(sys.modules, modules):
        dist_clip.megatron.log_layer_grad_norms(clipper, every)


@pytest.mark.parametrize(("every", "training", "words"), [(0, True, ">= 1, got 0"), (5, False, "has not imported")])
def test_bad_input(every: int, training: bool, words: str) -> None:
    with pytest.raises(WorkerError, match=words):
        pool(1, "megatron").run(refused, every, training)


def test_the_flag_wants_a_mode() -> None:
    parser = dist_clip.megatron.add_clip_args(argparse.ArgumentParser(), [])
    with pytest.raises(ValueError, match="--log-layer-grad-norms without --grad-clip-mode"):
        dist_clip.megatron.policy_from_args(parser.parse_args(["--log-layer-grad-norms", "5"]), 1.0)
