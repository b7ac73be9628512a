"""One picture of the whole model from the rows of its sources: on the host of the first rank, some steps later."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dist_clip.monitor.collect import HEAD, Place, Source, Window, length
from dist_clip.monitor.names import groups_of
from dist_clip.monitor.record import Culprit, Record, Spike, Tensors
from dist_clip.monitor.spikes import SpikeDetector
from dist_clip.policies import LogClip, Policy

Array = NDArray[np.float64]

OUTLIER = 10.0
"""A tensor whose norm is this many times its level stands out, whatever the loss does."""


class Levels:
    """The usual norm of each tensor, where no policy remembers one: a moving geometric mean, by LogClip's constants.

    Args:
        n: number of tensors.
        warmup: number of norms after which a single one moves the level by no more than LogClip lets it.
    """

    def __init__(self, n: int, warmup: int) -> None:
        self._rule, self._warmup = LogClip(), warmup
        self.values = np.full(n, math.nan)
        self.counts = np.zeros(n, dtype=np.int64)

    def follow(self, norms: Array) -> None:
        """Let the levels follow the norms of a step; a norm of 0, NaN or Inf is no observation."""
        seen = (norms > 0) & np.isfinite(norms)
        before = np.where(np.isnan(self.values), norms, self.values)
        bound = np.where(self.counts < self._warmup, self._rule.warmup_ratio, self._rule.ratio)
        share = np.maximum(self._rule.rate, 1 / (self.counts + 1))
        moved = before * np.clip(np.where(seen, norms, 1.0) / np.where(seen, before, 1.0), 1 / bound, bound) ** share
        self.values = np.where(seen, moved, self.values)
        self.counts += seen


class Picture:
    """Turns rows into records.

    Args:
        sources: whose rows arrive, in their order.
        policies: the policy of each policy group.
        top: how many culprits a spike names.
        warmup: how many norms of a tensor must be known before it can stand out.
        detectors: of spikes in the loss and in the gradient norm.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        policies: Sequence[Policy],
        top: int,
        warmup: int,
        detectors: Mapping[str, SpikeDetector],
    ) -> None:
        self._sources, self._policies, self._top, self._detectors = list(sources), list(policies), top, detectors
        self._warmup = warmup
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
        self._columns = list(names.values())
        self._own = Levels(len(names), warmup)
        self._spikes = self._steps = 0
        self._forget()

    def _forget(self) -> None:
        """Begin the next table."""
        self._peaks = np.full(len(self.names), math.nan)
        self._clipped = np.zeros(len(self.names), dtype=np.int64)
        self._since = 0

    def records(self, numbers: Tensor, window: Window) -> Iterator[Record]:
        """Yield the records of a window from what `Collector.bring_together` made, fp32 on the CPU."""
        k, m = len(window.steps), len(window.tables)
        size = max(length(source, k, m) for source in self._sources)
        values = numbers.double().numpy()
        parts = values[: size * len(self._sources)].reshape(len(self._sources), size)
        more = values[size * len(self._sources) :]
        rows = [part[: k * s.width].reshape(k, s.width) for part, s in zip(parts, self._sources, strict=True)]
        states = [
            part[k * s.width : length(s, k, m)].reshape(m, s.state_width)
            for part, s in zip(parts, self._sources, strict=True)
        ]
        head = [dict(zip(HEAD, row, strict=True)) for row in rows[0][:, : len(HEAD)].tolist()]
        norms, scales, kept = self._merged(rows)
        scalars = [
            {name: float(more[v.index]) if isinstance(v, Place) else v for name, v in given.items()}
            for given in window.scalars
        ]
        known = self._numbers(scalars, head, norms, scales)
        # Policies' levels where there are any, and else those of the picture, which each step moves on.
        levels, settled = kept, np.zeros(kept.shape, dtype=bool)
        for j in range(k):
            levels[j] = np.where(kept[j] > 0, kept[j], self._own.values)
            settled[j] = self._own.counts >= self._warmup
            if known[j] and not head[j]["skip"]:
                self._own.follow(norms[j])
        with np.errstate(invalid="ignore", divide="ignore"):
            ratios = np.where(np.isfinite(norms), np.where(norms > 0, norms, math.nan) / levels, math.inf)
            clipped = (norms != 0) & (scales < 1)
            outlier = [bool(row.any()) for row in settled & (ratios >= OUTLIER)]
        for j, step in enumerate(window.steps):
            self._since += 1
            if known[j]:
                self._peaks = np.fmax(self._peaks, ratios[j])
                self._clipped += clipped[j]
            reasons = self._reasons(scalars[j], outlier[j])
            spike = Spike(reasons, ()) if reasons else None
            if spike is not None and known[j]:
                spike = Spike(reasons, self._culprits(norms[j], levels[j], ratios[j], scales[j]))
            tensors = None
            if j in window.tables and known[j]:
                state = self._state(states, window.tables.index(j))
                tensors = self._table(norms[j], levels[j], scales[j], state)
                self._forget()
            yield Record(step, scalars[j], tensors, spike)

    def _merged(self, rows: Sequence[Array]) -> tuple[Array, Array, Array]:
        """Return norms, scales and the policies' levels, [steps, tensors]; NaN where there is no level."""
        parts: list[tuple[Array, Array, Array]] = []
        for row, source in zip(rows, self._sources, strict=True):
            n = len(source.names)
            norms, scales, kept = np.split(row[:, len(HEAD) :], [n, 2 * n], axis=1)
            levels = np.full_like(norms, math.nan)
            for group, indices in source.levels:
                own, kept = kept[:, : len(indices)], kept[:, len(indices) :]
                levels[:, list(indices)] = np.where(self._comparable(group, row), own, math.nan)
            parts.append((norms, scales, levels))
        norms, scales, levels = (np.concatenate(each, axis=1)[:, self._columns] for each in zip(*parts, strict=True))
        return norms, scales, np.where(levels > 0, levels, math.nan)

    def _comparable(self, group: int, row: Array) -> NDArray[np.bool_]:
        """Return, as [steps, 1], where a policy's levels are of norms that were not clipped globally before."""
        numbers = row[:, HEAD.index("t")] + row[:, HEAD.index("skip")]  # a step that was skipped is not counted
        policy = self._policies[group]
        return np.array([[not policy.one_scale(max(1, int(number)))] for number in numbers], dtype=bool)

    def _numbers(
        self, scalars: Sequence[dict[str, Any]], head: Sequence[dict[str, float]], norms: Array, scales: Array
    ) -> list[bool]:
        """Put the numbers of each step into `scalars`. Returns at which steps gradients were clipped, or could be."""
        has_grad = norms != 0
        tensors = np.maximum(1, has_grad.sum(axis=1))
        fraction = (has_grad & (scales < 1)).sum(axis=1) / tensors
        mean = np.where(has_grad, scales, 0.0).sum(axis=1) / tensors
        smallest = scales.min(axis=1, initial=1.0)
        before = np.sqrt(np.square(norms).sum(axis=1))
        with np.errstate(invalid="ignore"):
            after = np.sqrt(np.square(np.where(scales == 0, 0.0, norms * scales)).sum(axis=1))
        known = []
        for j, (numbers, row) in enumerate(zip(scalars, head, strict=True)):
            known.append(row["has_report"] > 0)
            if row["has_loss"] > 0:
                numbers["loss"] = row["loss"] / row["has_loss"]
            if not known[j]:
                continue
            numbers["clip/fraction"], numbers["clip/min_scale"] = float(fraction[j]), float(smallest[j])
            numbers["clip/mean_scale"] = float(mean[j])
            numbers["clip/nonfinite"], numbers["clip/skipped"] = float(row["nonfinite"] > 0), float(row["skip"] > 0)
            numbers["clip/grad_norm"], numbers["clip/grad_norm_after"] = float(before[j]), float(after[j])
        return known

    def _reasons(self, scalars: dict[str, Any], outlier: bool) -> tuple[str, ...]:
        """Return why a step stands out, and put the spike score so far into `scalars`."""
        found = [
            name
            for name, key in (("loss", "loss"), ("grad norm", "clip/grad_norm"))
            if key in scalars and self._detectors[name].add(scalars[key])
        ]
        self._steps += 1
        self._spikes += bool(found)
        if self._steps >= min(detector.window for detector in self._detectors.values()):
            scalars["clip/spike_score"] = self._spikes / self._steps
        more = (
            ("tensor", outlier),
            ("non-finite", scalars.get("clip/nonfinite")),
            ("skipped", scalars.get("clip/skipped")),
        )
        return (*found, *(name for name, there in more if there))

    def _culprits(self, norms: Array, levels: Array, ratios: Array, scales: Array) -> tuple[Culprit, ...]:
        known = np.nan_to_num(ratios, nan=0.0, posinf=math.inf)
        largest = np.argsort(-known, kind="stable")[: self._top]
        return tuple(
            Culprit(self.names[i], float(norms[i]), float(levels[i]), float(ratios[i]), float(scales[i]))
            for i in largest
            if known[i] > 1
        )

    def _table(self, norms: Array, levels: Array, scales: Array, state: dict[str, list[float]]) -> Tensors:
        return Tensors(
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

    def _state(self, states: Sequence[Array], table: int) -> dict[str, list[float]]:
        """Return what the policies remember, {slot: a number for each tensor, NaN where there is none}."""
        found: dict[str, Array] = {}
        offset, total = 0, sum(len(source.names) for source in self._sources)
        for part, source in zip(states, self._sources, strict=True):
            values = part[table]
            for name, indices in source.slots:
                slot = found.setdefault(name, np.full(total, math.nan))
                slot[[offset + i for i in indices]] = values[: len(indices)]
                values = values[len(indices) :]
            offset += len(source.names)
        return {name: slot[self._columns].tolist() for name, slot in found.items()}
