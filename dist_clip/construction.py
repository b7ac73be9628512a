"""From a clipper's arguments, checked, to a layout that all ranks have agreed on."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler

from dist_clip.agreement import Announcement, agree, told
from dist_clip.domains import checked_rules
from dist_clip.errors import LayoutError
from dist_clip.groups import checked_group, device_of, distributed, stage_of
from dist_clip.kernels import TORCH, Kernels, choose
from dist_clip.layout import Layout, LayoutReader
from dist_clip.policies.base import Policy
from dist_clip.readers import build_layout, modules_of, named_parameters, reduced_together
from dist_clip.scaling import checked_scaler


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What the user passed to the clipper, beside the target. Not checked yet."""

    policy: Policy
    pp_group: Any
    process_group: Any
    nonfinite: Any
    groups: Any
    exclude: Any
    log_global_norm: Any
    skip_above: Any
    kernels: Any
    scaler: Any
    detect_desync: Any
    overlap: Any


@dataclasses.dataclass(frozen=True)
class Construction:
    """What a clipper is made of, the same on every rank of a pipeline stage.

    Attributes:
        layout: the logical tensors.
        rules: (pattern, policy) pairs in order, the default last.
        pp_group, process_group: as passed.
        device: where norms, scales and state live.
        target: the modules that were passed, which can be asked for their parameters again; None where none were.
        known: ids of all parameters of the target, excluded ones included.
        counted: whether this stage's copy of each tensor counts in the global norm.
        elsewhere: names that other pipeline stages hold.
        kernels: what measures and scales.
        scaler: the GradScaler, if there is one that scales.
        detect_desync: whether to look for ranks that are out of step.
        overlap: how many buckets may be reduced in backward.
        reduced_together: where that is not 0, FSDP2's parameter groups.
    """

    layout: Layout
    rules: list[tuple[str, Policy]]
    pp_group: Any
    process_group: Any
    device: torch.device
    target: Any
    known: frozenset[int]
    counted: tuple[bool, ...]
    elsewhere: frozenset[str]
    kernels: Kernels
    scaler: GradScaler | None
    detect_desync: bool
    overlap: int
    reduced_together: tuple[tuple[Tensor, ...], ...]

    def check_not_stale(self) -> None:
        """Raise if the module's parameters are no longer those of the construction: they would not be clipped."""
        if self.target is None:
            return
        for name, param in named_parameters(self.target):
            if id(param) not in self.known:
                raise LayoutError(
                    f"rank {_rank()}: {name!r} is another parameter than when the clipper was constructed, so its gradient "
                    "would not be clipped: construct the clipper after whatever replaces parameters (fully_shard, "
                    "parallelize_module, to_empty, a new head), and outside forward and backward"
                )


def construct(target: Any, arguments: Arguments) -> Construction:
    """Check, read, and agree with the other ranks: what is wrong on one rank is the same error on all of them."""
    draft = _Draft(target, arguments)
    announcement = draft.announce()
    everyone = agree(announcement, draft.process_group, draft.pp_group)
    assert draft.layout is not None
    assert draft.device is not None  # agree() has raised what went wrong
    earlier = {name for _, a in everyone if a.stage < announcement.stage for name in a.names}
    return Construction(
        layout=draft.layout,
        rules=draft.rules,
        pp_group=draft.pp_group,
        process_group=draft.process_group,
        device=draft.device,
        target=draft.modules,
        known=draft.known,
        # The first stage that holds a name counts it.
        counted=tuple(name not in earlier for name in draft.layout.names),
        elsewhere=frozenset(name for _, a in everyone if a.stage != announcement.stage for name in a.names),
        kernels=draft.kernels,
        scaler=draft.scaler,
        detect_desync=arguments.detect_desync,
        overlap=arguments.overlap,
        reduced_together=draft.reduced_together,
    )


class _Draft:
    """A construction that may yet fail."""

    def __init__(self, target: Any, arguments: Arguments) -> None:
        self.target, self.arguments = target, arguments
        self.rules: list[tuple[str, Policy]] = []
        self.exclude: tuple[str, ...] = ()
        self.pp_group: Any = None
        self.process_group: Any = None
        self.layout: Layout | None = None
        self.device: torch.device | None = None
        self.modules: Any = None
        self.known: frozenset[int] = frozenset()
        self.kernels: Kernels = TORCH
        self.scaler: GradScaler | None = None
        self.reduced_together: tuple[tuple[Tensor, ...], ...] = ()

    def announce(self) -> Announcement:
        """Do all that this rank can do alone; a failure becomes part of what it tells the others, so that all raise."""
        try:
            return self._announce()
        except Exception as error:  # whatever it is, the others wait for this rank to say so
            return Announcement(error=told(error), stage=0)

    def _announce(self) -> Announcement:
        arguments = self.arguments
        self.process_group = checked_group(arguments.process_group, "process_group")
        self.pp_group = checked_group(arguments.pp_group, "pp_group")
        self.rules = checked_rules(arguments.policy, arguments.nonfinite, arguments.groups, arguments.exclude)
        self.exclude = tuple(arguments.exclude)
        self.scaler = checked_scaler(arguments.scaler, arguments.nonfinite)
        _check_reporting(arguments)
        layout, excluded = self._read()
        _check_process_group(layout, self.process_group)
        self.layout = layout
        self.device = layout.device or device_of(self.pp_group)
        self.kernels = choose(arguments.kernels, self.device)
        tensors = layout.describe()
        if _checked_overlap(arguments, self.rules, self.process_group):
            self.reduced_together = self._fsdp2_groups(layout)
            group_of = {id(param): g for g, group in enumerate(self.reduced_together) for param in group}
            tensors = [f"{t.describe()}, FSDP2 group {group_of.get(id(t.param))}" for t in layout]
        patterns = frozenset(self.exclude) | {pattern for pattern, _ in self.rules[:-1]}
        matched = excluded | {p for p in patterns for name in layout.names if fnmatch.fnmatchcase(name, p)}
        policies = ", ".join(f"{pattern!r}: {rule!r}" for pattern, rule in self.rules)
        return Announcement(
            error=None,
            stage=stage_of(self.pp_group),
            tensors=tuple(tensors),
            config=(
                f"{policies}; nonfinite={arguments.nonfinite!r}, log_global_norm={arguments.log_global_norm}, "
                f"skip_above={arguments.skip_above}, pp_group={'given' if self.pp_group is not None else None}, "
                f"kernels={self.kernels.name}, detect_desync={arguments.detect_desync}, "
                f"overlap={arguments.overlap}, scaler={'given' if self.scaler is not None else None}"
            ),
            patterns=patterns,
            matched=frozenset(matched),
            names=layout.names,
            shapes=tuple(t.shape for t in layout),
        )

    def _fsdp2_groups(self, layout: Layout) -> tuple[tuple[Tensor, ...], ...]:
        if self.modules is None:
            raise ValueError(
                "overlap= needs to know the model's FSDP2 groups: pass the module to GradClipper, not parameters, an "
                "optimizer or Megatron's"
            )
        groups = reduced_together(modules_of(self.modules))
        if distributed() and len(layout) and not groups:
            raise ValueError(
                "overlap= needs FSDP2 (fully_shard), which tells when a gradient is final; this model has no such module. "
                "Under DDP nothing is reduced; with FSDP1 and tensor parallelism alone leave overlap= out"
            )
        return groups

    def _read(self) -> tuple[Layout, set[str]]:
        """The layout of the target, and the exclude patterns that matched."""
        excluded: set[str] = set()

        def skip(name: str) -> bool:
            hits = {p for p in self.exclude if fnmatch.fnmatchcase(name, p)}
            excluded.update(hits)
            return bool(hits)

        target = self.target
        if isinstance(target, LayoutReader):
            return target.read_layout(skip), excluded
        if not isinstance(target, (nn.Module, torch.optim.Optimizer, Tensor, Mapping)) and isinstance(target, Iterable):
            target = list(target)  # a generator can be read once
        layout = build_layout(target, allow_empty=self.pp_group is not None, skip=skip)
        modules = target if isinstance(target, Sequence) else [target]
        if all(isinstance(module, nn.Module) for module in modules):
            self.modules = target
        self.known = frozenset(id(param) for _, param in named_parameters(target))
        return layout, excluded


def _checked_overlap(arguments: Arguments, rules: list[tuple[str, Policy]], process_group: Any) -> int:
    """``overlap``, where it can be."""
    overlap = arguments.overlap
    if isinstance(overlap, bool) or not isinstance(overlap, int):
        raise TypeError(f"overlap must be an int, got {overlap!r}")
    if overlap < 0:
        raise ValueError(f"overlap must be at least 0, got {overlap!r}")
    if not overlap:
        return 0
    if arguments.scaler is not None:
        raise ValueError(
            "overlap= measures gradients in backward, before a GradScaler can unscale them: pass one of the two"
        )
    shard_scope = [pattern for pattern, policy in rules if policy.rule_scope == "shard"]
    if shard_scope:
        raise ValueError(
            f'overlap= has nothing to do for scope "shard" (rule {shard_scope[0]!r}), which reduces nothing'
        )
    if process_group is not None and process_group.size() < dist.get_world_size():
        raise ValueError(
            f"overlap= makes process groups, for which all {dist.get_world_size()} ranks are needed, and process_group= has "
            f"{process_group.size()}: leave overlap= out"
        )
    return overlap


def _check_reporting(arguments: Arguments) -> None:
    if not isinstance(arguments.log_global_norm, bool):
        raise TypeError(f"log_global_norm must be a bool, got {arguments.log_global_norm!r}")
    if not isinstance(arguments.detect_desync, bool):
        raise TypeError(f"detect_desync must be a bool, got {arguments.detect_desync!r}")
    above = arguments.skip_above
    if isinstance(above, bool) or not isinstance(above, numbers.Real):
        raise TypeError(f"skip_above must be a number, got {above!r}")
    if math.isnan(float(above)) or float(above) <= 0:
        raise ValueError(f"skip_above must be above 0, got {above!r}")


def _check_process_group(layout: Layout, process_group: Any) -> None:
    if process_group is None:
        return
    ranks = frozenset(dist.get_process_group_ranks(process_group))
    for tensor in layout:
        outside = sorted(tensor.mesh_ranks - ranks)
        if outside:
            raise LayoutError(
                f"rank {_rank()}: {tensor.name!r} is laid out over ranks {sorted(tensor.mesh_ranks)}, of which {outside} "
                f"are not in process_group=, whose ranks are {sorted(ranks)}: pass a group of all ranks that train this "
                "model, or nothing if that is all ranks"
            )


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
