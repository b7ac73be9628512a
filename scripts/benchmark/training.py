"""What clipping takes of a real training step: forward and backward of launch's GPT on text-like bytes, clip, AdamW."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import dist_clip
from launch.model import VOCAB_SIZE, ModelConfig, build_model, next_byte_loss
from scripts.benchmark.timing import Section
from scripts.policies import compared, label, make

PHASES = ("forward_backward", "clip", "optimizer")


def end_to_end(quick: bool) -> Section:
    """One model and optimizer, whose steps are clipped by each candidate in turn."""
    cfg = ModelConfig(dim=32, layers=2, seq_len=64) if quick else ModelConfig(dim=192, layers=6, seq_len=128)
    rounds = 3 if quick else 11
    model = build_model(cfg, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
    candidates = {
        "torch clip_grad_norm_": lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True),
        **clips(model),
    }
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, dict[str, list[float]]] = {name: {phase: [] for phase in PHASES} for name in candidates}
    for turn in range(rounds + 1):
        for name, clip in candidates.items():
            text = torch.randint(VOCAB_SIZE, (8, cfg.seq_len + 1), generator=generator)
            marks = [time.perf_counter()]
            next_byte_loss(model(text[:, :-1]), text[:, 1:]).backward()  # type: ignore[no-untyped-call]
            marks.append(time.perf_counter())
            clip()
            marks.append(time.perf_counter())
            optimizer.step()
            marks.append(time.perf_counter())
            optimizer.zero_grad()
            if turn > 0:
                for phase, start, end in zip(PHASES, marks, marks[1:], strict=False):
                    seconds[name][phase].append(end - start)
    milliseconds = {
        name: [1e3 * statistics.median(phases[phase]) for phase in PHASES] for name, phases in seconds.items()
    }
    size = sum(param.numel() for param in model.parameters())
    about = (
        f"One process, {size:,} parameters, 8 x {cfg.seq_len} random bytes a step: forward and backward, clip, "
        "AdamW (foreach)."
    )
    return share_table(about, milliseconds, model, rounds)


def clips(model: nn.Module) -> dict[str, Callable[[], Any]]:
    """A clip by each policy, past its warm-up from the second step on."""
    return {label(mode): dist_clip.GradClipper(model, make(mode, warmup_steps=1)).clip_ for mode in compared()}


def share_table(about: str, milliseconds: dict[str, list[float]], model: nn.Module, rounds: int) -> Section:
    """The table, from what each of `PHASES` takes with each candidate."""
    rows = []
    for name, phases in milliseconds.items():
        row = {"name": name, **{f"{phase}_ms": ms for phase, ms in zip(PHASES, phases, strict=True)}}
        rows.append({**row, "clip_percent": 100 * phases[PHASES.index("clip")] / sum(phases)})
    params = list(model.parameters())
    return Section(
        "Share of a training step",
        about,
        {
            "name": "",
            "forward_backward_ms": "forward and backward, ms",
            "clip_ms": "clip, ms",
            "optimizer_ms": "AdamW, ms",
            "clip_percent": "clip, % of the step",
        },
        rows,
        {"parameters": sum(param.numel() for param in params), "tensors": len(params), "rounds": rounds},
    )
