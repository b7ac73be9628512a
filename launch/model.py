"""The model: a small byte-level GPT whose parameter names are the same whole, sharded or cut into pipeline stages."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB_SIZE = 256  # the values of a byte


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of the GPT."""

    dim: int = 64
    """Width of the residual stream."""
    layers: int = 2
    """Number of transformer blocks."""
    heads: int = 4
    """Attention heads; must divide dim, with an even head size."""
    seq_len: int = 128
    """Bytes in a training sequence."""
    zero_init: bool = False
    """Start the projections into the residual stream (wo, down) at zero: at first all other blocks' weights have no
    gradient."""

    def __post_init__(self) -> None:
        for name in ("dim", "layers", "heads", "seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(f"dim / heads must be an even whole number, got dim={self.dim}, heads={self.heads}")


class Attention(nn.Module):
    """Causal self-attention. The number of heads is read off the projections' output: under TP it is this rank's share."""

    cos: Tensor
    sin: Tensor

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.head_dim = cfg.dim // cfg.heads
        self.wq = nn.Linear(cfg.dim, cfg.dim, bias=False)
        self.wk = nn.Linear(cfg.dim, cfg.dim, bias=False)
        self.wv = nn.Linear(cfg.dim, cfg.dim, bias=False)
        self.wo = nn.Linear(cfg.dim, cfg.dim, bias=False)
        cos, sin = rotary_table(cfg.seq_len, self.head_dim)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        q, k = rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(cfg.dim, 4 * cfg.dim, bias=False)
        self.down = nn.Linear(4 * cfg.dim, cfg.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(cfg.dim, bias=False)
        self.attn = Attention(cfg)
        self.mlp_norm = nn.LayerNorm(cfg.dim, bias=False)
        self.mlp = MLP(cfg)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Pre-norm GPT with rotary positions and an untied head.

    `stage_of` cuts it into pipeline stages. A stage lacks `embed` (all but the first) or `norm` and `head` (all but the
    last), and its blocks keep their global numbers as keys, so that a tensor has one name under every layout.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed: nn.Module | None = nn.Embedding(VOCAB_SIZE, cfg.dim)
        self.blocks = nn.ModuleDict({str(i): Block(cfg) for i in range(cfg.layers)})
        self.norm: nn.Module | None = nn.LayerNorm(cfg.dim, bias=False)
        self.head: nn.Module | None = nn.Linear(cfg.dim, VOCAB_SIZE, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Bytes [batch, seq] int64 (or, in a later stage, activations [batch, seq, dim]) to logits or activations."""
        if self.embed is not None:
            x = self.embed(x)
        for block in self.blocks.values():
            x = block(x)
        if self.norm is not None and self.head is not None:
            x = self.head(self.norm(x))
        return x


def build_model(cfg: ModelConfig, seed: int) -> GPT:
    """The whole model on CPU, the same weights on every rank whatever the layout: it is sharded afterwards."""
    model = GPT(cfg)
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        if param.ndim == 1:
            nn.init.ones_(param)
            continue
        std = 0.02
        if name.endswith(("wo.weight", "down.weight")):  # GPT-2: keeps the residual stream's variance as layers add up
            std = 0.0 if cfg.zero_init else std / (2 * cfg.layers) ** 0.5
        nn.init.normal_(param, std=std, generator=generator)
    return model


def stage_of(model: GPT, stage: int, num_stages: int) -> GPT:
    """Cut `model`, in place, down to one pipeline stage of `num_stages`, blocks shared out as evenly as they go."""
    numbers = list(model.blocks)
    if len(numbers) < num_stages:
        raise ValueError(f"{num_stages} pipeline stages need as many layers, got layers={len(numbers)}")
    first, last = (len(numbers) * s // num_stages for s in (stage, stage + 1))
    for number in numbers[:first] + numbers[last:]:
        del model.blocks[number]
    if stage > 0:
        model.embed = None
    if stage < num_stages - 1:
        model.norm = model.head = None
    return model


def next_byte_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per byte, in fp32 whatever autocast made of the logits."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def rotary_table(seq_len: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, [seq, head_dim / 2] each (RoFormer, arXiv 2104.09864)."""
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angle = torch.outer(torch.arange(seq_len), frequency)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the two halves of each head by their position's angles. x: [batch, heads, seq, head_dim]."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[: x.shape[-2]], sin[: x.shape[-2]]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
