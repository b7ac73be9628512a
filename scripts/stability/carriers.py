"""Which tensors carry what corrupted batches did to a model: each part of it put back as the twin without the fault has it.

Both models are taken just after the fault's last step. The loss is on the validation text, so parts that only a corrupted
batch uses (embeddings of bytes that the text lacks) can't show.
"""

from __future__ import annotations

import functools
import multiprocessing
import shutil
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from launch.model import build_model, next_byte_loss
from launch.train import Config, parse
from scripts.stability.grid import AXES, NONE, Grid, Spec
from scripts.stability.results import Setting
from scripts.stability.runner import cached_corpus, quiet_worker, start
from scripts.stability.store import Row, Rows
from scripts.stability.tables import table

FAULT = "batch"
OPTIMIZERS = {"stdlib": ("adamw-999", "lion", "muon"), "headers": ("adamw-999",)}
POLICIES = ("global", "logclip", "zeroed")
SEEDS = (0, 1)
FOREIGN = 128
"""Corrupted batches are of bytes from this one on, which the text hardly has."""


def cells(grid: Grid) -> list[Spec]:
    """The faulted runs that are looked into, of the small model."""
    return [
        grid.spec("small", corpus, optimizer, "plain", policy, FAULT, seed)
        for seed in SEEDS
        for corpus, optimizers in OPTIMIZERS.items()
        for optimizer in optimizers
        for policy in POLICIES
    ]


def run(grid: Grid, rows: Rows, work: Path, workers: int) -> None:
    """A row for each cell that has none."""
    done = rows.read()
    todo = [spec for spec in cells(grid) if spec.id not in done]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=quiet_worker) as executor:
        for row in executor.map(functools.partial(measure, grid, work), todo):
            rows.append(row)
            print(row["id"], f"{row['excess']:+.4f}", flush=True)


def measure(grid: Grid, work: Path, spec: Spec) -> Row:
    twin = grid.spec(*(NONE if axis == "fault" else getattr(spec, axis) for axis in AXES), spec.seed)
    cfg = parse(spec.options)
    folder = work / spec.id.replace("/", "+")
    branch, last = folder / "before.pt", spec.fault_step + cfg.fault.fault_steps - 1
    start(twin, folder / "twin", ["--save-at", str(spec.fault_step - 1), "--save-to", str(branch)])
    states = []
    for one in (spec, twin):
        after = folder / f"{one.fault}.pt"
        more = ["--from-snapshot", str(branch), "--save-at", str(last), "--save-to", str(after)]
        start(one, folder / f"branch-{one.fault}", more)
        states.append(torch.load(after, weights_only=True)["model"])
    shutil.rmtree(folder)
    faulted, clean = states
    kept = loss_of(cfg, clean)
    return {
        "id": spec.id,
        **{axis: getattr(spec, axis) for axis in AXES},
        "seed": spec.seed,
        "excess": loss_of(cfg, faulted) - kept,
        "without": {part: loss_of(cfg, put_back(faulted, clean, part)) - kept for part in PARTS},
    }


PARTS: dict[str, tuple[str | None, slice]] = {
    "head, foreign bytes": ("head.weight", slice(FOREIGN, None)),
    "head, the text's bytes": ("head.weight", slice(FOREIGN)),
    "embedding, the text's bytes": ("embed.weight", slice(FOREIGN)),
    "blocks and norms": (None, slice(None)),
}
"""Part of the model -> its tensor (None: all that no other part has a share of) and the rows of it."""


def put_back(faulted: Mapping[str, Tensor], clean: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    whole, rows = PARTS[part]
    split = {name for name, _ in PARTS.values()}
    mixed = {name: tensor.clone() for name, tensor in faulted.items()}
    for name in mixed.keys() - split if whole is None else [whole]:
        mixed[name][rows] = clean[name][rows]
    return mixed


@torch.no_grad()
def loss_of(cfg: Config, state: Mapping[str, Tensor]) -> float:
    """Validation loss, nats a byte."""
    model = build_model(cfg.model, cfg.seed)
    model.load_state_dict(dict(state))
    corpus = cached_corpus(cfg.data, cfg.model.seq_len)
    batches = corpus.validation_batches(cfg.optim.batch_size, cfg.optim.validation_batches, cfg.model.seq_len)
    return statistics.fmean(next_byte_loss(model(inputs), targets).item() for inputs, targets in batches)


def carriers_table(grid: Grid, rows: Sequence[Row]) -> str:
    """Means over the seeds."""
    lines = []
    for setting in dict.fromkeys(setting_of(row) for row in rows):
        for policy in POLICIES:
            some = [row for row in rows if setting_of(row) == setting and row["policy"] == policy]
            if some:
                cut = [statistics.fmean(row["without"][part] for row in some) for part in PARTS]
                excess = statistics.fmean(row["excess"] for row in some)
                numbers = [f"{value:+.3f}" for value in (excess, *cut)]
                lines.append([setting.title(grid), grid.title("policy", policy), len(some), *numbers])
    header = ["setting", "clipping", "seeds", "excess just after", *(f"with its twin's {part}" for part in PARTS)]
    return table(header, lines) if lines else "No rows yet."


def setting_of(row: Row) -> Setting:
    return Setting(row["size"], row["corpus"], row["optimizer"], row["condition"])
