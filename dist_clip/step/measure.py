"""The measurement of a step: the norms of this rank's shards and, where anything needs them, of the whole tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from dist_clip.kernels import Kernels
from dist_clip.memory import Memory, PolicyGroup
from dist_clip.policies.base import is_finite, is_nonfinite
from dist_clip.reduction import Channel
from dist_clip.step.early import EarlyClips
from dist_clip.step.fault import naming_what_fails
from dist_clip.step.nonfinite import NonFiniteMode


@dataclasses.dataclass(slots=True)
class Measured:
    """The measurements of one step, each [n] for the layout's n tensors.

    Attributes:
        local: float64, squared norms of this rank's shards.
        whole: float64, norms of the whole tensors (with ``nonfinite="zero"``: 0 where non-finite); None if they were
            not reduced.
        norms: float64, norms of the policies' elements: of shards with scope "shard", else of whole tensors.
        clean: `norms` as the policies see them: with ``nonfinite="zero"`` 0 where `bad` is set.
        bad: bool, which of `norms` are NaN or Inf.
        weight_norms: float64, norms of the elements' parameters; None where no policy asks.
        weight_whole: float64, norms of the whole parameters; None where no policy asks, or if they were not reduced.
        carried: the sums of what was sent along over the ranks of the pipeline stage; None if nothing was.
    """

    local: Tensor
    whole: Tensor | None
    norms: Tensor
    clean: Tensor
    bad: Tensor
    weight_norms: Tensor | None = None
    weight_whole: Tensor | None = None
    carried: Tensor | None = None

    def elements_of(self, group: PolicyGroup) -> Tensor:
        """Return the clean norms of a group's tensors or shards, float64 [elements]."""
        return group.select(self.clean)


class Meter:
    """Measures gradients and, where a policy asks for it, parameters.

    Args:
        every_norm: reduce the tensors' norms on every step, also where no policy needs them.
        early: what the step has measured before its `clip_`; None: nothing.
    """

    def __init__(
        self,
        memory: Memory,
        channel: Channel,
        kernels: Kernels,
        nonfinite: NonFiniteMode,
        *,
        every_norm: bool,
        early: EarlyClips | None = None,
    ) -> None:
        self._memory, self._channel, self._kernels = memory, channel, kernels
        self._nonfinite, self._early = nonfinite, early
        self._every_norm = every_norm
        shards = {i for group in memory.groups if group.per_shard for i in group.indices}
        self._any_per_shard = bool(shards)
        self._per_shard = torch.tensor(
            [i in shards for i in range(len(memory.layout))], dtype=torch.bool, device=memory.device
        )

    def squares(self, grads: Sequence[Tensor | None]) -> Tensor:
        """Return the squared norms of this rank's shards of the gradients, float64 [n], in the layout's order."""
        with naming_what_fails(self._memory.layout.names, grads):
            squares = self._kernels.power_sums(grads, 2.0, self._memory.device)
        return squares if self._early is None else self._early.with_remembered(squares)

    def measure(self, local: Tensor, carried: Tensor | None = None) -> Measured:
        """Work out all norms from the `squares`. Collective where `reduces` is true.

        Args:
            carried: float64 [j], numbers of this rank to be added over the ranks of the pipeline stage; only where the
                channel carries them and norms are reduced.

        Raises:
            DesyncError: with ``detect_desync``, on the CPU: ranks are out of step.
        """
        weights = None
        if any("weight_norms" in needs for needs in self._memory.needs()):
            weights = self.weight_squares()
        whole = weight_whole = None
        if self.reduces():
            sums = local
            if self._nonfinite.zeroes and self._any_per_shard:
                # With scope "shard" only the faulty shard is left out, not the tensor's other shards.
                sums = torch.where(self._per_shard & is_nonfinite(local), 0.0, local)
            packed = sums if weights is None else torch.stack([sums, weights], dim=1)
            added, carried = self._channel.sum_over_shards(packed, self._memory.shared_states(), carried)
            roots = added.sqrt()
            whole, weight_whole = (roots, None) if weights is None else roots.unbind(1)
        norms = self._of_elements(local, whole)
        weight_norms = None if weights is None else self._of_elements(weights, weight_whole)
        bad = is_nonfinite(norms)
        if whole is not None and self._nonfinite.zeroes:
            whole = torch.where(is_finite(whole), whole, 0.0)
        clean = self._nonfinite.clean(norms, bad)
        return Measured(local, whole, norms, clean, bad, weight_norms, weight_whole, carried)

    def weight_squares(self) -> Tensor:
        """Return the squared norms of this rank's shards of the parameters, float64 [n]."""
        squares = self._kernels.power_sums([t.weight() for t in self._memory.layout], 2.0, self._memory.device)
        return squares if self._early is None else self._early.with_remembered_weights(squares)

    def _of_elements(self, local: Tensor, whole: Tensor | None) -> Tensor:
        """Return the norms of the policies' elements from the shards' squared norms and the norms of whole tensors."""
        if whole is None:
            return local.sqrt()
        return torch.where(self._per_shard, local.sqrt(), whole) if self._any_per_shard else whole

    def reduces(self) -> bool:
        """Return whether the next step computes norms of whole tensors: the same on every rank, without a host sync."""
        return (
            not self._channel.reduces_shards
            or self._every_norm
            or any(not group.per_shard for group in self._memory.groups)
            or any("global_norm" in needs for needs in self._memory.needs())
        )
