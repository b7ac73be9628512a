"""Says by hand how tensor parallelism cuts each parameter of megatron-core 0.16.1, and who holds what.

Nothing here reads an attribute of a parameter: a wrong mark in Megatron, or one that a test makes wrong, changes neither
the weights that a rank starts from nor the place of its gradient in the whole tensor. A parameter that no row of the
table names, or more than one, is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .setups import Config


@dataclass(frozen=True)
class Cut:
    """The tensor is `pieces`, of these relative sizes, laid out along `dim`; each rank has its part of every piece."""

    dim: int
    pieces: tuple[int, ...] = (1,)


REPLICATED = None
DIM0, DIM1 = Cut(0), Cut(1)
GATED = Cut(0, (1, 1))  # the gates, then what they gate: a rank's half of each
LAYER = r"(decoder\.layers\.\d+|mtp\.layers\.\d+\.(transformer|mtp_model)_layer)\."

# Sizes of setups.VARIANTS: Mamba's z, x, B, C, dt, of which x, B and C pass through the convolution; the gated delta net's
# query, key, value, gate, beta and alpha, of which the first three do.
MAMBA = (32, 32, 8, 8, 4)
DELTA = (8, 8, 32, 32, 4, 4)

TABLE: dict[str, Cut | None] = {
    r"embedding\.word_embeddings\.weight": DIM0,  # rows of the vocabulary
    r"embedding\.position_embeddings\.weight": REPLICATED,
    r"output_layer\.weight": DIM0,
    r"decoder\.final_(layer)?norm\.(weight|bias)": REPLICATED,
    LAYER + r"(input_|pre_mlp_)?(layer)?norm\.(weight|bias)": REPLICATED,
    # Attention. Each group's queries, key and value lie together in linear_qkv, and a rank has whole groups.
    LAYER + r"self_attention\.linear_qkv\.(weight|bias)": DIM0,
    LAYER + r"self_attention\.linear_proj\.weight": DIM1,
    LAYER + r"self_attention\.linear_proj\.bias": REPLICATED,  # added after the ranks' sum
    LAYER + r"self_attention\.(q|k|kv)_layernorm\.(weight|bias)": REPLICATED,
    LAYER + r"self_attention\.core_attention\.softmax_offset": DIM0,  # one sink for each head
    # Multi-latent attention of Megatron's local layers: its down-projections are split, too, and their output gathered.
    LAYER + r"self_attention\.linear_(q|q_down|q_up|kv_down|kv_up)_proj\.weight": DIM0,
    # Multi-layer perceptrons: dense, shared by all tokens, and routed experts, over the expert-tensor-parallel group.
    LAYER + r"mlp\.(shared_experts\.|experts\.local_experts\.\d+\.)?linear_fc1\.(weight|bias)": DIM0,  # or GATED
    LAYER + r"mlp\.(shared_experts\.|experts\.local_experts\.\d+\.)?linear_fc2\.weight": DIM1,
    LAYER + r"mlp\.(experts\.local_experts\.\d+\.)?linear_fc2\.bias": REPLICATED,
    LAYER + r"mlp\.router\.(weight|bias)": REPLICATED,
    LAYER + r"mlp\.shared_experts\.gate_weight": REPLICATED,
    # Heads of multi-token prediction.
    r"mtp\.layers\.\d+\.(enorm|hnorm|final_layernorm)\.(weight|bias)": REPLICATED,
    r"mtp\.layers\.\d+\.eh_proj\.weight": DIM0,
    # Mamba.
    LAYER + r"mixer\.in_proj\.weight": Cut(0, MAMBA),
    LAYER + r"mixer\.conv1d[._](weight|bias)": Cut(0, MAMBA[1:4]),  # parameters of the mixer itself in newer versions
    LAYER + r"mixer\.(A_log|D|dt_bias|norm\.weight)": DIM0,
    LAYER + r"mixer\.out_proj\.weight": DIM1,
    # The gated delta net.
    LAYER + r"self_attention\.in_proj\.weight": Cut(0, DELTA),
    LAYER + r"self_attention\.conv1d\.weight": Cut(0, DELTA[:3]),
    LAYER + r"self_attention\.(A_log|dt_bias)": DIM0,
    LAYER + r"self_attention\.out_norm\.(weight|bias)": REPLICATED,
    LAYER + r"self_attention\.out_proj\.weight": DIM1,
}


def row(name: str) -> str:
    """The one row of the table for a global name."""
    found = [pattern for pattern in TABLE if re.fullmatch(pattern, name)]
    assert len(found) == 1, f"{name!r} is named by {len(found)} rows of the table of cuts, not by one: {found}"
    return found[0]


def cut_of(name: str, config: Config) -> Cut | None:
    how = TABLE[row(name)]
    if config.variant == "mla-replicated" and "_down_proj" in name:
        return REPLICATED
    return GATED if config.gated and "linear_fc1" in name else how


def _place(name: str) -> tuple[int, int]:
    """This rank's number among those that a tensor is cut over, and how many they are."""
    from megatron.core import parallel_state

    routed = ".experts." in name
    group = (
        parallel_state.get_expert_tensor_parallel_group()
        if routed
        else parallel_state.get_tensor_model_parallel_group()
    )
    return group.rank(), group.size()


def whole_shape(name: str, local: torch.Size, config: Config) -> tuple[int, ...]:
    shape, how = list(local), cut_of(name, config)
    if how is not None:
        shape[how.dim] *= _place(name)[1]
    return tuple(shape)


def cut(name: str, whole: Tensor, config: Config) -> Tensor:
    """This rank's part of a whole tensor."""
    how = cut_of(name, config)
    if how is None:
        return whole
    rank, ranks = _place(name)
    unit = whole.shape[how.dim] // sum(how.pieces)
    pieces = whole.split([unit * piece for piece in how.pieces], how.dim)
    return torch.cat([piece.chunk(ranks, how.dim)[rank] for piece in pieces], how.dim)


def flat_index(name: str, local: torch.Size, config: Config) -> Tensor:
    """Where this rank's elements lie in the whole tensor, both flattened."""
    shape = whole_shape(name, local, config)
    return cut(name, torch.arange(math.prod(shape)).view(shape), config).flatten()


def named_parameters(model: Any, config: Config, chunk: int) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters with their global names: layers are counted over all stages, experts over all their ranks.

    Stage p of P has the layers p, p + P, ... of the P * V equal runs of layers that V chunks of P stages make.
    """
    from megatron.core import parallel_state

    stage = parallel_state.get_pipeline_model_parallel_rank()
    layers = config.layers // (config.pp * (config.vpp or 1))
    first_layer = (chunk * config.pp + stage) * layers
    first_expert = parallel_state.get_expert_model_parallel_rank() * (config.experts // config.ep)

    def plus(offset: int) -> Any:
        return lambda match: f"{match[1]}{int(match[2]) + offset}"

    for local, param in model.named_parameters():
        name = re.sub(r"^(decoder\.layers\.)(\d+)", plus(first_layer), local)
        name = re.sub(r"(\.local_experts\.)(\d+)", plus(first_expert), name)
        if config.tied and name == "output_layer.weight":
            name = "embedding.word_embeddings.weight"
        yield name, param
