"""Marks of tensor parallelism that are wrong: the norm is one process's all the same, or a user says it by hand.

The oracle reads no mark: a single process has the whole model, and this file says how its tensors are cut.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dist_clip
from dist_clip.clipper import GradClipper
from dist_clip.megatron import compat
from dist_clip.megatron.reader import MegatronReader
from tests.harness import pool

from . import setups
from .setups import HEADS, Config, Setup, build
from .training import leaves

SINK = "self_attention.core_attention.softmax_offset"
FC1 = re.compile(r"\.linear_fc1\.(weight|bias)$")
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
    "ChainedOptimizer, expert TP": (4, Config(tp=2, ep=2, etp=2, experts=4, sequence_parallel=True)),
    "ChainedOptimizer, PP": (4, Config(tp=2, pp=2, ep=2, etp=1, experts=4, sequence_parallel=True)),
}


# ---------------------------------------------------------------- on every rank


def with_sinks(config: Config, *, gated: bool = False) -> Setup:
    """The model with learnable attention sinks, whose start values are those of the whole model, cut by heads."""
    original = setups.transformer_config

    def transformer_config(config: Config) -> Any:
        transformer = original(config)
        transformer.softmax_type = "learnable"
        if gated:
            transformer.gated_linear_unit, transformer.activation_func = True, nn.functional.silu
        return transformer

    setups.transformer_config = transformer_config
    try:
        setup = build(config)
    finally:
        setups.transformer_config = original
    for name, param in global_params(setup).items():
        if name.endswith(SINK):
            whole = setups.whole_weight(name, (HEADS,), 0)
            param.data.copy_(whole.chunk(config.tp)[groups().tp.rank()])
        elif gated and config.tp == 1 and FC1.search(name):
            # A rank's part is its gate and its linear half: of the whole, all gates come first.
            gate0, up0, gate1, up1 = param.data.chunk(4)
            param.data.copy_(torch.cat([gate0, gate1, up0, up1]))
    setup.optimizer.reload_model_params()
    return setup


def groups() -> Any:
    return compat.process_groups(None)


def global_params(setup: Setup) -> dict[str, nn.Parameter]:
    out = {}
    for chunk in setup.chunks:
        inner = chunk.module.module if hasattr(chunk.module, "module") else chunk.module
        names = setups.oracle_names(inner, setup.config)
        out.update({names[local]: param for local, param in inner.named_parameters()})
    return out


def grad_of(param: nn.Parameter) -> Tensor:
    return param.main_grad.detach().double().clone()


def one_process(config: Config, gated: bool) -> dict[str, float]:
    """Norms of the whole model's gradients."""
    setup = with_sinks(config, gated=gated)
    setup.backward(1)
    return {name: grad_of(param).norm().item() for name, param in global_params(setup).items()}


def step(config: Config, spoil: str = "", by_hand: str = "", gated: bool = False) -> dict[str, Any]:
    """One step of a model that is spoilt before the clipper comes: what the clipper found, and what the step returned."""
    setup = with_sinks(config, gated=gated)
    if spoil:
        SPOIL[spoil](setup)
    sharded = BY_HAND[by_hand]() if by_hand else None
    reader = MegatronReader(setup.optimizer, setup.chunks, groups(), sharded)
    layout = reader.read_layout(lambda name: False)
    setup.backward(1)
    sinks = {name: grad_of(param) for name, param in global_params(setup).items() if name.endswith(SINK)}
    returned = None
    if sharded is None:
        clipper = dist_clip.megatron.attach(setup.optimizer, dist_clip.GlobalNorm(0.1), model=setup.chunks)
        _, returned, _ = setup.optimizer.step()
        report = clipper.last_report
    else:
        pp = groups().pp
        clipper = GradClipper(reader, dist_clip.GlobalNorm(0.1), pp_group=pp if pp.size() > 1 else None)
        setup.optimizer.prepare_grads()
        report = clipper.clip_()
    return {
        "optimizers": {type(leaf).__name__ for leaf in leaves(setup.optimizer)} | {type(setup.optimizer).__name__},
        "norms": dict(zip(report.names, report.tensor_norms.tolist(), strict=True)),
        "scales": dict(zip(report.names, report.scales.tolist(), strict=True)),
        "norm": float(report.global_norm),
        "returned": None if returned is None else float(returned),
        "placements": {tensor.name: tensor.placement for tensor in layout},
        "marked": {tensor.name for tensor in layout if tensor.marked_groups},
        "sinks": sinks,
        "matched": reader.by_hand.matched,
        "text": clipper.explain(),
    }


def matching(setup: Setup, ending: str) -> list[nn.Parameter]:
    return [param for name, param in global_params(setup).items() if name.endswith(ending)]


def mark(param: nn.Parameter, dim: int | None) -> None:
    param.tensor_model_parallel = dim is not None
    param.partition_dim = -1 if dim is None else dim


def wrong_marks(setup: Setup) -> None:
    """Of both kinds, and of the wrong dimension."""
    for param in matching(setup, "linear_proj.weight") + matching(setup, "experts.0.linear_fc2.weight"):
        mark(param, None)
    for param in matching(setup, "input_layernorm.weight") + matching(setup, "linear_proj.bias"):
        mark(param, 0)
    for param in matching(setup, "linear_qkv.weight"):
        mark(param, 1)


class OwnNorm(nn.LayerNorm):
    """A user's class: that Megatron describes it as replicated says nothing."""


def own_norms(setup: Setup) -> None:
    for chunk in setup.chunks:
        for module in list(chunk.modules()):
            if type(module) is nn.LayerNorm:
                module.__class__ = OwnNorm


def own_norms_marked(setup: Setup) -> None:
    own_norms(setup)
    for param in matching(setup, "input_layernorm.weight"):
        mark(param, 0)


def undescribed(setup: Setup) -> None:
    """Modules that fail to describe themselves, as those do that hold a wrapper that Megatron does not know."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AttributeError("'LoRA' object has no attribute 'sharded_state_dict'")

    for chunk in setup.chunks:
        for module in chunk.modules():
            if hasattr(module, "sharded_state_dict"):
                module.sharded_state_dict = fail


SPOIL: dict[str, Callable[[Setup], None]] = {
    "wrong marks": wrong_marks,
    "own norms, marked": own_norms_marked,
    "undescribed": undescribed,
}

# What says that the sinks are split by heads, in all the ways that there are; and some of what else can be said.
BY_HAND: dict[str, Callable[[], dict[str, Any]]] = {
    "a dimension": lambda: {"*.softmax_offset": 0},
    "a negative dimension": lambda: {"*.softmax_offset": -1, "*.softmax*": None},
    "a group": lambda: {"*.softmax_offset": groups().tp},
    "a dimension and a group": lambda: {"*.softmax_offset": (0, groups().tp)},
    "replicated": lambda: {"*.input_layernorm.weight": None},
    "experts": lambda: {"*.linear_fc1.weight": 0, "*.experts.*.linear_fc2.weight": 1},
    "against mark and state dict": lambda: {"*.linear_proj.weight": 0},
    "wrongly replicated": lambda: {"*.linear_proj.weight": None},
}


# ---------------------------------------------------------------- in the test's process


@functools.cache
def expected(config: Config, gated: bool = False) -> Mapping[str, float]:
    return pool(1, "megatron").run(one_process, config, gated)[0]


def check(ranks: list[dict[str, Any]], config: Config, *, gated: bool = False) -> None:
    """Each rank has one process's norms, and one scale for each tensor."""
    right = expected(config.single, gated)
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
        assert "its mark says replicated" in rank["text"]
    if config.bf16:  # what is rounded is far from one process's, so the two halves are put together
        for name, norm in ranks[0]["norms"].items():
            if name.endswith(SINK):
                whole = torch.cat([rank["sinks"][name] for rank in ranks[:2]])
                assert math.isclose(norm, whole.norm().item(), rel_tol=RTOL)


@pytest.mark.parametrize("name", LAYOUTS)
def test_wrong_marks(name: str) -> None:
    world, config = LAYOUTS[name]
    ranks = pool(world, "megatron").run(step, config, "wrong marks")
    check(ranks, config)
    words = {
        "linear_proj.weight": "tensor parallel over 2 along dim 1 (by sharded_state_dict; its mark says replicated)",
        "input_layernorm.weight": "dense, replicated (by sharded_state_dict; its mark says along dim 0)",
        "linear_proj.bias": "dense, replicated (by sharded_state_dict; its mark says along dim 0)",
        "linear_qkv.weight": "tensor parallel over 2 along dim 0 (by sharded_state_dict; its mark says along dim 1)",
    }
    for rank in ranks:
        assert not rank["marked"]
        for tensor, placement in rank["placements"].items():
            for ending, text in words.items():
                assert text in placement or not tensor.endswith(ending), (tensor, placement)


def test_gated_projections() -> None:
    """SwiGLU's first projection is two tensors in a checkpoint and one here."""
    config = Config(tp=2)
    ranks = pool(2, "megatron").run(step, config, "", gated=True)
    check(ranks, config, gated=True)
    for rank in ranks:
        assert not rank["marked"]


def test_a_mark_that_nothing_else_vouches_for() -> None:
    """It is in force, and the comparison of supposed copies is told that only the mark says so."""
    for rank in pool(2, "megatron").run(step, Config(tp=2), "own norms, marked"):
        assert rank["marked"] == {name for name in rank["norms"] if name.endswith("input_layernorm.weight")}


def test_modules_that_describe_nothing() -> None:
    """Their marks are in force."""
    for rank in pool(2, "megatron").run(step, Config(tp=2), "undescribed"):
        split = {name for name, placement in rank["placements"].items() if "tensor parallel" in placement}
        assert rank["marked"] == split
        assert "by sharded_state_dict" not in rank["text"]
        assert any(name.endswith("linear_qkv.weight") for name in split)


@pytest.mark.parametrize("by_hand", ["a dimension", "a negative dimension", "a group", "a dimension and a group"])
def test_sinks_by_hand(by_hand: str) -> None:
    for name in ("FP32Optimizer", "DistributedOptimizer, PP"):
        world, config = LAYOUTS[name]
        ranks = pool(world, "megatron").run(step, config, "undescribed", by_hand)
        check(ranks, config)
        for rank in ranks:
            assert not any(name.endswith(SINK) for name in rank["marked"])
            assert "(by sharded=)" in rank["text"]
            assert "*.softmax_offset" in rank["matched"]


@pytest.mark.parametrize(
    ("by_hand", "spoil", "name"),
    [
        ("replicated", "own norms, marked", "LayerWiseDistributedOptimizer"),
        ("experts", "wrong marks", "ChainedOptimizer"),
        ("experts", "wrong marks", "ChainedOptimizer, expert TP"),
        ("against mark and state dict", "", "FP32Optimizer"),
    ],
)
def test_by_hand(by_hand: str, spoil: str, name: str) -> None:
    world, config = LAYOUTS[name]
    ranks = pool(world, "megatron").run(step, config, spoil, by_hand)
    check(ranks, config)
    assert all(rank["matched"] for rank in ranks)


def test_what_the_user_says_is_done_even_if_it_is_wrong() -> None:
    """So the norm is that of the rank's own part: nothing else overrules it."""
    config = Config(tp=2)
    for rank in pool(2, "megatron").run(step, config, "", "wrongly replicated"):
        for name, norm in rank["norms"].items():
            right = expected(config.single)[name]
            assert math.isclose(norm, right, rel_tol=RTOL) != name.endswith("linear_proj.weight"), name
