"""What a monitor hands to its writers: one record a step, with tensors and culprits on some of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Protocol

from dist_clip.monitor.names import Group


@dataclasses.dataclass(frozen=True)
class Culprit:
    """A tensor whose norm is far above its level at a spike.

    Attributes:
        name: its FQN.
        norm: L2 norm of its gradient before clipping.
        level: its usual norm before the step; NaN where nothing is known.
        ratio: norm / level; infinite for a norm that is NaN or Inf.
        scale: what its gradient was multiplied by.
    """

    name: str
    norm: float
    level: float
    ratio: float
    scale: float


@dataclasses.dataclass(frozen=True)
class Spike:
    """A step at which something stood out.

    Attributes:
        reasons: "loss", "grad norm" (spikes of the series), "tensor" (a norm far above its level), "non-finite",
            "skipped".
        culprits: the tensors with the largest ratios, the largest first.
    """

    reasons: tuple[str, ...]
    culprits: tuple[Culprit, ...]


@dataclasses.dataclass(frozen=True)
class Tensors:
    """The tensors of the whole model at one step, in columns, and what happened since the last such table.

    Attributes:
        names: FQNs, in the model's order. With scope "shard" a rank's shard is "NAME@rankR".
        groups: layer and kind of each.
        norms: L2 norms before clipping at this step.
        levels: usual norms before this step; NaN where nothing is known. A policy's own where it remembers one.
        scales: what the gradients were multiplied by at this step.
        peaks: the largest ratio of norm to level since the last table; NaN where there is none.
        clipped: number of steps since then at which the scale was below 1.
        steps: number of steps since then.
        states: the policies' numbers for each tensor, {slot: values}; NaN where a policy has no such slot.
    """

    names: tuple[str, ...]
    groups: tuple[Group, ...]
    norms: list[float]
    levels: list[float]
    scales: list[float]
    peaks: list[float]
    clipped: list[int]
    steps: int
    states: dict[str, list[float]]

    @property
    def ratios(self) -> list[float]:
        """Norm / level of each tensor at this step; NaN where there is none."""
        return [norm / level if level > 0 else math.nan for norm, level in zip(self.norms, self.levels, strict=True)]

    def by_layer(self) -> dict[str, tuple[float, float]]:
        """Return {"layer 3": (norm, peak)}: the L2 norm of the layer's tensors together, and its largest peak."""
        return self._grouped(lambda group: group.kind if group.layer is None else f"layer {group.layer}")

    def by_kind(self) -> dict[str, tuple[float, float]]:
        """Return {"attn.wq": (norm, peak)}, likewise for the tensors of one kind in all layers."""
        return self._grouped(lambda group: group.kind)

    def _grouped(self, key: Callable[[Group], str]) -> dict[str, tuple[float, float]]:
        squares: dict[str, float] = {}
        peaks: dict[str, float] = {}
        for group, norm, peak in zip(self.groups, self.norms, self.peaks, strict=True):
            label = key(group)
            squares[label] = squares.get(label, 0.0) + norm * norm
            peaks[label] = max(peaks.get(label, 0.0), 0.0 if math.isnan(peak) else peak)
        return {label: (math.sqrt(square), peaks[label]) for label, square in squares.items()}


@dataclasses.dataclass(frozen=True)
class Record:
    """One step. Later versions may add fields.

    Attributes:
        step: number of the step, as it was given.
        scalars: "loss", "clip/grad_norm", "clip/grad_norm_after", "clip/fraction", "clip/min_scale",
            "clip/mean_scale", "clip/nonfinite", "clip/skipped", "clip/spike_score", and what else was given. A number
            that nobody measured is missing.
        tensors: on every ``tensors_every``-th step, else None.
        spike: where something stood out, else None.
    """

    step: int
    scalars: Mapping[str, float]
    tensors: Tensors | None = None
    spike: Spike | None = None


class Writer(Protocol):
    """Where records go. Only the first rank's writers are called, some steps after the step that a record is about."""

    def start(self, header: Mapping[str, object]) -> None:
        """Get what is known of the run, before the first record."""

    def write(self, record: Record) -> None:
        """Write one step. The steps come in order, and each comes once."""

    def close(self) -> None:
        """Write what is left. Called once."""
