"""The figures, from the rows alone: what faults do, what a rule costs without them, and how both come about."""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from scripts.stability.results import BASELINE, CONTROLS, FLOORS, Results, Setting
from scripts.stability.row import BIN
from scripts.stability.store import Row

HIDDEN = FLOORS
TRACKED = ("level", "gamma", "mean")
"""What rules call the norm that they take for usual."""
README_SETTING = Setting("large", "stdlib", "adamw-95", "plain")
"""Of the four AdamW settings whose courses are recorded, the one in which LogClip gains least against bad batches."""
README_RULES = {BASELINE: ("GlobalNorm(1.0)", "#c8552b"), "logclip": ("LogClip()", "#1f5fa8")}
"""Policy in the grid -> how a user writes it, and its colour."""
README_STEPS = 80
SMALLEST = 1e-3
"""nats: excursions below are drawn here, as a logarithmic axis has no 0."""


def draw(results: Results, folder: Path) -> list[Path]:
    figures: dict[str, Callable[[Results], Any]] = {
        **{f"study-excursions-{f}.png": functools.partial(excursions, fault=f) for f in results.faults()},
        "study-price.png": prices,
        "study-course.png": courses,
        "study-clipping.png": clipping,
        "study-tracking.png": tracking,
        "readme-fault.png": fault_courses,
    }
    drawn = []
    for name, make in figures.items():
        figure = make(results)
        if figure is not None:  # no rows for it yet
            figure.savefig(folder / name, dpi=130, metadata={"Software": None})
            plt.close(figure)
            drawn.append(folder / name)
    return drawn


def colour(results: Results, policy: str) -> Any:
    """One colour a rule in all figures of a part."""
    drawn = {row["policy"] for row in results.rows}
    shown = [name for name in results.grid.raw["policy"] if name in drawn and name not in HIDDEN]
    return plt.get_cmap("tab20" if len(shown) > 10 else "tab10")(shown.index(policy))


def excursions(results: Results, fault: str) -> Any:
    """How far a fault throws the loss: a panel a setting, a dot a seed."""
    settings = [s for s in results.settings if results.of(s, BASELINE, fault)]
    shown = [policy for policy in results.grid.raw["policy"] if policy not in HIDDEN]
    names = [policy for policy in shown if any(results.of(setting, policy, fault) for setting in settings)]
    if not settings:
        return None
    figure, panels = wrapped(results, settings, names)
    for axes, setting in zip(panels, settings, strict=True):
        for y, policy in enumerate(names):
            values = [max(SMALLEST, v) for v in results.excursions(setting, policy, fault).values()]
            finite = [v for v in values if math.isfinite(v)]
            if finite:
                tone = colour(results, policy)
                axes.plot(finite, [y] * len(finite), "o", color=tone, markersize=4, alpha=0.5, mew=0)
                axes.plot(sum(finite) / len(finite), y, "|", color=tone, markersize=13, mew=2.5)
            if len(finite) < len(values):
                axes.text(1.0, y, "diverged", transform=axes.get_yaxis_transform(), ha="right", fontsize="x-small")
        base = [v for v in results.excursions(setting, BASELINE, fault).values() if math.isfinite(v)]
        if base:
            axes.axvline(sum(base) / len(base) / 5, color="0.4", linewidth=1, linestyle=":", zorder=0)
        axes.set_xscale("log")
        axes.grid(axis="x", color="0.93", zorder=-1)
    figure.supxlabel(
        "largest excess of the training loss over the run without the fault, nats a byte (log scale)", fontsize="medium"
    )
    figure.suptitle(
        f"How far does the loss go? {results.grid.title('fault', fault).capitalize()}\n"
        "dots: seeds; bars: means; dotted: a fifth of GlobalGC's mean",
        fontsize="medium",
    )
    return figure


def prices(results: Results) -> Any:
    """What a rule costs where nothing goes wrong: differences from GlobalGC with their intervals over the noise floor."""
    settings = [s for s in results.settings if len(results.policies(s)) > 1 and results.of(s, BASELINE)]
    dull = (BASELINE, *CONTROLS)
    names = [p for p in results.grid.raw["policy"] if p not in dull and any(results.of(s, p) for s in settings)]
    if not settings:
        return None
    figure, panels = wrapped(results, settings, names)
    for axes, setting in zip(panels, settings, strict=True):
        floor = results.floor(setting)
        if floor is not None:
            axes.axvspan(-floor, floor, color="0.88", zorder=0)
        axes.axvline(0, color="0.5", linewidth=0.8, zorder=0)
        for y, policy in enumerate(names):
            price = results.price(setting, policy)
            if price is not None:
                tone = "0.3" if policy in FLOORS else colour(results, policy)
                axes.errorbar(price.mean, y, xerr=price.half or 0, fmt="o", color=tone, markersize=4, capsize=2.5)
            elif results.of(setting, policy):
                axes.text(0.5, y, "diverged", transform=axes.get_yaxis_transform(), ha="center", va="center")
        axes.set_xscale("symlog", linthresh=0.02)
        axes.set_xticks([-0.3, -0.1, -0.02, 0, 0.02, 0.1, 0.3, 1], ["-.3", "-.1", "-.02", "0", ".02", ".1", ".3", "1"])
        axes.minorticks_off()
        axes.tick_params(axis="x", labelsize="x-small")
    panels[0].set_xlim(-0.3, 1.2)  # shared; a bar may leave it, a mean does not
    figure.supxlabel(
        "validation loss less GlobalGC's, paired over seeds, 95 % interval (linear to .02, then log)", fontsize="medium"
    )
    figure.suptitle(
        "What does a rule cost without faults? Right: worse than GlobalGC; grey: the noise floor", fontsize="medium"
    )
    return figure


def wrapped(results: Results, settings: Sequence[Setting], names: Sequence[str]) -> tuple[Any, list[Any]]:
    """Panels, four a row, with the rules' titles down the left side."""
    columns = min(4, len(settings))
    rows = -(-len(settings) // columns)
    size = (2.3 + 2.5 * columns, 1.3 + rows * (1.0 + 0.24 * len(names)))
    figure, grid = plt.subplots(
        rows, columns, figsize=size, sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    panels = list(grid.flat)
    for axes in panels[len(settings) :]:
        axes.remove()
    for axes, setting in zip(panels, settings, strict=False):
        size, rest = setting.title(results.grid).split(", ", 1)
        axes.set_title(f"{size}\n{textwrap.fill(rest, 28)}", fontsize="small")
        axes.tick_params(axis="x", labelbottom=True)
        axes.tick_params(axis="y", labelsize="small")
        plain(axes)
    panels[0].set_yticks(range(len(names)), [results.grid.title("policy", name) for name in names])
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    return figure, panels[: len(settings)]


def courses(results: Results) -> Any:
    """The course of the loss through each fault, one seed."""
    rows = [row for row in results.rows if "excess" in row["series"]]
    settings = [s for s in results.settings if any(is_of(row, s) for row in rows)]
    faults = [fault for fault in results.faults() if any(row["fault"] == fault for row in rows)]
    if not settings:
        return None
    figure, panels = plt.subplots(
        len(faults), len(settings), figsize=(1.5 + 3.4 * len(settings), 2.6 * len(faults)), layout="constrained",
        squeeze=False, sharex="col", sharey="row",
    )  # fmt: skip
    for line, fault in zip(panels, faults, strict=True):
        for axes, setting in zip(line, settings, strict=True):
            for row in rows:
                if is_of(row, setting) and row["fault"] == fault:
                    values = [math.nan if value is None else value for value in row["series"]["excess"]]
                    steps = range(row["compared_from"], row["compared_from"] + len(values))
                    label = results.grid.title("policy", row["policy"])
                    axes.plot(steps, values, color=colour(results, row["policy"]), linewidth=1.2, label=label)
            axes.axvspan(0, results.grid.raw["fault"][fault]["options"]["fault-steps"], color="0.92", zorder=0)
            axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
            axes.set_yscale("symlog", linthresh=0.1)
            plain(axes)
        line[0].set_ylabel(results.grid.title("fault", fault).replace(", ", ",\n"))
    for axes, setting in zip(panels[0], settings, strict=True):
        axes.set_title(setting.title(results.grid), fontsize="small")
    for axes in panels[-1]:
        axes.set_xlabel("steps from the fault's first")
    legend(figure, panels)
    figure.suptitle(
        "Training loss over that of the same run without the fault (seed 0; grey: while it lasts)", fontsize="medium"
    )
    return figure


def fault_courses(results: Results) -> Any:
    """For the README: the course of the loss through each fault under GlobalGC and under LogClip, one setting, one seed."""
    rows = [row for row in results.rows if is_of(row, README_SETTING) and "excess" in row["series"]]
    rows = [row for row in rows if row["policy"] in README_RULES]
    if not rows:
        return None
    faults = list(results.faults())
    figure, panels = plt.subplots(1, len(faults), figsize=(7.6, 3.4), layout="constrained", sharey=True, squeeze=False)
    for axes, fault in zip(panels.flat, faults, strict=True):
        lasts = results.grid.raw["fault"][fault]["options"]["fault-steps"]
        axes.axvspan(0, lasts, color="0.91", zorder=0, linewidth=0)
        axes.text(lasts / 2, 0.96, "fault", transform=axes.get_xaxis_transform(), ha="center", va="top", color="0.4")
        axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        for row in (row for row in rows if row["fault"] == fault):
            label, tone = README_RULES[row["policy"]]
            steps = range(row["compared_from"], README_STEPS)
            axes.plot(steps, row["series"]["excess"][: len(steps)], color=tone, linewidth=1.9)
            largest = list(results.excursions(README_SETTING, row["policy"], fault).values())
            mean = sum(largest) / len(largest)
            y = 0.66 if row["policy"] == BASELINE else 0.48
            text = f"{label}: largest {row['excursion']:.2f}\n(mean of {len(largest)} seeds: {mean:.2f})"
            axes.text(1.0, y, text, transform=axes.transAxes, ha="right", color=tone)
        axes.set_title(results.grid.title("fault", fault).capitalize(), fontsize="medium")
        axes.set_xlabel("steps since the fault began")
        axes.set_xlim(-3, README_STEPS)
        plain(axes)
    panels[0][0].set_ylabel("training loss above that of the run\nwithout the fault, nats a byte")
    figure.suptitle(f"{README_SETTING.title(results.grid)}, seed {rows[0]['seed']}", fontsize="medium", color="0.3")
    return figure


def clipping(results: Results) -> Any:
    """Share of tensors clipped and mean scale over a run without faults, mean over seeds."""
    settings = [s for s in results.settings if len(results.policies(s)) > 2][:4]
    if not settings:
        return None
    figure, panels = plt.subplots(
        2, len(settings), figsize=(1.5 + 3.2 * len(settings), 5), layout="constrained", squeeze=False, sharex="col",
        sharey="row",
    )  # fmt: skip
    for column, setting in zip(panels.T, settings, strict=True):
        for policy in results.policies(setting):
            if policy in HIDDEN:
                continue
            rows = results.of(setting, policy)
            for axes, name in zip(column, ("clipped", "scale"), strict=True):
                means = mean_series([row["series"][name] for row in rows])
                steps = [(i + 0.5) * BIN for i in range(len(means))]
                label = results.grid.title("policy", policy)
                axes.plot(steps, means, color=colour(results, policy), linewidth=1.2, label=label)
                axes.set_ylim(-0.03, 1.03)
                plain(axes)
        column[0].set_title(setting.title(results.grid).replace(", ", "\n", 1), fontsize="small")
        column[1].set_xlabel("step")
    panels[0][0].set_ylabel("share of tensors clipped")
    panels[1][0].set_ylabel("mean scale")
    legend(figure, panels)
    figure.suptitle("What is clipped where nothing goes wrong (means of 10 steps and all seeds)", fontsize="medium")
    return figure


def tracking(results: Results) -> Any:
    """Norm and what the rule takes for usual, for some tensors, through the fault in one of them."""
    rows = [
        row
        for row in results.rows
        if row["fault"] == "grad"
        and any(slot in series for name, series in row.get("tensors", {}).items() if name != "step" for slot in TRACKED)
    ]
    first = next((s for s in results.settings if any(is_of(row, s) for row in rows)), None)
    if first is None:
        return None
    rows = [row for row in rows if is_of(row, first)]
    names = [name for name in rows[0]["tensors"] if name != "step"]
    figure, panels = plt.subplots(
        len(rows), len(names), figsize=(1 + 3 * len(names), 0.8 + 2 * len(rows)), layout="constrained", squeeze=False,
        sharex=True, sharey="col",
    )  # fmt: skip
    for line, row in zip(panels, rows, strict=True):
        for axes, name in zip(line, names, strict=True):
            series, steps = row["tensors"][name], row["tensors"]["step"]
            axes.plot(steps, series["norm"], color="0.6", linewidth=1, label="gradient norm")
            slot = next(slot for slot in TRACKED if slot in series)
            axes.plot(
                steps, positive(series[slot]), color=colour(results, row["policy"]), label="tracked", linewidth=1.6
            )
            axes.set_yscale("log")
            plain(axes)
        line[0].set_ylabel(results.grid.title("policy", row["policy"]))
        line[0].legend(frameon=False, fontsize="x-small")
    for axes, name in zip(panels[0], names, strict=True):
        axes.set_title(name, fontsize="small")
    for axes in panels[-1]:
        axes.set_xlabel("step")
    figure.suptitle(
        f"What each rule takes for a tensor's usual norm ({first.title(results.grid)}, seed 0, garbage in wq)"
    )
    return figure


def is_of(row: Row, setting: Setting) -> bool:
    return all(row[axis] == getattr(setting, axis) for axis in ("size", "corpus", "optimizer", "condition"))


def mean_series(series: Sequence[Sequence[float | None]]) -> list[float]:
    columns = zip(*series, strict=True)
    return [math.nan if None in column else sum(column) / len(column) for column in columns]  # type: ignore[arg-type]


def positive(values: Sequence[float | None]) -> list[float]:
    """Without what a logarithmic axis cannot show: nothing known yet."""
    return [value if value else math.nan for value in values]


def legend(figure: Any, panels: Any) -> None:
    found: dict[str, Any] = {}
    for axes in panels.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=min(4, len(found)), frameon=False)


def plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
