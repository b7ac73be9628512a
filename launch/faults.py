"""The faults: bad batches, bad gradients, a wrong learning rate, changes that last. The same fault under every layout."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

IN_BATCHES = ("batch", "targets", "repeat")
"""Faults on whose steps the loss says what the batch is, and not what has become of the model."""


@dataclasses.dataclass(frozen=True)
class FaultConfig:
    """One fault to inject, on purpose."""

    fault: Literal["none", "batch", "targets", "repeat", "grad", "scale", "lr", "batch-size"] = "none"
    """batch: the whole batch becomes random bytes >= 128. targets: each row's targets are shuffled. repeat: the whole batch
    becomes one sequence, the same at every step. grad: garbage is added to one tensor's gradient. scale, lr, batch-size:
    all gradients, the learning rate, or the number of rows, times --fault-factor."""
    fault_step: int = 160
    """First step with the fault, counted from 1."""
    fault_steps: int = 20
    """For how many steps."""
    fault_tensor: str = "blocks.0.attn.wq.weight"
    """grad: the tensor's name."""
    fault_scale: float = 1e4
    """grad: standard deviation of the garbage, one fixed normal pattern for the whole fault."""
    fault_factor: float = 10.0
    """scale, lr, batch-size: the factor; a whole number for batch-size."""
    fault_answer: Literal["none", "zero", "skip"] = "none"
    """A control: what somebody who knew of the fault would do at its steps. zero: the clipped gradients become zero, the
    most that any clipping can do. skip: the optimizer does not step."""

    def __post_init__(self) -> None:
        if self.fault_step < 1 or self.fault_steps < 1:
            raise ValueError(f"--fault-step and --fault-steps start at 1, got {self.fault_step} and {self.fault_steps}")
        if self.fault_factor <= 0 or (self.fault == "batch-size" and self.fault_factor != int(self.fault_factor)):
            raise ValueError(f"--fault-factor must be above 0, and whole for batch-size, got {self.fault_factor}")

    def check(self, names: Iterable[str]) -> None:
        """Raise unless the tensor to corrupt is one of the whole model's."""
        names = list(names)
        if self.fault == "grad" and self.fault_tensor not in names:
            raise ValueError(f"--fault-tensor: no tensor {self.fault_tensor!r}; the model has {', '.join(names)}")

    def check_start(self, first: int) -> None:
        """Raise if the fault belongs to steps before `first`, the first one that this run takes itself."""
        if self.fault != "none" and self.fault_step < first:
            raise ValueError(f"--fault-step {self.fault_step} is over: the snapshot goes on at step {first}")

    def active(self, kind: str, step: int) -> bool:
        return self.fault == kind and self.at(step)

    def rows(self, rows: int, step: int) -> int:
        """The rows of a step's batch."""
        return rows * int(self.fault_factor) if self.active("batch-size", step) else rows

    def source(self, step: int) -> int:
        """The step whose batch this step is made of."""
        return self.fault_step if self.active("repeat", step) else step

    def answered(self, answer: str, step: int) -> bool:
        return self.fault_answer == answer and self.at(step)

    def at(self, step: int) -> bool:
        return self.fault != "none" and self.fault_step <= step < self.fault_step + self.fault_steps


def corrupt_batch(inputs: Tensor, targets: Tensor, cfg: FaultConfig, step: int, seed: int) -> tuple[Tensor, Tensor]:
    """The batch as the fault has it, on the steps of a fault in batches: int64 [rows, seq_len] each, as it came in."""
    rows, seq_len = inputs.shape
    if cfg.active("batch", step):
        # Bytes that hardly occur in the text.
        noise = torch.randint(128, 256, (rows, seq_len + 1), generator=_generator(f"batch:{seed}:{step}"))
        return noise[:, :-1].contiguous(), noise[:, 1:].contiguous()
    if cfg.active("targets", step):
        order = torch.rand(rows, seq_len, generator=_generator(f"targets:{seed}:{step}")).argsort(dim=1)
        return inputs, targets.gather(1, order)
    if cfg.active("repeat", step):
        return inputs[:1].repeat(rows, 1), targets[:1].repeat(rows, 1)
    return inputs, targets


@torch.no_grad()
def corrupt_gradients(named_params: Iterable[tuple[str, nn.Parameter]], cfg: FaultConfig, step: int, seed: int) -> None:
    """The gradients as the fault has them, on the steps of a fault in gradients.

    To be called between backward and clipping.
    """
    if cfg.active("grad", step):
        add_garbage(named_params, cfg, seed)
    if cfg.active("scale", step):
        for _, param in named_params:
            if param.grad is not None:
                param.grad.mul_(cfg.fault_factor)


@contextlib.contextmanager
def wrong_lr(optimizer: torch.optim.Optimizer, cfg: FaultConfig, step: int) -> Iterator[None]:
    """The learning rate times the factor, on the steps of that fault; the schedule sees nothing of it."""
    rates = [group["lr"] for group in optimizer.param_groups]
    if cfg.active("lr", step):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * cfg.fault_factor
    yield
    if cfg.active("lr", step):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


@torch.no_grad()
def add_garbage(named_params: Iterable[tuple[str, nn.Parameter]], cfg: FaultConfig, seed: int) -> None:
    """Add the pattern to the tensor's gradient: each rank the shard that it holds, replicas all the same values.

    To be called between backward and clipping, where a flipped bit or a bad kernel would leave its mark.
    """
    for name, param in named_params:
        if name != cfg.fault_tensor or param.grad is None:
            continue
        pattern = torch.randn(tuple(param.shape), generator=_generator(f"grad:{seed}:{name}")) * cfg.fault_scale
        grad: Tensor = param.grad
        if isinstance(grad, DTensor):
            if any(placement.is_partial() for placement in grad.placements):
                # A Partial gradient is a sum that is still to be made: the pattern would enter it once per rank.
                grad = grad.redistribute(placements=[Replicate() if p.is_partial() else p for p in grad.placements])
                param.grad = grad
            pattern = _shard_like(pattern.to(grad.to_local()), grad)
            grad = grad.to_local()
        grad.add_(pattern.to(grad))


def _shard_like(full: Tensor, like: DTensor) -> Tensor:
    """This rank's piece of `full`, cut as `like` is. Communicates nothing: every rank has the whole of `full`."""
    whole = DTensor.from_local(full, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
    return whole.redistribute(placements=like.placements).to_local()


def _generator(key: str) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big"))
