"""The layouts: how the model is laid out over the ranks, and one forward and backward pass under each."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from launch.model import GPT, next_byte_loss, stage_of

Device = Literal["auto", "cpu", "cuda"]
Mode = Literal["ddp", "fsdp", "hsdp", "tp", "tp-fsdp", "pp", "pp-fsdp"]


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How the ranks share the work."""

    parallel: Mode = "ddp"
    """ddp: whole copies. fsdp: shards over all ranks. hsdp: shards within groups, copies across them. tp: each matrix is
    split over all ranks. pp: the layers are split over all ranks. tp-fsdp, pp-fsdp: groups of tp / pp, FSDP across them."""
    shard_degree: int = 2
    """hsdp: ranks that share one copy."""
    tp_degree: int = 2
    """tp-fsdp: ranks that share a matrix."""
    pp_degree: int = 2
    """pp-fsdp: pipeline stages."""


@contextlib.contextmanager
def process_group(kind: Device) -> Iterator[torch.device]:
    """Join the ranks that torchrun started (or be the only one, without torchrun) and yield this rank's device."""
    local_rank, local_ranks = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if kind == "auto":  # nccl refuses two ranks on one GPU
        kind = "cuda" if torch.cuda.device_count() >= local_ranks else "cpu"
    if kind == "cuda" and torch.cuda.device_count() < local_ranks:
        raise ValueError(
            f"--device cuda: {local_ranks} ranks here need as many GPUs, found {torch.cuda.device_count()}"
        )
    backend, device = "gloo", torch.device("cpu")
    if kind == "cuda":
        backend, device = "nccl", torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield device
    dist.destroy_process_group()  # not after an error: gloo then waits for peers that never come


def end_program() -> NoReturn:
    """End this process with status 0, without Python's own shutdown.

    A thread of gloo's may still release a collective's tensors, for which it needs the interpreter. Python before 3.14 ends
    a thread that asks for it during shutdown, and C++ turns that into an abort ("terminate called without an active
    exception"). DTensors keep the process group alive, so that destroying it does not wait for these threads.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@dataclasses.dataclass(kw_only=True)
class ParallelModel:
    """The laid-out model on this rank, its share of the batch, and one pass over it."""

    module: GPT
    """What this rank holds of the model: shards of it, a pipeline stage of it, or all of it."""
    device: torch.device
    dp_rank: int = 0
    dp_size: int = 1
    """Ranks that see different rows of the batch, and which of them this is."""
    micro_batches: int
    """Pieces that the rows go through in, one after the other."""
    bf16: bool
    pp_group: dist.ProcessGroup | None = None
    """Ranks that hold the other stages of this rank's pipeline."""

    def rows(self, batch: Tensor) -> Tensor:
        """This rank's rows of a global batch, on its device."""
        return batch.chunk(self.dp_size)[self.dp_rank].to(self.device)

    def forward_backward(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        """Accumulate the gradient of the mean loss over the global batch; return this rank's mean loss, 0-dim.

        None from a pipeline stage that is not the last one, for which there is no loss.
        """
        raise NotImplementedError

    def evaluate(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        """This rank's mean loss without a gradient; None as above."""
        raise NotImplementedError

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


@dataclasses.dataclass(kw_only=True)
class WholeDepth(ParallelModel):
    """DDP, FSDP2, HSDP, TP and TP + FSDP2: every rank runs all the layers."""

    forward: nn.Module

    def forward_backward(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        total = torch.zeros((), device=self.device)
        pieces = zip(inputs.chunk(self.micro_batches), targets.chunk(self.micro_batches), strict=True)
        for i, (x, y) in enumerate(pieces, start=1):
            with self._reduce_gradients(i == self.micro_batches):
                with self.autocast():
                    # The mean over micro-batches is made here; the mean over ranks by DDP's and FSDP's reductions.
                    loss = next_byte_loss(self.forward(x), y) / self.micro_batches
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        with self.autocast():
            return next_byte_loss(self.forward(inputs), targets)

    def _reduce_gradients(self, wanted: bool) -> contextlib.AbstractContextManager[None]:
        """Reduce over the data-parallel ranks once a step, with the last micro-batch, not with each."""
        if isinstance(self.forward, FSDPModule):
            self.forward.set_requires_gradient_sync(wanted)
        elif isinstance(self.forward, DistributedDataParallel) and not wanted:
            return self.forward.no_sync()
        return contextlib.nullcontext()


@dataclasses.dataclass(kw_only=True)
class Pipeline(ParallelModel):
    """PP and PP + FSDP2: each rank runs one stage; the pipeline's micro-batches are the gradient accumulation."""

    stage: PipelineStage
    schedule: Schedule1F1B

    def forward_backward(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        return self._run(self.schedule.step, inputs, targets)

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        return self._run(self.schedule.eval, inputs, targets)

    def _run(self, run: Callable[..., Any], inputs: Tensor, targets: Tensor) -> Tensor | None:
        losses: list[Tensor] = []
        args = (inputs,) if self.stage.is_first else ()
        with self.autocast():
            if not self.stage.is_last:
                run(*args)
                return None
            run(*args, target=targets, losses=losses)
        return torch.stack([loss.detach() for loss in losses]).mean()


def parallelize(
    model: GPT, cfg: ParallelConfig, device: torch.device, *, batch_size: int, accumulate: int, bf16: bool
) -> ParallelModel:
    """Lay `model` (whole, on CPU, alike on every rank) out over all ranks as `cfg` says.

    `batch_size` rows make a global batch, which every rank takes in `accumulate` pieces; a pipeline takes at least one
    piece for each of its stages.
    """
    world = dist.get_world_size()
    model.to(device)

    def mesh_of(**dims: int) -> DeviceMesh:
        return init_device_mesh(device.type, tuple(dims.values()), mesh_dim_names=tuple(dims))

    def whole_depth(forward: nn.Module, dp_rank: int = 0, dp_size: int = 1) -> WholeDepth:
        check_batch(batch_size, dp_size, accumulate)
        common: dict[str, Any] = {"device": device, "micro_batches": accumulate, "bf16": bf16}
        return WholeDepth(module=model, forward=forward, dp_rank=dp_rank, dp_size=dp_size, **common)

    match cfg.parallel:
        case "ddp":
            ddp = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
            return whole_depth(ddp, dist.get_rank(), world)
        case "fsdp":
            return whole_depth(shard(model, mesh_of(dp=world)), dist.get_rank(), world)
        case "hsdp":
            replicas = groups_of(cfg.shard_degree, world, "--shard-degree")
            mesh = mesh_of(replicate=replicas, shard=cfg.shard_degree)
            return whole_depth(shard(model, mesh), dist.get_rank(), world)  # copies see different rows, too
        case "tp":
            return whole_depth(split_matrices(model, mesh_of(tp=world)))
        case "tp-fsdp":
            mesh = mesh_of(dp=groups_of(cfg.tp_degree, world, "--tp-degree"), tp=cfg.tp_degree)
            # TP first: FSDP2 then shards what is left of each matrix on a rank.
            shard(split_matrices(model, mesh["tp"]), mesh["dp"])
            # True of the logits, and harmless: nothing writes to them in place.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
            return whole_depth(model, mesh.get_local_rank("dp"), mesh["dp"].size())
        case "pp" | "pp-fsdp":
            stages = world if cfg.parallel == "pp" else cfg.pp_degree
            mesh = mesh_of(dp=groups_of(stages, world, "--pp-degree"), pp=stages)
            module = stage_of(model, mesh.get_local_rank("pp"), stages)
            if cfg.parallel == "pp-fsdp":
                shard(module, mesh["dp"])
            micro_batches = max(accumulate, stages)
            check_batch(batch_size, mesh["dp"].size(), micro_batches)
            group = mesh.get_group("pp")
            stage = PipelineStage(module, mesh.get_local_rank("pp"), stages, device, group=group)
            return Pipeline(
                module=module,
                device=device,
                dp_rank=mesh.get_local_rank("dp"),
                dp_size=mesh["dp"].size(),
                micro_batches=micro_batches,
                bf16=bf16,
                pp_group=group,
                stage=stage,
                # scale_grads, on by default, makes the mean over micro-batches.
                schedule=Schedule1F1B(stage, micro_batches, loss_fn=next_byte_loss),
            )


def shard(model: GPT, mesh: DeviceMesh) -> GPT:
    """FSDP2: each block is gathered by itself, just in time; on a 2-D mesh (replicate, shard) this is HSDP."""
    for block in model.blocks.values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)  # changes the class of `model`, which stays the same object
    return model


def split_matrices(model: GPT, mesh: DeviceMesh) -> GPT:
    """Tensor parallelism with sequence parallelism: between the matrices, activations are split along the sequence.

    The layer norms' weights are whole on every rank, but each rank has seen its part of the sequence only: their gradients
    are Partial, sums that are still to be made. The clipper makes them.
    """
    heads, seq_len = model.cfg.heads, model.cfg.seq_len
    if heads % mesh.size() or seq_len % mesh.size():
        raise ValueError(f"heads={heads} and seq_len={seq_len} must be multiples of the TP degree {mesh.size()}")
    plan: dict[str, ParallelStyle] = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "blocks.*.attn_norm": SequenceParallel(),
        "blocks.*.attn": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
        "blocks.*.attn.w[qkv]": ColwiseParallel(),
        "blocks.*.attn.wo": RowwiseParallel(output_layouts=Shard(1)),
        "blocks.*.mlp_norm": SequenceParallel(),
        "blocks.*.mlp": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
        "blocks.*.mlp.up": ColwiseParallel(),
        "blocks.*.mlp.down": RowwiseParallel(output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, plan)
    return model


def groups_of(degree: int, world: int, flag: str) -> int:
    """How many groups of `degree` ranks `world` makes."""
    if degree < 1 or world % degree:
        raise ValueError(f"{flag} must divide the number of ranks, got {degree} for {world} ranks")
    return world // degree


def check_batch(batch_size: int, dp_size: int, micro_batches: int) -> None:
    # Pieces of different sizes would make the mean of their means another number than the global batch's mean.
    if batch_size % (dp_size * micro_batches):
        raise ValueError(
            f"--batch-size must be a multiple of data-parallel ranks x micro-batches = {dp_size} x {micro_batches}, "
            f"got {batch_size}"
        )
