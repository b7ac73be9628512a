"""Train a small GPT on one device and step inside backward: gradients are clipped, stepped with and freed, bucket by bucket.

    python -m launch.in_backward --clip "logclip ratio=3" --buckets 8
    python -m launch.in_backward --order after      # the same training in the usual order, to compare

No more than a bucket of gradients is alive at a time. docs/in-backward.md says when that saves memory and when it does not.
"""

from __future__ import annotations

import dataclasses
import functools
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

import dist_clip
from launch.data import DataConfig, load_corpus
from launch.model import ModelConfig, build_model, next_byte_loss
from launch.optim import OptimConfig, build_optimizer, build_schedule


class StepInBackward:
    """Steps `optimizer` inside backward with clipped gradients, a bucket of parameters at a time.

    The optimizer stays one object with one state dict: while a bucket is stepped, its param_groups hold that bucket's
    parameters only. It must not write to its param_groups, as Schedule-Free does: a step would then write once a bucket.

    A step whose rule needs the norm of all gradients (a global warm-up; GlobalNorm always) runs forward and backward twice
    on the same batch with the same random numbers: the first measures, the second steps. So does the first step of all,
    because the first backward finds a weight whose gradient arrives in parts before anything has moved.

    Args:
        optimizer: a torch optimizer over the parameters; each must be in the clipper's target.
        clipper: clips them.
        buckets: number of groups of parameters, of about the same size.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, clipper: dist_clip.GradClipper, *, buckets: int = 8) -> None:
        self._optimizer, self._clipper = optimizer, clipper
        self._measuring = False
        self._rehearsed = False
        params = [param for group in optimizer.param_groups for param in group["params"] if param.requires_grad]
        # In the order of the clipper's tensors backwards, which is about the order in which gradients arrive.
        order = {id(tensor.param): i for i, tensor in enumerate(clipper.layout)}
        params.sort(key=lambda param: -order.get(id(param), -1))
        self._buckets = [_Bucket(part) for part in split_evenly(params, buckets)]
        self._handles = [
            param.register_post_accumulate_grad_hook(functools.partial(self._arrived, bucket))  # type: ignore[no-untyped-call]
            for bucket in self._buckets
            for param in bucket.params
        ]

    def step(self, backward: Callable[[], Tensor]) -> tuple[Tensor, dist_clip.ClipReport]:
        """Take one step, and return what `backward` returned, and the clipper's report.

        Args:
            backward: computes the loss of the step's batch and calls its backward once. It may be called twice, and must
                do the same both times; layers that count batches (BatchNorm) see them twice.
        """
        if not (self._rehearsed and self._clipper.can_clip_early):
            with torch.random.fork_rng():
                self._run(backward, measuring=True)
            self._rehearsed = True
        loss = self._run(backward, measuring=False)
        return loss, self._clipper.clip_()

    def remove(self) -> None:
        """Take the hooks off the parameters."""
        for handle in self._handles:
            handle.remove()

    def _run(self, backward: Callable[[], Tensor], *, measuring: bool) -> Tensor:
        self._measuring = measuring
        for bucket in self._buckets:
            bucket.ready, bucket.finished = [], False
        result = backward()
        for bucket in self._buckets:  # some of its gradients are missing in this step
            self._finish(bucket)
        return result

    def _arrived(self, bucket: _Bucket, param: Tensor) -> None:
        bucket.ready.append(param)
        # A gradient that arrives again goes to the clipper as well, which knows the tensor's name.
        if len(bucket.ready) == len(bucket.params) or bucket.finished:
            self._finish(bucket)

    def _finish(self, bucket: _Bucket) -> None:
        ready, bucket.ready, bucket.finished = bucket.ready, [], True
        if not ready:
            return
        if self._measuring:
            self._clipper.measure_early_(ready)
        else:
            self._clipper.clip_early_(ready)
            with only(self._optimizer, ready):
                self._optimizer.step()
        for param in ready:
            param.grad = None


class _Bucket:
    """Parameters that are stepped together, and those of them whose gradient has arrived."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = params
        self.ready: list[Tensor] = []
        self.finished = False


class only:
    """Within it, the optimizer's param_groups hold these parameters only; settings are those of the moment."""

    def __init__(self, optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> None:
        self._optimizer, self._ids = optimizer, set(map(id, params))

    def __enter__(self) -> None:
        self._groups = self._optimizer.param_groups
        self._optimizer.param_groups = self._few = [
            {**group, "params": [param for param in group["params"] if id(param) in self._ids]}
            for group in self._groups
        ]

    def __exit__(self, error: object, *_: object) -> None:
        self._optimizer.param_groups = self._groups
        if error is not None:
            return
        for group, few in zip(self._groups, self._few, strict=True):
            written = sorted(key for key, value in few.items() if key != "params" and value is not group.get(key))
            if written:
                raise RuntimeError(
                    f"{type(self._optimizer).__name__} writes {written} to its param_groups at each step, so it cannot step "
                    "a part of its parameters at a time"
                )


def split_evenly(params: Sequence[Tensor], parts: int) -> Iterator[list[Tensor]]:
    """Cut the list into at most `parts` runs of about the same number of elements."""
    total, done, run = sum(param.numel() for param in params), 0, []
    part = 1
    for param in params:
        run.append(param)
        done += param.numel()
        if done * parts >= total * part:
            yield run
            run, part = [], done * parts // total + 1
    if run:
        yield run


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    clip: str = "logclip"
    """The rule as `dist_clip.policy` reads it: its name, and options such as "logclip ratio=3"."""
    order: Literal["in-backward", "after"] = "in-backward"
    """Step inside backward, or after it as usual."""
    buckets: int = 8
    """Groups of parameters that are stepped together."""
    device: str = "cpu"
    """A torch device, such as cuda."""
    seed: int = 0
    """Of the initial weights and the batches."""

    def __post_init__(self) -> None:
        if self.optim.accumulate > 1:
            raise ValueError("--accumulate: the gradient of a micro-batch is not final, and cannot be stepped with")
        if self.optim.optimizer != "adamw":
            raise ValueError(f"--optimizer {self.optim.optimizer} counts its steps in its param_groups; use adamw here")
        if self.buckets < 1:
            raise ValueError(f"--buckets must be at least 1, got {self.buckets}")


def train(cfg: Config, *, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Train, and return the losses, the seconds of each step, the peak of resident memory, the model and the clipper."""
    corpus = load_corpus(cfg.data, cfg.model.seq_len)
    model = build_model(cfg.model, cfg.seed).to(cfg.device)
    optimizer = build_optimizer(model, cfg.optim)
    schedule = build_schedule(optimizer, cfg.optim)
    clipper = dist_clip.GradClipper(model, dist_clip.policy(cfg.clip))
    stepper = StepInBackward(optimizer, clipper, buckets=cfg.buckets) if cfg.order == "in-backward" else None
    losses: list[float] = []
    seconds: list[float] = []
    for step in range(1, cfg.optim.steps + 1):
        inputs, targets = corpus.batch(step, cfg.optim.batch_size, cfg.model.seq_len, cfg.seed)

        def backward(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            with torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.optim.bf16):
                loss = next_byte_loss(model(inputs.to(cfg.device)), targets.to(cfg.device))
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()

        start = time.perf_counter()
        if stepper is not None:
            loss, report = stepper.step(backward)
        else:
            loss, report = backward(), clipper.clip_()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
        schedule.step()
        if step % 10 == 0 or step == cfg.optim.steps:
            log(f"step {step}: loss {losses[-1]:.4f}, {report}")
    return {"losses": losses, "seconds": seconds, "peak": peak_memory(), "model": model, "clipper": clipper}


def peak_memory() -> int:
    """Return the most resident memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    try:
        cfg = tyro.cli(Config, config=(tyro.conf.OmitArgPrefixes,), description=__doc__)
        result = train(cfg)
    except (ValueError, TypeError) as error:
        raise SystemExit(f"launch.in_backward: {error}") from error
    print(f"peak of resident memory: {result['peak'] / 2**20:,.0f} MiB")


if __name__ == "__main__":
    main()
