"""Measures a step: the norms of this rank's shards and, where anything needs them, of the whole tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from dist_clip.kernels import Kernels
from dist_clip.memory import Memory, PolicyGroup
from dist_clip.policies.base import is_finite, is_nonfinite
from dist_clip.reduction import Channel
from dist_clip.step.nonfinite import NonFiniteMode


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one step measured, [n] of the layout's tensors each.

    Attributes:
        local: float64, squared norms of this rank's shards.
        whole: float64, norms of the whole tensors; None if they were not reduced.
        norms: float64, norms of the elements that the policies see: shards with scope "shard", else whole tensors.
        clean: `norms` as the policies see them.
        bad: bool, which of `norms` are NaN or Inf.
        weight_norms: float64, the elements' norms of the parameters; `weight_whole` of the whole tensors. None where no
            policy asks.
    """

    local: Tensor
    whole: Tensor | None
    norms: Tensor
    clean: Tensor
    bad: Tensor
    weight_norms: Tensor | None = None
    weight_whole: Tensor | None = None

    def elements_of(self, group: PolicyGroup) -> Tensor:
        """float64 [elements]: the clean norms of a group's tensors or shards."""
        return group.select(self.clean)


class Meter:
    """Measures gradients, and parameters where a policy asks for them.

    Args:
        every_norm: reduce the tensors' norms on every step, also where no policy needs them.
    """

    def __init__(
        self, memory: Memory, channel: Channel, kernels: Kernels, nonfinite: NonFiniteMode, *, every_norm: bool
    ) -> None:
        self._memory, self._channel, self._kernels = memory, channel, kernels
        self._nonfinite = nonfinite
        self._every_norm = every_norm
        shards = {i for group in memory.groups if group.per_shard for i in group.indices}
        self._any_per_shard = bool(shards)
        self._per_shard = torch.tensor(
            [i in shards for i in range(len(memory.layout))], dtype=torch.bool, device=memory.device
        )

    def measure(self, grads: Sequence[Tensor | None]) -> Measured:
        """Measure this rank's shards of the gradients, in the layout's order. Collective where `reduces` says so."""
        local = self._kernels.power_sums(grads, 2.0, self._memory.device)
        weights = None
        if any("weight_norms" in needs for needs in self._memory.needs()):
            shards = [tensor.weight() for tensor in self._memory.layout]
            weights = self._kernels.power_sums(shards, 2.0, self._memory.device)
        whole = weight_whole = None
        if self.reduces():
            sums = local
            if self._nonfinite.zeroes and self._any_per_shard:
                # Per shard: a faulty shard is left out, the tensor's other shards are not.
                sums = torch.where(self._per_shard & is_nonfinite(local), 0.0, local)
            packed = sums if weights is None else torch.stack([sums, weights], dim=1)
            added = self._channel.sum_over_shards(packed, self._memory.shared_states()).sqrt()
            whole, weight_whole = (added, None) if weights is None else added.unbind(1)
        norms = self._of_elements(local, whole)
        weight_norms = None if weights is None else self._of_elements(weights, weight_whole)
        bad = is_nonfinite(norms)
        if whole is not None and self._nonfinite.zeroes:
            whole = torch.where(is_finite(whole), whole, 0.0)
        return Measured(local, whole, norms, self._nonfinite.clean(norms, bad), bad, weight_norms, weight_whole)

    def _of_elements(self, local: Tensor, whole: Tensor | None) -> Tensor:
        """The norms of what the policies see, from the shards' squared norms and the norms of whole tensors."""
        if whole is None:
            return local.sqrt()
        return torch.where(self._per_shard, local.sqrt(), whole) if self._any_per_shard else whole

    def reduces(self) -> bool:
        """Whether the next step needs norms of whole tensors. Known to the host, the same on every rank."""
        return (
            not self._channel.reduces_shards
            or self._every_norm
            or any(not group.per_shard for group in self._memory.groups)
            or any("global_norm" in needs for needs in self._memory.needs())
        )
