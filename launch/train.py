"""Train a small GPT on real text under any parallel layout, with any clipping rule, through a fault if you like.

    torchrun --nproc-per-node 2 -m launch.train --parallel fsdp --clip adagc --gamma-init median

Each neighbouring module owns one thing (model, data, parallel, clipping, faults, metrics); this one tells the story.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import platform
from typing import Any, Literal

import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn

import dist_clip
from launch.clipping import ClipConfig, build_clipper
from launch.data import Corpus, DataConfig, load_corpus
from launch.faults import FaultConfig, add_garbage, corrupt_batch
from launch.metrics import LogConfig, RunLog, global_mean
from launch.model import ModelConfig, build_model
from launch.parallel import Device, Layout, ParallelConfig, parallelize, process_group


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule."""

    steps: int = 300
    """Optimizer steps."""
    batch_size: int = 8
    """Sequences in an optimizer step, all ranks and micro-batches together."""
    accumulate: int = 1
    """Micro-batches that a rank's share of the batch is taken in (gradient accumulation; the pipeline's under pp)."""
    lr: float = 3e-3
    """Peak learning rate."""
    lr_warmup_steps: int = 50
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up."""
    min_lr: float = 0.1
    """cosine: where the learning rate ends, as a share of its peak."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""
    weight_decay: float = 0.1
    """On matrices; layer norms have none."""
    bf16: bool = False
    """Forward pass under bf16 autocast; parameters and gradients stay fp32."""
    validate_every: int = 0
    """Steps between validations; 0 for one at the end."""
    validation_batches: int = 16
    """Batches of a validation."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "validation_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    clip: ClipConfig = dataclasses.field(default_factory=ClipConfig)
    fault: FaultConfig = dataclasses.field(default_factory=FaultConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    device: Device = "auto"
    """cpu with gloo, or cuda with nccl; auto: cuda where there is a GPU for each rank."""
    seed: int = 0
    """Of the initial weights, the batches and the faults; none of them depends on the layout."""


def train(cfg: Config, device: torch.device) -> None:
    """One run. Needs a process group; every rank calls it alike."""
    corpus = load_corpus(cfg.data, cfg.model.seq_len)
    check_same_data(corpus)

    model = build_model(cfg.model, cfg.seed)
    names = [name for name, _ in model.named_parameters()]
    cfg.fault.check(names)
    size = sum(param.numel() for param in model.parameters())
    layout = parallelize(
        model,
        cfg.parallel,
        device,
        batch_size=cfg.optim.batch_size,
        accumulate=cfg.optim.accumulate,
        bf16=cfg.optim.bf16,
    )
    optimizer = build_optimizer(layout.module, cfg.optim)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(lr_share, cfg.optim))
    clipper = build_clipper(layout, cfg.clip)

    with RunLog(cfg.log, cfg.optim.steps, device, describe(cfg, corpus, device, size, len(names))) as log:
        for step in range(1, cfg.optim.steps + 1):
            inputs, targets = corpus.batch(step, cfg.optim.batch_size, cfg.model.seq_len, cfg.seed)
            if cfg.fault.active("batch", step):
                inputs, targets = corrupt_batch(inputs, step, cfg.seed)

            loss = layout.forward_backward(layout.rows(inputs), layout.rows(targets))
            if cfg.fault.active("grad", step):
                add_garbage(layout.module.named_parameters(), cfg.fault, cfg.seed)

            # After the whole batch's gradient is there (accumulated and reduced), before the optimizer looks at it.
            report = clipper.clip_()
            # "skip" asks the host to look at a flag, which waits for the device; the other choices do not.
            if cfg.clip.nonfinite != "skip" or not report.nonfinite:
                optimizer.step()
            optimizer.zero_grad()

            log.step(step, loss, report, optimizer.param_groups[0]["lr"], cfg.fault.active(cfg.fault.fault, step))
            schedule.step()
            if step == cfg.optim.steps or (cfg.optim.validate_every and step % cfg.optim.validate_every == 0):
                log.validation(step, validate(layout, corpus, cfg))


def build_optimizer(module: nn.Module, cfg: OptimConfig) -> torch.optim.AdamW:
    params = list(module.parameters())
    groups = [
        {"params": [param for param in params if param.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [param for param in params if param.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=cfg.lr, betas=cfg.betas)


def lr_share(cfg: OptimConfig, done: int) -> float:
    """Learning rate of the step after `done` steps, as a share of its peak."""
    if done < cfg.lr_warmup_steps:
        return (done + 1) / cfg.lr_warmup_steps
    if cfg.schedule == "constant":
        return 1.0
    progress = (done - cfg.lr_warmup_steps) / max(1, cfg.steps - cfg.lr_warmup_steps)
    return cfg.min_lr + (1 - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def validate(layout: Layout, corpus: Corpus, cfg: Config) -> Tensor:
    """Mean validation loss over all ranks, 0-dim."""
    layout.module.eval()
    batches = corpus.validation_batches(cfg.optim.batch_size, cfg.optim.validation_batches, cfg.model.seq_len)
    losses = [layout.evaluate(layout.rows(inputs), layout.rows(targets)) for inputs, targets in batches]
    layout.module.train()
    known = [loss for loss in losses if loss is not None]
    return global_mean(torch.stack(known).mean() if known else None, layout.device)


def check_same_data(corpus: Corpus) -> None:
    """Ranks on other machines may have another Python, and so another standard library: say so, on every rank."""
    digests: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(digests, corpus.digest)
    for rank, digest in enumerate(digests):
        if digest != digests[0]:
            raise ValueError(f"rank {rank} reads other data (digest {digest}) than rank 0 ({digests[0]}); pass --data")


def describe(cfg: Config, corpus: Corpus, device: torch.device, parameters: int, tensors: int) -> dict[str, Any]:
    """What somebody needs to know to repeat the run."""
    config = dataclasses.asdict(cfg)
    config["data"]["data"], config["log"]["out"] = str(cfg.data.data or "standard library"), str(cfg.log.out)
    return {
        "config": config,
        "policy": cfg.clip.policy().config(),
        "ranks": dist.get_world_size(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "parameters": parameters,
        "tensors": tensors,
        "data": {
            "digest": corpus.digest,
            "files": corpus.files,
            "train_bytes": len(corpus.train),
            "validation_bytes": len(corpus.validation),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "dist_clip": dist_clip.__version__,
        },
    }


def main() -> None:
    cfg = tyro.cli(Config, config=(tyro.conf.OmitArgPrefixes,), description=__doc__)
    with process_group(cfg.device) as device:
        train(cfg, device)


if __name__ == "__main__":
    main()
