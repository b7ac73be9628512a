"""What the tests of Accelerate and transformers share: a tiny GPT-2, its data, and the plain loop that is the oracle."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.distributed as dist
import transformers
from accelerate import state as accelerate_state
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import dist_clip

transformers.logging.set_verbosity_error()

VOCABULARY, LENGTH, WARMUP = 64, 8, 4

Batch = dict[str, Tensor]


def policy() -> dist_clip.Policy:
    return dist_clip.AdaGC(gamma_init="median", warmup_steps=WARMUP)


def make_model(layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=layers, n_head=2, bos_token_id=0, eos_token_id=0
    )
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return transformers.GPT2LMHeadModel(config)


def make_data(examples: int = 64) -> list[Batch]:
    """Random tokens; some labels are left out, so that batches have different numbers of them."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (examples, LENGTH), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.2, -100, ids)
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]


def collate(examples: Sequence[Batch]) -> Batch:
    return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}


def plain_loop(
    model: nn.Module,
    steps: Sequence[Sequence[Batch]],
    spoil: Callable[[int, nn.Module], None] = lambda step, model: None,
    loss_of: Callable[[Any, Batch, Tensor], Tensor] = lambda model, batch, labels: (
        model(**batch, num_items_in_batch=labels).loss
    ),
    **options: Any,
) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Train by hand on the micro-batches of each step. Returns whole parameters, and of each step scales and norm.

    The loss is the mean over all labels of the step, on all ranks.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    clipper = dist_clip.GradClipper(model, **{"policy": policy(), **options})
    scales, norms = [], []
    world = dist.get_world_size() if dist.is_initialized() else 1
    for step, micro_batches in enumerate(steps):
        labels = torch.stack([(batch["labels"] != -100).sum() for batch in micro_batches]).sum()
        if world > 1:
            dist.all_reduce(labels)
        for i, batch in enumerate(micro_batches):
            synchronise(model, i == len(micro_batches) - 1)
            (loss_of(model, batch, labels) * world).backward()
        spoil(step, model)
        report = clipper.clip_()
        scales.append(report.scales.clone())
        norms.append(report.global_norm.item())
        if not report.skip:
            optimizer.step()
        optimizer.zero_grad()
    return whole_parameters(model), scales, norms


def synchronise(model: Any, now: bool) -> None:
    """Have DDP or FSDP2 reduce gradients in the backward that follows, or later."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model.require_backward_grad_sync = now
    elif hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(now)


def sharded(model: Any) -> Any:
    """The model under FSDP2, with units of one block, as the tests have Accelerate make it."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole_parameters(model: nn.Module) -> list[Tensor]:
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for p in model.parameters()]


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@contextlib.contextmanager
def launched(fsdp: bool = False) -> Iterator[None]:
    """Tell Accelerate what a launcher would: ranks and addresses, and, for FSDP, that this is no CPU.

    With several CPU processes Accelerate ignores an FSDP plugin and trains DDP. FSDP2 itself runs on CPUs.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": 1}
    before = dict(os.environ)
    os.environ.update({key: str(value) for key, value in own.items()}, MASTER_ADDR="127.0.0.1")
    init = accelerate_state.AcceleratorState.__init__

    def told(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin
            accelerate_state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    if fsdp:
        accelerate_state.AcceleratorState.__init__ = told
    try:
        yield
    finally:
        accelerate_state.AcceleratorState.__init__ = init
        forget_accelerate()
        os.environ.clear()
        os.environ.update(before)


def forget_accelerate() -> None:
    """Drop what Accelerate keeps for a process, so that the next test starts afresh."""
    accelerate_state.AcceleratorState._reset_state(True)
    accelerate_state.GradientState._reset_state()
