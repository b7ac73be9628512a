"""One picture of the whole model from the rows of its sources: on the host of the first rank, some steps later."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_clip.monitor.collect import HEAD, Source, length
from dist_clip.monitor.names import groups_of
from dist_clip.monitor.record import Culprit, Record, Spike, Tensors
from dist_clip.monitor.spikes import SpikeDetector
from dist_clip.policies import LogClip, Policy, StepInputs

OUTLIER = 10.0
"""A tensor whose norm is this many times its level stands out, whatever the loss does."""


@dataclasses.dataclass(frozen=True)
class Window:
    """What the rows of some steps say beside their numbers.

    Attributes:
        steps: number of each step.
        scalars: what else was given at each, {name: number, or its place among the numbers that follow the rows}.
        tables: at which of the steps, by index, the state was copied.
    """

    steps: list[int]
    scalars: list[dict[str, Any]]
    tables: list[int]


class Picture:
    """Turns rows into records.

    Args:
        sources: whose rows arrive, in their order.
        policies: the policy of each policy group.
        top: how many culprits a spike names.
        detectors: of spikes in the loss and in the gradient norm.
    """

    def __init__(
        self, sources: Sequence[Source], policies: Sequence[Policy], top: int, detectors: Mapping[str, SpikeDetector]
    ) -> None:
        self._sources, self._policies, self._top, self._detectors = list(sources), list(policies), top, detectors
        names: dict[str, int] = {}
        found: set[tuple[str, str]] = set()
        offset = 0
        for source in self._sources:
            for i, piece in enumerate(zip(source.names, source.shards, strict=True)):
                if piece not in found:  # copies of a tensor, or of a shard, are one tensor of the picture
                    found.add(piece)
                    names[piece[0] if piece[0] not in names else f"{piece[0]}@rank{source.rank}"] = offset + i
            offset += len(source.names)
        self.names = tuple(names)
        self.groups = tuple(groups_of(names).values())
        self._columns = torch.tensor(list(names.values()), dtype=torch.int64)
        # Where a policy keeps no usual norm, it is what LogClip would take for one.
        self._follow = LogClip(warmup_steps=0)
        self._own = self._follow.init_state(len(names), torch.device("cpu"))
        self._numel = torch.ones(len(names), dtype=torch.int64)
        self._spikes = self._steps = 0
        self._forget()

    def _forget(self) -> None:
        """Begin the next table."""
        self._peaks = torch.full((len(self.names),), math.nan, dtype=torch.float64)
        self._clipped = torch.zeros(len(self.names), dtype=torch.int64)
        self._since = 0

    def records(self, numbers: Tensor, window: Window) -> Iterator[Record]:
        """Return the records of a window from what `Collector.bring_together` made, fp32 on the CPU."""
        k, m = len(window.steps), len(window.tables)
        size = max(length(source, k, m) for source in self._sources)
        parts = numbers[: size * len(self._sources)].double().view(len(self._sources), size)
        more = numbers[size * len(self._sources) :].tolist()
        rows = [part[: k * s.width].view(k, s.width) for part, s in zip(parts, self._sources, strict=True)]
        states = [part[k * s.width :] for part, s in zip(parts, self._sources, strict=True)]
        head = [dict(zip(HEAD, row, strict=True)) for row in rows[0][:, : len(HEAD)].tolist()]
        norms, scales, levels = self._merged(rows)
        for j, step in enumerate(window.steps):
            scalars = {name: more[v] if isinstance(v, Place) else v for name, v in window.scalars[j].items()}
            tables = [i for i, at in enumerate(window.tables) if at == j]
            state = self._state(states, tables[0]) if tables else None
            yield self._record(step, scalars, head[j], norms[j], scales[j], levels[j], state)

    def _merged(self, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return norms, scales and the policies' levels, float64 [steps, tensors]; NaN where there is no level."""
        all_norms, all_scales, all_levels = [], [], []
        for row, source in zip(rows, self._sources, strict=True):
            n = len(source.names)
            norms, scales, kept = torch.split(row[:, len(HEAD) :], [n, n, row.shape[1] - len(HEAD) - 2 * n], dim=1)
            levels = torch.full_like(norms, math.nan)
            for group, indices in source.levels:
                own, kept = kept[:, : len(indices)], kept[:, len(indices) :]
                levels[:, list(indices)] = own.where(self._comparable(group, row), math.nan)
            all_norms.append(norms)
            all_scales.append(scales)
            all_levels.append(levels)
        columns = (
            torch.cat(each, dim=1).index_select(1, self._columns) for each in (all_norms, all_scales, all_levels)
        )
        norms, scales, levels = columns
        return norms, scales, levels.where(levels > 0, math.nan)

    def _comparable(self, group: int, row: Tensor) -> Tensor:
        """Return, as bool [steps, 1], where a policy's levels are of norms that were not clipped globally before."""
        skip, t = row[:, HEAD.index("skip")], row[:, HEAD.index("t")]
        numbers = (t + skip).long().tolist()  # a step that was skipped is not counted
        return torch.tensor([not self._policies[group].one_scale(max(1, number)) for number in numbers]).unsqueeze(1)

    def _state(self, states: Sequence[Tensor], table: int) -> dict[str, list[float]]:
        found: dict[str, Tensor] = {}
        offset, total = 0, sum(len(source.names) for source in self._sources)
        for part, source in zip(states, self._sources, strict=True):
            values = part[table * source.state_width : (table + 1) * source.state_width]
            for name, indices in source.slots:
                slot = found.setdefault(name, torch.full((total,), math.nan, dtype=torch.float64))
                slot[[offset + i for i in indices]] = values[: len(indices)]
                values = values[len(indices) :]
            offset += len(source.names)
        return {name: slot.index_select(0, self._columns).tolist() for name, slot in found.items()}

    def _record(
        self,
        step: int,
        scalars: dict[str, Any],
        head: dict[str, float],
        norms: Tensor,
        scales: Tensor,
        kept: Tensor,
        state: dict[str, list[float]] | None,
    ) -> Record:
        reported, skipped = head["has_report"] > 0, head["skip"] > 0
        levels = kept.where(kept > 0, self._own["level"].double())
        levels = levels.where(levels > 0, math.nan)
        ratios = torch.where(norms.isfinite(), (norms / levels).where(norms > 0, math.nan), math.inf)
        if reported and not skipped:
            self._own = self._follow.step(self._own, StepInputs(norms, self._numel, torch.tensor(1)))[1]
        if head["has_loss"] > 0:
            scalars["loss"] = head["loss"] / head["has_loss"]
        has_grad = norms != 0
        if reported:
            clipped, tensors = has_grad & (scales < 1), max(1, int(has_grad.sum()))
            self._peaks = torch.fmax(self._peaks, ratios)
            self._clipped += clipped
            scalars["clip/fraction"] = int(clipped.sum()) / tensors
            scalars["clip/min_scale"] = float(scales.amin()) if len(scales) else 1.0
            scalars["clip/mean_scale"] = float(scales.where(has_grad, 0.0).sum()) / tensors
            scalars["clip/nonfinite"], scalars["clip/skipped"] = float(head["nonfinite"] > 0), float(skipped)
            if head["has_norm"] > 0:
                scalars["clip/grad_norm"] = head["grad_norm"]
            if not math.isnan(head["grad_norm_after"]):
                scalars["clip/grad_norm_after"] = head["grad_norm_after"]
        self._since += 1
        spike = self._spike(scalars, ratios, norms, levels, scales, reported)
        tensors_now = None
        if state is not None and reported:
            tensors_now = Tensors(
                self.names,
                self.groups,
                norms.tolist(),
                levels.tolist(),
                scales.tolist(),
                self._peaks.tolist(),
                self._clipped.tolist(),
                self._since,
                state,
            )
            self._forget()
        return Record(step, scalars, tensors_now, spike)

    def _spike(
        self, scalars: dict[str, Any], ratios: Tensor, norms: Tensor, levels: Tensor, scales: Tensor, reported: bool
    ) -> Spike | None:
        found = [
            name
            for name, key in (("loss", "loss"), ("grad norm", "clip/grad_norm"))
            if key in scalars and self._detectors[name].add(scalars[key])
        ]
        self._steps += 1
        self._spikes += bool(found)
        if self._steps >= min(detector.window for detector in self._detectors.values()):
            scalars["clip/spike_score"] = self._spikes / self._steps
        if not reported:
            return Spike(tuple(found), ()) if found else None
        known = ratios.nan_to_num(nan=0.0, posinf=math.inf)
        if len(known) and float(known.amax()) >= OUTLIER:
            found.append("tensor")
        if scalars["clip/nonfinite"]:
            found.append("non-finite")
        if scalars["clip/skipped"]:
            found.append("skipped")
        if not found:
            return None
        largest = torch.topk(known, min(self._top, len(known)))
        culprits = [
            Culprit(self.names[i], float(norms[i]), float(levels[i]), ratio, float(scales[i]))
            for i, ratio in zip(largest.indices.tolist(), largest.values.tolist(), strict=True)
            if ratio > 1
        ]
        return Spike(tuple(found), tuple(culprits))


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of a number among those that follow the rows."""

    index: int

    def __index__(self) -> int:
        return self.index
