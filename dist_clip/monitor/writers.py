"""Writers: JSON lines, TensorBoard, Weights & Biases and MLflow. Packages are imported where they are used."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from dist_clip.monitor.record import Record, Spike, Tensors

STEP_NAMES = {
    "clip/grad_norm": "grad_norm",
    "clip/grad_norm_after": "grad_norm_clipped",
    "clip/fraction": "clipped_fraction",
    "clip/min_scale": "smallest_scale",
    "clip/mean_scale": "mean_scale",
    "clip/nonfinite": "nonfinite",
    "clip/skipped": "skipped",
    "clip/spike_score": "spike_score",
}
"""What the scalars are called in a log of JSON lines."""

_UNCLIPPED: dict[str, Any] = {
    "loss": math.nan,
    "grad_norm": None,
    "grad_norm_clipped": None,
    "clipped_fraction": 0.0,
    "smallest_scale": 1.0,
    "mean_scale": None,
    "nonfinite": False,
    "skipped": False,
}
"""A step of which nothing is known, for every step has these keys."""


class JSONLWriter:
    """Writes one JSON object a line, which ``dist-clip report`` and `read_run` read. docs/monitoring.md has the format.

    Args:
        path: the file; its folder is made.
        append: go on with a file that is there, as after a restart; False replaces it.

    Example:
        >>> from dist_clip.monitor import JSONLWriter, Record
        >>> writer = JSONLWriter("runs/a/log.jsonl")
        >>> writer.start({})
        >>> writer.write(Record(1, {"loss": 2.0}))
        >>> writer.close()
    """

    def __init__(self, path: str | Path, *, append: bool = False) -> None:
        self.path, self._append = Path(path), append
        self._file: TextIO | None = None
        self._flushed = -math.inf

    def start(self, header: Mapping[str, object]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a" if self._append else "w", encoding="utf-8")
        self.line({"kind": "run", **header})

    def write(self, record: Record) -> None:
        self.line(step_line(record))
        if record.tensors is not None:
            self.line({"kind": "tensors", "step": record.step, **_tensors_line(record.tensors)})
        if record.spike is not None:
            self.line({"kind": "spike", "step": record.step, **_spike_line(record.spike)})

    def line(self, entry: Mapping[str, object]) -> None:
        """Write one more line, of a kind of your own."""
        assert self._file is not None, "start() comes first"
        self._file.write(json.dumps(entry, default=str) + "\n")  # str: paths
        # So that the log can be read while the run goes on; a flush of each line would be a fifth of a monitor's work.
        if time.monotonic() - self._flushed > 1:
            self._file.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def step_line(record: Record) -> dict[str, Any]:
    """Return a step as JSON lines have it."""
    numbers = {STEP_NAMES.get(name, name): value for name, value in record.scalars.items()}
    line = {"kind": "step", "step": record.step, **_UNCLIPPED, **numbers}
    for flag in ("nonfinite", "skipped"):
        line[flag] = bool(line[flag])
    for name in ("grad_norm", "grad_norm_clipped", "mean_scale"):
        line[name] = None if line[name] is None or math.isnan(line[name]) else line[name]
    return line


def _tensors_line(tensors: Tensors) -> dict[str, Any]:
    states: dict[str, dict[str, float]] = {}
    for slot, values in tensors.states.items():
        for name, value in zip(tensors.names, values, strict=True):
            if not math.isnan(value):
                states.setdefault(name, {})[slot] = value
    return {
        "norms": dict(zip(tensors.names, tensors.norms, strict=True)),
        "scales": dict(zip(tensors.names, tensors.scales, strict=True)),
        "state": states,
        # In the order of the norms. Short, because a log may have many of them.
        "levels": [_short(value) for value in tensors.levels],
        "peaks": [_short(value) for value in tensors.peaks],
        "clipped": tensors.clipped,
        "steps": tensors.steps,
    }


def _spike_line(spike: Spike) -> dict[str, Any]:
    culprits = [
        {key: value if key == "name" else _short(value) for key, value in vars(culprit).items()}
        for culprit in spike.culprits
    ]
    return {"reasons": list(spike.reasons), "culprits": culprits}


def _short(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.5g}")


def grouped(tensors: Tensors) -> Iterator[tuple[str, float]]:
    """Yield (name, number) of the layers and kinds of a table, few enough for a dashboard."""
    for groups in (tensors.by_layer(), tensors.by_kind()):
        for label, (norm, peak) in groups.items():
            yield f"norm/{label}", norm
            yield f"peak/{label}", peak


def in_words(spike: Spike) -> str:
    """Return a spike in one line."""
    culprits = ", ".join(f"{c.name} ({c.ratio:.3g} x its level)" for c in spike.culprits)
    return f"{', '.join(spike.reasons)}: {culprits or 'no tensor stands out'}"


class TensorBoardWriter:
    """Writes TensorBoard events: scalars at every step, norms and peaks by layer and kind, spikes as text.

    Needs the package ``tensorboard``.

    Args:
        folder: where the events go.
        per_tensor: also write ``norm/NAME`` and ``peak/NAME`` of each tensor.
    """

    def __init__(self, folder: str | Path, *, per_tensor: bool = False) -> None:
        self._folder, self._per_tensor = folder, per_tensor
        self.board: Any = None

    def start(self, header: Mapping[str, object]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # seconds to import, so only where it is used
        except ImportError as error:
            raise ImportError("TensorBoardWriter needs the package tensorboard: pip install tensorboard") from error
        self.board = SummaryWriter(str(self._folder))

    def write(self, record: Record) -> None:
        for name, value in record.scalars.items():
            self.board.add_scalar(name, value, record.step)
        if record.tensors is not None:
            for name, value in _all_numbers(record.tensors, self._per_tensor):
                self.board.add_scalar(name, value, record.step)
        if record.spike is not None:
            self.board.add_text("spike", in_words(record.spike), record.step)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


class WandbWriter:
    """Logs to a run of Weights & Biases: scalars at every step, norms and peaks by layer and kind, spikes as text.

    The records come some steps late, so they have an axis of their own, "clip/step". Needs the package ``wandb``.

    Args:
        run: what ``wandb.init`` returned; None: the run that is active when the monitor starts.
        per_tensor: also log ``norm/NAME`` and ``peak/NAME`` of each tensor.
    """

    def __init__(self, run: Any = None, *, per_tensor: bool = False) -> None:
        self._run, self._per_tensor = run, per_tensor

    def start(self, header: Mapping[str, object]) -> None:
        if self._run is None:
            try:
                import wandb
            except ImportError as error:
                raise ImportError("WandbWriter needs the package wandb: pip install wandb") from error
            self._run = wandb.run
        if self._run is None:
            raise RuntimeError(
                "WandbWriter found no active run: call wandb.init first, on the first rank, or pass its run"
            )
        self._run.define_metric("clip/step")
        for names in ("clip/*", "norm/*", "peak/*"):
            self._run.define_metric(names, step_metric="clip/step")

    def write(self, record: Record) -> None:
        numbers: dict[str, Any] = {"clip/step": record.step}
        for name, value in record.scalars.items():
            numbers[name if name.startswith("clip/") else f"clip/{name}"] = value
        if record.tensors is not None:
            numbers.update(_all_numbers(record.tensors, self._per_tensor))
        if record.spike is not None:
            numbers["clip/spike"] = in_words(record.spike)
        self._run.log(numbers)

    def close(self) -> None:
        """Leave the run open, for it is the user's."""


class MLflowWriter:
    """Logs to the active run of MLflow: scalars at every step, norms and peaks by layer and kind, spikes as tags.

    Needs the package ``mlflow``. The tag of a spike is ``spike.STEP``.

    Args:
        per_tensor: also log ``norm/NAME`` and ``peak/NAME`` of each tensor.
    """

    def __init__(self, *, per_tensor: bool = False) -> None:
        self._per_tensor = per_tensor
        self._log: Callable[..., Any] | None = None
        self._tag: Callable[..., Any] | None = None

    def start(self, header: Mapping[str, object]) -> None:
        try:
            import mlflow
        except ImportError as error:
            raise ImportError("MLflowWriter needs the package mlflow: pip install mlflow") from error
        self._log, self._tag = mlflow.log_metrics, mlflow.set_tag

    def write(self, record: Record) -> None:
        assert self._log is not None, "start() comes first"
        assert self._tag is not None
        numbers = dict(record.scalars)
        if record.tensors is not None:
            numbers.update(_all_numbers(record.tensors, self._per_tensor))
        # MLflow takes letters, digits and these signs only.
        self._log({re.sub(r"[^\w./ -]", "_", name): float(value) for name, value in numbers.items()}, step=record.step)
        if record.spike is not None:
            self._tag(f"spike.{record.step}", in_words(record.spike))

    def close(self) -> None:
        """Leave the run open, for it is the user's."""


def _all_numbers(tensors: Tensors, per_tensor: bool) -> Iterator[tuple[str, float]]:
    yield from grouped(tensors)
    if per_tensor:
        for name, norm, peak in zip(tensors.names, tensors.norms, tensors.peaks, strict=True):
            yield f"norm/{name}", norm
            if not math.isnan(peak):
                yield f"peak/{name}", peak
