"""The figures of the report, as Plotly's. Their colours are names, which the page's script turns into those of its mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dist_clip.monitor import Run, groups_of

_MOST_POINTS = 4000
_MOST_COLUMNS = 240
_MOST_ROWS = 400
_SHOWN = 15
"""Tensors in the figure of the most clipped ones."""


def course(run: Run) -> Any:
    """Return loss, gradient norm and share of tensors clipped over the steps, with spikes and skipped steps."""
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.04, row_heights=[0.42, 0.36, 0.22])
    steps, loss = run.series("step"), run.series("loss")
    by_step = dict(zip(steps, loss, strict=True))

    def line(row: int, name: str, values: list[float], colour: str, **more: Any) -> None:
        kept = thinned(values)
        figure.add_scatter(
            x=[steps[i] for i in kept],
            y=[_shown(values[i]) for i in kept],
            name=name,
            mode="lines",
            line={"width": 1.5},
            meta={"line": colour, **more},
            row=row,
            col=1,
        )

    def marks(name: str, where: list[int], colour: str, symbol: str) -> None:
        shown = [step for step in where if not math.isnan(by_step.get(step, math.nan))]
        if shown:
            figure.add_scatter(
                x=shown,
                y=[by_step[step] for step in shown],
                name=name,
                mode="markers",
                marker={"symbol": symbol, "size": 9, "line": {"width": 2}},
                meta={"marker": colour},
                row=1,
                col=1,
            )

    line(1, "training loss", loss, "blue")
    if run.validation:
        figure.add_scatter(
            x=[record["step"] for record in run.validation],
            y=[record["loss"] for record in run.validation],
            name="validation loss",
            mode="markers",
            marker={"size": 8, "symbol": "diamond"},
            meta={"marker": "green"},
            row=1,
            col=1,
        )
    marks("spike", [spike["step"] for spike in run.spikes], "red", "circle-open")
    marks("step skipped", [record["step"] for record in run.steps if record.get("skipped")], "orange", "x-thin-open")
    line(2, "norm before clipping", run.series("grad_norm"), "purple")
    line(2, "norm after clipping", run.series("grad_norm_clipped"), "green")
    line(3, "share of tensors clipped", run.series("clipped_fraction"), "orange", fill=True)
    figure.update_yaxes(title_text="loss", row=1)
    norms = [norm for norm in (*run.series("grad_norm"), *run.series("grad_norm_clipped")) if 0 < norm < math.inf]
    wide = bool(norms) and max(norms) > 100 * min(norms)
    ticks = {"dtick": 1 if wide else "D2", "exponentformat": "power"}
    figure.update_yaxes(title_text="gradient norm", type="log", row=2, **ticks)
    figure.update_yaxes(title_text="clipped", range=[-0.03, 1.03], tickformat=".0%", row=3)
    figure.update_xaxes(title_text="step", row=3)
    for first, last in faults(run):
        figure.add_vrect(x0=first - 0.5, x1=last + 0.5, line_width=0, opacity=0.16, fillcolor="#888888", layer="below")
    figure.update_layout(
        height=620,
        hovermode="x unified",
        margin={"l": 70, "r": 20, "t": 36, "b": 46},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0},
    )
    return figure


def faults(run: Run) -> list[tuple[int, int]]:
    """Return first and last step of each stretch that the log marks as a fault made on purpose."""
    out: list[tuple[int, int]] = []
    for record in run.steps:
        if record.get("fault"):
            if out and out[-1][1] == record["step"] - 1:
                out[-1] = (out[-1][0], record["step"])
            else:
                out.append((record["step"], record["step"]))
    return out


def thinned(values: Sequence[float], most: int = _MOST_POINTS) -> list[int]:
    """Return the indices of at most about `most` values that look the same: the smallest and largest of each stretch."""
    if len(values) <= most:
        return list(range(len(values)))
    width = math.ceil(2 * len(values) / most)
    kept: set[int] = {0, len(values) - 1}
    for start in range(0, len(values), width):
        stretch = range(start, min(start + width, len(values)))
        kept |= {min(stretch, key=lambda i: values[i]), max(stretch, key=lambda i: values[i])}
    return sorted(kept)


def heat(run: Run) -> tuple[Any, dict[str, Any]] | None:
    """Return the heat map of the tensors over time, and what its buttons need; None without tables of tensors."""
    import plotly.graph_objects as go

    tables = [table for table in run.tensors if "peaks" in table]
    if not tables:
        return None
    names = list(tables[-1]["norms"])
    rows = _rows(names)
    joined = [tables[i : i + _joined(len(tables))] for i in range(0, len(tables), _joined(len(tables)))]
    peaks: list[list[float | None]] = [[] for _ in rows]
    norms: list[list[float | None]] = [[] for _ in rows]
    about: list[list[list[Any]]] = [[] for _ in rows]
    for part in joined:
        columns = _columns(part)
        for r, members in enumerate(rows.values()):
            found = [columns[name] for name in members if name in columns]
            peak = max((entry["peak"] for entry in found if entry["peak"] is not None), default=None)
            norm = math.sqrt(sum(entry["norm"] ** 2 for entry in found)) if found else math.nan
            peaks[r].append(_log(peak, 2.0))
            norms[r].append(_log(norm, 10.0))
            one = found[0] if len(found) == 1 else None
            about[r].append(
                [
                    _digits(norm),
                    _digits(one["level"]) if one else "",
                    _digits(peak),
                    _digits(min((entry["scale"] for entry in found), default=None)),
                    f"{sum(entry['clipped'] for entry in found)} of {sum(entry['steps'] for entry in found)}",
                ]
            )
    steps = [part[-1]["step"] for part in joined]
    labels = list(rows)
    figure = go.Figure(
        go.Heatmap(
            x=steps,
            y=labels,
            z=peaks,
            customdata=about,
            zmin=0,
            zmax=_top(peaks),
            hoverongaps=False,
            hovertemplate=(
                "<b>%{y}</b>, up to step %{x}<br>norm %{customdata[0]}, level %{customdata[1]}<br>"
                "largest norm / level %{customdata[2]}<br>scale %{customdata[3]}<br>clipped %{customdata[4]}"
                "<extra></extra>"
            ),
            colorbar={"title": {"text": "norm / level"}, **_ticks(0, _top(peaks), 2)},
        )
    )
    figure.update_layout(
        height=min(1500, max(320, 110 + 17 * len(labels))),
        margin={"l": 10, "r": 10, "t": 14, "b": 46},
        xaxis={"title": {"text": "step"}},
        yaxis={
            "autorange": "reversed",
            "automargin": True,
            "categoryorder": "array",
            "categoryarray": labels,
            "tickfont": {"size": 11},
            **({"dtick": 1} if len(labels) <= 85 else {}),
        },
    )
    low, high = _bounds(norms)
    groups = groups_of(label if label in names else f"{label}.weight" for label in labels)
    first = {kind: i for i, kind in reversed(list(enumerate(group.kind for group in groups.values())))}
    by_kind = sorted(range(len(labels)), key=lambda i: (first[list(groups.values())[i].kind], i))
    choices = {
        "peaks": {"z": peaks, "zmin": 0, "zmax": _top(peaks), "title": "norm / level", **_ticks(0, _top(peaks), 2)},
        "norms": {"z": norms, "zmin": low, "zmax": high, "title": "norm", **_ticks(low, high, 10)},
        "by layer": labels,
        "by kind": [labels[i] for i in by_kind],
    }
    return figure, choices


def _rows(names: list[str]) -> dict[str, list[str]]:
    """Return {label: tensors}: one row a tensor, or, of too many, one a layer."""
    if len(names) <= _MOST_ROWS:
        return {name.removesuffix(".weight") or name: [name] for name in names}
    rows: dict[str, list[str]] = {}
    for name, group in groups_of(names).items():
        rows.setdefault(group.kind if group.layer is None else f"layer {group.layer}", []).append(name)
    return rows


def _joined(tables: int) -> int:
    """Return how many tables share a column."""
    return math.ceil(tables / _MOST_COLUMNS)


def _columns(tables: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return each tensor's numbers in some consecutive tables."""
    out: dict[str, dict[str, Any]] = {}
    for table in tables:
        rows = zip(table["norms"].items(), table["levels"], table["peaks"], table["clipped"], strict=True)
        for (name, norm), level, peak, clipped in rows:
            before = out.get(name, {"peak": None, "clipped": 0, "steps": 0, "scale": 1.0})
            peaks = [value for value in (before["peak"], peak) if value is not None]
            out[name] = {
                "norm": norm,
                "level": level,
                "peak": max(peaks, default=None),
                "scale": min(before["scale"], table["scales"][name]),
                "clipped": before["clipped"] + clipped,
                "steps": before["steps"] + table["steps"],
            }
    return out


def most_clipped(run: Run) -> Any | None:
    """Return the tensors that were clipped at most steps; None where there are none."""
    import plotly.graph_objects as go

    found = _columns([table for table in run.tensors if "peaks" in table])
    shares = {name: entry["clipped"] / max(1, entry["steps"]) for name, entry in found.items() if entry["clipped"]}
    if not shares:
        return None
    shown = sorted(shares, key=lambda name: -shares[name])[:_SHOWN]
    figure = go.Figure(
        go.Bar(
            x=[shares[name] for name in shown],
            y=[name.removesuffix(".weight") or name for name in shown],
            orientation="h",
            customdata=[[found[name]["clipped"], found[name]["steps"]] for name in shown],
            hovertemplate="<b>%{y}</b><br>clipped at %{customdata[0]} of %{customdata[1]} steps<extra></extra>",
            meta={"marker": "orange"},
        )
    )
    figure.update_layout(
        height=max(160, 80 + 24 * len(shown)),
        margin={"l": 10, "r": 20, "t": 10, "b": 46},
        bargap=0.3,
        xaxis={"title": {"text": "share of steps at which it was clipped"}, "tickformat": ".0%", "rangemode": "tozero"},
        yaxis={"autorange": "reversed", "automargin": True},
    )
    return figure


def _shown(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _log(value: float | None, base: float) -> float | None:
    if value is None or math.isnan(value) or value <= 0:
        return None
    return 99.0 if math.isinf(value) else round(math.log(value, base), 3)


def _digits(value: float | None) -> str:
    return "unknown" if value is None or math.isnan(value) else f"{value:.3g}"


def _top(rows: list[list[float | None]]) -> float:
    """Return the upper end of the colours of log2 ratios: 8 at least, and 1024 at most, beyond which all is as bad."""
    return min(10.0, max(3.0, *(value for row in rows for value in row if value is not None and value < 99), 3.0))


def _bounds(rows: list[list[float | None]]) -> tuple[float, float]:
    values = [value for row in rows for value in row if value is not None and value < 99]
    return (min(values), max(max(values), min(values) + 1)) if values else (0.0, 1.0)


def _ticks(low: float, high: float, base: int) -> dict[str, Any]:
    step = max(1, round((high - low) / 6))
    places = list(range(math.ceil(low), math.floor(high) + 1, step))
    texts = [f"{base**place:g}" if base == 2 else f"1e{place}" for place in places]
    return {"tickvals": places, "ticktext": texts}
