"""Snapshots: the whole state of a run at one step, for runs that branch off there, with a fault or without."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR

import dist_clip
from launch.parallel import ParallelModel


@dataclasses.dataclass(frozen=True)
class SnapshotConfig:
    """Saving a run's state, and starting from a saved one. One process or DDP only."""

    save_at: int = 0
    """Write a snapshot after this step; 0 for none."""
    save_to: Path = Path("runs/snapshot.pt")
    """--save-at: the file."""
    from_snapshot: Path | None = None
    """Start where the run that wrote this file was. Every option must be that run's, but for the fault, the log and
    these; without a fault the rest of that run comes out again, bit for bit."""

    def check(self, parallel: str, steps: int) -> None:
        """Raise unless this layout can be saved, and at this step."""
        if (self.save_at or self.from_snapshot is not None) and parallel != "ddp":
            raise ValueError(
                f"snapshots hold whole tensors: --save-at and --from-snapshot need --parallel ddp, got {parallel} "
                "(docs/checkpointing.md shows how to save sharded state)"
            )
        if not 0 <= self.save_at <= steps:
            raise ValueError(f"--save-at must be a step of the run or 0, got {self.save_at} with {steps} steps")


@dataclasses.dataclass(frozen=True)
class Training:
    """All that a step changes."""

    parallel: ParallelModel
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    clipper: dist_clip.GradClipper

    def save(self, path: Path, step: int, identity: dict[str, str]) -> None:
        """Write the state after `step`; `identity` is what a branch must share with this run."""
        if dist.get_rank() == 0:  # the others hold the same
            path.parent.mkdir(parents=True, exist_ok=True)
            parts = {name: part.state_dict() for name, part in self._parts().items()}
            # Under another name until it is whole: a run killed meanwhile leaves no half a snapshot.
            partial = path.with_name(path.name + ".partial")
            torch.save({"step": step, "identity": identity, **parts}, partial)
            partial.replace(path)

    def load(self, path: Path, identity: dict[str, str]) -> int:
        """Take on a saved state. Returns the step after which it was saved."""
        saved = torch.load(path, map_location=self.parallel.device, weights_only=True)
        different = {key for key in {*identity, *saved["identity"]} if identity.get(key) != saved["identity"].get(key)}
        if different:
            what = "; ".join(
                f"{key}: {saved['identity'].get(key)} there, {identity.get(key)} here" for key in different
            )
            raise ValueError(f"--from-snapshot {path} is of another run ({what})")
        for name, part in self._parts().items():
            part.load_state_dict(saved[name])
        return int(saved["step"])

    def _parts(self) -> dict[str, Any]:
        return {
            "model": self.parallel.module,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "clipper": self.clipper,
        }
