"""Measure what stepping inside backward saves and costs, and write the tables of docs/in-backward.md.

    OMP_NUM_THREADS=1 python -m scripts.in_backward_memory          # all of it, and the page: some minutes
    python -m scripts.in_backward_memory --page                     # the page from docs/data/in_backward.json

Each row of memory is the most resident memory of a process of its own. The time is that of processes of both orders that
take turns, so that whatever else the machine does meets both. Not of two trainings in one process: the memory that one
frees, the other finds already mapped, and is a fifth faster for it.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dist_clip
from launch.in_backward import StepInBackward, peak_memory
from launch.model import VOCAB_SIZE, ModelConfig, build_model, next_byte_loss

ROOT = Path(__file__).parents[1]
DATA, PAGE = ROOT / "docs/data/in_backward.json", ROOT / "docs/in-backward.md"
MODEL = ModelConfig(dim=576, layers=10, heads=9, seq_len=256)
WARMUP, STEPS, BUCKETS = 3, 8, 8

ROWS: dict[str, dict[str, Any]] = {
    "1 x 128": {"rows": 1, "seq": 128},
    "4 x 256, checkpointed": {"rows": 4, "seq": 256, "checkpointed": True},
    "4 x 256": {"rows": 4, "seq": 256},
    "1 x 128, warm-up in the usual order": {"rows": 1, "seq": 128, "usual_warmup": True},
}


class Training:
    """A GPT and what trains it, in one order of steps or the other."""

    def __init__(
        self, *, rows: int, seq: int, early: bool, checkpointed: bool = False, usual_warmup: bool = False
    ) -> None:
        self.model = build_model(MODEL, seed=0)
        if checkpointed:
            for block in self.model.blocks.values():
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.clipper = dist_clip.GradClipper(self.model, dist_clip.LogClip(warmup_steps=WARMUP))
        self.generator = torch.Generator().manual_seed(0)
        self.rows, self.seq, self.early, self.usual_warmup = rows, seq, early, usual_warmup
        self.stepper: StepInBackward | None = None

    def step(self) -> None:
        text = torch.randint(VOCAB_SIZE, (self.rows, self.seq + 1), generator=self.generator)

        def backward() -> Tensor:
            loss = next_byte_loss(self.model(text[:, :-1]), text[:, 1:])
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()

        if self.early and not (self.usual_warmup and not self.clipper.can_clip_early):
            self.stepper = self.stepper or StepInBackward(self.optimizer, self.clipper, buckets=BUCKETS)
            self.stepper.step(backward)
            return
        backward()
        self.clipper.clip_()
        self.optimizer.step()
        self.optimizer.zero_grad()


def gradients_of(model: nn.Module) -> int:
    return sum(param.numel() * param.element_size() for param in model.parameters())


def measure_here(row: str, early: bool) -> dict[str, Any]:
    """Train in this process. Returns its most resident memory and the size of the gradients, in bytes, and the median
    CPU seconds of a step after the warm-up, which other work on the machine changes least."""
    training = Training(early=early, **ROWS[row])
    for _ in range(WARMUP + 1):
        training.step()
    taken = []
    for _ in range(STEPS):
        start = time.process_time()
        training.step()
        taken.append(time.process_time() - start)
    return {"peak": peak_memory(), "gradients": gradients_of(training.model), "cpu": statistics.median(taken)}


def measure(row: str, early: bool) -> dict[str, Any]:
    """As `measure_here`, in a process of its own."""
    command = [sys.executable, "-m", "scripts.in_backward_memory", "--row", row, *(["--early"] if early else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure_memory() -> dict[str, dict[str, int]]:
    memory = {}
    for row in ROWS:
        usual, early = measure(row, False), measure(row, True)
        memory[row] = {"usual": usual["peak"], "early": early["peak"], "gradients": usual["gradients"]}
        print(row, memory[row], flush=True)
    return memory


def measure_time(rounds: int) -> dict[str, Any]:
    """Return the median CPU seconds of processes of both orders, which take turns, and the ratio of each pair."""
    pairs = [(measure("1 x 128", False)["cpu"], measure("1 x 128", True)["cpu"]) for _ in range(rounds)]
    usual, early = map(statistics.median, zip(*pairs, strict=True))
    return {"usual": usual, "early": early, "ratios": sorted(round(late / first, 3) for first, late in pairs)}


def memory_table(data: dict[str, Any]) -> str:
    lines = [
        "| batch x length | step after backward | step in backward | saved | of the gradients' size |",
        "|---|---|---|---|---|",
    ]
    for row, found in data["memory"].items():
        usual, early, size = (value / 2**20 for value in (found["usual"], found["early"], found["gradients"]))
        lines.append(
            f"| {row} | {usual:,.0f} MiB | {early:,.0f} MiB | {usual - early:,.0f} MiB | {(usual - early) / size:.2f} |"
        )
    return "\n".join(lines)


def time_table(data: dict[str, Any]) -> str:
    found = data["time"]
    usual, early, ratios = found["usual"], found["early"], found["ratios"]
    return "\n".join(
        [
            "| | step after backward | step in backward | ratio | ratios of pairs |",
            "|---|---|---|---|---|",
            f"| CPU time | {1e3 * usual:.0f} ms | {1e3 * early:.0f} ms | {early / usual:.3f} | "
            f"{ratios[0]:.3f} to {ratios[-1]:.3f}, median {statistics.median(ratios):.3f} |",
        ]
    )


def with_tables(page: str, data: dict[str, Any]) -> str:
    """Return the page with the tables of `data` between their marks."""
    for name, table in (("memory", memory_table(data)), ("time", time_table(data))):
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, rest = page.split(start)
        page = f"{before}{start}{table}\n{end}{rest.split(end)[1]}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="write the page from the data that is there")
    parser.add_argument("--row", choices=list(ROWS), help="measure one row in this process, and print it")
    parser.add_argument("--early", action="store_true", help="with --row: step in backward")
    parser.add_argument("--time", action="store_true", help="measure the time again, and keep the memory")
    parser.add_argument("--rounds", type=int, default=7, help="timed processes of each order")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.row:
        print(json.dumps(measure_here(args.row, args.early)))
        return
    if not args.page:
        memory = json.loads(DATA.read_text(encoding="utf-8"))["memory"] if args.time else measure_memory()
        data = {"memory": memory, "time": measure_time(args.rounds), "torch": torch.__version__}
        DATA.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    data = json.loads(DATA.read_text(encoding="utf-8"))
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), data), encoding="utf-8")


if __name__ == "__main__":
    main()
