"""Every class of parameter that megatron-core 0.16.1 or 0.19 can run on CPU, by the values of its gradient.

cuts.py says how each class is cut; no attribute of a parameter does. Two tests share one run of each layout: the whole
gradient, gathered from all ranks, is a single process's element by element, and the norms that dist_clip reports are those
of that gradient. The first one holds the table, and Megatron's own reductions; the second one dist_clip, whatever
Megatron's marks say.

Mamba and the gated delta net run on kernels.py, the latter with Megatron's own torch version of the delta rule.
Multi-latent attention runs on the local attention, with values as wide as keys. Not here, because they need more than a
kernel: whatever is Transformer Engine's (TEGroupedMLP, fused norms) and the indexer of sparse attention, whose linear
layers are. The legacy GroupedMLP is refused (test_bad_input.py). Biases of experts: Megatron wants an expert
tensor-parallel size of 1, and under sequence parallelism it adds up the biases of different experts.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import pytest
import torch

from tests.harness import pool

from . import cuts, training
from .setups import Config

LAYOUTS: dict[str, tuple[int, Config]] = {
    "sinks-tp2": (2, Config(tp=2, variant="sinks")),
    "sinks-gated-tp2-pp2-sp-zero": (4, Config(tp=2, pp=2, sequence_parallel=True, zero=True, variant="sinks-gated")),
    "qk-norm-tp2": (2, Config(tp=2, variant="qk-norm")),
    "one-query-group-tp2-sp": (2, Config(tp=2, sequence_parallel=True, variant="one-query-group")),
    "positions-tp2-sp-tied": (2, Config(tp=2, sequence_parallel=True, tied=True, variant="positions")),
    "positions-tp2-pp2": (4, Config(tp=2, pp=2, variant="positions")),
    "mla-tp2": (2, Config(tp=2, variant="mla")),
    "mla-replicated-tp2-sp": (2, Config(tp=2, sequence_parallel=True, variant="mla-replicated")),
    "mla-one-query-projection-tp2-pp2": (4, Config(tp=2, pp=2, variant="mla-one-query-projection")),
    "shared-experts-tp2": (2, Config(tp=2, experts=2, sequence_parallel=True, variant="shared-experts")),
    "shared-experts-tp2-ep2-etp1": (
        2,
        Config(tp=2, ep=2, etp=1, experts=4, sequence_parallel=True, variant="shared-experts"),
    ),
    "shared-experts-tp2-ep2-etp2-zero": (
        4,
        Config(tp=2, ep=2, etp=2, experts=4, sequence_parallel=True, zero=True, variant="shared-experts"),
    ),
    "expert-biases-ep2": (2, Config(ep=2, experts=4, variant="expert-biases")),
    "mtp-tp2-tied": (2, Config(tp=2, tied=True, variant="mtp")),
    "mtp-tp2-pp2-sp": (4, Config(tp=2, pp=2, sequence_parallel=True, variant="mtp")),
    "mamba-tp2": (2, Config(tp=2, layers=4, variant="mamba")),
    "mamba-tp2-pp2-sp": (4, Config(tp=2, pp=2, layers=4, sequence_parallel=True, variant="mamba")),
    "delta-tp2-sp-zero": (4, Config(tp=2, sequence_parallel=True, zero=True, variant="delta")),
}

MEGATRONS_OWN = dict.fromkeys(
    ["mla-tp2", "mla-one-query-projection-tp2-pp2"],
    "Megatron 0.16.1: gathered down-projections sum no gradient of the keys' positions over the ranks, and without "
    "sequence parallelism the gradient of q_layernorm counts once for each rank",
)
"""Layouts in which Megatron's gradients are not those of a single process."""


@functools.cache
def single(config: Config) -> dict[str, Any]:
    return training.alone(config, None, 1)


@functools.cache
def ran(layout: str) -> training.Run:
    """One step of the layout under dist_clip."""
    world, config = LAYOUTS[layout]
    shapes = {name: param.shape for name, param in single(config.single)["params"].items()}
    return training.Run(pool(world, "megatron").run(training.measure, config), shapes)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(name, marks=pytest.mark.xfail(strict=True, raises=AssertionError, reason=MEGATRONS_OWN[name]))
        if name in MEGATRONS_OWN
        else name
        for name in LAYOUTS
    ],
)
def test_the_whole_gradient_is_that_of_one_process(layout: str) -> None:
    training.check_gradients(ran(layout), single(LAYOUTS[layout][1].single))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norms_are_those_of_the_whole_gradient(layout: str) -> None:
    together = ran(layout)
    expected = {name: torch.linalg.vector_norm(grad).item() for name, grad in together.at(1, "before").items()}
    total = math.hypot(*expected.values())
    reported = set()
    for rank, entry in enumerate(together.ranks):
        (record,) = entry["records"]
        assert record["error"] is None
        assert training.close(record["norm"], total, 1e-5), f"rank {rank}: {record['norm']}, not {total}"
        for name, norm, scale in zip(record["names"], record["norms"], record["scales"], strict=True):
            reported.add(name)
            assert training.close(norm, expected[name], 1e-5), f"rank {rank}, {name}: {norm}, not {expected[name]}"
            assert training.close(scale, min(1.0, 1.0 / total), 1e-5), f"rank {rank}, {name}: scale {scale}"
    assert reported == expected.keys()


def test_each_row_of_the_table_is_met() -> None:
    named = {cuts.row(name) for _, config in LAYOUTS.values() for name in single(config.single)["params"]}
    assert named == cuts.TABLE.keys()


def test_a_parameter_that_the_table_does_not_name_is_an_error() -> None:
    with pytest.raises(AssertionError, match="named by 0 rows"):
        cuts.row("decoder.layers.0.self_attention.new_scale")


COPIES_DIFFER = {
    # Each rank's heads alone go into the gradient of the norm that all heads share.
    "delta": r"self_attention\.out_norm\.(weight|bias)",
    # And into that of the keys' positions, and of all that comes before them.
    "mla-replicated": r"layers\.0\.(input_layernorm|self_attention\.linear_kv_down_proj)\.weight",
}
"""Replicated weights whose gradients Megatron 0.16.1 sums over the ranks under sequence parallelism only."""


@pytest.mark.parametrize("variant", COPIES_DIFFER)
def test_copies_that_megatron_leaves_different_are_an_error(variant: str) -> None:
    ranks = pool(2, "megatron").run(training.measure, Config(tp=2, variant=variant))
    (error,) = {rank["records"][0]["error"] for rank in ranks}
    assert re.match(rf"'decoder\.\S*{COPIES_DIFFER[variant]}' should be one tensor with copies on ranks 0, 1", error)
