"""Marks of tensor parallelism that are wrong: the norm is one process's all the same, or a user says it by hand.

The oracle reads no mark: a single process has the whole model, and this file says how its tensors are cut.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import dist_clip
from dist_clip.clipper import GradClipper
from dist_clip.megatron import compat, marks
from dist_clip.megatron.reader import MegatronReader
from tests.distributed.counting import CollectiveLog
from tests.harness import pool

from . import setups
from .setups import HEADS, Config, Setup, build
from .training import leaves, main_params

SINK = "self_attention.core_attention.softmax_offset"
RTOL = 1e-6

LAYOUTS = {
    "FP32Optimizer": (2, Config(tp=2)),
    "FP32Optimizer, PP": (4, Config(tp=2, pp=2)),
    "Float16Optimizer": (2, Config(tp=2, bf16=True)),
    "Float16Optimizer, PP": (4, Config(tp=2, pp=2, bf16=True)),
    "DistributedOptimizer": (4, Config(tp=2, zero=True)),
    "DistributedOptimizer, PP": (4, Config(tp=2, pp=2, zero=True)),
    "LayerWiseDistributedOptimizer": (4, Config(tp=2, layer_wise=True)),
    "LayerWiseDistributedOptimizer, PP": (4, Config(tp=2, pp=2, layer_wise=True)),
    "ChainedOptimizer": (4, Config(tp=2, ep=2, etp=1, experts=4, sequence_parallel=True)),
    "ChainedOptimizer, PP": (4, Config(tp=2, pp=2, ep=2, etp=1, experts=4, sequence_parallel=True)),
}


# ---------------------------------------------------------------- on every rank


def with_sinks(config: Config) -> Setup:
    """The model with learnable attention sinks, whose start values are those of the whole model, cut by heads."""
    original = setups.transformer_config

    def transformer_config(config: Config) -> Any:
        transformer = original(config)
        transformer.softmax_type = "learnable"
        return transformer

    setups.transformer_config = transformer_config
    try:
        setup = build(config)
    finally:
        setups.transformer_config = original
    rank = tp_rank()
    for name, param in global_params(setup).items():
        if name.endswith(SINK):
            whole = setups.whole_weight(name, (HEADS,), 0)
            param.data.copy_(whole.chunk(config.tp)[rank])
    setup.optimizer.reload_model_params()
    return setup


def tp_rank() -> int:
    from megatron.core import parallel_state

    return int(parallel_state.get_tensor_model_parallel_rank())


def tp_group() -> dist.ProcessGroup:
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_group()


def global_params(setup: Setup) -> dict[str, nn.Parameter]:
    out = {}
    for chunk in setup.chunks:
        inner = chunk.module.module if hasattr(chunk.module, "module") else chunk.module
        names = setups.oracle_names(inner, setup.config)
        out.update({names[local]: param for local, param in inner.named_parameters()})
    return out


def grad_of(param: nn.Parameter) -> Tensor:
    return param.main_grad.detach().double().clone()


def one_process(config: Config) -> dict[str, float]:
    """Norms of the whole model's gradients."""
    setup = with_sinks(config)
    setup.backward(1)
    return {name: grad_of(param).norm().item() for name, param in global_params(setup).items()}


def step(
    config: Config, spoil: Callable[[Setup], None] | None = None, by_hand: str | None = None
) -> dict[str, Any]:
    """One optimizer step with `spoil` applied before attaching: what the clipper found, and what the step returned."""
    setup = with_sinks(config)
    if spoil is not None:
        spoil(setup)
    sharded = BY_HAND[by_hand]() if by_hand else None
    reader = MegatronReader(setup.optimizer, setup.chunks, compat.process_groups(None), sharded)
    layout = reader.read_layout(lambda name: False)
    sinks = {name: param for name, param in global_params(setup).items() if name.endswith(SINK)}
    setup.backward(1)
    norm = None
    if sharded is None:
        clipper = dist_clip.megatron.attach(setup.optimizer, dist_clip.GlobalNorm(0.1), model=setup.chunks)
        _, norm, _ = setup.optimizer.step()
        report = clipper.last_report
    else:
        pp = compat.process_groups(None).pp
        clipper = GradClipper(reader, dist_clip.GlobalNorm(0.1), pp_group=pp if pp.size() > 1 else None)
        setup.optimizer.prepare_grads()
        report = clipper.clip_()
    return {
        "optimizers": {type(leaf).__name__ for leaf in leaves(setup.optimizer)} | {type(setup.optimizer).__name__},
        "norms": dict(zip(report.names, report.tensor_norms.tolist(), strict=True)),
        "scales": dict(zip(report.names, report.scales.tolist(), strict=True)),
        "norm": float(report.global_norm),
        "returned": None if norm is None else float(norm),
        "placements": {t.name: t.placement for t in layout},
        "shapes": {t.name: t.shape for t in layout},
        "marked": {t.name for t in layout if t.marked_groups},
        "sinks": {name: grad_of(param) for name, param in sinks.items()} if norm is None or not config.zero else {},
        "matched": reader.by_hand.matched,
        "text": clipper.explain(),
    }


# ---------------------------------------------------------------- in the test's process


@functools.cache
def expected(config: Config) -> Mapping[str, float]:
    return pool(1, "megatron").run(one_process, config.single)[0]


def check(ranks: list[dict[str, Any]], config: Config) -> None:
    """Each rank has one process's norms, and one scale for each tensor."""
    right = expected(config)
    rtol = 0.05 if config.bf16 else RTOL  # of gradients that are rounded to 8 bits on their way
    total = math.sqrt(sum(norm**2 for norm in right.values()))
    scales: dict[str, float] = {}
    for rank, found in enumerate(ranks):
        for name, norm in found["norms"].items():
            assert math.isclose(norm, right[name], rel_tol=rtol), f"rank {rank}, {name}: {norm}, not {right[name]}"
            scale = found["scales"][name]
            assert scales.setdefault(name, scale) == scale, f"rank {rank}, {name}: copies are scaled differently"
        assert math.isclose(found["norm"], total, rel_tol=rtol), f"rank {rank}: {found['norm']}, not {total}"
        if found["returned"] is not None:
            assert found["returned"] == found["norm"]
    assert set(scales) == set(right)
    assert max(scales.values()) < 1, "the test is to blame: nothing was clipped"


@pytest.mark.parametrize("name", LAYOUTS)
def test_sinks(name: str) -> None:
    world, config = LAYOUTS[name]
    ranks = pool(world, "megatron").run(step, config)
    check(ranks, config)
    for rank in ranks:
        assert any(name.split(",")[0] in kind for kind in rank["optimizers"])
        assert not rank["marked"], "a mark that agrees with the state dict is taken for the only witness"
        for tensor, placement in rank["placements"].items():
            overruled = "along dim 0 (by sharded_state_dict; its mark says replicated)" in placement
            assert overruled == tensor.endswith(SINK), (tensor, placement)
            assert f"{tensor}" in rank["text"]
        assert "its mark says replicated" in rank["text"]
