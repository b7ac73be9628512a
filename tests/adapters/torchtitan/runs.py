"""Runs of torchtitan in this process or as one rank of several, and the same training written as a plain loop."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from . import tiny  # isort: skip  # makes torchtitan run here
from torchtitan.components.metrics import BaseLogger
from torchtitan.config import ConfigManager

MODULE = tiny.__name__
NATIVE_OFF = ["--training.max_norm", "inf"]


class Recorder(BaseLogger):
    """In place of TensorBoard: what each step logs."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.rows.append({"step": step, **metrics})


def train(
    way: str,
    folder: str,
    clip: dict[str, Any] | None = None,
    *arguments: str,
    overrides: tuple[str, ...] = (),
    spoil: dict[int, str] | None = None,
) -> dict[str, Any]:
    """Train as ``torchrun -m torchtitan.train`` would, and return what happened, with whole parameters.

    Args:
        way: "plain", torchtitan as it is; "override", its command line; "trainer", `ClipTrainer`.
        clip: what the clipper gets.
        arguments: more of torchtitan's command line.
        overrides: more entries of ``--override.imports``.
        spoil: {step: name}, parameters whose gradient gets one Inf at that step.
    """
    import json

    os.environ.update(RANK=str(dist.get_rank()), LOCAL_RANK="0", WORLD_SIZE=str(dist.get_world_size()))
    entries = list(overrides)
    if way == "override":
        entries = [f"dist_clip.torchtitan.clip={json.dumps(clip or {})}", "dist_clip.torchtitan.metrics", *entries]
    line = ["--module", MODULE, "--config", "with_trainer" if way == "trainer" else "plain", "--dump_folder", folder]
    line += (NATIVE_OFF if way == "override" else []) + list(arguments)
    line += ["--override.imports", *entries] if entries else []
    config = ConfigManager().parse_args(line)
    if way == "trainer":
        config.clip = clip or {}
    trainer = config.build()
    try:
        recorder = trainer.metrics_processor.logger = Recorder()
        clipper = getattr(trainer, "clipper", None) or getattr(trainer.optimizers, "clipper", None)
        reports: list[dict[str, Any]] = []
        _after(trainer, "train_step", lambda: clipper is not None and reports.append(_kept(clipper.last_report)))
        loaded: list[int] = []
        _after(trainer.checkpointer, "load", lambda: clipper is not None and loaded.append(clipper.steps))
        for step, name in (spoil or {}).items():
            _after(trainer, "forward_backward_step", lambda step=step, name=name: _spoil(trainer, step, name))
        trainer.train()
        return {
            "parameters": whole(trainer.model_parts),
            "moments": moments(trainer.optimizers),
            "logged": recorder.rows,
            "reports": reports,
            "steps_at_load": loaded[0] if loaded else None,
            "state": None if clipper is None else clipper.state_dict(),
        }
    finally:
        trainer.close()


def _after(target: Any, name: str, then: Callable[[], Any]) -> None:
    method = getattr(target, name)

    def both(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        then()
        return result

    setattr(target, name, both)


def _kept(report: Any) -> dict[str, Any]:
    return {
        "names": report.names,
        "scales": report.scales.clone(),
        "norms": report.tensor_norms.clone(),
        "global_norm": None if report.global_norm is None else report.global_norm.item(),
        "skip": bool(report.skip),
    }


def _spoil(trainer: Any, step: int, name: str) -> None:
    if trainer.step == step:
        grad = next(p.grad for full, p in trainer.model_parts[0].named_parameters() if _unwrapped(full) == name)
        local = grad.to_local() if isinstance(grad, DTensor) else grad
        local.view(-1)[0] = math.inf


def whole(parts: list[nn.Module]) -> dict[str, Tensor]:
    """Return all parameters of this rank's stages, whole."""
    found = {name: param.detach() for part in parts for name, param in part.named_parameters()}
    return {_unwrapped(name): _whole(param).clone() for name, param in sorted(found.items())}


def _unwrapped(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "")


def moments(optimizers: Any) -> list[Tensor]:
    return [
        _whole(value).clone()
        for optimizer in optimizers
        for group in optimizer.param_groups
        for param in group["params"]
        for _, value in sorted(optimizer.state[param].items())
    ]


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def plain_loop(clip: dict[str, Any], *, accumulate: int = 1) -> dict[str, Any]:
    """The training of one process, with nothing of torchtitan's but the model and its initial weights."""
    import dist_clip
    from dist_clip.adapter import make_clipper

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    config = ConfigManager().parse_args(["--module", MODULE, "--config", "plain"])
    trainer = config.build()
    trainer.close()
    model = trainer.model_config.build()  # neither wrapped nor sharded
    model.init_weights(buffer_device=None)
    with torch.no_grad():
        for name, value in whole(trainer.model_parts).items():
            model.get_parameter(name).copy_(value)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=tiny.RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True
    )
    clipper: dist_clip.GradClipper = make_clipper(model, **clip)
    reports, losses, number = [], [], 0
    for _ in range(tiny.STEPS):
        optimizer.zero_grad()
        total = 0.0
        for _ in range(accumulate):
            inputs, labels = tiny.batch_of(number, tiny.BATCH)
            number += 1
            logits = model(inputs["input"], positions=inputs["positions"])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            loss = loss / torch.tensor(labels.numel() * accumulate)
            loss.backward()
            total += loss.item()
        report = clipper.clip_(loss=total)
        reports.append(_kept(report))
        losses.append(total)
        if not bool(report.skip):
            optimizer.step()
    state = [value.clone() for param in model.parameters() for _, value in sorted(optimizer.state[param].items())]
    return {"parameters": whole([model]), "moments": state, "reports": reports, "losses": losses}


def follow_the_page(block: str, folder: str) -> dict[str, float]:
    """Run a sample of docs/frameworks/torchtitan.md with the tiny model, and return what its last step logs."""
    import shlex

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    settings = ["--dump_folder", folder, "--training.steps", "3"]
    if block.startswith("torchrun"):
        words = shlex.split(block.replace("\\\n", " "))
        line = words[words.index("torchtitan.train") + 1 :]
        assert line[:4] == ["--module", "llama3", "--config", "llama3_8b"]
        config = ConfigManager().parse_args(["--module", MODULE, "--config", "plain", *settings, *line[4:]])
    else:
        from torchtitan.models.llama3 import config_registry

        config_registry.llama3_8b = tiny.plain
        names: dict[str, Any] = {}
        exec(block, names)
        config = names["llama3_8b_clip"]()
        config.training.steps, config.dump_folder = 3, folder
    trainer = config.build()
    recorder = trainer.metrics_processor.logger = Recorder()
    trainer.train()
    trainer.close()
    return recorder.rows[-1]


def run_docstrings() -> int:
    """Run the examples in the adapter's docstrings, and return how many there are."""
    import doctest

    import dist_clip.torchtitan

    results = doctest.testmod(dist_clip.torchtitan)
    assert results.failed == 0
    return results.attempted
