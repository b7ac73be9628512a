"""Ranks that have fallen out of step, found by numbers that ride along with the packed vector: no collective of its own.

Each rank adds a few whole numbers to the vector that is summed over a group anyway: how often it has clipped, whether these
gradients were clipped before, a fingerprint of the state that all ranks of its stage share, and the squares of them. m
ranks have the same number x exactly if the sums are m x and m x^2 (then the variance is 0), and if they have not, every
one of them sees it. All of it is whole and below 2^53, so float64 sums are exact in whatever order they are made.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_clip.errors import DesyncError

_PRIME = 131_071
"""Numbers that travel are below this: 2^17, so that 2^18 ranks' squares add up to less than 2^53."""


@dataclasses.dataclass(frozen=True)
class Standing:
    """Where one rank stands, in full: sent only once something is known to differ.

    Attributes:
        calls: how often it has clipped (after a load: the step that was loaded, and the clips since).
        again: its gradients are those that it clipped last: no backward since.
        names: the tensors it takes part in.
        state: {tensor or pattern: {slot: value}}, without what is a rank's own (scope "shard").
    """

    calls: int
    again: bool
    names: tuple[str, ...]
    state: Mapping[str, Mapping[str, tuple[float, ...]]]


def shared_state(snapshot: Mapping[str, Any]) -> dict[str, dict[str, tuple[float, ...]]]:
    """The `Standing.state` of a snapshot (`dist_clip.state`); rows of a warm-up's record that hold nothing are -1."""
    tensors = {name: entry for name, entry in snapshot["tensors"].items() if name not in snapshot["shards"]}
    return {
        name: {slot: tuple(value.nan_to_num(nan=-1.0).flatten().tolist()) for slot, value in entry.items()}
        for name, entry in {**snapshot["global"], **tensors}.items()
    }


class DesyncDetector:
    """Makes the numbers that ride along, and judges what comes back.

    Args:
        standing: what this rank says of itself when ranks differ.
        device: where the numbers are made. On the CPU they are judged at once, before anything is clipped. Elsewhere
            reading them would make the host wait for the device: they are read when the next clip begins.
    """

    def __init__(self, standing: Callable[[], Standing], device: torch.device) -> None:
        self._standing = standing
        self._device = device
        self._weights: dict[int, Tensor] = {}
        self._verdicts: list[Verdict] = []

    def riders(self, calls: int, again: bool, states: Iterable[Tensor] = ()) -> Tensor:
        """float64 [6]: calls, `again` and a fingerprint of `states`, then their squares."""
        numbers = torch.stack([self._number(calls), self._number(again), self._fingerprint(states)])
        return torch.cat([numbers, numbers.square()])

    def judge(self, sent: Tensor, arrived: Sequence[tuple[Any, Tensor]]) -> None:
        """Compare the sums over each group with what they are if all its ranks sent what this one did.

        Raises:
            DesyncError: on the CPU; elsewhere `raise_if_found` does so later.
        """
        for group, sums in arrived:
            self._verdicts.append(Verdict(group, (sums != sent * group.size()).any()))
        if self._device.type == "cpu":
            self.raise_if_found()

    def raise_if_found(self) -> None:
        """Read the verdicts that are due.

        Raises:
            DesyncError: on every rank of a group that is out of step.
        """
        verdicts, self._verdicts = self._verdicts, []
        for verdict in verdicts:
            if verdict.read():
                compare(self._standing(), verdict.group)

    def _number(self, value: int) -> Tensor:
        # full, not tensor: the value reaches an accelerator as a kernel's argument, and the host need not wait.
        return torch.full((), value % _PRIME, dtype=torch.float64, device=self._device)

    def _fingerprint(self, states: Iterable[Tensor]) -> Tensor:
        """A weighted sum of the states' bits modulo a prime: one state that differs changes it."""
        total = torch.zeros((), dtype=torch.int64, device=self._device)
        for state in states:
            bits = state if not state.is_floating_point() else state.view(_BITS[state.dtype])
            residues = torch.remainder(bits.flatten().to(torch.int64), _PRIME)
            total = total + torch.remainder(residues * self._weights_for(residues.numel()), _PRIME).sum()
        return torch.remainder(total, _PRIME).double()

    def _weights_for(self, n: int) -> Tensor:
        if n not in self._weights:
            self._weights[n] = torch.remainder(torch.arange(1, n + 1, device=self._device) * 48_271, _PRIME)
        return self._weights[n]


_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


class Verdict:
    """A flag over a group, on its way to the host: to be read a step later, so that the host need not wait."""

    def __init__(self, group: Any, flag: Tensor) -> None:
        self.group = group
        self._flag, self._event = flag, None
        if flag.device.type != "cpu":
            self._flag = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(flag, non_blocking=True)
            self._event = torch.get_device_module(flag.device.type).Event()
            self._event.record()

    def read(self) -> bool:
        if self._event is not None:
            self._event.synchronize()  # a whole step ago: long done
        return bool(self._flag)


def compare(mine: Standing, group: Any) -> None:
    """Exchange the standings of `group` (None: all ranks) and raise if any differ. Collective over it.

    Raises:
        DesyncError: the same on every rank of the group, naming the ranks that differ from most others, and the first
            tensor whose state differs.
    """
    group = group if group is not None else dist.group.WORLD
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, mine, group=group)
    everyone: dict[int, Standing] = dict(zip(dist.get_process_group_ranks(group), gathered, strict=True))
    problems = [*_counts_that_differ(everyone), *_clipped_again(everyone), *_states_that_differ(everyone)]
    if problems:
        raise DesyncError(
            f"ranks are out of step: {'; '.join(problems)}. Every rank must call clip_() once a step and load the same "
            "checkpoint; copies of one tensor must get the same gradients"
        )


def _counts_that_differ(everyone: Mapping[int, Standing]) -> list[str]:
    usual = _usual(standing.calls for standing in everyone.values())
    others: dict[int, list[int]] = {}
    for rank, standing in everyone.items():
        if standing.calls != usual:
            others.setdefault(standing.calls, []).append(rank)
    return [
        f"{_ranks(ranks)} {'is' if len(ranks) == 1 else 'are'} at step {calls} and the other ranks at {usual}"
        for calls, ranks in others.items()
    ]


def _clipped_again(everyone: Mapping[int, Standing]) -> list[str]:
    ranks = [rank for rank, standing in everyone.items() if standing.again]
    return [f"{_ranks(ranks)} clipped again without a backward"] if 0 < len(ranks) < len(everyone) else []


def _states_that_differ(everyone: Mapping[int, Standing]) -> list[str]:
    """For each stage, the first of its tensors whose state is not the same on all its ranks."""
    problems = []
    for names in dict.fromkeys(standing.names for standing in everyone.values()):
        stage = {rank: s for rank, s in everyone.items() if s.names == names}
        keys = dict.fromkeys(key for s in stage.values() for key in s.state)
        order = {name: i for i, name in enumerate(names)}
        for key in sorted(keys, key=lambda key: order.get(key, len(order))):
            usual = _usual(_slots(s, key) for s in stage.values())
            ranks = [rank for rank, s in stage.items() if _slots(s, key) != usual]
            if ranks:
                problems.append(
                    f"the first state that differs is that of {key!r}: {_tell(_slots(stage[ranks[0]], key))} on "
                    f"{_ranks(ranks)}, {_tell(usual)} on the others"
                )
                break
    return problems


def _slots(standing: Standing, key: str) -> tuple[tuple[str, tuple[float, ...]], ...]:
    return tuple(sorted(standing.state.get(key, {}).items()))


def _usual(values: Iterable[Any]) -> Any:
    """The most common of the values, of equals the first."""
    return Counter(values).most_common(1)[0][0]


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _tell(slots: tuple[tuple[str, tuple[float, ...]], ...]) -> str:
    """The slots for people: a warm-up's record is not spelled out."""
    shown = [f"{name} {values[0]:.9g}" for name, values in slots if len(values) == 1]
    return ", ".join(shown) or ("another record of the warm-up" if slots else "none")
