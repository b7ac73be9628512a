"""MedianGuard, which skips steps at which most tensors' norms are far above their own usual ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection

import torch
from torch import Tensor

from dist_clip.guards.base import Guard, GuardInputs, GuardNeed, WhenStuck, check_patience
from dist_clip.guards.registry import register_guard
from dist_clip.policies.base import State, observed
from dist_clip.policies.check import check_count, check_finite, check_number

_LOW = 4.0
"""A norm below its reference by this factor is low."""
_LOW_STEPS = 8
"""The guard rests while there are more low steps to make up for than this."""
_WARMUP_BOUND = 100.0
"""The bound of one observation in the warm-up, in levels: a tensor's first norm may be far from its usual ones."""
_EARN = 50
"""How many steps must be taken to give one skip back to the budget of ``max_skips_in_a_row`` skips."""
_EDGES = 16
"""The median's movement is known in this many steps on either side of 0, of which the last is at threshold ** 2."""


@register_guard("median")
@dataclasses.dataclass(frozen=True)
class MedianGuard(Guard):
    """Skips a step at which most tensors' norms are ``threshold`` times their own usual norms, or more where all move.

    A bad batch lifts the norms of most tensors, and is skipped; a bad tensor lifts its own, and is left to the policy.
    A median over tensors is above a threshold exactly if more than half of the tensors are, so the guard counts tensors. A
    tensor counts once it has ``warmup_steps`` observations, on steps at which it has a gradient; a norm of NaN or Inf
    counts as above the threshold, and enters nothing.

    **What is usual.** Each tensor has a level, a geometric moving average of its norms as in `LogClip`: ``level *=
    clamp(n / level, 1 / b, b) ** max(rate, 1 / observations)``, with b = 100 in its warm-up and ``threshold`` after it.
    Its usual norm is the largest level of the last ``window`` to ``2 * window`` steps, so that an episode of low norms
    that is shorter is not forgotten. Skipped steps leave it as it is.

    **What is far.** The median of ``ln(n / usual)`` is far if it exceeds both ``ln(threshold)`` and ``deviations`` times
    the scatter of its own movement. The movement is the median of ``ln(n / level)`` over the tensors that have a level, in
    eighths of ``ln(threshold)`` and at most twice that. The scatter is its mean absolute deviation from its mean, both
    moving averages with the same rate. Where all norms move together by nature, as early under Lion, a threshold alone
    would skip steps that nothing is wrong with.

    **How it ends.** There is a budget of ``max_skips_in_a_row`` skips, to which each step that is taken gives back a
    fiftieth of one. When it is used up the next step is taken, and its norms become the usual ones: a lasting rise is
    skipped no longer than that, and of T steps no more are skipped than the budget and T / 50.

    **When it rests.** While most tensors are below a quarter of their usual norms for more than 8 steps, and then until as
    many usual steps have passed (at most ``window``), no step is skipped: the return from unusually low norms is no fault.
    The first ``window`` low steps leave the levels as they are, too.

    Args:
        threshold: how far above their usual norms most tensors must be, as a factor above 1.
        deviations: how many times the median's usual scatter it must be above as well, at least 0.
        rate: share of the log of a norm's ratio that the level moves by, in (0, 1].
        warmup_steps: observations of a tensor before it counts, at least 1.
        window: steps for which a level is remembered, and for which low norms do not count as usual, at least 1.
        max_skips_in_a_row: the budget, at least 1.
        when_stuck: what follows when so many steps in a row were skipped: "step" takes the next step, "raise" raises
            `StuckError`.

    State: ``level``, ``peak`` and ``earlier``, fp32 [n] (0: nothing observed): the level, its maximum in this window and
    in the one before; ``observations``, int32 [n]; ``drift`` and ``scatter``, fp32 0-dim: the mean of the median's
    movement and its mean deviation; ``moves``, int32 0-dim, movements that they have seen; ``clock``, int32 0-dim, steps
    since the window began; ``lows``, int32 0-dim, low steps to make up for; ``spent``, int32 0-dim, fiftieths of a skip
    of the budget that are used.

    Raises:
        TypeError, ValueError: a hyper-parameter of the wrong type or out of its range.

    Example:
        >>> import torch, dist_clip
        >>> model = torch.nn.Linear(2, 2)
        >>> clipper = dist_clip.GradClipper(model, dist_clip.LogClip(), guard=dist_clip.MedianGuard())

    Reference: a rule of this library; docs/guards.md says what it promises.
    """

    threshold: float = 2.0
    deviations: float = 5.0
    rate: float = 0.02
    warmup_steps: int = 100
    window: int = 128
    max_skips_in_a_row: int = 50
    when_stuck: WhenStuck = "step"

    tensor_slots = ("level", "peak", "earlier", "observations")

    def __post_init__(self) -> None:
        check_finite("MedianGuard", "threshold", self.threshold, 1.0, open_low=True)
        check_finite("MedianGuard", "deviations", self.deviations, 0.0)
        check_number("MedianGuard", "rate", self.rate, 0.0, 1.0, open_low=True)
        for name in ("warmup_steps", "window", "max_skips_in_a_row"):
            check_count("MedianGuard", name, getattr(self, name), 1)
        check_patience(self)

    def needs(self) -> Collection[GuardNeed]:
        needs: tuple[GuardNeed, ...] = ("global_norm",)
        return needs

    def init_state(self, n: int, device: torch.device) -> State:
        return {
            "level": torch.zeros(n, dtype=torch.float32, device=device),
            "peak": torch.zeros(n, dtype=torch.float32, device=device),
            "earlier": torch.zeros(n, dtype=torch.float32, device=device),
            "observations": torch.zeros(n, dtype=torch.int32, device=device),
            "drift": torch.zeros((), dtype=torch.float32, device=device),
            "scatter": torch.zeros((), dtype=torch.float32, device=device),
            "moves": torch.zeros((), dtype=torch.int32, device=device),
            "clock": torch.zeros((), dtype=torch.int32, device=device),
            "lows": torch.zeros((), dtype=torch.int32, device=device),
            "spent": torch.zeros((), dtype=torch.int32, device=device),
        }

    def tally(self, state: State, norms: Tensor) -> Tensor:
        """Return of each tensor, in rows: is it far above, is it low, does it count, has it a level, its movement.

        Its movement takes ``2 * _EDGES`` rows, one for each edge that it may be above.
        """
        usual = torch.maximum(state["peak"], state["earlier"]).double()
        seen = torch.logical_and(state["observations"] > 0, norms != 0)
        counts = torch.logical_and(seen, state["observations"] >= self.warmup_steps)
        bound = state["drift"].double() + self.deviations * state["scatter"].double()
        far = torch.exp(torch.clamp(bound, min=math.log(self.threshold)))
        above = torch.logical_not(norms <= far * usual)  # also if it is NaN
        low = norms * _LOW < usual
        edges = torch.arange(-_EDGES, _EDGES, dtype=torch.float64, device=norms.device) + 0.5
        moved = torch.log(norms / state["level"].double()) > self._unit * edges.unsqueeze(1)
        flags = torch.stack([torch.logical_and(counts, above), torch.logical_and(counts, low), counts, seen])
        return torch.cat([flags, torch.logical_and(seen, moved)]).double()

    def step(self, state: State, inputs: GuardInputs) -> tuple[Tensor, State]:
        flags, edges = torch.split(inputs.tallies, [4, 2 * _EDGES])
        above, low, counted, seen = flags.unbind()
        most_above, most_low = 2 * above > counted, 2 * low > counted
        lows, spent = state["lows"], state["spent"]
        bad = torch.logical_and(most_above, lows <= _LOW_STEPS)
        assert inputs.global_norm is not None
        used_up = torch.logical_and(spent >= _EARN * self.max_skips_in_a_row, torch.isfinite(inputs.global_norm))
        renew = torch.logical_and(bad, used_up)
        if self.when_stuck == "raise":
            renew = torch.zeros_like(renew)
        skip = torch.logical_and(bad, torch.logical_not(renew))
        unusual = torch.logical_or(skip, torch.logical_and(most_low, lows < self.window))
        clock = torch.where(unusual, state["clock"], torch.remainder(state["clock"] + 1, self.window))
        back = torch.where(most_above, lows, lows - 1)
        new = {
            "lows": torch.where(most_low, lows + 1, back).clamp(0, self.window),
            "spent": torch.where(skip, spent + _EARN, (spent - 1).clamp(min=0)),
            "clock": clock,
        }
        usual = torch.logical_not(unusual)
        movement = self._unit * ((2 * edges > seen).sum() - _EDGES)
        moves = torch.logical_and(torch.logical_and(usual, torch.logical_not(renew)), seen > 0)
        new |= self._move(state, movement, moves)
        return skip, new | self._follow(state, inputs.norms, usual, renew, clock == 0)

    @property
    def _unit(self) -> float:
        """The unit of the median's movement, so that the last edge is near twice the threshold's logarithm."""
        return 2 * math.log(self.threshold) / _EDGES

    def _move(self, state: State, movement: Tensor, moves: Tensor) -> State:
        """Return what is known of the median's movement after another one, or as it is."""
        drift, scatter, count = state["drift"].double(), state["scatter"].double(), state["moves"]
        deviation = torch.abs(movement - drift)
        # The first movement has nothing to deviate from.
        calm = torch.where(
            count > 0, scatter + torch.clamp(1 / count.double(), min=self.rate) * (deviation - scatter), scatter
        )
        mean = drift + torch.clamp(1 / (count + 1).double(), min=self.rate) * (movement - drift)
        return {
            "drift": torch.where(moves, mean.float(), state["drift"]),
            "scatter": torch.where(moves, calm.float(), state["scatter"]),
            "moves": torch.where(moves, count + 1, count),
        }

    def _follow(self, state: State, norms: Tensor, usual: Tensor, renew: Tensor, begins: Tensor) -> State:
        """Return the tensors' slots after a `usual` step, or as they are; where they `renew`, from its norms."""
        level, observations = state["level"].double(), state["observations"] + 1
        rate = torch.clamp(1 / observations.double(), min=self.rate)
        first = observations <= self.warmup_steps
        bound = torch.where(first, _WARMUP_BOUND, self.threshold).double()
        ratio = torch.minimum(torch.maximum(norms / level, 1 / bound), bound)
        known = torch.logical_and(level > 0, torch.logical_not(renew))
        moved = torch.where(known, level * torch.exp(rate * torch.log(ratio)), norms).float()
        seen = torch.logical_and(torch.logical_and(observed(norms.float()), observed(moved)), usual)
        level = torch.where(seen, moved, state["level"])
        # No maximum of a warm-up's levels, which start anywhere.
        anew = torch.logical_and(seen, torch.logical_or(renew, first))
        peak = torch.where(anew, level, torch.maximum(state["peak"], level))
        return {
            "level": level,
            "observations": torch.where(seen, observations, state["observations"]),
            "peak": torch.where(torch.logical_and(begins, usual), level, peak),
            "earlier": torch.where(torch.logical_and(begins, usual), peak, torch.where(anew, level, state["earlier"])),
        }
