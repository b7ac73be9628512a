"""What a run comes to: its numbers in few words, and its spikes as events."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from dist_clip.monitor import Run, spikes

_GAP = 5
"""Spikes with at most so many quiet steps between them are one event."""


@dataclasses.dataclass(frozen=True)
class Event:
    """Spikes that follow each other.

    Attributes:
        first: step of the first one.
        last: step of the last one.
        reasons: why they are spikes, in the order in which they came up.
        culprits: each tensor's largest ratio to its level, as the log has culprits, the largest first.
        loss: the largest loss; NaN without one.
        grad_norm: the largest global norm before clipping; NaN where it was not measured.
    """

    first: int
    last: int
    reasons: tuple[str, ...]
    culprits: tuple[dict[str, Any], ...]
    loss: float
    grad_norm: float

    @property
    def size(self) -> float:
        """How far the first culprit is above its level; 0 without one."""
        return ratio_of(self.culprits[0]) if self.culprits else 0.0


@dataclasses.dataclass(frozen=True)
class Summary:
    """The numbers of a run.

    Attributes:
        steps: number of steps.
        loss: mean loss of the last 20 steps.
        validation: the last validation loss; NaN without one.
        clipped: mean share of tensors clipped.
        skipped: number of skipped steps.
        score: OLMo-core's spike score; None for a run that is too short.
        largest: the largest finite global norm; NaN where none was measured.
        events: spikes, the worst first.
    """

    steps: int
    loss: float
    validation: float
    clipped: float
    skipped: int
    score: float | None
    largest: float
    events: tuple[Event, ...]


def summarize(run: Run) -> Summary:
    """Return the summary of a run."""
    last = [value for value in run.series("loss")[-20:] if not math.isnan(value)]
    fractions = [value for value in run.series("clipped_fraction") if not math.isnan(value)]
    norms = [value for value in run.series("grad_norm") if math.isfinite(value)]
    scores = [value for value in run.series("spike_score") if not math.isnan(value)]
    return Summary(
        steps=len(run.steps),
        loss=sum(last) / len(last) if last else math.nan,
        validation=run.validation[-1]["loss"] if run.validation else math.nan,
        clipped=sum(fractions) / len(fractions) if fractions else 0.0,
        skipped=sum(bool(record.get("skipped")) for record in run.steps),
        score=scores[-1] if scores else None,
        largest=max(norms, default=math.nan),
        events=tuple(sorted(events_of(run), key=lambda event: (-event.size, event.first))),
    )


def events_of(run: Run) -> list[Event]:
    """Return the run's spikes as events, in the order of time.

    A log that was not written by a monitor has no spikes; those of its loss and norm are found here, without culprits.
    """
    found = run.spikes or _found(run)
    parts: list[list[dict[str, Any]]] = []
    for spike in found:
        if parts and spike["step"] - parts[-1][-1]["step"] <= _GAP + 1:
            parts[-1].append(spike)
        else:
            parts.append([spike])
    records = {record["step"]: record for record in run.steps}
    return [_event(part, [records[spike["step"]] for spike in part if spike["step"] in records]) for part in parts]


def ratio_of(culprit: dict[str, Any]) -> float:
    """Return a culprit's ratio to its level, infinite where that is no number."""
    ratio = culprit["ratio"]
    return math.inf if ratio is None else float(ratio)


def _found(run: Run) -> list[dict[str, Any]]:
    reasons: dict[int, list[str]] = {}
    for name, series in (("loss", "loss"), ("grad norm", "grad_norm")):
        for i in spikes(value for value in run.series(series)):
            if run.steps[i].get(series) is not None:
                reasons.setdefault(run.steps[i]["step"], []).append(name)
    for record in run.steps:
        for key, name in (("nonfinite", "non-finite"), ("skipped", "skipped")):
            if record.get(key):
                reasons.setdefault(record["step"], []).append(name)
    return [{"step": step, "reasons": reasons[step], "culprits": []} for step in sorted(reasons)]


def _event(part: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]]) -> Event:
    worst: dict[str, dict[str, Any]] = {}
    for spike in part:
        for culprit in spike["culprits"]:
            known = worst.get(culprit["name"])
            if known is None or ratio_of(culprit) > ratio_of(known):
                worst[culprit["name"]] = culprit

    def largest(key: str) -> float:
        values = [record[key] for record in records if record.get(key) is not None]
        return max((value for value in values if not math.isnan(value)), default=math.nan)

    return Event(
        part[0]["step"],
        part[-1]["step"],
        tuple(dict.fromkeys(reason for spike in part for reason in spike["reasons"])),
        tuple(sorted(worst.values(), key=lambda culprit: -ratio_of(culprit))),
        largest("loss"),
        largest("grad_norm"),
    )
