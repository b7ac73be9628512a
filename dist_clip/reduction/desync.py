"""The detector of ranks that are out of step, which compares numbers that travel with the packed vector.

Each rank appends a few whole numbers to the vector that is summed over a group anyway, so that there is no further
collective: how often it has clipped, whether these gradients were clipped before, a fingerprint of the state that all
ranks of its pipeline stage share, and the squares of these. All m ranks have the same number x exactly if the sums are
m x and m x^2, because then the variance is 0; otherwise every rank sees the difference. All sums are whole and below
2^53, so float64 adds them exactly in any order.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_clip.errors import DesyncError
from dist_clip.layouts.process_groups import gather, name_ranks
from dist_clip.memory.host_copy import HostCopy
from dist_clip.memory.memory import Memory
from dist_clip.memory.snapshot import snapshot
from dist_clip.reduction.grad_version import ClippedGradients

_PRIME = 131_071
"""Upper bound of the numbers, below 2^17, so that the squares of 2^18 ranks add up to less than 2^53."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a floating-point dtype -> the integer dtype as which its bits are read."""


@dataclasses.dataclass(frozen=True)
class RankState:
    """The clips and the whole state of one rank, sent only when ranks are compared in full.

    Attributes:
        calls: how often it has clipped (after a load: the step that was loaded, and the clips since).
        again: whether its gradients are those that it clipped last, without a backward since.
        names: FQNs of the tensors that it takes part in.
        state: {tensor or pattern: {slot: value}}, without the states of shards (scope "shard"), which differ by rank.
    """

    calls: int
    again: bool
    names: tuple[str, ...]
    state: Mapping[str, Mapping[str, tuple[float | str, ...]]]


class DesyncDetector:
    """Makes the numbers that travel with the packed vector, and checks their sums.

    On the CPU it checks the sums at once, before anything is clipped. Elsewhere reading them would make the host wait
    for the device, so it checks them when the next clip begins.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._clipped = ClippedGradients()
        self._weights: dict[int, Tensor] = {}
        self._differs: list[tuple[dist.ProcessGroup, HostCopy]] = []

    def clipped(self) -> None:
        """Record the gradients as they are now, after clipping."""
        self._clipped.remember(self._memory.layout)

    def numbers(self, states: Iterable[Tensor] = ()) -> Tensor:
        """Return the numbers that travel, float64 [6].

        They are the number of clips, whether these gradients were clipped before, a fingerprint of `states`, and the
        squares of these three.
        """
        again = self._clipped.all_clipped(self._memory.layout)
        numbers = torch.stack([self._number(self._memory.calls), self._number(again), self._fingerprint(states)])
        return torch.cat([numbers, numbers.square()])

    def check(self, sent: Tensor, sums: Sequence[tuple[dist.ProcessGroup, Tensor]]) -> None:
        """Compare the sums over each group with those that there would be if all its ranks had sent `sent`.

        Raises:
            DesyncError: on the CPU: ranks are out of step. Elsewhere `raise_if_found` raises it later.
        """
        for group, theirs in sums:
            self._differs.append((group, HostCopy((theirs != sent * group.size()).any())))
        if self._memory.device.type == "cpu":
            self.raise_if_found()

    def raise_if_found(self) -> None:
        """Read the results of `check`.

        Raises:
            DesyncError: ranks are out of step; raised on every rank of the group.
        """
        differs, self._differs = self._differs, []
        for group, flag in differs:
            if bool(flag.read()):
                self.compare(group)

    def compare(self, group: dist.ProcessGroup | None) -> None:
        """Exchange the ranks' states over `group` (None: all ranks), and raise if any differ. Collective.

        Raises:
            DesyncError: ranks are out of step. The same on every rank of the group, naming the ranks that differ from
                most others, and the first tensor whose state differs.
        """
        mine = RankState(
            calls=self._memory.calls,
            again=self._clipped.all_clipped(self._memory.layout),
            names=self._memory.layout.names,
            state=_shared_state(snapshot(self._memory)),
        )
        everyone = gather(mine, group)
        problems = [*_counts_that_differ(everyone), *_clipped_again(everyone), *_states_that_differ(everyone)]
        if problems:
            raise DesyncError(
                f"ranks are out of step: {'; '.join(problems)}. Every rank must call clip_() once a step and load the same "
                "checkpoint; copies of one tensor must get the same gradients"
            )

    def _number(self, value: int) -> Tensor:
        # torch.full passes the value to an accelerator as a kernel's argument, without a host sync; torch.tensor syncs.
        return torch.full((), value % _PRIME, dtype=torch.float64, device=self._memory.device)

    def _fingerprint(self, states: Iterable[Tensor]) -> Tensor:
        """Return a weighted sum of the states' bits modulo a prime, which changes if one element does."""
        total = torch.zeros((), dtype=torch.int64, device=self._memory.device)
        for state in states:
            bits = state.view(_BITS[state.element_size()]) if state.is_floating_point() else state
            residues = torch.remainder(bits.flatten().to(torch.int64), _PRIME)
            total = total + torch.remainder(residues * self._weights_for(residues.numel()), _PRIME).sum()
        return torch.remainder(total, _PRIME).double()

    def _weights_for(self, n: int) -> Tensor:
        if n not in self._weights:
            weights = torch.arange(1, n + 1, device=self._memory.device) * 48_271
            self._weights[n] = torch.remainder(weights, _PRIME)
        return self._weights[n]


def _shared_state(taken: Mapping[str, Any]) -> dict[str, dict[str, tuple[float | str, ...]]]:
    """Return the `RankState.state` of a snapshot. NaN becomes the text "nan", which equals itself."""
    tensors = {name: entry for name, entry in taken["tensors"].items() if name not in taken["shards"]}
    for k, entry in taken.get("guards", {}).items():
        tensors[f"guard {k}"] = entry["model"]
        tensors |= {f"guard {k}: {name}": slots for name, slots in entry["tensors"].items()}
    return {
        name: {slot: tuple("nan" if x != x else x for x in value.flatten().tolist()) for slot, value in entry.items()}
        for name, entry in {**taken["global"], **tensors}.items()
    }


def _counts_that_differ(everyone: Mapping[int, RankState]) -> list[str]:
    usual = _usual(state.calls for state in everyone.values())
    others: dict[int, list[int]] = {}
    for rank, state in everyone.items():
        if state.calls != usual:
            others.setdefault(state.calls, []).append(rank)
    return [
        f"{name_ranks(ranks)} {'is' if len(ranks) == 1 else 'are'} at step {calls} and the other ranks at {usual}"
        for calls, ranks in others.items()
    ]


def _clipped_again(everyone: Mapping[int, RankState]) -> list[str]:
    ranks = [rank for rank, state in everyone.items() if state.again]
    return [f"{name_ranks(ranks)} clipped again without a backward"] if 0 < len(ranks) < len(everyone) else []


def _states_that_differ(everyone: Mapping[int, RankState]) -> list[str]:
    """Describe, for each pipeline stage, the first tensor whose state is not the same on all ranks of the stage."""
    problems = []
    for names in dict.fromkeys(state.names for state in everyone.values()):
        stage = {rank: s for rank, s in everyone.items() if s.names == names}
        keys = dict.fromkeys(key for s in stage.values() for key in s.state)
        order = {name: i for i, name in enumerate(names)}
        for key in sorted(keys, key=lambda key: order.get(key, len(order))):
            usual = _usual(_slots(s, key) for s in stage.values())
            ranks = [rank for rank, s in stage.items() if _slots(s, key) != usual]
            if ranks:
                problems.append(
                    f"the first state that differs is that of {key!r}: {_shown(_slots(stage[ranks[0]], key))} on "
                    f"{name_ranks(ranks)}, {_shown(usual)} on the others"
                )
                break
    return problems


def _slots(state: RankState, key: str) -> tuple[tuple[str, tuple[float | str, ...]], ...]:
    return tuple(sorted(state.state.get(key, {}).items()))


def _usual(values: Iterable[Any]) -> Any:
    """Return the most common of the values; if several are, the first of them."""
    return Counter(values).most_common(1)[0][0]


def _shown(slots: tuple[tuple[str, tuple[float | str, ...]], ...]) -> str:
    """Return the slots as text for an error, without a warm-up's record, which is long."""
    shown = [f"{name} {float(values[0]):.9g}" for name, values in slots if len(values) == 1]
    return ", ".join(shown) or ("another record of the warm-up" if slots else "none")
