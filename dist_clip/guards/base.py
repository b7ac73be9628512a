"""The contract of a guard: pure maths from the norms, and the loss, to whether a step is taken, with a small state."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import Tensor

from dist_clip.policies.base import State, plain
from dist_clip.policies.check import check_choice, check_count

GuardNeed = Literal["global_norm", "loss"]
"""A measurement that a guard must ask for."""

WhenStuck = Literal["step", "raise"]
"""What follows after ``max_skips_in_a_row`` skips: the step is taken, or `StuckError` is raised."""

IN_A_ROW = "skips_in_a_row"
"""Name in checkpoints of the number of skips in a row, which the clipper counts for every guard."""


@dataclasses.dataclass(frozen=True)
class GuardInputs:
    """What a guard sees of one step. Later versions may add fields.

    Attributes:
        norms: float64 [n], L2 norm of the gradient of each of the n tensors that this rank takes part in, before
            clipping; 0 without a gradient; possibly non-finite. Across pipeline stages these are this stage's tensors.
        t: int64 0-dim on the device, the number of this step, from 1. Steps that were skipped do not count.
        skips_in_a_row: int32 0-dim, how many steps before this one the guard has skipped in a row.
        tallies: float64 [k], what `Guard.tally` returned, added over all tensors of the model, of which each counts once.
        global_norm: float64 0-dim, L2 norm of all gradients together; None unless `Guard.needs` asks.
        loss: float64 0-dim, the mean over the ranks' losses, possibly non-finite; None unless `Guard.needs` asks.

    Example:
        >>> import torch, dist_clip
        >>> inputs = dist_clip.GuardInputs(
        ...     torch.tensor([3.0, 4.0]).double(), torch.tensor(1), torch.tensor(0), torch.zeros(0), torch.tensor(5.0)
        ... )
        >>> dist_clip.SkipAbove(2.0).step({}, inputs)
        (tensor(True), {})
    """

    norms: Tensor
    t: Tensor
    skips_in_a_row: Tensor
    tallies: Tensor
    global_norm: Tensor | None = None
    loss: Tensor | None = None


class Guard:
    """Base class of the guards, which decide whether a step is taken at all.

    A guard knows nothing of ranks, names or processes. A subclass is a frozen dataclass whose fields are its
    hyper-parameters. It must define `step`. `GradClipper` tries each guard out at its construction, and raises for a
    guard that would fail later. docs/guards.md walks through a complete guard.

    Attributes:
        tensor_slots: names of the state's slots that have one column a tensor, [n] or [k, n]. The other slots are the
            model's: they have any shape, and must come out the same on every rank.
        max_skips_in_a_row: this many steps in a row may be skipped, at least 1; None: any number. What follows says
            `when_stuck`. A subclass may set both for the class or declare them as fields.
        when_stuck: "step": the next step is taken, unless its global norm or, for a guard that asks for it, its loss is
            NaN or Inf. "raise": `StuckError` is raised on every rank.

    Example:
        >>> import dataclasses, torch, dist_clip
        >>> @dataclasses.dataclass(frozen=True)
        ... class SkipZeros(dist_clip.Guard):
        ...     def needs(self):
        ...         return ("global_norm",)
        ...
        ...     def step(self, state, inputs):
        ...         return inputs.global_norm == 0, state
        >>> clipper = dist_clip.GradClipper(torch.nn.Linear(2, 2), dist_clip.LogClip(), guard=SkipZeros())
    """

    tensor_slots: tuple[str, ...] = ()
    max_skips_in_a_row: int | None = None
    when_stuck: WhenStuck = "step"

    def init_state(self, n: int, device: torch.device) -> State:
        """Return the state before the first step, for `n` tensors, on `device`; by default there is none.

        Example:
            >>> import torch, dist_clip
            >>> sorted(dist_clip.DropNorm().init_state(3, torch.device("cpu")))
            ['count', 'mean', 'mean_square']
        """
        return {}

    def needs(self) -> Collection[GuardNeed]:
        """Return what the guard needs beside the norms: "global_norm", "loss"; by default nothing.

        Example:
            >>> import dist_clip
            >>> dist_clip.SkipStep().needs(), dist_clip.SkipStep(loss=False).needs()
            (('global_norm', 'loss'), ('global_norm',))
        """
        return ()

    def tally(self, state: State, norms: Tensor) -> Tensor:
        """Return k numbers of each tensor, float64 [k, n], whose sums over the whole model `step` gets; default none.

        They travel with what the pipeline stages exchange anyway. Each must depend on the tensor alone, and be a whole
        number, for which the order of the additions does not matter.

        Args:
            state: what `init_state` or the step before returned.
            norms: as in `GuardInputs`.

        Example:
            >>> import torch, dist_clip
            >>> guard = dist_clip.MedianGuard()
            >>> guard.tally(guard.init_state(3, torch.device("cpu")), torch.ones(3).double()).shape
            torch.Size([36, 3])
        """
        return norms.new_zeros((0, norms.numel()))

    def step(self, state: State, inputs: GuardInputs) -> tuple[Tensor, State]:
        """Decide one step. It must change no argument and never sync the host.

        Args:
            state: what `init_state` or the step before returned.
            inputs: what was measured.

        Returns:
            Whether to skip the step, bool 0-dim, and the new state, with the same slots. The clipper stores the state
            whether the step is skipped or not. NaN and Inf must not enter it.

        Raises:
            NotImplementedError: the subclass does not define `step`.

        Example:
            >>> import torch, dist_clip
            >>> nothing, zero = torch.zeros(0), torch.tensor(0)
            >>> dist_clip.SkipAbove(2.0).step({}, dist_clip.GuardInputs(nothing, zero, zero, nothing, torch.tensor(1.0)))
            (tensor(False), {})
        """
        raise NotImplementedError

    def overdue(self, inputs: GuardInputs) -> Tensor:
        """Return, as bool 0-dim, whether so many steps were skipped in a row that the clipper lets this one be taken.

        Example:
            >>> import torch, dist_clip
            >>> nothing, guard = torch.zeros(0), dist_clip.SkipAbove(2.0, max_skips_in_a_row=5)
            >>> guard.overdue(dist_clip.GuardInputs(nothing, torch.tensor(9), torch.tensor(5), nothing))
            tensor(True)
        """
        if self.max_skips_in_a_row is None or self.when_stuck == "raise":
            return torch.zeros_like(inputs.skips_in_a_row, dtype=torch.bool)
        return inputs.skips_in_a_row >= self.max_skips_in_a_row

    def config(self) -> dict[str, Any]:
        """Return the class name and the hyper-parameters as JSON values, for checkpoints and for comparing ranks.

        Example:
            >>> import dist_clip
            >>> dist_clip.SkipAbove(10.0).config()
            {'guard': 'SkipAbove', 'max_norm': 10.0, 'max_skips_in_a_row': None, 'when_stuck': 'step'}
        """
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {"guard": type(self).__name__, **{f.name: plain(getattr(self, f.name)) for f in fields}}


def check_patience(guard: Guard) -> None:
    """Raise TypeError or ValueError unless the guard's `max_skips_in_a_row` and `when_stuck` are allowed together."""
    name, most = type(guard).__name__, guard.max_skips_in_a_row
    if most is not None:
        check_count(name, "max_skips_in_a_row", most, 1)
    check_choice(name, "when_stuck", guard.when_stuck, ("step", "raise"))
    if most is None and guard.when_stuck == "raise":
        raise ValueError(f'{name}: when_stuck="raise" needs max_skips_in_a_row, after which to raise')
