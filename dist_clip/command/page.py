"""The report: one HTML page that holds all it needs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from dist_clip.command import figures
from dist_clip.command.summary import Event, ratio_of, summarize
from dist_clip.monitor import Run, rule_of

_MOST_EVENTS = 40


def render(run: Run, title: str) -> str:
    """Return the page.

    Raises:
        ImportError: plotly or jinja2 is missing.
        ValueError: the run has no steps.
    """
    try:
        import jinja2
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError('the report needs plotly and jinja2: pip install "dist-clip[cli]"') from error
    if not run.steps:
        raise ValueError("the log has no steps yet")
    summary = summarize(run)
    heat = figures.heat(run)
    plots: dict[str, Any] = {"course": figures.course(run), "clipped": figures.most_clipped(run)}
    if heat is not None:
        plots["heat"] = heat[0]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    tiles = [
        ("steps", f"{summary.steps:,}"),
        ("loss, last 20 steps", _number(summary.loss)),
        *([("validation loss", _number(summary.validation))] if not math.isnan(summary.validation) else []),
        ("largest gradient norm", _number(summary.largest)),
        ("tensors clipped, on average", f"{summary.clipped:.0%}"),
        ("steps skipped", f"{summary.skipped:,}"),
        ("spike score", "too short" if summary.score is None else f"{summary.score:.2%}"),
    ]
    return environment.get_template("page.html.jinja").render(
        title=title,
        rule=rule_of(run) if "policy" in run.header else "clipped by something else",
        about=_about(run),
        tiles=tiles,
        events=[_event(event) for event in summary.events[:_MOST_EVENTS]],
        more_events=len(summary.events) - _MOST_EVENTS,
        has_fault=bool(figures.faults(run)),
        plots={name: json.loads(figure.to_json()) for name, figure in plots.items() if figure is not None},
        heat=None if heat is None else heat[1],
        plotly=get_plotlyjs(),
    )


def _about(run: Run) -> str:
    header = run.header
    parts = [
        f"{header['ranks']} ranks" if header.get("ranks", 1) != 1 else "one process",
        *([f"{header['parameters']:,} parameters"] if "parameters" in header else []),
        *([f"{header['tensors']} tensors"] if "tensors" in header else []),
        *(f"guard {guard['guard']}" for guard in header.get("guards", [])),
        *(f"{name} {version}" for name, version in header.get("versions", {}).items()),
    ]
    if run.end is not None and run.end.get("error"):
        parts.append(f"ended with {run.end['error']}")
    return " · ".join(parts)


def _event(event: Event) -> dict[str, Any]:
    return {
        "steps": f"{event.first:,}" if event.first == event.last else f"{event.first:,} to {event.last:,}",
        "reasons": ", ".join(event.reasons),
        "loss": _number(event.loss),
        "norm": _number(event.grad_norm),
        "culprits": [
            {
                "name": culprit["name"],
                "ratio": "not finite" if math.isinf(ratio_of(culprit)) else f"{_number(ratio_of(culprit), 3)} x",
                "norm": _number(culprit["norm"]),
                "level": _number(culprit["level"]),
                "scale": _number(culprit["scale"]),
            }
            for culprit in event.culprits[:5]
        ],
    }


def _number(value: float | None, digits: int = 4) -> str:
    if value is None or math.isnan(value):
        return "unknown"
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if 1000 <= abs(rounded) < 1e9 else f"{rounded:.{digits}g}"
