"""Spikes of a series: values far above the mean of those before them, and the share of steps that are one."""

from __future__ import annotations

import math
import operator
from collections import deque
from collections.abc import Iterable

WINDOW = 128
SIGMAS = 6.0
"""OLMo-core's defaults (its StabilityMonitorCallback)."""

_SMALLEST_STD = 1e-10
"""Below it the values before are one constant, and any rounding would be a spike."""


class SpikeDetector:
    """Says of each value in turn whether it is a spike: more than ``sigmas`` standard deviations above the mean.

    Mean and population variance are those of the last `window` values; before there are so many, nothing is a spike.
    That is OLMo-core's definition. NaN and Inf, of which it says nothing, are spikes here and enter no mean.

    Args:
        window: number of values before this one, at least 1.
        sigmas: how many standard deviations are too many, above 0.
        two_sided: whether values far below the mean are spikes as well.

    Example:
        >>> from dist_clip.monitor import SpikeDetector
        >>> detector = SpikeDetector(window=4, sigmas=3.0)
        >>> [detector.add(value) for value in (1.0, 1.1, 1.0, 1.1, 1.05, 9.0)]
        [False, False, False, False, False, True]
    """

    def __init__(self, window: int = WINDOW, sigmas: float = SIGMAS, *, two_sided: bool = False) -> None:
        if window < 1 or not sigmas > 0:
            raise ValueError(f"a spike needs window >= 1 and sigmas > 0, got {window} and {sigmas}")
        self.window, self.sigmas, self.two_sided = window, sigmas, two_sided
        self._last: deque[float] = deque(maxlen=window)

    def add(self, value: float) -> bool:
        """Return whether `value` is a spike, and remember it."""
        spike = self._is_spike(value)
        self._last.append(value)
        return spike

    def _is_spike(self, value: float) -> bool:
        if len(self._last) < self.window:
            return False
        if not math.isfinite(value):
            return True
        mean = sum(self._last) / self.window
        square = sum(map(operator.mul, self._last, self._last)) / self.window - mean * mean
        # Most values are so ordinary that a variance of few digits tells; this is False where NaN or Inf is among them.
        if square > 1e-6 * mean * mean and (value - mean) ** 2 < 0.5 * self.sigmas**2 * square:
            return False
        before = [x for x in self._last if math.isfinite(x)]
        if not before:
            return False
        mean = sum(before) / len(before)
        std = math.sqrt(sum((x - mean) ** 2 for x in before) / len(before))
        off = abs(value - mean) if self.two_sided else value - mean
        return std >= _SMALLEST_STD and off > self.sigmas * std


def spikes(
    values: Iterable[float], window: int = WINDOW, sigmas: float = SIGMAS, *, two_sided: bool = False
) -> list[int]:
    """Return the indices of the spikes of a series; the arguments are those of `SpikeDetector`.

    Example:
        >>> from dist_clip.monitor import spikes
        >>> spikes([1.0, 1.1] * 4 + [9.0, 1.0], window=8)
        [8]
    """
    detector = SpikeDetector(window, sigmas, two_sided=two_sided)
    return [i for i, value in enumerate(values) if detector.add(value)]
