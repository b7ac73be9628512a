"""The models: names and shapes of every tensor as torchtitan holds them, from public configurations.

Weights of a layer's experts are stacked along dim 0. Norms, routers and low-rank down-projections are whole under tensor
parallelism; the rest is split by columns (dim 0) or rows (dim 1).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

Split = Literal["columns", "rows", "whole"]
"""What tensor parallelism does to a tensor: Shard(0), Shard(1) or Replicate()."""


@dataclasses.dataclass(frozen=True)
class TensorShape:
    """One logical tensor.

    Attributes:
        name: fully qualified, layers numbered globally.
        shape: of the whole tensor.
        split: under tensor parallelism.
        expert: dim 0 counts experts.
        layer: None for what comes before the layers (`head` False) or after them (`head` True).
    """

    name: str
    shape: tuple[int, ...]
    split: Split = "whole"
    expert: bool = False
    layer: int | None = None
    head: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """A model as a list of tensors, and where the numbers are from."""

    name: str
    source: str
    layers: int
    tensors: tuple[TensorShape, ...]

    @property
    def numel(self) -> int:
        return sum(t.numel for t in self.tensors)

    def stage(self, index: int, stages: int) -> tuple[TensorShape, ...]:
        """The tensors of one pipeline stage: an even share of the layers, the ends on the first and the last stage."""
        share = [self.layers // stages + (s < self.layers % stages) for s in range(stages)]
        first = sum(share[:index])
        mine = range(first, first + share[index])
        ends = {False: index == 0, True: index == stages - 1}
        return tuple(t for t in self.tensors if (ends[t.head] if t.layer is None else t.layer in mine))


def _ends(vocab: int, dim: int) -> Iterator[TensorShape]:
    yield TensorShape("tok_embeddings.weight", (vocab, dim), "columns")
    yield TensorShape("norm.weight", (dim,), head=True)
    yield TensorShape("output.weight", (vocab, dim), "columns", head=True)


def _layer(
    index: int, tensors: dict[str, tuple[tuple[int, ...], Split]], expert: bool = False
) -> Iterator[TensorShape]:
    for name, (shape, split) in tensors.items():
        yield TensorShape(f"layers.{index}.{name}", shape, split, expert, index)


def _norms(dim: int) -> dict[str, tuple[tuple[int, ...], Split]]:
    return {"attention_norm.weight": ((dim,), "whole"), "ffn_norm.weight": ((dim,), "whole")}


def _attention(dim: int, heads: int, kv_heads: int) -> dict[str, tuple[tuple[int, ...], Split]]:
    """Grouped-query attention."""
    kv = dim // heads * kv_heads
    return {
        "attention.wq.weight": ((dim, dim), "columns"),
        "attention.wk.weight": ((kv, dim), "columns"),
        "attention.wv.weight": ((kv, dim), "columns"),
        "attention.wo.weight": ((dim, dim), "rows"),
    }


def _latent_attention(dim: int, heads: int) -> dict[str, tuple[tuple[int, ...], Split]]:
    """Multi-head latent attention with the ranks and head sizes of DeepSeek-V3 and Kimi-K2."""
    q_rank, kv_rank, nope, rope, value = 1536, 512, 128, 64, 128
    return {
        "attention.wq_a.weight": ((q_rank, dim), "whole"),
        "attention.q_norm.weight": ((q_rank,), "whole"),
        "attention.wq_b.weight": ((heads * (nope + rope), q_rank), "columns"),
        "attention.wkv_a.weight": ((kv_rank + rope, dim), "whole"),
        "attention.kv_norm.weight": ((kv_rank,), "whole"),
        "attention.wkv_b.weight": ((heads * (nope + value), kv_rank), "columns"),
        "attention.wo.weight": ((dim, heads * value), "rows"),
    }


def _feed_forward(dim: int, hidden: int, prefix: str = "feed_forward") -> dict[str, tuple[tuple[int, ...], Split]]:
    return {
        f"{prefix}.w1.weight": ((hidden, dim), "columns"),
        f"{prefix}.w2.weight": ((dim, hidden), "rows"),
        f"{prefix}.w3.weight": ((hidden, dim), "columns"),
    }


def _experts(experts: int, dim: int, hidden: int) -> dict[str, tuple[tuple[int, ...], Split]]:
    return {
        "moe.experts.w1": ((experts, hidden, dim), "whole"),
        "moe.experts.w2": ((experts, dim, hidden), "whole"),
        "moe.experts.w3": ((experts, hidden, dim), "whole"),
    }


def _router(experts: int, dim: int) -> dict[str, tuple[tuple[int, ...], Split]]:
    return {"moe.router.gate.weight": ((experts, dim), "whole")}


def llama(
    name: str, source: str, *, layers: int, dim: int, hidden: int, heads: int, kv_heads: int, vocab: int
) -> ModelShape:
    tensors = list(_ends(vocab, dim))
    for i in range(layers):
        tensors += _layer(i, _attention(dim, heads, kv_heads) | _feed_forward(dim, hidden) | _norms(dim))
    return ModelShape(name, source, layers, tuple(tensors))


def mixtral(
    name: str, source: str, *, layers: int, dim: int, hidden: int, heads: int, kv_heads: int, vocab: int, experts: int
) -> ModelShape:
    tensors = list(_ends(vocab, dim))
    for i in range(layers):
        tensors += _layer(i, _attention(dim, heads, kv_heads) | _norms(dim) | _router(experts, dim))
        tensors += _layer(i, _experts(experts, dim, hidden), expert=True)
    return ModelShape(name, source, layers, tuple(tensors))


def latent_moe(
    name: str,
    source: str,
    *,
    layers: int,
    dim: int,
    dense_hidden: int,
    hidden: int,
    heads: int,
    vocab: int,
    experts: int,
) -> ModelShape:
    """The first layer is dense, the others have routed experts and one shared expert."""
    tensors = list(_ends(vocab, dim))
    tensors += _layer(0, _latent_attention(dim, heads) | _norms(dim) | _feed_forward(dim, dense_hidden))
    for i in range(1, layers):
        shared = _feed_forward(dim, hidden, "moe.shared_experts")
        tensors += _layer(i, _latent_attention(dim, heads) | _norms(dim) | _router(experts, dim) | shared)
        tensors += _layer(i, _experts(experts, dim, hidden), expert=True)
    return ModelShape(name, source, layers, tuple(tensors))


def stack(tensors: int, *, stages: int = 1, experts: int = 0) -> ModelShape:
    """A made-up model, that many tensors on each of `stages` stages: matrices, norms and, if any, experts in turn."""
    kinds: list[tuple[tuple[int, ...], Split, bool]] = [
        ((256, 256), "columns", False),
        ((256, 256), "rows", False),
        ((256,), "whole", False),
    ]
    if experts:
        kinds.append(((experts, 64, 64), "whole", True))
    made = []
    for stage in range(stages):
        for i in range(tensors):
            shape, split, expert = kinds[i % len(kinds)]
            made.append(TensorShape(f"layers.{stage}.{i}.weight", shape, split, expert, layer=stage))
    return ModelShape(f"stack of {tensors}", "made up, to vary the number of tensors", stages, tuple(made))


MODELS: dict[str, ModelShape] = {
    model.name: model
    for model in (
        llama(
            "Llama-2-7B",
            "config.json of meta-llama/Llama-2-7b",
            layers=32,
            dim=4096,
            hidden=11008,
            heads=32,
            kv_heads=32,
            vocab=32000,
        ),
        llama(
            "Llama-3-70B",
            "config.json of meta-llama/Meta-Llama-3-70B",
            layers=80,
            dim=8192,
            hidden=28672,
            heads=64,
            kv_heads=8,
            vocab=128256,
        ),
        mixtral(
            "Mixtral-8x22B",
            "config.json of mistralai/Mixtral-8x22B-Instruct-v0.1",
            layers=56,
            dim=6144,
            hidden=16384,
            heads=48,
            kv_heads=8,
            vocab=32768,
            experts=8,
        ),
        latent_moe(
            "MoE-1T",
            "as config.json of moonshotai/Kimi-K2-Base: latent attention, 384 experts of 2048 and a shared one a layer",
            layers=61,
            dim=7168,
            dense_hidden=18432,
            hidden=2048,
            heads=64,
            vocab=163840,
            experts=384,
        ),
    )
}
