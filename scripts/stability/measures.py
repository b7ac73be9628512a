"""What is measured of a run, and of a set of runs: excursion, spike score, paired differences.

Recovery is launch.compare's `steps_to_recover`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from dist_clip import monitor

SPIKE_SIGMAS = 7.0
SPIKE_WINDOW = 100
"""Spike score: share of the steps whose loss lies more than this many standard deviations off the mean of the steps before
it, as OLMo and the AdaGC paper have it, with k = 7 or 10 and the last 1000 steps; the runs here have 300 and 500."""

_T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110,
    2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""97.5 % quantile of Student's t for 1, 2, ... 30 degrees of freedom."""


class Interval(NamedTuple):
    """A mean and the half-width of its 95 % t-interval (None from a single value), over n values."""

    mean: float
    half: float | None
    n: int

    @property
    def excludes_zero(self) -> bool:
        return self.half is not None and abs(self.mean) > self.half


def interval(values: Sequence[float]) -> Interval:
    n = len(values)
    mean = statistics.fmean(values)
    if n < 2:
        return Interval(mean, None, n)
    return Interval(mean, _T_975[min(n - 1, 30) - 1] * statistics.stdev(values) / math.sqrt(n), n)


def paired(values: dict[int, float], others: dict[int, float]) -> Interval | None:
    """Mean difference over the seeds that both have; None without any."""
    seeds = sorted(values.keys() & others.keys())
    return interval([values[seed] - others[seed] for seed in seeds]) if seeds else None


def excursion(excess: Sequence[float]) -> float:
    """Largest excess over the twin's loss on the same batch; infinite where the loss is no number any more."""
    return math.inf if any(math.isnan(value) for value in excess) else max(0.0, *excess)


def spikes(loss: Sequence[float], window: int = SPIKE_WINDOW, sigmas: float = SPIKE_SIGMAS) -> int:
    """Number of spikes, up or down; the first `window` steps have no mean yet and do not count."""
    return len(monitor.spikes(loss, window, sigmas, two_sided=True))


def spike_score(loss: Sequence[float], window: int = SPIKE_WINDOW, sigmas: float = SPIKE_SIGMAS) -> float:
    return spikes(loss, window, sigmas) / max(1, len(loss) - window)


def binned(values: Sequence[float], width: int) -> list[float]:
    """Means of consecutive `width` values."""
    return [statistics.fmean(values[i : i + width]) for i in range(0, len(values), width)]
