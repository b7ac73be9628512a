"""Train a small GPT on real text under any parallel layout, with any clipping rule, through a fault if you like.

    torchrun --nproc-per-node 2 -m launch.train --parallel fsdp --clip logclip --logclip-ratio 3

Each neighbouring module owns one thing (model, data, parallel, optim, clipping, faults, snapshot, metrics); this one
tells the story.
"""

from __future__ import annotations

import dataclasses
import platform
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import tyro
from torch import Tensor

import dist_clip
from dist_clip.policies.command_line import import_modules
from launch.clipping import ClipConfig, build_clipper, config_from_flags, flags_class
from launch.data import Corpus, DataConfig, load_corpus
from launch.faults import FaultConfig, corrupt_batch, corrupt_gradients, wrong_lr
from launch.metrics import LogConfig, RunLog, global_mean
from launch.model import ModelConfig, build_model
from launch.optim import OptimConfig, build_optimizer, build_schedule
from launch.parallel import Device, ParallelConfig, ParallelModel, end_program, parallelize, process_group
from launch.snapshot import SnapshotConfig, Training


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    clip: ClipConfig = dataclasses.field(default_factory=ClipConfig)
    fault: FaultConfig = dataclasses.field(default_factory=FaultConfig)
    snapshot: SnapshotConfig = dataclasses.field(default_factory=SnapshotConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    device: Device = "auto"
    """cpu with gloo, or cuda with nccl; auto: cuda where there is a GPU for each rank."""
    seed: int = 0
    """Of the initial weights, the batches and the faults; none of them depends on the layout."""
    verify: bool = False
    """At the first step, compare all norms with those of the whole gradients; exit with status 1 if any differs."""


def train(cfg: Config, device: torch.device, corpus: Corpus | None = None) -> None:
    """One run. Needs a process group; every rank calls it alike.

    `corpus`: what `cfg.data` says, if the caller has read it already.
    """
    cfg.snapshot.check(cfg.parallel.parallel, cfg.optim.steps)
    corpus = load_corpus(cfg.data, cfg.model.seq_len) if corpus is None else corpus
    check_same_data(corpus)

    model = build_model(cfg.model, cfg.seed)
    names = [name for name, _ in model.named_parameters()]
    cfg.fault.check(names)
    size = sum(param.numel() for param in model.parameters())
    parallel = parallelize(
        model,
        cfg.parallel,
        device,
        batch_size=cfg.optim.batch_size,
        accumulate=cfg.optim.accumulate,
        bf16=cfg.optim.bf16,
    )
    optimizer = build_optimizer(parallel.module, cfg.optim)
    schedule = build_schedule(optimizer, cfg.optim)
    clipper = build_clipper(parallel, cfg.clip)
    training = Training(parallel, optimizer, schedule, clipper)
    done = 0
    if cfg.snapshot.from_snapshot is not None:
        done = training.load(cfg.snapshot.from_snapshot, identity(cfg, corpus))
        cfg.fault.check_start(done + 1)

    header = describe(cfg, corpus, device, size, len(names))
    with RunLog(cfg.log, cfg.optim.steps - done, header, clipper) as log:
        for step in range(done + 1, cfg.optim.steps + 1):
            anew = step == cfg.data.other_batch
            source, rows = cfg.fault.source(step), cfg.fault.rows(cfg.optim.batch_size, step)
            inputs, targets = corpus.batch(source, rows, cfg.model.seq_len, cfg.seed, anew=anew)
            inputs, targets = corrupt_batch(inputs, targets, cfg.fault, step, cfg.seed)

            loss = parallel.forward_backward(parallel.rows(inputs), parallel.rows(targets))
            corrupt_gradients(parallel.module.named_parameters(), cfg.fault, step, cfg.seed)

            if cfg.verify and step == done + 1:
                verify(clipper)

            # After the whole batch's gradient is there (accumulated and reduced), before the optimizer looks at it.
            report = clipper.clip_(loss=loss)
            if cfg.fault.answered("zero", step):
                optimizer.zero_grad(set_to_none=False)
            # To skip, the host has to look at a flag, which waits for the device.
            if not (cfg.fault.answered("skip", step) or (clipper.may_skip and report.skip)):
                with wrong_lr(optimizer, cfg.fault, step):
                    optimizer.step()
            optimizer.zero_grad()

            lr, fault = optimizer.param_groups[0]["lr"], cfg.fault.at(step)
            log.step(step, loss, lr, fault)
            schedule.step()
            if step == cfg.snapshot.save_at:
                training.save(cfg.snapshot.save_to, step, identity(cfg, corpus))
            if step == cfg.optim.steps or (cfg.optim.validate_every and step % cfg.optim.validate_every == 0):
                log.validation(step, validate(parallel, corpus, cfg))


def validate(parallel: ParallelModel, corpus: Corpus, cfg: Config) -> Tensor:
    """Mean validation loss over all ranks, 0-dim."""
    parallel.module.eval()
    batches = corpus.validation_batches(cfg.optim.batch_size, cfg.optim.validation_batches, cfg.model.seq_len)
    losses = [parallel.evaluate(parallel.rows(inputs), parallel.rows(targets)) for inputs, targets in batches]
    parallel.module.train()
    known = [loss for loss in losses if loss is not None]
    return global_mean(torch.stack(known).mean() if known else None, parallel.device)


def verify(clipper: dist_clip.GradClipper) -> None:
    """Print what `clipper.verify()` finds, on rank 0. Exits on every rank if anything differs."""
    report = clipper.verify()
    if dist.get_rank() == 0:
        print(report, flush=True)
    if not report.ok:
        raise SystemExit(1)


def check_same_data(corpus: Corpus) -> None:
    """Ranks on other machines may have another Python, and so another standard library: say so, on every rank."""
    digests: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(digests, corpus.digest)
    for rank, digest in enumerate(digests):
        if digest != digests[0]:
            raise ValueError(f"rank {rank} reads other data (digest {digest}) than rank 0 ({digests[0]}); pass --data")


def identity(cfg: Config, corpus: Corpus) -> dict[str, str]:
    """What runs that branch off one snapshot have in common."""
    parts = {name: str(getattr(cfg, name)) for name in ("model", "optim", "clip", "seed")}
    return {**parts, "data": corpus.digest, "ranks": str(dist.get_world_size())}


def describe(cfg: Config, corpus: Corpus, device: torch.device, parameters: int, tensors: int) -> dict[str, Any]:
    """What somebody needs to know to repeat the run."""
    config = dataclasses.asdict(cfg)
    config["optim"] |= {"lr": cfg.optim.peak_lr, "betas": cfg.optim.used_betas}
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


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Read the options from `arguments`, default those of the command line. Exits where they are wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        import_modules("--policy-module", arguments)
        clip = flags_class()
        fields = [("clip", clip, dataclasses.field(default_factory=clip))]
        options = dataclasses.make_dataclass("Options", fields, bases=(Config,), frozen=True)
        parsed: Any = tyro.cli(options, args=arguments, config=(tyro.conf.OmitArgPrefixes,), description=__doc__)
        kept = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(Config)}
        return Config(**kept | {"clip": config_from_flags(parsed.clip)})
    except (ImportError, ValueError, TypeError) as error:
        raise SystemExit(f"launch.train: {error}") from error


def main() -> None:
    cfg = parse()
    with process_group(cfg.device) as device:
        train(cfg, device)
    end_program()


if __name__ == "__main__":
    main()
