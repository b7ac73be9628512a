"""Learning-rate sensitivity: the final loss against the learning rate, a table and a figure, from the rows alone.

As Wortsman et al. (arXiv 2309.14322) measure it: the mean over the learning rates of the final loss, no worse than that of
an untrained model, less the best one.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from scripts.stability.figures import colour, plain
from scripts.stability.measures import Interval, paired
from scripts.stability.results import BASELINE, Results, Setting, number
from scripts.stability.tables import signed, table

PART = "rates"
UNTRAINED = math.log(256)
"""Nats a byte of a model that knows nothing, which no run counts as worse than."""
USABLE = 0.2
"""nats: a learning rate is usable with a rule if the loss is within this of the best one of all rules and rates."""


def tables(results: Results) -> dict[str, str]:
    """Sections of the page: name -> text."""
    sizes = list(dict.fromkeys(row["size"] for row in results.rows))
    parts = [f"**{results.grid.title('size', size)} parameters**\n\n{losses_table(results, size)}" for size in sizes]
    sections = [sensitivity_table(results, size) for size in sizes]
    return {
        "rates-losses": "\n\n".join(parts) if parts else "No rows yet.",
        "rates-sensitivity": "\n\n".join(sections) if sections else "No rows yet.",
    }


def rate(results: Results, setting: Setting) -> float:
    return float(results.grid.raw["condition"][setting.condition]["options"]["lr"])


def settings(results: Results, size: str) -> list[Setting]:
    """Those of a size, by learning rate."""
    return sorted((s for s in results.settings if s.size == size), key=lambda setting: rate(results, setting))


def policies(results: Results, size: str) -> list[str]:
    found = {row["policy"] for row in results.rows if row["size"] == size}
    return [policy for policy in results.grid.raw["policy"] if policy in found]


def losses(results: Results, setting: Setting, policy: str) -> dict[int, float]:
    """Final validation loss by seed; that of an untrained model where a run diverged."""
    found = {row["seed"]: number(row["validation"]) for row in results.of(setting, policy)}
    return {seed: UNTRAINED if math.isnan(loss) else min(loss, UNTRAINED) for seed, loss in found.items()}


def losses_table(results: Results, size: str) -> str:
    """A line a learning rate: mean (least to largest) of each rule; the least mean is bold."""
    shown = policies(results, size)
    lines = []
    for setting in settings(results, size):
        values = [list(losses(results, setting, policy).values()) for policy in shown]
        means = [statistics.fmean(some) if some else math.inf for some in values]
        line = [f"{rate(results, setting):.0e}"]
        for some, mean in zip(values, means, strict=True):
            text = f"**{mean:.2f}**" if mean == min(means) else f"{mean:.2f}"
            line.append(text + (f" ({min(some):.2f} to {max(some):.2f})" if len(some) > 1 else "") if some else "")
        lines.append(line)
    return table(["learning rate", *(results.grid.title("policy", policy) for policy in shown)], lines)


def by_seed(results: Results, size: str, policy: str) -> dict[int, list[float]]:
    """Losses by learning rate for each seed that has all of them."""
    columns = [losses(results, setting, policy) for setting in settings(results, size)]
    seeds = set.intersection(*(set(column) for column in columns)) if columns else set()
    return {seed: [column[seed] for column in columns] for seed in sorted(seeds)}


def sensitivity(values: Sequence[float], best: float) -> float:
    """Mean excess over the best loss."""
    return statistics.fmean(values) - best


def usable(rates: Sequence[float], values: Sequence[float], best: float) -> float:
    """Decades of learning rate, interpolated between neighbours, over which the loss is within `USABLE` of the best."""
    width, limit = 0.0, best + USABLE
    for (low, a), (high, b) in itertools.pairwise(zip(rates, values, strict=True)):
        decades = math.log10(high / low)
        if max(a, b) <= limit:
            width += decades
        elif min(a, b) < limit:
            width += decades * (limit - min(a, b)) / abs(a - b)
    return width


def sensitivity_table(results: Results, size: str) -> str:
    """A line a rule: the sensitivity and the usable decades, against GlobalGC's, paired over seeds."""
    shown = policies(results, size)
    rates = [rate(results, setting) for setting in settings(results, size)]
    found = {policy: by_seed(results, size, policy) for policy in shown}
    best: dict[int, float] = {}
    for columns in found.values():
        for seed, values in columns.items():
            best[seed] = min(best.get(seed, math.inf), *values)
    measured = {
        policy: (
            {seed: sensitivity(values, best[seed]) for seed, values in columns.items()},
            {seed: usable(rates, values, best[seed]) for seed, values in columns.items()},
        )
        for policy, columns in found.items()
    }
    lines = []
    for policy in shown:
        cells = []
        for ours, base in zip(measured[policy], measured[BASELINE], strict=True):
            difference: Interval | None = None if policy == BASELINE else paired(ours, base)
            cells.append(f"{statistics.fmean(ours.values()):.2f}" if ours else "")
            cells.append("" if difference is None else signed(difference))
        lines.append([results.grid.title("policy", policy), len(found[policy]), *cells])
    header = ["clipping", "seeds", "sensitivity, nats", "less GlobalGC's", "usable decades", "less GlobalGC's"]
    span = f"{rates[0]:.0e} to {rates[-1]:.0e}" if rates else ""
    return f"**{results.grid.title('size', size)} parameters, learning rates {span}**\n\n{table(header, lines)}"


def draw(results: Results, folder: Path) -> list[Path]:
    """The figure: a panel a size, a line a rule, from the least to the largest seed."""
    sizes = list(dict.fromkeys(row["size"] for row in results.rows))
    if not sizes:
        return []
    figure, panels = plt.subplots(
        1, len(sizes), figsize=(1.0 + 5.2 * len(sizes), 4.4), layout="constrained", squeeze=False
    )
    handles: dict[str, Any] = {}
    for axes, size in zip(panels[0], sizes, strict=True):
        for policy in policies(results, size):
            found = [(rate(results, s), list(losses(results, s, policy).values())) for s in settings(results, size)]
            found = [(x, values) for x, values in found if values]
            tone = colour(results, policy)
            (line,) = axes.plot(
                [x for x, _ in found], [statistics.fmean(values) for _, values in found], "o-", color=tone, markersize=4
            )
            low, high = [min(values) for _, values in found], [max(values) for _, values in found]
            axes.fill_between([x for x, _ in found], low, high, color=tone, alpha=0.15, linewidth=0)
            handles.setdefault(results.grid.title("policy", policy), line)
        axes.set_xscale("log")
        axes.set_xlabel("peak learning rate")
        axes.set_title(f"{results.grid.title('size', size)} parameters", fontsize="medium")
        axes.grid(color="0.93", zorder=-1)
        plain(axes)
    panels[0][0].set_ylabel("final validation loss, nats a byte")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False)
    path = folder / "study-rates.png"
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
    return [path]
