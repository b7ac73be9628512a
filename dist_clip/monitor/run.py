"""Reading back a run from its log."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from dist_clip.policies import GlobalNorm, registered

LOG = "log.jsonl"
"""Name of a run's log in its folder."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as its log tells it.

    Attributes:
        header: options, policy, versions.
        steps: one record a step.
        tensors: tables of all tensors, every few steps.
        validation: validation losses.
        end: seconds and error; None for a run that was killed.
        spikes: steps that stood out, with their culprits.
    """

    header: dict[str, Any]
    steps: list[dict[str, Any]]
    tensors: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    end: dict[str, Any] | None
    spikes: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def series(self, name: str) -> list[float]:
        """Return one number a step; NaN where it was not measured."""
        return [math.nan if record.get(name) is None else record[name] for record in self.steps]


def read_run(path: str | Path) -> Run:
    """Return the run whose log is `path`, or is "log.jsonl" in the folder `path`.

    Of a step that is there twice, as after a restart, the later record counts.

    Raises:
        FileNotFoundError: no such log.
        ValueError: it is not one, or was cut short within a line.

    Example:
        >>> from dist_clip.monitor import JSONLWriter, Record, read_run
        >>> writer = JSONLWriter("runs/a/log.jsonl")
        >>> writer.start({})
        >>> writer.write(Record(1, {"loss": 2.0}))
        >>> writer.close()
        >>> read_run("runs/a/log.jsonl").series("loss")
        [2.0]
    """
    path = Path(path)
    path = path / LOG if path.is_dir() else path
    with path.open(encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    headers = [record for record in records if record.get("kind") == "run"]
    if not headers:
        raise ValueError(f"{path} is no log of a run: it has no line of the kind 'run'")

    def of(kind: str) -> list[dict[str, Any]]:
        found = {record["step"]: record for record in records if record["kind"] == kind}
        return [found[step] for step in sorted(found)]

    end = next((record for record in records if record["kind"] == "end"), None)
    return Run(headers[0], of("step"), of("tensors"), of("validation"), end, of("spike"))


def rule_of(run: Run) -> str:
    """Return the clipping rule: its name, its scope where that is not its own, and each option not at its default."""
    config = dict(run.header["policy"])
    name = config.pop("policy")
    if name == GlobalNorm.__name__ and math.isinf(config["max_norm"]):
        return "no clipping"
    known = {cls.__name__: cls for cls in registered().values()}.get(name)
    defaults = {field.name: field.default for field in dataclasses.fields(known)} if known else {}  # type: ignore[arg-type]
    changed = {key: value for key, value in config.items() if key not in defaults or value != defaults[key]}
    scope = changed.pop("scope", None)
    title = "GlobalGC" if name == GlobalNorm.__name__ else name
    title += f"-{scope.capitalize()}" if scope else ""
    options = ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in changed.items()
    )
    return f"{title} ({options})" if options else title
