"""What a run leaves behind: a JSONL log, TensorBoard scalars, a progress bar and a plot, all written by rank 0."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from dist_clip import ClipMonitor, GradClipper
from dist_clip.monitor import JSONLWriter, Record, Run, TensorBoardWriter, Writer, read_run, rule_of
from dist_clip.monitor.run import LOG

__all__ = ["LogConfig", "Run", "RunLog", "global_mean", "plot_run", "read_run", "rule_of"]


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What to log, and where."""

    out: Path = Path("runs/train")
    """Folder for log.jsonl, the TensorBoard events and plot.png; those of an older run in it are replaced."""
    log_every: int = 10
    """Steps between two readings of the device's numbers; every step is logged all the same."""
    tensors_every: int = 20
    """Steps between two records of each tensor's norm and scale; 0 for none."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    plot: bool = True
    """Draw plot.png at the end."""
    progress: bool = True
    """Print validation losses and, on a terminal, show a progress bar."""

    def __post_init__(self) -> None:
        if self.log_every < 1 or self.tensors_every < 0:
            raise ValueError(f"--log-every {self.log_every} must be >= 1, --tensors-every {self.tensors_every} >= 0")


def global_mean(value: Tensor | None, device: torch.device) -> Tensor:
    """Mean over the ranks that have a value, on every rank. A collective: to be called by all ranks."""
    pair = torch.zeros(2, device=device)
    if value is not None:
        pair += torch.stack([value.float(), torch.ones_like(pair[1])])
    dist.all_reduce(pair)
    return pair[0] / pair[1]


class RunLog:
    """A run's log, progress bar and plot, around the monitor that collects the numbers.

    Every method is called by every rank alike; rank 0 writes.
    """

    def __init__(
        self,
        cfg: LogConfig,
        steps: int,
        header: dict[str, Any],
        clipper: GradClipper | None,
    ) -> None:
        self.cfg = cfg
        self.main = dist.get_rank() == 0
        self._started = time.perf_counter()
        self._lines = JSONLWriter(cfg.out / LOG)
        self._board = TensorBoardWriter(cfg.out) if cfg.tensorboard else None
        writers: list[Writer] = [self._lines]
        if self.main:
            cfg.out.mkdir(parents=True, exist_ok=True)
            for stale in cfg.out.glob("events.out.tfevents.*"):
                stale.unlink()  # TensorBoard would draw them over the new ones
            # None: shown on a terminal, not in a log file.
            disable = None if cfg.progress else True
            self._bar = tqdm(total=steps, unit="step", disable=disable, dynamic_ncols=True, mininterval=0.5)
            writers += [*([self._board] if self._board else []), ProgressWriter(self._bar)]
        self._monitor = ClipMonitor(
            clipper, writers, every=cfg.log_every, tensors_every=cfg.tensors_every, header=header
        )

    def step(
        self, step: int, loss: Tensor | None, lr: float, fault: bool, grad_norm: Tensor | float | None = None
    ) -> None:
        """Remember one step's numbers. Reads nothing back from the device.

        `grad_norm`: what is known of the norm where dist_clip does not clip.
        """
        known = {} if grad_norm is None else {"clip/grad_norm": grad_norm}
        self._monitor.step(step, loss, scalars={"lr": lr, "fault": fault, **known})

    def validation(self, step: int, loss: Tensor) -> None:
        """Log a validation loss that is already a mean over ranks."""
        self._monitor.flush()
        if self.main:
            self._lines.line({"kind": "validation", "step": step, "loss": loss.item()})
            if self.cfg.progress:
                tqdm.write(f"step {step}: validation loss {loss.item():.4f}")
            if self._board is not None:
                self._board.board.add_scalar("validation loss", loss.item(), step)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._monitor.flush()
        if self.main:
            seconds = time.perf_counter() - self._started
            self._lines.line(
                {"kind": "end", "seconds": round(seconds, 2), "error": None if error is None else repr(error)}
            )
        self._monitor.__exit__(kind, error, trace)
        if self.main and kind is None and self.cfg.plot:
            print(f"log: {self.cfg.out / LOG}   plot: {plot_run(self.cfg.out)}")


class ProgressWriter:
    """Moves a progress bar on."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self._bar = bar

    def start(self, header: Mapping[str, object]) -> None:
        """Do nothing: the bar is there."""

    def write(self, record: Record) -> None:
        self._bar.update()
        loss, clipped = record.scalars.get("loss", math.nan), record.scalars.get("clip/fraction", 0.0)
        self._bar.set_postfix(loss=f"{loss:.3f}", clipped=f"{clipped:.2f}", refresh=False)

    def close(self) -> None:
        self._bar.close()


def plot_run(folder: Path) -> Path:
    """Draw `folder`/plot.png: loss, gradient norm before and after clipping, and what was clipped."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    run = read_run(folder)
    steps = run.series("step")
    config = run.header["config"]
    figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(8, 8), sharex=True, layout="constrained")
    figure.suptitle(f"{rule_of(run)}; {config['parallel']['parallel']}, {run.header['ranks']} ranks")
    top.plot(steps, run.series("loss"), color="C0", label="training loss", linewidth=1)
    if run.validation:
        points = [(record["step"], record["loss"]) for record in run.validation]
        top.plot(*zip(*points, strict=True), "o", color="C3", label="validation loss", markersize=5)
    top.set_ylabel("loss (nats per byte)")
    middle.plot(steps, run.series("grad_norm"), color="C1", label="before clipping", linewidth=1)
    middle.plot(steps, run.series("grad_norm_clipped"), color="C2", label="after clipping", linewidth=1)
    middle.set_yscale("log")
    middle.set_ylabel("global grad norm")
    bottom.plot(steps, run.series("clipped_fraction"), color="C4", label="share of tensors clipped", linewidth=1)
    bottom.plot(steps, run.series("smallest_scale"), color="C5", label="smallest scale", linewidth=1)
    bottom.set_ylim(-0.05, 1.05)
    bottom.set_xlabel("step")
    faulty = [record["step"] for record in run.steps if record["fault"]]
    for axes in (top, middle, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        if faulty:
            axes.axvspan(faulty[0] - 0.5, faulty[-1] + 0.5, color="0.88", zorder=0, label="fault")
        axes.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    path = folder / "plot.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
