"""The memory between steps: which policy clips which tensors, each policy's state, and the number of steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dist_clip.guards import Guard
from dist_clip.layouts.layout import Layout
from dist_clip.memory.host_copy import HostCopy, capturing
from dist_clip.policies.base import Need, Policy, State

Rule = tuple[str, Policy]
"""The label of a selector (an FQN pattern is its own), and the policy of the tensors that it selects."""

_ASK_EVERY = 32
"""Steps between two copies of the step count to the host. The host may learn late that a warm-up is over."""


@dataclasses.dataclass
class PolicyGroup:
    """The tensors that one policy clips, and its state. Its global norm is the norm of these tensors together.

    Attributes:
        policy: the policy.
        pattern: the FQN pattern that selects the tensors, or the label of another selector.
        indices: the tensors' numbers in the layout.
        index: `indices` on the device, int64.
        numel: int64 [elements], as in `StepInputs.numel`.
        state: the policy's state.
        one_element: whether the policy sees one element, the global norm (scope "global").
        per_shard: whether the policy sees this rank's shards, whose scales may differ between ranks (scope "shard").
    """

    policy: Policy
    pattern: str
    indices: tuple[int, ...]
    index: Tensor
    numel: Tensor
    state: State

    def __post_init__(self) -> None:
        self.one_element = self.policy.elements.one
        self.per_shard = self.policy.elements.per_rank

    @property
    def num_elements(self) -> int:
        return 1 if self.one_element else len(self.indices)

    def fresh_state(self) -> State:
        """Return the state before the first step."""
        return self.policy.init_state(self.num_elements, self.index.device)

    def select(self, values: Tensor) -> Tensor:
        """Return the entries of this group's tensors in `values`, [n] for the layout's n tensors."""
        return values.index_select(0, self.index)


@dataclasses.dataclass
class GuardMemory:
    """A guard and what it remembers.

    Attributes:
        guard: the guard.
        state: the guard's state; its tensor slots have one column a tensor of the layout.
        skips_in_a_row: int32 0-dim, how many steps it has skipped in a row.
    """

    guard: Guard
    state: State
    skips_in_a_row: Tensor


@dataclasses.dataclass
class UnderWay:
    """The numbers of the tensors that a step has seen before its `clip_` (`dist_clip.step.early`).

    Attributes:
        measured: those measured in a first backward.
        clipped: those clipped.
        elsewhere: those of them whose gradients were passed, and are not in ``.grad`` yet.
    """

    measured: set[int] = dataclasses.field(default_factory=set)
    clipped: set[int] = dataclasses.field(default_factory=set)
    elsewhere: set[int] = dataclasses.field(default_factory=set)


class Memory:
    """The policy groups and guards with their states, and the step count. It does not communicate.

    Args:
        rules: (label, policy) pairs in order, the default last.
        numbers: the number of the rule of each tensor of the whole model, by FQN.
        layout: the logical tensors.
        elsewhere: shape of each tensor that only other pipeline stages hold.
        device: where states and step count live.
        may_skip: whether a step may be skipped, which the host does not know.
        guards: the guards.

    Attributes:
        guards: the guards with their states.
        groups: one policy group a rule, with its tensors on this stage, possibly none.
        t: int64 0-dim on `device`, the number of steps taken.
        under_way: what the next step has done already.
        calls: how often `advance` was called (after a load: the step that was loaded, and the calls since).
        names_elsewhere: FQNs of the tensors that only other pipeline stages hold.
        shapes: shape of each tensor of the whole model, by FQN.
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        numbers: Mapping[str, int],
        layout: Layout,
        elsewhere: Mapping[str, tuple[int, ...]],
        device: torch.device,
        *,
        may_skip: bool,
        guards: Sequence[Guard] = (),
    ) -> None:
        self.layout, self.device = layout, device
        self.names_elsewhere = frozenset(elsewhere)
        self.shapes = {**elsewhere, **{tensor.name: tensor.shape for tensor in layout}}
        self.t = torch.zeros((), dtype=torch.int64, device=device)
        self.calls = 0
        self.under_way = UnderWay()
        self._rules, self._numbers = tuple(rules), dict(numbers)
        self._may_skip = may_skip
        self._known_steps = 0
        self._pending: HostCopy | None = None
        self._asked = 0
        self._needs: tuple[int, list[frozenset[Need]]] = (0, [])
        self.guards = [
            GuardMemory(guard, guard.init_state(len(layout), device), torch.zeros((), dtype=torch.int32, device=device))
            for guard in guards
        ]
        self.groups = [self._group(k, elsewhere) for k in range(len(self._rules))]

    def _group(self, k: int, elsewhere: Mapping[str, tuple[int, ...]]) -> PolicyGroup:
        pattern, policy = self._rules[k]
        indices = tuple(i for i, name in enumerate(self.layout.names) if self._numbers[name] == k)
        tensors = [self.layout.tensors[i] for i in indices]
        numel = [t.shard_numel if policy.elements.per_rank else t.numel for t in tensors]
        if policy.elements.one:
            numel = [sum(numel) + sum(math.prod(s) for name, s in elsewhere.items() if self._numbers[name] == k)]
        group = PolicyGroup(
            policy,
            pattern,
            indices,
            torch.tensor(indices, dtype=torch.int64, device=self.device),
            torch.tensor(numel, dtype=torch.int64, device=self.device),
            {},
        )
        group.state = group.fresh_state()
        return group

    def policy_for(self, name: str) -> Policy:
        """Return the policy of the tensor `name`, of this pipeline stage or another."""
        return self._rules[self._numbers[name]][1]

    def needs(self) -> list[frozenset[Need]]:
        """Return what the next step must measure for each policy group, the same on every rank."""
        step, needs = self._needs
        if step != self.calls + 1:
            step = self.calls + 1
            needs = [self._group_needs(group, step) for group in self.groups]
            self._needs = (step, needs)
        return needs

    def _group_needs(self, group: PolicyGroup, step: int) -> frozenset[Need]:
        # Where steps may be skipped, the host does not know how many were, and so not whether a warm-up is over.
        needs = {need for number in ({1, step} if self._may_skip else {step}) for need in group.policy.needs(number)}
        if group.one_element or self._may_skip:  # to skip together, the stages communicate anyway
            needs.add("global_norm")
        return frozenset(needs)

    def one_scale(self, group: PolicyGroup) -> bool:
        """Return whether all tensors of `group` get the same scale at the next step, on every rank. No host sync."""
        return group.one_element or (not self._may_skip and group.policy.one_scale(self.calls + 1))

    @property
    def steps_done(self) -> int:
        """Number of steps that the host knows to have been taken, without waiting for the device: a lower bound."""
        if not self._may_skip:
            return self.calls
        if self.device.type == "cpu":
            return int(self.t)
        if self.calls % _ASK_EVERY == 0 and self.calls > self._asked and not capturing(self.device):
            # Read when the next copy is made, and not when it arrives: all ranks must know the same at the same step, or
            # they would drop the record of a warm-up at different steps. A copy of so long ago need not be waited for.
            if self._pending is not None:
                self._known_steps = int(self._pending.read())
            self._pending, self._asked = HostCopy(self.t), self.calls
        return self._known_steps

    def advance(
        self, new_states: Sequence[State], skip: Tensor | None, guards: Sequence[tuple[State, Tensor]] = ()
    ) -> None:
        """Count the step and store the new states, one a group, unless `skip`, bool 0-dim, is set.

        Args:
            guards: each guard's new state and number of skips in a row, which are stored in any case.
        """
        self.t.add_(1 if skip is None else torch.logical_not(skip))
        olds: list[Tensor] = []
        news: list[Tensor] = []
        for group, new in zip(self.groups, new_states, strict=True):
            # The record of a warm-up that is over is dropped: the policy no longer returns that slot.
            group.state = {name: value for name, value in group.state.items() if name in new}
            olds += group.state.values()
            news += [new[name] for name in group.state]
        if skip is not None:
            news = [torch.where(skip, old, new) for new, old in zip(news, olds, strict=True)]
        for memory, (new, in_a_row) in zip(self.guards, guards, strict=True):
            olds += [*memory.state.values(), memory.skips_in_a_row]
            news += [*(new[name] for name in memory.state), in_a_row]
        # Copied in place, because a captured CUDA graph needs the state at a fixed address.
        if olds:
            torch._foreach_copy_(olds, news)
        self.calls += 1

    @property
    def steps(self) -> int:
        """Number of steps taken, without those that were skipped. Syncs the host."""
        return int(self.t)

    def set_steps(self, steps: int) -> None:
        """Set the step count, `calls` included, to `steps`, and forget a step that is under way."""
        self.under_way = UnderWay()
        self.calls = self._known_steps = self._asked = steps
        self._pending = None
        self.t.fill_(steps)

    def check_between_steps(self, method: str) -> None:
        """Check that no step is under way, of which some tensors were clipped and others were not.

        Raises:
            RuntimeError: one is.
        """
        early = self.under_way.clipped or self.under_way.measured
        if early:
            raise RuntimeError(
                f"{method}() was called in the middle of a step: {len(early)} tensors were clipped or measured early, such "
                f"as {self.layout.names[min(early)]!r}, and others were not. Call clip_() first"
            )

    def shared_states(self) -> list[Tensor]:
        """Return the states' tensors that all ranks of a pipeline stage share: all but those of scope "shard"."""
        guards = [value for guard in self.guards for value in (*guard.state.values(), guard.skips_in_a_row)]
        return [value for group in self.groups if not group.per_shard for value in group.state.values()] + guards
