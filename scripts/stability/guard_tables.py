"""Tables of the guards and of the recommended setting, in Markdown, from the rows alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Sequence

from scripts.stability.grid import NONE
from scripts.stability.results import BASELINE, FLOORS, Results, Setting
from scripts.stability.store import Row
from scripts.stability.tables import signed, span, table

PART = "guards"
CANDIDATE = "recommended"
"""The setting whose acceptance table there is."""
CONTROL = "skipped"
"""GlobalGC by somebody who knows the faulty steps and does not take them."""
COMPARED = "global-median"
"""Where this one was run, all guards are shown beside each other."""
SHARE, LEVEL = 0.2, 2.0
"""The candidate may have this share of GlobalGC's excursion, or this multiple of the control's."""
SKIPS_WITHOUT_FAULT = 0.005
"""Share of the steps that may be skipped where nothing is wrong."""
LASTING = ("scale", "batch-size")
"""Changes that last, which a guard should come to take for usual."""


def tables(results: Results) -> dict[str, str]:
    """Sections of the page: name -> text."""
    return {
        "guards-clean": clean(results),
        "guards-faults": faulty(results),
        "guards-others": others(results),
        "guards-lasting": lasting(results),
    }


def settings_of(results: Results, policy: str) -> list[Setting]:
    return [setting for setting in results.settings if results.of(setting, policy)]


def skips(row: Row) -> int:
    return len(row.get("skipped", ()))


def option(row: Row, name: str) -> int:
    """What the row's command gives a whole-numbered option."""
    return int(row["command"].split(f"--{name} ")[1].split()[0])


def clean(results: Results) -> str:
    """The candidate against GlobalGC where nothing is wrong, setting by setting."""
    lines = []
    for setting in settings_of(results, CANDIDATE):
        rows = results.of(setting, CANDIDATE)
        price, floor, verdict = (
            results.price(setting, CANDIDATE),
            results.floor(setting),
            results.verdict(setting, CANDIDATE),
        )
        share = sum(map(skips, rows)) / sum(option(row, "steps") for row in rows)
        good = verdict in ("within the noise", "worse by less than the noise", "better", "one seed")
        lines.append(
            [
                setting.title(results.grid),
                len(rows),
                "" if price is None else signed(price),
                "" if floor is None else f"{floor:.4f}",
                verdict,
                ", ".join(map(str, map(skips, rows))),
                f"{share:.2%}",
                "yes" if good and share <= SKIPS_WITHOUT_FAULT else "**no**",
            ]
        )
    header = ["setting", "seeds", "validation loss less GlobalGC's", "noise floor", "verdict"]
    header += ["steps skipped, by seed", "share", "holds"]
    return table(header, lines) if lines else "No rows yet."


def faulty(results: Results) -> str:
    """The candidate beside GlobalGC and the control, a line for each setting and fault."""
    lines = []
    for fault in results.faults():
        if fault in LASTING:
            continue
        for setting in settings_of(results, CANDIDATE):
            rows = results.of(setting, CANDIDATE, fault)
            if not rows:
                continue
            ours, theirs, control = (
                results.excursions(setting, policy, fault) for policy in (CANDIDATE, BASELINE, CONTROL)
            )
            mine = statistics.fmean(ours.values())
            share = results.excursion_ratio(setting, CANDIDATE, fault)
            common = ours.keys() & control.keys()
            level = sum(ours[seed] for seed in common) / sum(control[seed] for seed in common) if common else math.nan
            holds = (share is not None and share <= SHARE) or level <= LEVEL
            lines.append(
                [
                    results.grid.title("fault", fault),
                    setting.title(results.grid),
                    len(rows),
                    _mean(theirs.values()),
                    f"{mine:.2f}",
                    _mean(control.values()),
                    "" if share is None else f"{share:.2f}",
                    "" if math.isnan(level) else f"{level:.1f}",
                    ", ".join(str(_from_fault(row)) for row in rows),
                    "yes" if holds else "**no**",
                ]
            )
    header = ["fault", "setting", "seeds", "GlobalGC 1.0", "recommended", "control: faulty steps skipped"]
    header += ["recommended / GlobalGC", "recommended / control", "steps skipped from the fault on, by seed", "holds"]
    return table(header, lines) if lines else "No rows yet."


def _mean(values: Collection[float]) -> str:
    return f"{statistics.fmean(values):.2f}" if values else ""


def _from_fault(row: Row) -> int:
    """Steps skipped from the fault's first one on."""
    return sum(step >= option(row, "fault-step") for step in row["skipped"])


def others(results: Results) -> str:
    """All guards and combinations beside each other: excursion, and steps skipped, means over settings and seeds."""
    compared = settings_of(results, COMPARED)
    found = {policy for setting in compared for policy in results.policies(setting)} - set(FLOORS)
    guarded = [policy for policy in results.grid.raw["policy"] if policy in found]
    lines = []
    for setting in compared:
        for fault in (NONE, *(fault for fault in results.faults() if results.of(setting, COMPARED, fault))):
            line = [setting.title(results.grid), results.grid.title("fault", fault)]
            for policy in guarded:
                line.append(_cell(results.of(setting, policy, fault)))
            lines.append(line)
    titles = [results.grid.title("policy", policy) for policy in guarded]
    return table(["setting", "fault", *titles], lines) if lines else "No rows yet."


def _cell(rows: Sequence[Row]) -> str:
    """Mean excursion and mean number of steps skipped; without a fault the latter alone."""
    if not rows:
        return ""
    if rows[0]["fault"] == NONE:
        return f"{statistics.fmean(map(skips, rows)):.1f} skipped" if all("skipped" in row for row in rows) else ""
    excursion = statistics.fmean(math.inf if row["excursion"] is None else row["excursion"] for row in rows)
    if not all("skipped" in row for row in rows):
        return f"{excursion:.2f}"
    return f"{excursion:.2f} ({statistics.fmean(_from_fault(row) for row in rows):.1f})"


def lasting(results: Results) -> str:
    """What changes that last lead to: steps skipped after them, and the loss at the end less that without the change."""
    lines = []
    for fault in (fault for fault in results.faults() if fault in LASTING):
        for setting in settings_of(results, CANDIDATE):
            rows = results.of(setting, CANDIDATE, fault)
            if rows:
                ours, theirs = (
                    [row["validation_over_twin"] for row in results.of(setting, policy, fault)]
                    for policy in (CANDIDATE, BASELINE)
                )
                skipped = ", ".join(str(_from_fault(row)) for row in rows)
                lines.append(
                    [results.grid.title("fault", fault), setting.title(results.grid), len(rows), skipped]
                    + [span(values, "+.3f") for values in (ours, theirs)]
                )
    header = ["change", "setting", "seeds", "steps skipped, by seed", "validation loss over the twin's"]
    return table([*header, "the same of GlobalGC"], lines) if lines else "No rows yet."
