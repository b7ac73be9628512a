"""The guards of a clipper at work: their tallies, the loss, whether to skip, and errors that all ranks raise alike."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_clip.errors import StuckError
from dist_clip.guards import GuardInputs
from dist_clip.layouts.process_groups import distributed, gather, name_ranks
from dist_clip.memory import Memory
from dist_clip.memory.host_copy import HostCopy, capturing
from dist_clip.policies.base import State
from dist_clip.reduction import Channel
from dist_clip.step.global_norms import Totals
from dist_clip.step.measure import Measured

_ASK_EVERY = 32
"""Clips between two looks of the host at what went wrong on the device; on the CPU it looks at each."""

_NONE = "passed no loss"


class Guards:
    """Runs the guards of one clipper.

    Args:
        memory: the guards with their states.
        channel: adds the loss over the ranks.
        counts: bool [n], which tensors this stage counts.
        process_group: all ranks that train the model; None: all there are.
        stage: number of this rank's pipeline stage.
        ranks_a_stage: number of ranks of one pipeline stage.

    Attributes:
        needs_loss: whether a guard looks at the loss.
    """

    def __init__(
        self,
        memory: Memory,
        channel: Channel,
        counts: Tensor,
        process_group: dist.ProcessGroup | None,
        stage: int,
        ranks_a_stage: int,
    ) -> None:
        self._memory, self._channel, self._counts = memory, channel, counts
        self._process_group, self._stage, self._ranks_a_stage = process_group, stage, ranks_a_stage
        guarded = {i for group in memory.groups if group.policy.guarded for i in group.indices}
        self._all_guarded = all(group.policy.guarded for group in memory.groups)
        self._guarded = torch.tensor(
            [i in guarded for i in range(len(memory.layout))], dtype=torch.bool, device=memory.device
        )
        self._loss_guards = [memory.guard for memory in memory.guards if "loss" in memory.guard.needs()]
        self.needs_loss = bool(self._loss_guards)
        self._may_raise = any(memory.guard.when_stuck == "raise" for memory in memory.guards)
        self._alone = not distributed()
        self._at_once = memory.device.type == "cpu"  # where reading waits for nothing
        self._carries = True
        if self.needs_loss and not self._alone:
            # Stages may be laid out differently, and all of them must add the loss in the same way.
            cannot = torch.full((), not channel.carries, device=memory.device)
            self._carries = not bool(channel.any_rank(cannot))
        self._sizes: list[int] = []
        self._loss: Tensor | None = None
        self._error: str | None = None
        self._clips = 0
        self._wrong = torch.zeros(2, dtype=torch.bool, device=memory.device)
        self._asked: HostCopy | None = None

    def begin(self, losses: Sequence[Any]) -> Tensor | None:
        """Begin a step. Returns what is to be measured along with the norms, float64 [3], or None.

        It is this rank's loss (0 if there is none), 1 if there is one, and 1 if what the user passed is none.

        Collective where a guard needs the loss and no vector that travels anyway can add it.

        Args:
            losses: this rank's losses as the user passed them, of one or more micro-batches.

        Raises:
            TypeError, ValueError: on a single process: a guard needs the loss, and there is none, or it is no scalar.
        """
        if not self.needs_loss:
            return None
        device = self._memory.device
        zero = torch.zeros((), dtype=torch.float64, device=device)
        mine, error = torch.stack([zero, zero, zero]), _NONE
        if losses:
            try:
                values = torch.stack([checked_loss(loss, device) for loss in losses])
            except (TypeError, ValueError) as problem:
                if self._alone:
                    raise
                error = f"passed another thing ({problem})"
                mine = torch.stack([zero, zero, torch.ones_like(zero)])
            else:
                mine, error = torch.stack([values.sum() / len(losses), torch.ones_like(zero), zero]), ""
        elif self._alone:
            raise ValueError(self._about_loss("it was not passed"))
        self._error = error or self._error
        if self._carries:
            return mine
        self._loss = self._channel.sum_over_ranks(mine)
        return None

    def extra(self, measured: Measured) -> Tensor | None:
        """Return what travels with the vector of the pipeline stages, float64 [j]: the tallies and the stage's loss."""
        if not self._memory.guards:
            return None
        norms = self._norms(measured)
        parts = []
        for memory in self._memory.guards:
            tally = memory.guard.tally(memory.state, norms).double()
            parts.append(torch.where(self._counts, tally, 0.0).sum(dim=1))
        self._sizes = [len(part) for part in parts]
        if measured.carried is not None:
            parts.append(self._with_gaps(measured.carried))
        return torch.cat(parts)

    def decide(self, measured: Measured, totals: Totals) -> list[tuple[State, Tensor]]:
        """Run the guards, and set ``totals.skip``. Returns each guard's new state and number of skips in a row.

        Raises:
            StuckError: a guard is stuck, and is to raise then.
            ValueError: a guard needs the loss, and ranks have not passed it. Both are raised on the CPU before anything
                is clipped, and elsewhere a few clips later, on every rank at the same clip.
        """
        if not self._memory.guards:
            return []
        assert totals.extra is not None
        assert totals.skip is not None
        norms, together = self._norms(measured), self._together(totals)
        *tallies, rest = torch.split(totals.extra, [*self._sizes, len(totals.extra) - sum(self._sizes)])
        finite, loss, no_loss = torch.isfinite(together), None, torch.zeros_like(totals.skip)
        if self.needs_loss:
            total, given, wrong = (rest if self._loss is None else self._with_gaps(self._loss)).unbind()
            loss, no_loss = total / given, torch.logical_or(wrong > 0, given == 0)
        stuck, decided = torch.zeros_like(totals.skip), []
        for memory, tally in zip(self._memory.guards, tallies, strict=True):
            guard, in_a_row, needs = memory.guard, memory.skips_in_a_row, memory.guard.needs()
            inputs = GuardInputs(
                norms=norms,
                t=self._memory.t + 1,
                skips_in_a_row=in_a_row,
                tallies=tally,
                global_norm=together if "global_norm" in needs else None,
                loss=loss if "loss" in needs else None,
            )
            skip, new = guard.step(memory.state, inputs)
            if guard.when_stuck == "raise":
                assert guard.max_skips_in_a_row is not None  # the trial has checked it
                stuck = torch.logical_or(stuck, torch.logical_and(skip, in_a_row >= guard.max_skips_in_a_row))
            elif guard.max_skips_in_a_row is not None:
                usable = finite if inputs.loss is None else torch.logical_and(finite, torch.isfinite(inputs.loss))
                taken = torch.logical_and(guard.overdue(inputs), usable)
                skip = torch.logical_and(skip, torch.logical_not(taken))
            decided.append((new, torch.where(skip, in_a_row + 1, 0)))
            totals.skip = torch.logical_or(totals.skip, skip)
        self._look(torch.stack([stuck, no_loss]))
        return decided

    def _norms(self, measured: Measured) -> Tensor:
        """Return the norms that guards see, float64 [n]: 0 for the tensors of policies that are not guarded."""
        assert measured.whole is not None
        return measured.whole if self._all_guarded else torch.where(self._guarded, measured.whole, 0.0)

    def _together(self, totals: Totals) -> Tensor:
        """Return the norm of all tensors that guards see, float64 0-dim."""
        assert totals.together is not None
        if self._all_guarded:
            return totals.together
        groups = zip(self._memory.groups, totals.norms, strict=True)
        squares = [norm.square() for group, norm in groups if group.policy.guarded and norm is not None]
        return torch.stack(squares).sum().sqrt() if squares else torch.zeros_like(totals.together)

    def _with_gaps(self, loss: Tensor) -> Tensor:
        """Return the sums of what ranks sent of their losses, with an error where only a part of a stage has one."""
        total, given, wrong = loss.unbind()
        partly = torch.remainder(given, self._ranks_a_stage) != 0
        return torch.stack([total, given, wrong + partly])

    def _look(self, wrong: Tensor) -> None:
        """Raise if anything is `wrong`, bool [2], or was at an earlier clip that the host has not looked at."""
        watches = self._may_raise or (self.needs_loss and not self._alone)
        if not watches or capturing(self._memory.device):
            return
        self._clips += 1
        self._wrong.logical_or_(wrong)
        found: Tensor | None = None
        if self._at_once:
            found = self._wrong
        elif self.needs_loss and not self._alone and self._clips in (1, 2, 4, 8, 16):
            found = HostCopy(self._wrong).read()
        elif self._clips % _ASK_EVERY == 0:
            # Read when the next copy is made: all ranks then raise at the same clip, and the host need not wait.
            found, self._asked = None if self._asked is None else self._asked.read(), HostCopy(self._wrong)
        if found is None:
            return
        stuck, no_loss = found.tolist()
        if stuck or no_loss:
            self._wrong.zero_()
            self._asked = None
        if no_loss:
            self._raise_no_loss()
        self._error = None
        if stuck:
            raise StuckError(self._about_stuck())

    def _about_stuck(self) -> str:
        raising = [memory.guard for memory in self._memory.guards if memory.guard.when_stuck == "raise"]
        names = " or ".join(repr(guard) for guard in raising)
        return (
            f"{names} has skipped as many steps in a row as it may, and would skip another: training does not go on by "
            "itself. Look at the data and at report.tensor_norms, go back to a checkpoint, or let the guard go on "
            '(when_stuck="step")'
        )

    def _raise_no_loss(self) -> None:
        """Collective over `process_group`."""
        everyone = gather((self._stage, self._error), self._process_group)
        self._error = None
        having = {stage for stage, error in everyone.values() if error is None}
        strange = {rank: error for rank, (_, error) in everyone.items() if error and error != _NONE}
        lacking = [rank for rank, (stage, error) in everyone.items() if error and stage in having]
        if strange:
            rank, error = next(iter(strange.items()))
            what = f"rank {rank} {error}"
        elif having and lacking:
            what = f"{name_ranks(lacking)} passed none"
        else:
            what = "no rank passed it"
        raise ValueError(self._about_loss(what))

    def _about_loss(self, what: str) -> str:
        names = ", ".join(type(guard).__name__ for guard in self._loss_guards)
        return (
            f"{names} looks at the loss, but {what}. On every rank (of the last pipeline stage) pass the mean of its own "
            "batch: clipper.clip_(loss=loss) or, before the step of an attached optimizer, clipper.observe_loss(loss). Or "
            "let the guard look at the norm alone (loss=False)"
        )


def checked_loss(loss: Any, device: torch.device) -> Tensor:
    """Return `loss`, a number or a tensor of one element, as float64 0-dim on `device`, without gradient.

    Raises:
        TypeError, ValueError: it is none.
    """
    if isinstance(loss, numbers.Real) and not isinstance(loss, bool):
        return torch.full((), float(loss), dtype=torch.float64, device=device)
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss must be a number or a tensor of one element, got {type(loss).__name__}")
    if isinstance(loss, DTensor):
        if any(not placement.is_replicate() for placement in loss.placements):
            raise ValueError(
                f"loss must be whole on each rank, got a DTensor placed {loss.placements}: call full_tensor()"
            )
        loss = loss.to_local()
    if loss.numel() != 1 or loss.is_complex():
        raise ValueError(f"loss must be a number or a tensor of one element, got {loss.dtype} {list(loss.shape)}")
    return loss.detach().to(device, torch.float64, non_blocking=True).reshape(())
