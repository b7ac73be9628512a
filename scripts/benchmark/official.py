"""A baseline: AdaGC with the official code's schedule of collectives and host reads. Written for this benchmark.

Not the official code, which is a patch on one commit of Megatron-LM, but the order in which it communicates: every step
one all-reduce and one host read for the global norm (also after the warm-up, where nothing needs it), and one of each for
every tensor that tensor parallelism splits. Its arithmetic is that of the rule (docs/algorithms.md), in fp32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Piece:
    """This rank's piece of one tensor.

    Attributes:
        param: has the gradient of the piece, a plain tensor.
        sharded: ranks of the group hold different pieces; otherwise all hold the whole.
    """

    param: Tensor
    sharded: bool


class OfficialSchedule:
    """AdaGC, one tensor after the other.

    Args:
        pieces: of all tensors, in the same order on every rank of `group`.
        group: over which tensors are sharded; None: all ranks.
        lambda_rel, beta, warmup_steps, max_norm, eps: as in `dist_clip.AdaGC`, with its "min" for a start.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        group: Any = None,
        *,
        lambda_rel: float = 1.04,
        beta: float = 0.99,
        warmup_steps: int = 100,
        max_norm: float = 1.0,
        eps: float = 1e-6,
    ) -> None:
        self.pieces, self.group = list(pieces), group
        self.lambda_rel, self.beta, self.warmup_steps = lambda_rel, beta, warmup_steps
        self.max_norm, self.eps = max_norm, eps
        self.gamma: dict[int, float] = {}
        self.t = 0

    @torch.no_grad()
    def step(self) -> None:
        """Clip all gradients in place. Collective over the group."""
        self.t += 1
        total = self._global_norm()
        warm_scale = min(1.0, self.max_norm / (total + 1e-6))
        for i, piece in enumerate(self.pieces):
            grad = piece.param.grad
            assert grad is not None
            if self.t <= self.warmup_steps:
                grad.mul_(warm_scale)
                norm = self._norm(grad, piece.sharded)
                self.gamma[i] = min(self.gamma.get(i, math.inf), norm)
                continue
            norm = self._norm(grad, piece.sharded)
            gamma = self.gamma.setdefault(i, norm)
            limit = self.lambda_rel * gamma
            scale = min(1.0, limit / (norm + self.eps))
            if scale < 1.0:
                grad.mul_(scale)
            self.gamma[i] = self.beta * gamma + (1 - self.beta) * min(norm, limit)

    def _global_norm(self) -> float:
        """One packed sum over this rank's tensors, one all-reduce, one host read."""
        first = dist.get_rank(self.group) == 0
        counted = [p.param.grad for p in self.pieces if p.sharded or first]  # a copy counts once
        squares = torch.zeros(())
        if counted:
            squares = torch.stack(torch._foreach_norm(counted)).square().sum()  # type: ignore[arg-type]
        dist.all_reduce(squares, group=self.group)
        return math.sqrt(squares.item())

    def _norm(self, grad: Tensor, sharded: bool) -> float:
        """One all-reduce where the tensor is sharded, and one host read."""
        squares = torch.linalg.vector_norm(grad).square()
        if sharded:
            dist.all_reduce(squares, group=self.group)
        return math.sqrt(squares.item())
