"""The faults: a corrupted batch, or garbage in one tensor's gradient, the same fault under every layout."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate


@dataclasses.dataclass(frozen=True)
class FaultConfig:
    """One fault to inject, on purpose."""

    fault: Literal["none", "batch", "grad"] = "none"
    """batch: the whole batch becomes random bytes >= 128. grad: garbage is added to one tensor's gradient."""
    fault_step: int = 160
    """First step with the fault, counted from 1."""
    fault_steps: int = 20
    """For how many steps."""
    fault_tensor: str = "blocks.0.attn.wq.weight"
    """grad: the tensor's name."""
    fault_scale: float = 1e4
    """grad: standard deviation of the garbage, one fixed normal pattern for the whole fault."""
    fault_answer: Literal["none", "zero", "skip"] = "none"
    """A control: what somebody who knew of the fault would do at its steps. zero: the clipped gradients become zero, the
    most that any clipping can do. skip: the optimizer does not step."""

    def __post_init__(self) -> None:
        if self.fault_step < 1 or self.fault_steps < 1:
            raise ValueError(f"--fault-step and --fault-steps start at 1, got {self.fault_step} and {self.fault_steps}")

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

    def answered(self, answer: str, step: int) -> bool:
        return self.fault_answer == answer and self.at(step)

    def at(self, step: int) -> bool:
        return self.fault != "none" and self.fault_step <= step < self.fault_step + self.fault_steps


def corrupt_batch(inputs: Tensor, step: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random bytes >= 128, which hardly occur in the text, in place of a batch's inputs and targets."""
    rows, seq_len = inputs.shape
    noise = torch.randint(128, 256, (rows, seq_len + 1), generator=_generator(f"batch:{seed}:{step}"))
    return noise[:, :-1].contiguous(), noise[:, 1:].contiguous()


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
