"""`verify()` at a Megatron optimizer's first step: right for every kind of optimizer; else an error before the step."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import dist_clip
from dist_clip.kernels import TORCH
from tests.harness import pool

from .setups import Config, build
from .test_layouts import CONFIGS

KINDS = [
    *("tp2-sp", "pp2-interleaved-tied", "tp2-sp-zero-tied", "zero-instances", "cp2", "tp2-ep2-etp1-zero"),
    *("pp2-ep2-zero", "layer-wise", "tp2-pp2-tied-bf16", "zero-overlap-bf16", "layer-wise-bf16"),
]


def verified(config: Config) -> dist_clip.VerifyReport:
    """The report of the first of two steps; the second one verifies nothing."""
    setup = build(config)
    clipper = dist_clip.megatron.attach(setup.optimizer, dist_clip.AdaGC(), model=setup.chunks)
    reports: list[dist_clip.VerifyReport] = []
    original = clipper.verify

    def recorded() -> dist_clip.VerifyReport:
        reports.append(original())
        return reports[-1]

    with mock.patch.object(clipper, "verify", recorded), mock.patch("dist_clip.verify.gather.CHUNK", 150):
        clipper.attachment.verify_next()
        for step in (1, 2):
            setup.backward(step)
            assert setup.optimizer.step()[0]
    (report,) = reports
    assert clipper.steps == 2
    return report


@functools.cache
def single_process(config: Config) -> dict[str, float]:
    (report,) = pool(1, "megatron").run(verified, config)
    return {row.name: row.measured for row in report.tensors}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_optimizer_is_right(name: str) -> None:
    world, config = CONFIGS[name]
    reports = pool(world, "megatron").run(verified, config)
    report = reports[0]
    assert all(repr(other) == repr(report) for other in reports)
    assert report.ok, str(report)
    expected = single_process(config.single)
    assert {row.name for row in report.tensors} == expected.keys()
    for row in report.tensors:
        tolerance = 0.1 if config.bf16 else 1e-4
        assert row.measured == pytest.approx(expected[row.name], rel=tolerance, abs=1e-6), row.name
    if "tied" in name and config.pp > 1:
        row = next(row for row in report.tensors if row.name == "embedding.word_embeddings.weight")
        assert row.num_copies >= 2


def off_by_a_thousandth(config: Config, name: str) -> tuple[str, bool, int, bool]:
    """The last rank that holds a piece measures its norm 0.1 % too large, until it is mended."""
    setup = build(config)
    wrong: list[int] = []
    message = ""

    def power_sums(*args: Any) -> Tensor:
        sums = TORCH.power_sums(*args)
        sums[wrong] *= 1.001**2
        return sums

    kernels: Any = dataclasses.replace(TORCH, power_sums=power_sums)
    clipper = dist_clip.megatron.attach(setup.optimizer, dist_clip.GlobalNorm(1.0), model=setup.chunks, kernels=kernels)
    index = clipper.layout.names.index(name)
    last = torch.tensor(dist.get_rank() if clipper.layout.tensors[index].shard_numel else -1)
    dist.all_reduce(last, op=dist.ReduceOp.MAX)
    bad = dist.get_rank() == last
    wrong = [index] if bad else []
    before = [param.detach().clone() for _, param in setup.named()]
    clipper.attachment.verify_next()
    setup.backward(1)
    try:
        setup.optimizer.step()
    except dist_clip.VerifyError as error:
        message = str(error)
    same = all(torch.equal(param, old) for (_, param), old in zip(setup.named(), before, strict=True))
    wrong = []
    clipper.attachment.verify_next()
    setup.backward(1)
    assert setup.optimizer.step()[0]
    return message, same, clipper.steps, bad


@pytest.mark.parametrize("name", ["tp2-sp", "tp2-sp-zero-tied"])
def test_a_norm_that_is_wrong_stops_the_step_on_every_rank(name: str) -> None:
    world, config = CONFIGS[name]
    tensor = "decoder.layers.0.mlp.linear_fc1.weight"
    ranks = pool(world, "megatron").run(off_by_a_thousandth, config, tensor)
    assert len({message for message, _, _, _ in ranks}) == 1
    (bad,) = (rank for rank, (_, _, _, is_bad) in enumerate(ranks) if is_bad)
    for message, same, steps, _ in ranks:
        assert f"{tensor}: the shard of rank {bad} has the norm" in message
        assert same
        assert steps == 1
