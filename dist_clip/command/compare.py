"""Several runs in one table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from dist_clip.command.summary import ratio_of, summarize
from dist_clip.command.text import table
from dist_clip.monitor import read_run, rule_of

_HEADER = (
    "run", "rule", "steps", "loss", "validation", "clipped", "skipped", "spikes", "spike score", "worst culprit",
)  # fmt: skip


def table_of_runs(paths: Sequence[Path]) -> str:
    """Return one row a run.

    Raises:
        ValueError: fewer than two runs, or a file that is no log.
    """
    if len(paths) < 2:
        raise ValueError("compare takes two runs or more")
    rows = []
    for path in paths:
        run = read_run(path)
        summary = summarize(run)
        culprits = [event.culprits[0] for event in summary.events if event.culprits]
        rows.append(
            (
                str(path),
                rule_of(run) if "policy" in run.header else "none",
                str(summary.steps),
                _number(summary.loss),
                _number(summary.validation),
                f"{summary.clipped:.0%}",
                str(summary.skipped),
                str(len(summary.events)),
                "" if summary.score is None else f"{summary.score:.2%}",
                f"{culprits[0]['name']} ({ratio_of(culprits[0]):.3g} x its level)" if culprits else "",
            )
        )
    return table(_HEADER, rows, width=200)


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4g}"
