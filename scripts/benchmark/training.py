"""What clipping takes of a real training step: forward and backward of launch's GPT on text-like bytes, clip, AdamW."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import dist_clip
from launch.model import VOCAB_SIZE, ModelConfig, build_model, next_byte_loss
from scripts.benchmark.timing import Section

PHASES = ("forward_backward", "clip", "optimizer")


def end_to_end(quick: bool) -> Section:
    """One model and optimizer, whose steps are clipped by each candidate in turn."""
    cfg = ModelConfig(dim=32, layers=2, seq_len=64) if quick else ModelConfig(dim=192, layers=6, seq_len=128)
    rounds = 3 if quick else 11
    model = build_model(cfg, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
    candidates: dict[str, Callable[[], Any]] = {
        "torch clip_grad_norm_": lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True),
        "GlobalNorm": dist_clip.GradClipper(model, dist_clip.GlobalNorm()).clip_,
        "ZClip": dist_clip.GradClipper(model, dist_clip.ZClip(warmup_steps=1)).clip_,
        "AdaGC": dist_clip.GradClipper(model, dist_clip.AdaGC(warmup_steps=1)).clip_,
        "LogClip": dist_clip.GradClipper(model, dist_clip.LogClip(warmup_steps=1)).clip_,
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
    rows = []
    for name, phases in seconds.items():
        ms = {phase: 1e3 * statistics.median(values) for phase, values in phases.items()}
        row = {"name": name, **{f"{phase}_ms": value for phase, value in ms.items()}}
        rows.append({**row, "clip_percent": 100 * ms["clip"] / sum(ms.values())})
    size = sum(param.numel() for param in model.parameters())
    return Section(
        "Share of a training step",
        f"One process, {size:,} parameters, 8 x {cfg.seq_len} random bytes a step: forward and backward, clip, "
        "AdamW (foreach).",
        {
            "name": "",
            "forward_backward_ms": "forward and backward, ms",
            "clip_ms": "clip, ms",
            "optimizer_ms": "AdamW, ms",
            "clip_percent": "clip, % of the step",
        },
        rows,
        {"parameters": size, "tensors": len(list(model.parameters())), "rounds": rounds},
    )
