"""Owns the small model that every layout test trains, its data, and its single-process training step.

The model has what makes sharding awkward: tensors with fewer elements than ranks, widths that no world size divides, a
zero-initialised projection (so that another tensor's first gradient is exactly zero), tied weights, frozen tensors,
tensors without a gradient on some steps, and experts. FQNs are the same under every layout: blocks keep their global
number on a pipeline stage.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH, LENGTH = 8, 4


@dataclass(frozen=True)
class Config:
    width: int = 8
    hidden: int = 16
    vocab: int = 12
    blocks: int = 2
    experts: int = 0
    tied: bool = False
    odd: bool = False  # tensors with fewer elements than ranks
    aux: bool = False  # tensors that get a gradient on some steps only
    frozen: tuple[str, ...] = ()


class Experts(nn.Module):
    """Expert e serves the tokens whose id is e modulo the number of experts; all weights are stacked along dim 0."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(config.experts, config.width, config.hidden))
        self.down = nn.Parameter(torch.empty(config.experts, config.hidden, config.width))

    def forward(self, x: Tensor, route: Tensor, first: int = 0) -> Tensor:
        """Sum over the local experts, numbered from `first`, of their output on their tokens; 0 for other tokens."""
        out = torch.zeros_like(x)
        for local, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            mine = (route == first + local).unsqueeze(-1).to(x.dtype)
            out = out + mine * (F.gelu(x @ up) @ down)
        return out


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, config.hidden)
        self.down = nn.Linear(config.hidden, config.width)
        self.experts = Experts(config) if config.experts else None

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Odd(nn.Module):
    """A gain of 3 elements and a shift of 1."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(3))
        self.shift = nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[..., :3] * self.gain, x[..., 3:] + self.shift], dim=-1)


class Aux(nn.Module):
    """`late` is first used at step 7, after every warm-up in these tests; `alternate` at every odd step."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.late = nn.Linear(config.width, config.width)
        self.alternate = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, step: int) -> Tensor:
        if step >= 7:
            x = x + self.late(x)
        if step % 2 == 1:
            x = x + self.alternate(x)
        return x


class Net(nn.Module):
    """Token ids -> logits. A pipeline stage keeps a part of the modules; what it lacks is None."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.is_first = self.is_last = True
        self.step = 0
        self.embed: nn.Embedding | None = nn.Embedding(config.vocab, config.width)
        self.odd = Odd() if config.odd else None
        self.blocks = nn.ModuleDict({str(i): Block(config) for i in range(config.blocks)})
        self.aux = Aux(config) if config.aux else None
        self.norm: nn.LayerNorm | None = nn.LayerNorm(config.width)
        self.head: nn.Linear | None = nn.Linear(config.width, config.vocab, bias=not config.tied)
        if config.tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        route = x % self.config.experts if self.config.experts else None
        if self.is_first and self.embed is not None:
            x = self.embed(x)
        if self.odd is not None:
            x = self.odd(x)
        for block in self.blocks.values():
            x = block(x)
            if block.experts is not None:
                x = x + block.experts(x, route)
        if self.aux is not None:
            x = self.aux(x, self.step)
        if self.norm is not None:
            x = self.norm(x)
        if self.is_last and self.head is not None:
            x = self.head(x)
        return x

    def part(self, stage: int, stages: int) -> Net:
        """This model's pipeline stage `stage` of `stages`. A tied embedding lives on the first and on the last one."""
        net = copy.deepcopy(self)
        names = list(net.blocks)
        per_stage = len(names) // stages
        for i, name in enumerate(names):
            if i // per_stage != stage:
                del net.blocks[name]
        net.is_first, net.is_last = stage == 0, stage == stages - 1
        if not net.is_first:
            net.odd = None
            if not (net.is_last and self.config.tied):
                net.embed = None
        if not net.is_last:
            net.norm = net.head = net.aux = None
        return net


def make_net(config: Config, dtype: torch.dtype = torch.float32) -> Net:
    """The model, initialised alike in every process."""
    net = Net(config).to(torch.float64)
    generator = torch.Generator().manual_seed(1234)
    with torch.no_grad():
        for name, param in net.named_parameters():
            noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            if param.dim() == 1:
                offset = 1.0 if name.endswith(("norm.weight", "gain")) else 0.0
                param.copy_(offset + 0.1 * noise)
            else:
                param.copy_(0.5 * noise)
        net.blocks[str(config.blocks - 1)].down.weight.zero_()
    for name, param in net.named_parameters():
        param.requires_grad_(name not in config.frozen)
    return net.to(dtype)


def make_index_net(config: Config) -> Net:
    """The model with every element's value its flat index: shards of its parameters tell which piece they are."""
    net = make_net(config, torch.float64)
    with torch.no_grad():
        for param in net.parameters():
            param.copy_(torch.arange(param.numel()).view_as(param))
    return net


def batch(config: Config, step: int) -> tuple[Tensor, Tensor]:
    """The whole batch of a step: token ids and targets, each [BATCH, LENGTH]."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(config.vocab, (BATCH, LENGTH), generator=generator)
    # Learnable most of the time, so that norms change over the steps as they do in training.
    noise = torch.randint(config.vocab, (BATCH, LENGTH), generator=generator)
    keep = torch.rand(BATCH, LENGTH, generator=generator) < 0.8
    return tokens, torch.where(keep, (5 * tokens + 1) % config.vocab, noise)


def spike(step: int) -> float:
    """Factor on the loss of a step: injected spikes, after the warm-up of every policy in these tests.

    One alone, and as many in a row as end the patience of LogClip in these tests.
    """
    return 50.0 if step in (9, 11, 12, 13) else 1.0


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, in float32 at least."""
    if logits.dtype == torch.bfloat16:
        logits = logits.float()
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def backward(net: nn.Module, config: Config, step: int) -> None:
    """One step's gradients in a single process, on the whole batch."""
    tokens, targets = batch(config, step)
    net.step = step
    (loss_of(net(tokens), targets) * spike(step)).backward()


def named_once(modules: list[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """Named parameters of the modules under clean FQNs, each once."""
    for module in modules:
        for name, param in module.named_parameters():
            yield clean(name), param


def clean(name: str) -> str:
    """A name without what DDP and FSDP1 put into it."""
    return name.removeprefix("module.").replace("_fsdp_wrapped_module.", "")
