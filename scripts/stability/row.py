"""A row: what is kept of a run. Measures, and series thin enough that all rows stay a small file."""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import Any

from launch.compare import steps_to_recover
from launch.metrics import Run
from scripts.stability import measures
from scripts.stability.grid import AXES, NONE, Spec
from scripts.stability.store import Row

MEASURED_FROM = 100
"""Clipped fraction and mean scale are means over the steps after this one (the longest warm-up) and before the fault."""
BIN = 10
"""Steps in a bin of the series."""


@dataclasses.dataclass(frozen=True)
class Recorded:
    """Which series a row gets beyond the binned ones."""

    excess: bool = False
    """The loss over the twin's, at each step from the fault on that has the twin's batch."""
    tensors: tuple[str, ...] = ()
    """Tensors whose norm, scale and remembered state are kept."""

    @classmethod
    def of(cls, record: dict[str, list[str]], spec: Spec) -> Recorded:
        """What the grid's `record` asks for; series of every run would be most of the file."""
        kept = spec.seed in record.get("seeds", []) and all(
            getattr(spec, axis) in record[axis] for axis in AXES if axis in record
        )
        return cls(excess=kept and spec.fault != NONE, tensors=tuple(record["tensors"]) if kept else ())


def make_row(spec: Spec, run: Run, twin: Run | None, recorded: Recorded) -> Row:
    """`twin`: the run without the fault, if this one has one; this one may have branched off it."""
    steps = {record["step"]: record for record in [*(twin.steps if twin else []), *run.steps]}
    if sorted(steps) != list(range(1, spec.steps + 1)):
        raise ValueError(f"{spec.id}: the log has {len(steps)} of {spec.steps} steps")
    records = [steps[step] for step in range(1, spec.steps + 1)]

    def series(name: str) -> list[float]:
        return [math.nan if record[name] is None else record[name] for record in records]

    loss, validation = series("loss"), run.validation[-1]["loss"]
    before = slice(MEASURED_FROM, spec.fault_step - 1)
    clipped, scale = series("clipped_fraction"), series("mean_scale")
    row: Row = {
        "id": spec.id,
        **{axis: getattr(spec, axis) for axis in AXES},
        "seed": spec.seed,
        "command": spec.command,
        "ranks": spec.ranks,
        "policy_config": run.header["policy"],
        "parameters": run.header["parameters"],
        "data": run.header["data"]["digest"],
        "versions": run.header["versions"],
        "seconds": run.end["seconds"] if run.end else None,
        "branched": len(run.steps) < spec.steps,
        "validation": validation,
        "train_loss": statistics.fmean(loss[-20:]),
        "diverged": not all(map(math.isfinite, [*loss, validation])),
        "spikes": measures.spikes(loss),
        "spike_score": measures.spike_score(loss),
        "clipped": statistics.fmean(clipped[before]),
        "scale": statistics.fmean(scale[before]),
        "skipped": [record["step"] for record in records if record["skipped"]],
        "series": {
            "loss": rounded(measures.binned(loss, BIN)),
            "clipped": rounded(measures.binned(clipped, BIN), 2),
            "scale": rounded(measures.binned(scale, BIN)),
        },
    }
    if twin is not None:
        # On a corrupted batch the loss says what the batch is, not what has become of the model.
        first = spec.fault_step
        if spec.corrupts_batches:
            first = max(record["step"] for record in records if record["fault"]) + 1
        excess = [a - b for a, b in zip(loss, twin.series("loss"), strict=True)][first - 1 :]
        row |= {
            "excursion": measures.excursion(excess),
            "recovery": steps_to_recover(excess),
            "recovery_of": len(excess),
            "compared_from": first - spec.fault_step,
            "validation_over_twin": validation - twin.validation[-1]["loss"],
        }
        if recorded.excess:
            row["series"]["excess"] = rounded(excess)
    if recorded.tensors:
        row["tensors"] = tensor_series(run, twin, recorded.tensors)
    return row


def tensor_series(run: Run, twin: Run | None, names: tuple[str, ...]) -> dict[str, Any]:
    records = {record["step"]: record for record in [*(twin.tensors if twin else []), *run.tensors]}
    ordered = [records[step] for step in sorted(records)]
    series: dict[str, Any] = {"step": sorted(records)}
    for name in names:
        slots = sorted({slot for record in ordered for slot in record["state"].get(name, {})})
        series[name] = {
            "norm": figures([record["norms"][name] for record in ordered]),
            "scale": figures([record["scales"][name] for record in ordered]),
            **{slot: figures([record["state"].get(name, {}).get(slot) for record in ordered]) for slot in slots},
        }
    return series


def rounded(values: list[float], digits: int = 3) -> list[float]:
    return [round(value, digits) if math.isfinite(value) else value for value in values]


def figures(values: list[float | None], digits: int = 4) -> list[float | None]:
    """Rounded to significant digits."""
    return [None if value is None else float(f"{value:.{digits}g}") for value in values]
