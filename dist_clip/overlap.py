"""Overlap: norms of tensors whose gradients are final are measured and reduced while backward still runs.

The sharded tensors are divided into buckets, in the order in which backward finishes them. Every rank issues one collective
a bucket and step, always in that order, whatever its gradients are: those of the early buckets during backward as soon as
the bucket's gradients are there, the others, at least that of the last bucket, in the clip. They run over a process group of
their own, so that they need not be in order with those of the framework.

Early are only tensors that FSDP2 manages, for it tells when a gradient is reduced and final. Buckets hold whole parameter
groups of FSDP2: what it adds to one gradient of a group shows as a write to all of them, which share their memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_clip.desync import Verdict
from dist_clip.errors import EarlyGradientError
from dist_clip.freshness import Seen
from dist_clip.groups import stage_of
from dist_clip.layout import Layout, LogicalTensor
from dist_clip.reduction import ReductionPlan, Stage, Underway

if TYPE_CHECKING:
    from dist_clip.construction import Construction

# By how much a norm that is measured twice may differ; kernels may add in another order in another list of tensors.
_SAME = 1e-6


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Tensors that are reduced together.

    Attributes:
        indices: their numbers in the layout; `index` is the same on the device.
        plan: reduces them, and only them.
        awaited: the parameters whose gradients are to be there first: all of the FSDP2 groups, also excluded ones.
        probes: of each FSDP2 group the tensor of which this rank holds least: measured again at the clip.
    """

    indices: tuple[int, ...]
    index: Tensor
    plan: ReductionPlan
    awaited: tuple[Tensor, ...] = ()
    probes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Launched:
    """A bucket under way: its gradients as they were measured, their squared norms, and the reduction of these."""

    seen: list[Seen]
    sums: Tensor
    reduction: Underway


class Overlap:
    """Measures and reduces in buckets; takes the place of a `ReductionPlan`. Construction is collective over all ranks.

    Holds hooks on the parameters, which go with it.
    """

    def __init__(self, made: Construction) -> None:
        self._layout, self._kernels, self._device = made.layout, made.kernels, made.device
        self._everyone: Any = made.process_group if made.process_group is not None else dist.group.WORLD
        self._group = _own_group(made.pp_group, self._everyone)
        early = divide(made.layout, made.reduced_together, made.overlap, made.elsewhere)
        taken = {i for indices, _ in early for i in indices}
        rest = tuple(i for i in range(len(made.layout)) if i not in taken)
        stages = 1 if made.pp_group is None else made.pp_group.size()

        def bucket(indices: tuple[int, ...], groups: Sequence[tuple[Tensor, ...]] = ()) -> Bucket:
            chosen = frozenset(indices)
            layout = Layout(tuple(t if i in chosen else _whole(t) for i, t in enumerate(made.layout)))
            plan = ReductionPlan(
                layout,
                process_group=self._group,
                copies_among=self._everyone.size() // stages,
                shared=made.elsewhere,
                meet=True,
            )
            index = torch.tensor(indices, dtype=torch.int64, device=self._device)
            awaited = tuple(param for group in groups for param in group)
            return Bucket(indices, index, plan, awaited, tuple(_probes(made.layout, indices, groups)))

        self._early = [bucket(indices, groups) for indices, groups in early]
        self._last = bucket(rest)
        self._probes = [i for each in self._early for i in each.probes]
        self._probe_index = torch.tensor(self._probes, dtype=torch.int64, device=self._device)
        self._bucket_of = {id(param): b for b, each in enumerate(self._early) for param in each.awaited}

        self._launched: list[_Launched] = []
        self._missing: list[set[int]] = []  # ids of parameters whose gradients are to come, a set a bucket
        self._inside = False
        self._streams: set[Any] = set()
        self._event: Any = None  # after the last launch
        self._stale: list[str] = []
        self._moved: Tensor | None = None
        self._found: Tensor | None = None
        self._heard_by: Any = self._group
        self._findings: list[_Finding] = []

        handles: dict[int, Any] = {}
        self._handles = handles
        weakref.finalize(self, _remove, handles)

    @property
    def stages(self) -> list[Stage]:
        """The collectives of a step, in order."""
        return [stage for bucket in (*self._early, self._last) for stage in bucket.plan.stages]

    @property
    def early(self) -> Sequence[Bucket]:
        """The buckets that may be launched in backward, in order."""
        return self._early

    def describe(self, index: int) -> str:
        """How tensor `index` is reduced, for people."""
        for b, bucket in enumerate(self._early, start=1):
            if index in bucket.indices:
                return f"{bucket.plan.describe(index)} in backward ({b})"
        return self._last.plan.describe(index)

    def reduce(self, sums: Tensor) -> Tensor:
        """Add up float64 [n] of the shards as a step does, all at once; returns a new [n]."""
        for bucket in (*self._early, self._last):
            sums = bucket.plan.reduce(sums)
        return sums

    # ------------------------------------------------------------------------------------------------- during backward

    @contextlib.contextmanager
    def backward(self) -> Iterator[None]:
        """Inside, a bucket is launched once its gradients are there."""
        if self._inside:
            raise RuntimeError("last_backward() is entered already: enter it once, around the last backward of a step")
        self._await()
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def _await(self) -> None:
        """Wait for all gradients anew. Parameters that were unfrozen get their hooks now."""
        this = weakref.ref(self)

        def arrived(param: Tensor) -> None:
            overlap = this()
            if overlap is not None and overlap._inside:
                overlap._arrived(param)

        for bucket in self._early:
            for param in bucket.awaited:
                if param.requires_grad and id(param) not in self._handles:
                    handle = param.register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]
                    self._handles[id(param)] = handle
        self._missing = [{id(p) for p in bucket.awaited if p.requires_grad} for bucket in self._early]

    def _arrived(self, param: Tensor) -> None:
        self._missing[self._bucket_of[id(param)]].discard(id(param))
        if self._device.type != "cpu":
            self._streams.add(self._stream())
        while len(self._launched) < len(self._early) and not self._missing[len(self._launched)]:
            self._launch()

    @torch.no_grad()
    def _launch(self) -> None:
        """Measure the next bucket as it is, and start its reduction."""
        bucket = self._early[len(self._launched)]
        if self._device.type != "cpu":
            # Gradients of one bucket may come from several streams of FSDP2's, and this is but one of them.
            for stream in self._streams - {self._stream()}:
                self._stream().wait_stream(stream)
        tensors = [self._layout.tensors[i] for i in bucket.indices]
        sums = self._kernels.power_sums([tensor.read() for tensor in tensors], 2.0, self._device)
        all_sums = sums.new_zeros(len(self._layout)).index_copy_(0, bucket.index, sums)
        seen = [Seen(tensor.param) for tensor in tensors if tensor.param is not None]
        self._launched.append(_Launched(seen, sums, bucket.plan.start(all_sums)))
        if self._device.type != "cpu":
            if self._event is not None:
                self._stream().wait_event(self._event)
            self._event = self._stream().record_event()

    def _stream(self) -> Any:
        return torch.get_device_module(self._device.type).current_stream(self._device)

    # --------------------------------------------------------------------------------------------------------- in a clip

    def measure(self, shards: Sequence[Tensor | None]) -> Tensor:
        """The shards' squared norms, float64 [n]: what was measured early as it was then. Launches what is still to be."""
        self._find_stale()
        if self._event is not None:
            # What was launched on other streams is read, and later let go, on this one.
            self._stream().wait_event(self._event)
            for launched in self._launched:
                for tensor in (launched.sums, *launched.reduction.buffers):
                    tensor.record_stream(self._stream())
        while len(self._launched) < len(self._early):
            self._launch()
        measured = self._kernels.power_sums(
            [shards[i] for i in (*self._last.indices, *self._probes)], 2.0, self._device
        )
        rest, again = torch.split(measured, [len(self._last.indices), len(self._probes)])
        sums = measured.new_empty(len(shards)).index_copy_(0, self._last.index, rest)
        for bucket, launched in zip(self._early, self._launched, strict=True):
            sums.index_copy_(0, bucket.index, launched.sums)
        then = sums.index_select(0, self._probe_index)
        # NaN and Inf compare false: they were there before.
        self._moved = (again - then).abs() > _SAME * then
        return sums

    def _find_stale(self) -> None:
        """Which tensors' gradients are not those that were measured, as far as the host can tell."""
        self._stale = [
            self._layout.tensors[i].name
            for bucket, launched in zip(self._early, self._launched, strict=False)
            for i, seen in zip(bucket.indices, launched.seen, strict=True)
            if not seen.still(_param(self._layout.tensors[i]))
        ]

    def reduce_with(self, sums: Tensor, riders: Tensor | None) -> tuple[Tensor, list[tuple[Any, Tensor]]]:
        """As `ReductionPlan.reduce_with`: launch the last bucket, with `riders`, and wait for all of them."""
        assert self._moved is not None
        mine = torch.logical_or(self._moved.any(), torch.full((), bool(self._stale), device=self._device))
        flag = mine.double().unsqueeze(0)
        last = self._last.plan.start(sums, flag if riders is None else torch.cat([flag, riders]))
        out = sums.clone()
        for launched in self._launched:
            out, _ = launched.reduction.finish(out)
        out, arrived = last.finish(out)
        pairs = [(group, *torch.split(values, [1, len(values) - 1])) for group, values in arrived]
        self._found = torch.stack([flag, *(found for _, found, _ in pairs)]).amax(0)
        self._heard_by = self._group
        self._launched, self._event = [], None
        self._streams.clear()
        if self._inside:
            self._await()
        return out, [(group, values) for group, _, values in pairs]

    @property
    def flag(self) -> Tensor:
        """float64 [1], above 0 where this stage has found a gradient that is not the one that was measured."""
        assert self._found is not None
        return self._found

    def hear(self, flag: Tensor) -> None:
        """`flag` of all pipeline stages, added up: then all ranks know."""
        self._found, self._heard_by = flag, self._everyone

    def judge(self) -> None:
        """Raise on every rank that has heard of it if a gradient was measured too early; on accelerators at the next clip.

        Raises:
            EarlyGradientError: the same on all those ranks, naming tensors and the ranks that hold them.
        """
        assert self._found is not None
        assert self._moved is not None
        verdict = Verdict(self._heard_by, (self._found > 0).squeeze(0))
        self._findings.append(_Finding(verdict, self._stale, self._moved))
        if self._device.type == "cpu":
            self.raise_if_found()

    def raise_if_found(self) -> None:
        """Read the verdicts that are due."""
        findings, self._findings = self._findings, []
        for finding in findings:
            if finding.verdict.read():
                moved = [self._layout.names[i] for i, m in zip(self._probes, finding.moved.tolist(), strict=True) if m]
                _raise(finding.stale or moved, finding.verdict.group)


@dataclasses.dataclass(frozen=True)
class _Finding:
    """What one step found: a verdict on its way to the host, and the names that it would be about."""

    verdict: Verdict
    stale: list[str]
    moved: Tensor


def divide(
    layout: Layout, together: Sequence[tuple[Tensor, ...]], early: int, elsewhere: frozenset[str]
) -> list[tuple[tuple[int, ...], list[tuple[Tensor, ...]]]]:
    """The tensors of up to `early` buckets, each with the FSDP2 groups that it is made of, in backward's order.

    Left for the last bucket are what FSDP2 does not manage, tensors that other pipeline stages hold, too (their gradients
    are added up after backward), and of the rest about an equal share, at least one group: that of the root module, which
    FSDP2 reduces last.
    """
    number = {id(tensor.param): i for i, tensor in enumerate(layout)}
    known = [(group, [number[id(p)] for p in group if id(p) in number]) for group in together]
    # A group is done when the first of its tensors is: forward's order is the layout's, backward's the reverse.
    order = sorted((pair for pair in known if pair[1]), key=lambda pair: -min(pair[1]))
    units = []
    for group, indices in order:
        fit = [i for i in indices if layout.tensors[i].norm_groups and layout.names[i] not in elsewhere]
        if fit:
            units.append((group, fit))
    parts = min(early + 1, len(units))
    total = sum(len(fit) for _, fit in units)
    buckets: list[tuple[tuple[int, ...], list[tuple[Tensor, ...]]]] = []
    start = done = 0
    for part in range(1, parts):
        end = start
        while end == start or (done < total * part / parts and len(units) - end > parts - part):
            done += len(units[end][1])
            end += 1
        chosen = units[start:end]
        buckets.append((tuple(sorted(i for _, fit in chosen for i in fit)), [group for group, _ in chosen]))
        start = end
    return buckets


def _probes(layout: Layout, indices: tuple[int, ...], groups: Sequence[tuple[Tensor, ...]]) -> Iterator[int]:
    for group in groups:
        members = {id(param) for param in group}
        held = [i for i in indices if id(layout.tensors[i].param) in members and layout.tensors[i].shard_numel > 0]
        if held:
            yield min(held, key=lambda i: layout.tensors[i].shard_numel)


def _whole(tensor: LogicalTensor) -> LogicalTensor:
    """The tensor as a plan sees it that is not to reduce it."""
    return dataclasses.replace(tensor, norm_groups=())


def _param(tensor: LogicalTensor) -> Tensor:
    assert tensor.param is not None  # FSDP2 leaves every rank a shard, if an empty one
    return tensor.param


def _own_group(pp_group: Any, everyone: Any) -> Any:
    """A new process group of the ranks of this rank's pipeline stage. Collective over all ranks, which make all groups."""
    stages: list[Any] = [None] * everyone.size()
    dist.all_gather_object(stages, stage_of(pp_group), group=everyone)
    ranks = dist.get_process_group_ranks(everyone)
    # Not use_local_synchronization: its names count the groups that a rank is in, which differ from rank to rank.
    groups = {
        stage: dist.new_group([rank for rank, its in zip(ranks, stages, strict=True) if its == stage])
        for stage in sorted(set(stages))
    }
    return groups[stage_of(pp_group)]


def _remove(handles: dict[int, Any]) -> None:
    for handle in handles.values():
        handle.remove()


def _raise(names: list[str], group: Any) -> None:
    """Collective over `group`, all of whose ranks get here."""
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, names, group=group)
    found: dict[str, list[int]] = {}
    for rank, theirs in zip(dist.get_process_group_ranks(group), everyone, strict=True):
        for name in theirs:
            found.setdefault(name, []).append(rank)
    listed = [f"{name!r} (rank {', '.join(map(str, holders))})" for name, holders in found.items()]
    more = f" and {len(listed) - 4} more" if len(listed) > 4 else ""
    raise EarlyGradientError(
        f"gradients have changed since last_backward() measured them: {', '.join(listed[:4])}{more}. Enter it around the "
        "last backward of a step only, call clip_() before the next one, and change no gradient in between (unscaling, an "
        "all-reduce of your own; a pipeline schedule does, unless made with scale_grads=False). Where that is not possible, "
        "leave last_backward() out"
    )
