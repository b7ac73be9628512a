"""Questions to the rows: the values of a cell by seed, differences and ratios paired over seeds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from scripts.stability.grid import NONE, RULES, Grid
from scripts.stability.measures import Interval, paired
from scripts.stability.store import Row

BASELINE = "global"
FLOORS = ("global-floor", "global-other")
"""GlobalGC again, with a max_norm that differs by a thousandth, or another first batch: the same training to all intents."""
CONTROLS = ("zeroed", "skipped")
"""GlobalGC by somebody who knows the fault: without one, GlobalGC to the last bit."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """All but the rule, the fault and the seed."""

    size: str
    corpus: str
    optimizer: str
    condition: str

    def title(self, grid: Grid) -> str:
        parts = [grid.title("size", self.size) + " parameters", grid.title("optimizer", self.optimizer)]
        if self.corpus != next(iter(grid.raw["corpus"])):
            parts.append(grid.title("corpus", self.corpus))
        if self.condition != next(iter(grid.raw["condition"])):
            parts.append(grid.title("condition", self.condition))
        return ", ".join(parts)


class Results:
    """The rows of the cells of a part of the grid, in the grid's order. `ids`: of all that there should be.

    Args:
        floors: another part, which the noise floors are measured in; None: this one.
    """

    def __init__(self, grid: Grid, rows: dict[str, Row], part: str = RULES, floors: Results | None = None) -> None:
        self.grid = grid
        self._floors = self if floors is None else floors
        self.ids = grid.ids(part)
        self.rows: list[Row] = [rows[name] for name in self.ids if name in rows]

    @property
    def settings(self) -> list[Setting]:
        """In the order of the axes in the grid's file."""
        found = {Setting(row["size"], row["corpus"], row["optimizer"], row["condition"]) for row in self.rows}

        def place(setting: Setting) -> tuple[int, ...]:
            values = dataclasses.asdict(setting)
            order = ("corpus", "condition", "size", "optimizer")
            return tuple(list(self.grid.raw[axis]).index(values[axis]) for axis in order)

        return sorted(found, key=place)

    def of(self, setting: Setting, policy: str, fault: str = NONE) -> list[Row]:
        wanted = {**dataclasses.asdict(setting), "policy": policy, "fault": fault}
        return [row for row in self.rows if all(row[axis] == value for axis, value in wanted.items())]

    def policies(self, setting: Setting) -> list[str]:
        """In the grid file's order."""
        return [policy for policy in self.grid.raw["policy"] if self.of(setting, policy)]

    def faults(self) -> Iterator[str]:
        """Those that there are rows of, in the grid file's order."""
        found = {row["fault"] for row in self.rows}
        return (fault for fault in self.grid.raw["fault"] if fault != NONE and fault in found)

    def price(self, setting: Setting, policy: str) -> Interval | None:
        """Validation loss without a fault, less GlobalGC's, paired over seeds. None where a run of either diverged."""
        ours, theirs = self.validation(setting, policy), self.validation(setting, BASELINE)
        return None if any(math.isnan(v) for v in [*ours.values(), *theirs.values()]) else paired(ours, theirs)

    def validation(self, setting: Setting, policy: str) -> dict[int, float]:
        return {row["seed"]: number(row["validation"]) for row in self.of(setting, policy)}

    def floor(self, setting: Setting) -> float | None:
        """The largest difference that is within the noise: the upper end of what GlobalGC differs from itself by.

        Of the two ways it was measured at this size with this optimizer the wider; where the grid has no such runs, at this
        size with any, the widest.
        """
        measured: dict[Setting, float] = {}
        for other in self._floors.settings:
            prices = [self._floors.price(other, floor) for floor in FLOORS] if other.size == setting.size else []
            widths = [abs(price.mean) + price.half for price in prices if price is not None and price.half is not None]
            if widths:
                measured[other] = max(widths)
        return measured.get(setting, max(measured.values(), default=None))

    def verdict(self, setting: Setting, policy: str) -> str:
        """Without a fault, against GlobalGC."""
        price, floor = self.price(setting, policy), self.floor(setting)
        if price is None:
            return "diverged" if self.of(setting, policy) else ""
        if floor is None or price.half is None:
            return "one seed"
        if price.mean - price.half > floor:
            return "worse"
        if price.mean + price.half < -floor:
            return "better"
        if price.mean > floor:
            return "perhaps worse"
        return "worse by less than the noise" if price.mean - price.half > 0 else "within the noise"

    def excursions(self, setting: Setting, policy: str, fault: str) -> dict[int, float]:
        """Largest excess over the own twin by seed; infinite where the run diverged."""
        rows = self.of(setting, policy, fault)
        return {row["seed"]: math.inf if row["excursion"] is None else row["excursion"] for row in rows}

    def excursion_ratio(self, setting: Setting, policy: str, fault: str) -> float | None:
        """Mean excursion over GlobalGC's, on the seeds that both have."""
        ours, theirs = (self.excursions(setting, p, fault) for p in (policy, BASELINE))
        seeds = ours.keys() & theirs.keys()
        below = sum(theirs[seed] for seed in seeds)
        return sum(ours[seed] for seed in seeds) / below if below else None


def number(value: float | None) -> float:
    return math.nan if value is None else value
