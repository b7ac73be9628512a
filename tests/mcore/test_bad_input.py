"""What attach refuses: by name, with the way out, the same on every rank, and never a silently wrong norm."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import dist_clip
from dist_clip.megatron import compat
from tests.harness import pool

from .setups import Config, build, gpt, initialise, megatron_version, start, transformer_config


def refused(case: str, config: Config) -> tuple[str, str]:
    """Kind and text of what attaching raised; then meet the other ranks, which shows that none was left behind."""
    optimizer, model, kwargs = CASES[case](config)
    try:
        dist_clip.megatron.attach(optimizer, dist_clip.AdaGC(), model=model, **kwargs)
    except Exception as error:
        result = (type(error).__name__, str(error))
    else:
        result = ("nothing", "")
    dist.barrier()
    return result


Case = tuple[Any, Any, dict[str, Any]]


def bad_rank() -> bool:
    return dist.get_rank() == 1


def first_weight(chunks: list[Any]) -> nn.Parameter:
    return next(p for p in chunks[0].parameters() if p.dim() == 2)


class Exotic:
    """No optimizer of Megatron's."""

    config = None


def unknown_optimizer(config: Config) -> Case:
    setup = build(config)
    setup.optimizer.chained_optimizers[0] = Exotic()
    return setup.optimizer, setup.chunks, {}


def unknown_optimizer_on_one(config: Config) -> Case:
    setup = build(config)
    if bad_rank():
        setup.optimizer.chained_optimizers[0] = Exotic()
    return setup.optimizer, setup.chunks, {}


def marked(attribute: str) -> Callable[[Config], Case]:
    def case(config: Config) -> Case:
        setup = build(config)
        setattr(first_weight(setup.chunks), attribute, True)
        return setup.optimizer, setup.chunks, {}

    return case


def marked_on_one(config: Config) -> Case:
    setup = build(config)
    if bad_rank():
        first_weight(setup.chunks).is_gtp_weight_remat = True
    return setup.optimizer, setup.chunks, {}


def unknown_strategy(config: Config) -> Case:
    setup = build(config)
    if bad_rank():
        setup.optimizer.ddp_config.data_parallel_sharding_strategy = "activations"
    return setup.optimizer, setup.chunks, {}


def unreadable_dtype(config: Config) -> Case:
    setup = build(config)
    params = setup.optimizer.optimizer.param_groups[0]["params"]
    whole = params[0]
    eight = torch.zeros_like(whole.to_local(), dtype=torch.float8_e4m3fn)
    params[0] = DTensor.from_local(eight, whole.device_mesh, whole.placements, shape=whole.shape, stride=whole.stride())
    params[0].orig_param = whole.orig_param
    return setup.optimizer, setup.chunks, {}


def sharded_by_hand(config: Config) -> Case:
    setup = build(config)
    return setup.optimizer, setup.chunks, {"sharded": {"*.linear_proj.weight": 1}}


def too_few_chunks(config: Config) -> Case:
    setup = build(config)
    return setup.optimizer, setup.chunks[:1], {}


def another_model(config: Config) -> Case:
    setup = build(config)
    other = gpt(config, transformer_config(config), 0)
    initialise(other, config, 3)
    return setup.optimizer, other, {}


def not_a_model(config: Config) -> Case:
    setup = build(config)
    return setup.optimizer, [p for chunk in setup.chunks for p in chunk.parameters()], {}


def no_chunks(config: Config) -> Case:
    setup = build(config)
    return setup.optimizer, [], {}


def stacked_experts(config: Config) -> Case:
    class GroupedMLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight1 = nn.Parameter(torch.zeros(4, 4))

    setup = build(config)
    inner = setup.chunks[0].module
    inner.experts = GroupedMLP()
    return setup.optimizer, setup.chunks, {}


def unnumbered_experts(config: Config) -> Case:
    setup = build(config)
    inner = setup.chunks[0].module
    inner.mlp = nn.Module()
    inner.mlp.experts = nn.Linear(2, 2, bias=False)
    inner.mlp.experts.weight.allreduce = False
    return setup.optimizer, setup.chunks, {}


def trainable_after_the_optimizer(config: Config) -> Case:
    """A tensor that was frozen when the optimizer was made."""
    setup = build(config)
    setup.chunks[0].module.extra = nn.Parameter(torch.zeros(3))
    return setup.optimizer, setup.chunks, {}


def a_pattern_for_nothing(config: Config) -> Case:
    setup = build(config)
    return setup.optimizer, setup.chunks, {"exclude": ["*.router.*"]}


def nothing_odd(config: Config) -> Case:
    setup = build(config)
    return setup.optimizer, setup.chunks, {}


CASES: dict[str, Callable[[Config], Case]] = {
    "nothing_odd": nothing_odd,
    "unknown_optimizer": unknown_optimizer,
    "unknown_optimizer_on_one": unknown_optimizer_on_one,
    "gtp": marked("is_gtp_weight_remat"),
    "gtp_on_one": marked_on_one,
    "unknown_strategy": unknown_strategy,
    "unreadable_dtype": unreadable_dtype,
    "sharded_by_hand": sharded_by_hand,
    "too_few_chunks": too_few_chunks,
    "another_model": another_model,
    "not_a_model": not_a_model,
    "no_chunks": no_chunks,
    "stacked_experts": stacked_experts,
    "unnumbered_experts": unnumbered_experts,
    "trainable_after_the_optimizer": trainable_after_the_optimizer,
    "a_pattern_for_nothing": a_pattern_for_nothing,
}


@pytest.mark.parametrize(
    ("case", "config", "words"),
    [
        ("unknown_optimizer", Config(tp=2), ["Exotic", "Megatron's own clipping"]),
        ("unknown_optimizer_on_one", Config(tp=2), ["Exotic", "rank 1"]),
        ("unknown_optimizer_on_one", Config(pp=2), ["Exotic", "rank 1"]),
        ("gtp", Config(tp=2), ["embedding.word_embeddings.weight", "is_gtp_weight_remat", "set its size to 1"]),
        ("gtp_on_one", Config(), ["embedding.word_embeddings.weight", "is_gtp_weight_remat", "rank 1"]),
        ("unknown_strategy", Config(fsdp="optim"), ["rank 1", "Megatron-FSDP", "'activations'", "optim_grads_params"]),
        ("unreadable_dtype", Config(fsdp="optim"), ["embedding.word_embeddings.weight", "float8_e4m3fn"]),
        ("sharded_by_hand", Config(fsdp="optim"), ["linear_proj.weight", "Shard(dim=0)", "leave it out of sharded="]),
        ("too_few_chunks", Config(pp=2, vpp=2, layers=4), ["belong to none of the 1 model chunks"]),
        ("another_model", Config(tp=2), ["no optimizer steps it", "embedding.word_embeddings.weight"]),
        ("not_a_model", Config(tp=2), ["model must be a module"]),
        ("no_chunks", Config(tp=2), ["model must be a module"]),
        ("stacked_experts", Config(), ["experts.weight1", "TEGroupedMLP"]),
        ("unnumbered_experts", Config(), ["mlp.experts.weight", "which expert"]),
        ("trainable_after_the_optimizer", Config(), ["'extra'", "no optimizer steps it"]),
        ("trainable_after_the_optimizer", Config(zero=True), ["'extra'", "3 elements"]),
        ("a_pattern_for_nothing", Config(pp=2), ["*.router.*"]),
        pytest.param(
            "nothing_odd",
            Config(tp=2, etp=1, experts=4, sequence_parallel=True),
            ["experts.local_experts.0", "expert tensor parallelism 1 and tensor parallelism 2", "set both alike"],
            marks=pytest.mark.skipif(megatron_version() >= (0, 19), reason="clipped there (test_layouts.py)"),
        ),
    ],
)
def test_refused_alike_on_every_rank(case: str, config: Config, words: list[str]) -> None:
    results = pool(2, "megatron").run(refused, case, config, timeout=60)
    for kind, text in results:
        assert kind in ("LayoutError", "TypeError"), (kind, text)
        for word in words:
            assert word in text, text
    assert len({text for _, text in results}) == 1, "ranks tell different stories"


def uninitialised() -> tuple[str, str]:
    start()
    from megatron.core import parallel_state

    setup = build(Config())
    parallel_state.destroy_model_parallel()
    try:
        dist_clip.megatron.attach(setup.optimizer, dist_clip.AdaGC(), model=setup.chunks)
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def test_before_megatron_is_initialised() -> None:
    for kind, text in pool(2, "megatron").run(uninitialised):
        assert kind == "LayoutError"
        assert "initialize_model_parallel" in text


@pytest.mark.parametrize(
    ("found", "warns"), [("0.15.3", True), ("0.16.1", False), ("0.19.2", False), ("0.20.0rc1", True)]
)
def test_a_version_that_was_not_tested(found: str, warns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "version", lambda: found)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compat.warn_if_untested()
    assert [found in str(w.message) and "0.16.1 to below 0.20" in str(w.message) for w in caught] == [True] * warns


def test_without_megatron_core(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "megatron.core.package_info", None)
    with pytest.raises(ImportError, match=r"pip install 'dist-clip\[megatron\]'"):
        dist_clip.megatron.attach(None, dist_clip.AdaGC(), model=nn.Linear(1, 1))
