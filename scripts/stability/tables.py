"""The page's tables, in Markdown, from the rows alone."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence

from scripts.stability.measures import Interval, interval
from scripts.stability.results import BASELINE, CONTROLS, FLOORS, Results, Setting, number
from scripts.stability.store import Row

CANDIDATE = "logclip"
"""The rule whose acceptance table there is."""
LIMIT = "zeroed"
"""The control that shows what clipping could do at most."""
UNCLIPPED = "none"
SKIPPING = "global-skip"
"""What the controls are shown beside, with the baseline and the candidate."""
SHARE = 0.2
"""Of GlobalGC's excursion that the candidate may have."""


def tables(results: Results, tuned: Results) -> dict[str, str]:
    """Sections of the page: name -> text. `tuned`: the runs that settings were chosen from."""
    return {
        "state": state(results, tuned),
        "summary": summary(results),
        "floor": floors(results),
        "controls": controls(results),
        "acceptance": acceptance(results),
        "cells": "\n\n".join(cell_table(results, setting) for setting in results.settings),
        "tuning": tuning(tuned),
    }


def state(*parts: Results) -> str:
    """How many runs there are of what the grid has, and of which versions."""
    rows = list({row["id"]: row for results in parts for row in results.rows}.values())
    planned = len({name for results in parts for name in results.ids})
    if not rows:
        return f"No rows yet, of {planned}."
    failed = sum(row["diverged"] for row in rows)
    versions = sorted({", ".join(f"{k} {v}" for k, v in row["versions"].items()) for row in rows})
    seconds = sum(row["seconds"] for row in rows)
    missing = "" if len(rows) == planned else f"**Not complete: {len(rows)} of {planned} runs.** "
    twins = [row for row in parts[0].rows if row["fault"] == "none"]
    text = (
        f"{missing}{len(rows)} runs, {seconds / 3600:.1f} hours of training added up; in {failed} of them the loss became "
        f"NaN or Inf. Spikes without a fault: {sum(row['spikes'] for row in twins)} in {len(twins)} runs. "
        f"{'; '.join(versions)}."
    )
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def summary(results: Results) -> str:
    """A line a rule, over all settings."""
    faults = list(results.faults())
    lines = []
    for policy in results.grid.raw["policy"]:
        settings = [s for s in results.settings if policy not in FLOORS and results.of(s, policy)]
        if not settings:
            continue
        verdicts = Counter(v for s in settings if (v := results.verdict(s, policy)) != "one seed")
        prices = [price.mean for s in settings if (price := results.price(s, policy)) is not None]
        line: list[object] = [results.grid.title("policy", policy), len(settings)]
        line += [""] * 2 if policy in (BASELINE, *CONTROLS) else [span(prices, "+.3f"), tally(verdicts)]
        for fault in faults:
            ratios = [r for s in settings if (r := results.excursion_ratio(s, policy, fault)) is not None]
            line += [span(ratios, ".2f"), returned([row for s in settings for row in results.of(s, policy, fault)])]
        lines.append(line)
    header = ["clipping", "settings", "no fault: least and largest difference", "verdicts"]
    for fault in faults:
        title = results.grid.title("fault", fault).split(",")[0]
        header += [f"{title}: excursion / GlobalGC's", "runs back at the end"]
    return table(header, lines) if lines else "No rows yet."


def span(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def tally(verdicts: Counter[str]) -> str:
    return ", ".join(f"{verdict}: {count}" for verdict, count in sorted(verdicts.items()))


def returned(rows: Sequence[Row]) -> str:
    return f"{sum(row['recovery'] is not None for row in rows)} of {len(rows)}" if rows else ""


def floors(results: Results) -> str:
    lines = []
    for setting in results.settings:
        prices, width = [results.price(setting, floor) for floor in FLOORS], results.floor(setting)
        if any(prices) and width is not None:
            cells = ["" if price is None else f"{signed(price)} ({price.n})" for price in prices]
            lines.append([setting.title(results.grid), *cells, f"{width:.4f}"])
    return table(["setting", "1.001 less 1.0 (seeds)", "another first batch (seeds)", "noise floor"], lines)


def controls(results: Results) -> str:
    """Mean excursions of the controls beside the rules', where there are any; on the control's seeds."""
    shown = (UNCLIPPED, BASELINE, CANDIDATE, *CONTROLS, SKIPPING)
    lines = []
    for fault in results.faults():
        for setting in results.settings:
            means = {policy: results.excursions(setting, policy, fault) for policy in shown}
            seeds = means[LIMIT].keys()
            if seeds:
                common = {policy: [values[seed] for seed in values.keys() & seeds] for policy, values in means.items()}
                cells = [f"{statistics.fmean(values):.2f}" if values else "" for values in common.values()]
                lines.append([setting.title(results.grid), len(seeds), *cells])
    titles = [results.grid.raw["policy"].get(policy, {}).get("title", policy) for policy in shown]
    return table(["setting", "seeds", *titles], lines) if lines else "No rows yet."


def acceptance(results: Results) -> str:
    """The candidate against GlobalGC, setting by setting."""
    faults = list(results.faults())
    limited = [
        fault for fault in faults if any(row["policy"] == LIMIT and row["fault"] == fault for row in results.rows)
    ]
    lines = []
    for setting in results.settings:
        price = results.price(setting, CANDIDATE)
        if price is None:
            continue
        ratios = [results.excursion_ratio(setting, CANDIDATE, fault) for fault in faults]
        limits = [results.excursion_ratio(setting, LIMIT, fault) for fault in limited]
        kept = results.verdict(setting, CANDIDATE) in ("within the noise", "worse by less than the noise", "better")
        tamed = [ratio is None or ratio <= SHARE for ratio in ratios]
        floor = results.floor(setting)
        lines.append(
            [
                setting.title(results.grid),
                price.n,
                signed(price),
                "" if floor is None else f"{floor:.4f}",
                results.verdict(setting, CANDIDATE),
                *("" if ratio is None else f"{ratio:.2f}" for ratio in (*ratios, *limits)),
                ("yes" if None not in ratios else "so far as run") if kept and all(tamed) else "**no**",
            ]
        )
    if not lines:
        return "No rows yet."
    titles = [f"excursion / GlobalGC's: {results.grid.title('fault', fault)}" for fault in faults]
    titles += [f"the same of gradients zeroed: {results.grid.title('fault', fault).split(',')[0]}" for fault in limited]
    return table(["setting", "seeds", "no fault", "noise floor", "verdict", *titles, "holds"], lines)


def cell_table(results: Results, setting: Setting) -> str:
    faults = list(results.faults())
    header = ["clipping", "seeds", "no fault: validation loss", "against GlobalGC", "clipped", "scale", "spikes"]
    for fault in faults:
        title = results.grid.title("fault", fault).split(",")[0]
        header += [f"{title}: excursion, mean / max", "back after", "validation loss over twin's", "spikes"]
    lines = []
    for policy in results.policies(setting):
        rows = results.of(setting, policy)
        price = results.price(setting, policy)
        against = "" if policy == BASELINE or price is None else f"{signed(price)}, {results.verdict(setting, policy)}"
        line: list[object] = [results.grid.title("policy", policy), len(rows), mean_validation(rows), against]
        line += [f"{mean(rows, 'clipped'):.2f}", f"{mean(rows, 'scale'):.2f}", score(rows)]
        for fault in faults:
            line += fault_cells(results.of(setting, policy, fault))
        lines.append(line)
    return f"**{setting.title(results.grid)}**\n\n" + table(header, lines)


def fault_cells(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return ["", "", "", ""]
    excursions = [math.inf if row["excursion"] is None else row["excursion"] for row in rows]
    over = [number(row["validation_over_twin"]) for row in rows]
    return [
        f"{statistics.fmean(excursions):.2f} / {max(excursions):.2f}",
        back_after(rows),
        signed(interval(over)) if not any(map(math.isnan, over)) else "diverged",
        score(rows),
    ]


def back_after(rows: Sequence[Row]) -> str:
    """Steps until the loss is back, the median over seeds; how many came back, unless all did."""
    back = [row["recovery"] for row in rows if row["recovery"] is not None]
    if not back:
        return f"not in {rows[0]['recovery_of']}"
    text = f"{statistics.median(back):.0f}"
    return text if len(back) == len(rows) else f"{text} ({len(back)} of {len(rows)})"


def tuning(results: Results) -> str:
    """Mean validation losses of the tuning seeds; the smallest of a setting is bold."""
    settings = list(dict.fromkeys((row["size"], row["optimizer"]) for row in results.rows))
    lines = []
    for size, optimizer in settings:
        losses: dict[str, list[float]] = {}
        for row in results.rows:
            if (row["size"], row["optimizer"]) == (size, optimizer):
                titles = [results.grid.title(axis, row[axis]) for axis in ("condition", "policy")]
                losses.setdefault(", ".join(titles), []).append(number(row["validation"]))
        means = {title: statistics.fmean(values) for title, values in losses.items()}
        best = min(means.values())
        place = f"{results.grid.title('size', size)}, {results.grid.title('optimizer', optimizer)}"
        lines += [
            [place, title, len(losses[title]), f"**{loss:.4f}**" if loss == best else f"{loss:.4f}"]
            for title, loss in means.items()
        ]
    return table(["setting", "tried", "seeds", "validation loss"], lines) if lines else "No rows yet."


def mean(rows: Iterable[Row], name: str) -> float:
    return statistics.fmean(number(row[name]) for row in rows)


def mean_validation(rows: Sequence[Row]) -> str:
    loss = mean(rows, "validation")
    return f"{sum(row['diverged'] for row in rows)} of {len(rows)} diverged" if math.isnan(loss) else f"{loss:.4f}"


def score(rows: Sequence[Row]) -> str:
    """Mean spike score, as the papers give it, in percent."""
    return f"{mean(rows, 'spike_score'):.2%}"


def signed(value: Interval) -> str:
    half = "" if value.half is None else f" ± {value.half:.4f}"
    return f"{value.mean:+.4f}{half}"


def table(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    rows = [list(header), ["---"] * len(header), *([str(cell) for cell in line] for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
