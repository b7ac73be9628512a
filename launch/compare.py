"""Runs side by side: a table and a plot of how far a fault threw each one off, computed from their logs alone.

    python -m launch.compare runs/demo

takes every run below the folder. A run with a fault is held against its twin, the run that differs in nothing but the
fault, and against the fault-free GlobalGC run of the same seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from dist_clip.policies import modes
from launch.faults import IN_BATCHES
from launch.metrics import Run, read_run, rule_of

RECOVERED = 0.05
"""nats per byte: a run has recovered when its loss stays within this of its twin's."""
SMOOTH = 5
"""Steps in the running mean with which recovery is judged: the losses of single batches scatter."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What one run has to show."""

    name: str
    rule: str
    fault: bool
    over_baseline: float
    """Largest excess of the training loss over the fault-free GlobalGC run's, same batch, from `comparable_from` on."""
    over_twin: float | None
    """The same over the run's own fault-free twin."""
    recovery: str
    """Steps from there until the loss stays close to the twin's."""
    clipped: float
    """Mean share of tensors clipped, from the end of the clipping rules' warm-ups to the fault."""
    validation: float


def load_runs(folder: Path) -> dict[str, Run]:
    runs = {path.parent.name: read_run(path.parent) for path in folder.glob("*/log.jsonl")}
    for name, run in runs.items():
        if run.end is None or run.end["error"] or not run.validation:
            raise ValueError(f"{folder / name} did not finish: {run.end['error'] if run.end else 'no end in its log'}")

    def place(name: str) -> tuple[int, str]:
        """No clipping and GlobalGC come first, then the rules in the order of their registration, then unknown ones."""
        order = ("none", "global", *modes())
        clip = runs[name].header["config"]["clip"]["clip"]
        return (order.index(clip) if clip in order else len(order)), name

    return {name: runs[name] for name in sorted(runs, key=place)}


def has_fault(run: Run) -> bool:
    return run.header["config"]["fault"]["fault"] != "none"


def identity(run: Run) -> dict[str, Any]:
    """What twins have in common: all that decides a run but the fault."""
    kept = {key: value for key, value in run.header["config"].items() if key not in ("fault", "log")}
    return {**kept, "policy": run.header["policy"], "data": run.header["data"]["digest"], "ranks": run.header["ranks"]}


def twin_of(run: Run, runs: dict[str, Run]) -> Run:
    for other in runs.values():
        if not has_fault(other) and identity(other) == identity(run):
            return other
    raise ValueError(f"no fault-free twin of {run.header['config']['log']['out']} among {', '.join(runs)}")


def baseline_of(runs: dict[str, Run]) -> Run:
    for run in runs.values():
        if not has_fault(run) and run.header["config"]["clip"]["clip"] == "global":
            return run
    raise ValueError(f"no fault-free GlobalGC run among {', '.join(runs)}")


def excess(run: Run, other: Run) -> list[float]:
    """Training loss above the other run's, on the same batches."""
    return [a - b for a, b in zip(run.series("loss"), other.series("loss"), strict=True)]


def running_mean(values: list[float], width: int = SMOOTH) -> list[float]:
    """Mean of the last `width` values, fewer at the start."""
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i + 1 - width) : i + 1])]


def fault_steps(runs: dict[str, Run]) -> tuple[int, int]:
    """First and last step of the fault that the runs share."""
    spans = set()
    for run in runs.values():
        if has_fault(run):
            steps = [record["step"] for record in run.steps if record["fault"]]
            if not steps:
                raise ValueError(f"{run.header['config']['log']['out']} ended before its fault")
            spans.add((steps[0], steps[-1]))
    if len(spans) != 1:
        raise ValueError(f"the runs must share one fault, got faults at steps {sorted(spans)}")
    return spans.pop()


def comparable_from(runs: dict[str, Run]) -> int:
    """First step whose loss tells what the fault has done: on a corrupted batch it tells what the batch is."""
    start, end = fault_steps(runs)
    fault = next(run for run in runs.values() if has_fault(run)).header["config"]["fault"]["fault"]
    return end + 1 if fault in IN_BATCHES else start


def steps_to_recover(values: Sequence[float]) -> int | None:
    """Steps until an excess stays small, from the first one of `values`; None where it does not.

    Small: its running mean is below `RECOVERED`.
    """
    above = [i for i, value in enumerate(running_mean(list(values)), start=1) if not value <= RECOVERED]
    if not above:
        return 0
    return None if above[-1] == len(values) else above[-1]


def recovery(run: Run, twin: Run, start: int) -> str:
    values = excess(run, twin)[start - 1 :]
    steps = steps_to_recover(values)
    return f"not in {len(values)}" if steps is None else str(steps)


def tabulate(runs: dict[str, Run]) -> list[Row]:
    start, _ = fault_steps(runs)
    first = comparable_from(runs)
    baseline = baseline_of(runs)
    warm = max(run.header["policy"].get("warmup_steps", 0) for run in runs.values())
    rows = []
    for name, run in runs.items():
        twin = twin_of(run, runs)
        clipped = run.series("clipped_fraction")[min(warm, start - 2) : start - 1]
        rows.append(
            Row(
                name=name,
                rule=rule_of(run),
                fault=has_fault(run),
                over_baseline=max(excess(run, baseline)[first - 1 :]),
                over_twin=max(excess(run, twin)[first - 1 :]) if has_fault(run) else None,
                recovery=recovery(run, twin, first) if has_fault(run) else "",
                clipped=sum(clipped) / len(clipped),
                validation=run.validation[-1]["loss"],
            )
        )
    return rows


def render(rows: list[Row], runs: dict[str, Run]) -> str:
    """The table, in Markdown, with what it means and where the adaptive rules are worse."""
    start, end = fault_steps(runs)
    baseline = next(row for row in rows if runs[row.name] is baseline_of(runs))
    header = next(run.header for run in runs.values() if has_fault(run))
    fault = header["config"]["fault"]
    what = (
        f"N(0, {fault['fault_scale']:g}^2) garbage added to the gradient of {fault['fault_tensor']}"
        if fault["fault"] == "grad"
        else "random bytes >= 128 in place of the batch"
    )
    titles = (
        "clipping", "fault", "loss excursion", "over own twin", "steps to recover", "clipped", "validation loss",
    )  # fmt: skip
    cells = [
        (
            row.rule,
            "yes" if row.fault else "no",
            "" if row is baseline else f"{row.over_baseline:+.3f}",
            "" if row.over_twin is None else f"{row.over_twin:+.3f}",
            row.recovery,
            f"{row.clipped:.0%}",
            f"{row.validation:.3f}" + ("" if row is baseline else f" ({row.validation - baseline.validation:+.3f})"),
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in (titles, *cells)) for i in range(len(titles))]

    def line(values: tuple[str, ...]) -> str:
        return "| " + " | ".join(value.ljust(width) for value, width in zip(values, widths, strict=True)) + " |"

    text = [line(titles), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, cells), ""]
    text += [
        f"Fault, chosen for this demonstration: {what}, steps {start} to {end} of {len(next(iter(runs.values())).steps)}.",
        "Loss excursion: largest excess of the training loss (nats per byte) over GlobalGC's without the fault, on the same",
        f"batch, from step {comparable_from(runs)} on; over own twin: over the same rule's run without the fault.",
        f"Recovered: the excess over the own twin, a mean of {SMOOTH} steps, stays below {RECOVERED}; 0: never above it.",
        "Clipped: mean share of tensors clipped between the rules' warm-up and the fault. A rule that clips nearly every",
        "tensor on every step also moves less, fault or no fault.",
        f"One seed ({header['config']['seed']}), {header['parameters']} parameters, {header['ranks']} ranks, "
        f"{header['config']['parallel']['parallel']}; data {header['data']['digest']}; "
        + ", ".join(f"{name} {version}" for name, version in header["versions"].items()) + ".",
    ]  # fmt: skip
    for row in rows:
        if row is not baseline and not row.fault:
            change = row.validation - baseline.validation
            verdict = "worse" if change > 0 else "better"
            text.append(
                f"Without any fault, {row.rule} ends {abs(change):.3f} {verdict} than GlobalGC in validation loss."
            )
    return "\n".join(text)


def plot(runs: dict[str, Run], path: Path) -> None:
    """Training loss, excess over the twin and norm after clipping, around the fault."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    start, end = fault_steps(runs)
    total = len(next(iter(runs.values())).steps)
    first = max(1, start - 2 * (total - start) // 3)
    figure, panels = plt.subplots(3, 1, figsize=(9, 9.5), sharex=True, layout="constrained")
    colours = {rule: f"C{i}" for i, rule in enumerate(dict.fromkeys(rule_of(run) for run in runs.values()))}
    for run in runs.values():
        steps, rule, faulty = run.series("step"), rule_of(run), has_fault(run)
        style: dict[str, Any] = {"color": colours[rule], "linewidth": 1.6 if faulty else 1.1}
        style["linestyle"] = "-" if faulty else ":"
        panels[0].plot(
            steps, running_mean(run.series("loss")), label=f"{rule}, {'' if faulty else 'no '}fault", **style
        )
        if faulty:
            panels[1].plot(steps, excess(run, twin_of(run, runs)), label=rule, **style)
            panels[2].plot(steps, run.series("grad_norm_clipped"), label=rule, **style)
    panels[0].set_ylabel(f"training loss, mean of {SMOOTH} steps")
    panels[1].set_ylabel("excess over own twin without fault")
    panels[2].set_ylabel("grad norm after clipping, fault runs")
    panels[2].set_ylim(bottom=0)
    panels[2].set_xlabel("step")
    panels[2].set_xlim(first, total)
    shown = [value for run in runs.values() for value in running_mean(run.series("loss"))[first - 1 :]]
    panels[0].set_ylim(min(shown) - 0.05, max(shown) + 0.05)
    panels[0].legend(frameon=False, ncols=len(colours), fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1))
    panels[1].axhline(0, color="0.6", linewidth=0.8, zorder=0)
    panels[2].legend(frameon=False, ncols=len(colours), fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1))
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.axvspan(start - 0.5, end + 0.5, color="0.9", zorder=0)
    panels[1].text((start + end) / 2, 0.97, "fault", transform=panels[1].get_xaxis_transform(), ha="center", va="top")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(folder: Annotated[Path, tyro.conf.Positional]) -> None:
    """Print the table of the runs below FOLDER, and write it (table.md) and a plot (comparison.png) there."""
    runs = load_runs(folder)
    table = render(tabulate(runs), runs)
    (folder / "table.md").write_text(table + "\n", encoding="utf-8")
    plot(runs, folder / "comparison.png")
    print(f"\n{table}\n\ntable: {folder / 'table.md'}   plot: {folder / 'comparison.png'}")


if __name__ == "__main__":
    tyro.cli(main)
