"""What a run leaves behind: a JSONL log, TensorBoard scalars, a progress bar and a plot, all written by rank 0."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from dist_clip.policies import GlobalNorm, registered

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from dist_clip import ClipReport


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
    """Collects a run's numbers on the device and writes them out now and then, so that logging does not slow the steps.

    Every method is called by every rank alike; rank 0 writes.
    """

    def __init__(self, cfg: LogConfig, steps: int, device: torch.device, header: dict[str, Any]) -> None:
        self.cfg = cfg
        self.device = device
        self.main = dist.get_rank() == 0
        self._pending: list[tuple[dict[str, Any], Tensor]] = []
        self._started = time.perf_counter()
        self._board: SummaryWriter | None = None
        if not self.main:
            return
        cfg.out.mkdir(parents=True, exist_ok=True)
        for stale in cfg.out.glob("events.out.tfevents.*"):
            stale.unlink()  # TensorBoard would draw them over the new ones
        self._file = (cfg.out / "log.jsonl").open("w", encoding="utf-8")
        # None: shown on a terminal, not in a log file.
        disable = None if cfg.progress else True
        self._bar = tqdm(total=steps, unit="step", disable=disable, dynamic_ncols=True, mininterval=0.5)
        if cfg.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # seconds to import, so only where it is used

            self._board = SummaryWriter(str(cfg.out))
        self._write({"kind": "run", **header})

    def step(
        self,
        step: int,
        loss: Tensor | None,
        report: ClipReport | None,
        lr: float,
        fault: bool,
        grad_norm: Tensor | float | None = None,
        state: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        """Remember one step's numbers. Reads nothing back from the device.

        `report`: None where dist_clip did not clip; `grad_norm` is then what is known of the norm. `state`: gives the
        clipper's state dict, asked for on the steps whose tensors are recorded.
        """
        nothing = torch.full((), math.nan, device=self.device)
        if report is None:
            norm = nothing if grad_norm is None else torch.as_tensor(grad_norm, device=self.device)
            clipping = [
                norm,
                nothing,
                nothing,
                torch.zeros_like(nothing),
                torch.ones_like(nothing),
                torch.zeros_like(nothing),
                nothing,
                torch.zeros_like(nothing),
            ]
        else:
            has_grad = report.tensor_norms != 0
            tensors = has_grad.sum()
            clipping = [
                nothing if report.global_norm is None else report.global_norm,
                nothing if report.clipped_global_norm is None else report.clipped_global_norm,
                report.clipped_fraction * tensors,
                tensors,
                report.min_scale,
                report.nonfinite,
                torch.where(has_grad, report.scales, 0.0).sum(),
                report.skip,
            ]
        numbers = [nothing if loss is None else loss, *clipping, torch.full_like(nothing, loss is not None)]
        vector = torch.stack([number.to(self.device, torch.float32) for number in numbers])
        self._pending.append(({"kind": "step", "step": step, "lr": lr, "fault": fault}, vector))
        if report is not None and self.cfg.tensors_every and step % self.cfg.tensors_every == 0:
            self._tensors(step, report, {} if state is None else state())
        if len(self._pending) == self.cfg.log_every:
            self.flush()

    def validation(self, step: int, loss: Tensor) -> None:
        """Log a validation loss that is already a mean over ranks."""
        self.flush()
        if self.main:
            self._write({"kind": "validation", "step": step, "loss": loss.item()})
            if self.cfg.progress:
                tqdm.write(f"step {step}: validation loss {loss.item():.4f}")
            if self._board is not None:
                self._board.add_scalar("loss/validation", loss.item(), step)

    def flush(self) -> None:
        """Bring the ranks' numbers together (one collective for all steps since the last time) and write them."""
        if not self._pending:
            return
        mine = torch.stack([vector for _, vector in self._pending])
        ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(ranks, mine)
        records, self._pending = [record for record, _ in self._pending], []
        if not self.main:
            return
        for record, row in zip(records, torch.stack(ranks, dim=1).double().cpu(), strict=True):
            loss, norm, clipped_norm, clipped, tensors, scale, nonfinite, scales, skip, has_loss = row.unbind(1)
            record |= {
                "loss": loss[has_loss > 0].mean().item(),
                # The same number on all ranks, or on none where the rule has no need of it.
                "grad_norm": _number(norm[0]),
                "grad_norm_clipped": _number(clipped_norm[0]),
                "clipped_fraction": (clipped.sum() / tensors.sum().clamp(min=1)).item(),
                "smallest_scale": scale.amin().item(),
                "mean_scale": _number(scales.sum() / tensors.sum().clamp(min=1)),
                "nonfinite": bool(nonfinite.any()),
                "skipped": bool(skip.any()),
            }
            self._write(record)
            if self._board is not None:
                for name in ("loss", "grad_norm", "grad_norm_clipped", "clipped_fraction", "smallest_scale", "lr"):
                    if record[name] is not None:
                        self._board.add_scalar(f"train/{name}", record[name], record["step"])
        self._bar.update(len(records))
        self._bar.set_postfix(loss=f"{record['loss']:.3f}", clipped=f"{record['clipped_fraction']:.2f}")

    def _tensors(self, step: int, report: ClipReport, state: dict[str, Any]) -> None:
        """Each tensor's norm and scale, and what the rule remembers of it. Ranks of other stages have other tensors."""
        remembered = {
            # Numbers only: what only a warm-up records is a list, and a policy may keep several numbers a tensor.
            name: {
                slot: value.item() for slot, value in entry.items() if isinstance(value, Tensor) and value.numel() == 1
            }
            for name, entry in state.get("tensors", {}).items()
        }
        values = zip(
            report.tensor_norms.tolist(),
            report.scales.tolist(),
            (remembered.get(name, {}) for name in report.names),
            strict=True,
        )
        mine = dict(zip(report.names, values, strict=True))
        ranks: list[dict[str, tuple[float, float, dict[str, float]]]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(ranks, mine)
        if not self.main:
            return
        merged: dict[str, tuple[float, float, dict[str, float]]] = {}
        for rank, theirs in enumerate(ranks):
            for name, record in theirs.items():
                # AdaGC-Shard measures each rank's piece as a tensor of its own: then ranks disagree, rightly.
                merged[name if merged.get(name, record) == record else f"{name}@rank{rank}"] = record
        norms = {name: norm for name, (norm, _, _) in merged.items()}
        scales = {name: scale for name, (_, scale, _) in merged.items()}
        states = {name: kept for name, (_, _, kept) in merged.items() if kept}
        self._write({"kind": "tensors", "step": step, "norms": norms, "scales": scales, "state": states})
        if self._board is not None:
            for name, norm in norms.items():
                self._board.add_scalar(f"norm/{name}", norm, step)

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, default=str) + "\n")  # str: paths
        self._file.flush()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.flush()
        if not self.main:
            return
        seconds = time.perf_counter() - self._started
        self._write({"kind": "end", "seconds": round(seconds, 2), "error": None if error is None else repr(error)})
        self._file.close()
        self._bar.close()
        if self._board is not None:
            self._board.close()
        if kind is None and self.cfg.plot:
            print(f"log: {self.cfg.out / 'log.jsonl'}   plot: {plot_run(self.cfg.out)}")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as its log tells it."""

    header: dict[str, Any]
    steps: list[dict[str, Any]]
    tensors: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    end: dict[str, Any] | None

    def series(self, name: str) -> list[float]:
        """One number a step; NaN where it was not measured."""
        return [math.nan if record[name] is None else record[name] for record in self.steps]


def read_run(folder: Path) -> Run:
    """Read `folder`/log.jsonl."""
    with (folder / "log.jsonl").open(encoding="utf-8") as file:
        records = [json.loads(line) for line in file]

    def of(kind: str) -> list[dict[str, Any]]:
        return [record for record in records if record["kind"] == kind]

    return Run(of("run")[0], of("step"), of("tensors"), of("validation"), next(iter(of("end")), None))


def rule_of(run: Run) -> str:
    """The clipping rule: its name, its scope where that is not its own, and each option that is not at its default."""
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


def _number(value: Tensor) -> float | None:
    return None if value.isnan() else value.item()
