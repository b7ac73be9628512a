"""The way from a clipper's arguments to a layout that all ranks have agreed on."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_clip.construction.agreement import RankConfig, agree, agreed_numbers, sendable
from dist_clip.construction.coverage import check_coverage
from dist_clip.construction.options import CheckedOptions, Options
from dist_clip.construction.selection import Selection, checked_rules, numbers_of
from dist_clip.errors import LayoutError
from dist_clip.kernels import TORCH, Kernels, choose
from dist_clip.layouts import Layout, LayoutReader, ParameterWatch, build_layout, merge_groups, named_parameters
from dist_clip.layouts.meeting import meet
from dist_clip.layouts.process_groups import (
    checked_group,
    current_rank,
    device_of,
    distributed,
    gather,
    group_size,
    stage_of,
)
from dist_clip.layouts.sharded import Division, divide, join
from dist_clip.memory import Rule
from dist_clip.reduction import ReductionPlan, ReplicaCheck


@dataclasses.dataclass(frozen=True)
class Construction:
    """The parts of a clipper, the same on every rank of a pipeline stage.

    Attributes:
        options: the user's options, checked.
        layout: the logical tensors.
        rules: (label, policy) pairs in order, the default last.
        numbers: the number of the rule of each tensor of the whole model, by FQN.
        device: where norms, scales and state live.
        kernels: what measures and scales.
        plan: reduces over the norm groups; its coverage is checked.
        target: the modules that were passed, whose parameters can be read again; None if no modules were passed.
        known: ids of all parameters of the target, excluded ones included.
        counted: whether this stage's copy of each tensor counts in the global norm.
        replicas: compares what should be copies of one tensor.
        elsewhere: shape of each tensor that only other pipeline stages hold.
        ranks_a_stage: number of ranks of one pipeline stage.
    """

    options: CheckedOptions
    layout: Layout
    rules: Sequence[Rule]
    numbers: Mapping[str, int]
    device: torch.device
    kernels: Kernels
    plan: ReductionPlan
    watch: ParameterWatch | None
    known: frozenset[int]
    counted: tuple[bool, ...]
    elsewhere: Mapping[str, tuple[int, ...]]
    replicas: ReplicaCheck
    ranks_a_stage: int

    def check_not_stale(self, *, thorough: bool) -> None:
        """Check that no parameter came after the construction whose gradient would be missed, and none went with one.

        Args:
            thorough: also look at parameters without a gradient, as is worth it once.

        Raises:
            LayoutError: there is one.
        """
        if self.watch is None or not (thorough or self.watch.changed()):
            return
        for name, param in self.watch.unknown(self.known):
            if thorough or (param.requires_grad and param.grad is not None):
                raise LayoutError(
                    f"rank {current_rank()}: {name!r} is another parameter than when the clipper was constructed, so its "
                    "gradient would not be clipped: construct the clipper after whatever replaces or adds parameters "
                    "(fully_shard, parallelize_module, to_empty, a new head or adapter), outside forward and backward; or "
                    "call clipper.refresh() on every rank, which takes them in and keeps what is known of the others"
                )
        if not self.watch.changed():
            return
        # By name as well: a parameter in whose place is another one is the other check's, which waits for its gradient.
        there = self.watch.parameters()
        ids = set(map(id, there.values()))
        for tensor in self.layout:
            left = tensor.param
            if left is not None and left.grad is not None and tensor.name not in there and id(left) not in ids:
                raise LayoutError(
                    f"rank {current_rank()}: {tensor.name!r} is no longer a parameter of the model, but it still has a "
                    "gradient, which would count in the norm: call clipper.refresh() on every rank, or set that gradient to "
                    "None before the parameter is taken away"
                )


def construct(target: Any, policy: object, options: Options) -> Construction:
    """Check the arguments, read the layout, and agree with the other ranks.

    Raises:
        LayoutError, TypeError, ValueError, ImportError: as `GradClipper` documents; the same on every rank.
    """
    draft = _Draft(target, policy, options)
    draft.meet()
    mine = draft.rank_config()
    checked = draft.checked
    everyone = agree(mine, checked.process_group, checked.pp_group)
    assert draft.layout is not None
    assert draft.device is not None  # agree() has raised what went wrong
    layout = merge_groups(join(draft.layout, draft.divisions, checked.process_group))
    names = frozenset(layout.names)
    # The first stage that holds a name counts it.
    earlier = {name for config in everyone.values() if config.stage < mine.stage for name in config.names}
    elsewhere: dict[str, tuple[int, ...]] = {}
    for config in everyone.values():
        if config.stage != mine.stage:
            elsewhere.update(zip(config.names, config.shapes, strict=True))
    copies_among = group_size(checked.process_group) // (1 if checked.pp_group is None else checked.pp_group.size())
    shared = names & elsewhere.keys()
    whole = layout.stage_group
    if whole is None and copies_among > 1 and checked.pp_group is None:
        whole = checked.process_group or dist.group.WORLD
    plan = ReductionPlan(
        layout,
        process_group=whole,
        copies_among=copies_among,
        shared=shared,
        meet=checked.detect_desync or checked.needs_loss,
    )
    check_coverage(layout, plan, checked.process_group)
    replicas = ReplicaCheck(
        layout,
        {*names, *elsewhere},
        checked.process_group,
        draft.device,
        copies_among=copies_among,
        shared=shared,
        enabled=checked.check_replicas,
    )
    return Construction(
        options=checked,
        layout=layout,
        rules=draft.rules,
        numbers=agreed_numbers(everyone),
        device=draft.device,
        kernels=draft.kernels,
        plan=plan,
        watch=None if draft.modules is None else ParameterWatch(draft.modules),
        known=draft.known,
        counted=tuple(name not in earlier for name in layout.names),
        elsewhere={name: shape for name, shape in elsewhere.items() if name not in names},
        replicas=replicas,
        ranks_a_stage=copies_among,
    )


class _Draft:
    """The part of a construction that one rank does alone, and that may fail there."""

    def __init__(self, target: Any, policy: object, options: Options) -> None:
        self.target, self.policy, self.options = target, policy, options
        self.checked = CheckedOptions()
        self.rules: Sequence[Rule] = []
        self.selections: Sequence[Selection] = []
        self.layout: Layout | None = None
        self.device: torch.device | None = None
        self.modules: Any = None
        self.known: frozenset[int] = frozenset()
        self.kernels: Kernels = TORCH
        self.divisions: Mapping[str, Division] = {}
        self._excluded: set[str] = set()
        self._described = RankConfig(error=None, stage=0)

    def meet(self) -> None:
        """Wait for the ranks that construct the clipper together with this one."""
        group = None
        with contextlib.suppress(LayoutError):  # a wrong group is an error that `rank_config` sends to the others
            group = checked_group(self.options.process_group, "process_group")
        meet(group, "construct or refresh a GradClipper")

    def rank_config(self) -> RankConfig:
        """Return what this rank sends to the others. It includes an error, so that all ranks raise it."""
        failed = self._attempt(self._check)
        # A framework's reader communicates, and would wait for a rank that has failed already.
        if isinstance(self.target, LayoutReader):
            anywhere = any(gather(failed is not None, self.checked.process_group).values())
            if anywhere and failed is None:
                return RankConfig(error=None, stage=0)  # the ranks that failed send theirs
        if failed is None:
            failed = self._attempt(self._describe)
        return self._described if failed is None else RankConfig(error=failed, stage=0)

    @staticmethod
    def _attempt(part: Callable[[], None]) -> Exception | None:
        try:
            part()
        except Exception as error:  # any error at all, because the other ranks wait for this one
            return sendable(error)
        return None

    def _check(self) -> None:
        self.checked = self.options.checked()
        self.rules, self.selections = checked_rules(self.policy, self.options.overrides, self.options.exclude)

    def _describe(self) -> None:
        options = self.checked
        layout = self.layout = self._read()
        _check_process_group(layout, options.process_group)
        self.device = layout.device or device_of(options.pp_group)
        self.kernels = choose(self.options.kernels, self.device)
        numbers, selected = numbers_of(self.selections, layout, self.known)
        patterns = frozenset(self.options.exclude) | set(options.divisions)
        matched = self._excluded | {p for p in patterns for name in layout.names if fnmatch.fnmatchcase(name, p)}
        policies = ", ".join(f"{label!r}: {rule!r}" for label, rule in self.rules)
        self._described = RankConfig(
            error=None,
            stage=stage_of(options.pp_group),
            tensors=tuple(tensor.describe() for tensor in layout),
            options=f"{policies}; {options.describe()}, kernels={self.kernels.name}",
            patterns=patterns | {label for label, _ in self.rules[:-1]},
            matched=frozenset(matched | selected),
            rules=tuple(label for label, _ in self.rules),
            numbers=numbers,
            names=layout.names,
            shapes=tuple(tensor.shape for tensor in layout),
        )

    def _read(self) -> Layout:
        target = self.target
        if isinstance(target, LayoutReader):  # which knows what the user says
            return target.read_layout(self._excludes)
        if not isinstance(target, (nn.Module, torch.optim.Optimizer, Tensor, Mapping)) and isinstance(target, Iterable):
            target = list(target)  # a generator can be read once
        layout = build_layout(target, allow_empty=self.checked.pp_group is not None, skip=self._excludes)
        modules = target if isinstance(target, Sequence) else [target]
        if all(isinstance(module, nn.Module) for module in modules):
            self.modules = target
        self.known = frozenset(id(param) for _, param in named_parameters(target))
        self.divisions = self.checked.divisions
        one_stage = distributed() and self.checked.pp_group is None
        everyone = (self.checked.process_group or dist.group.WORLD) if one_stage else None
        return divide(layout, self.divisions, everyone)

    def _excludes(self, name: str) -> bool:
        """Return whether `name` is excluded, and record the patterns that match it."""
        hits = {pattern for pattern in self.options.exclude if fnmatch.fnmatchcase(name, pattern)}
        self._excluded |= hits
        return bool(hits)


def _check_process_group(layout: Layout, process_group: dist.ProcessGroup | None) -> None:
    if process_group is None:
        return
    ranks = frozenset(dist.get_process_group_ranks(process_group))
    for tensor in layout:
        outside = sorted(tensor.mesh_ranks - ranks)
        if outside:
            raise LayoutError(
                f"rank {current_rank()}: {tensor.name!r} is laid out over ranks {sorted(tensor.mesh_ranks)}, of which "
                f"{outside} are not in process_group=, whose ranks are {sorted(ranks)}: pass a group of all ranks that "
                "train this model, or nothing if that is all ranks"
            )
