"""Gradient norms by layer in Megatron's own log: its TensorBoard and Weights & Biases writers, beside its ``grad-norm``."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from typing import Any

from dist_clip.clipper import GradClipper
from dist_clip.megatron.attach import MegatronAttachment
from dist_clip.monitor import ClipMonitor, Record

_GLOBALS = "megatron.training.global_vars"


def log_layer_grad_norms(clipper: GradClipper, every: int) -> None:
    """Write the norm of each layer's gradients, before clipping, at every `every`-th iteration.

    The tags are ``grad-norm/decoder.layers.3`` for layers and ``grad-norm/NAME`` for the other tensors. The rank that has
    Megatron's writers, the last one, gets the norms. No step syncs the host: the numbers are written when they have
    arrived, usually at the next step. Such an iteration costs one all-reduce of three numbers over all ranks, and under
    pipeline parallelism one gather over the stages. Collective.

    Args:
        clipper: what `attach` returned.
        every: iterations between two writes, at least 1.

    Raises:
        ImportError: the program does not use megatron.training, whose writers these are.
        ValueError: `every` is no whole number above 0.
        RuntimeError: the clipper is not attached to a Megatron optimizer.

    Example (needs Megatron-LM)::

        clipper = dist_clip.megatron.attach(optimizer, dist_clip.LogClip(), model=model_chunks)
        dist_clip.megatron.log_layer_grad_norms(clipper, every=100)
    """
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"log_layer_grad_norms: every must be a whole number >= 1, got {every!r}")
    if _GLOBALS not in sys.modules:
        raise ImportError(
            "log_layer_grad_norms writes with the writers of megatron.training, which this program has not imported: use "
            "dist_clip.ClipMonitor with writers of your own"
        )
    attachment = clipper.attachment
    if not isinstance(attachment, MegatronAttachment):
        raise RuntimeError("log_layer_grad_norms: the clipper is not attached to a Megatron optimizer")
    monitor = ClipMonitor(clipper, MegatronWriter(), every=1, top=0, tensors_every=1, last_rank=True)

    def after_clip() -> None:
        iteration = _iteration(clipper)
        if iteration % every == 0:
            monitor.step(iteration)
        else:
            monitor.write_arrived()

    attachment.after_clip = after_clip


class MegatronWriter:
    """Writes a monitor's tables of tensors with the writers that Megatron made; nothing where it made none."""

    def start(self, header: Mapping[str, object]) -> None: ...

    def close(self) -> None: ...

    def write(self, record: Record) -> None:
        if record.tensors is None:
            return
        squares: dict[str, float] = {}
        for name, norm in zip(record.tensors.names, record.tensors.norms, strict=True):
            layer = re.match(r".*?layers\.\d+(?=\.)", name)
            tag = f"grad-norm/{layer[0] if layer else name}"
            squares[tag] = squares.get(tag, 0.0) + norm * norm
        norms = {tag: math.sqrt(square) for tag, square in squares.items()}
        writers: Any = sys.modules[_GLOBALS]
        tensorboard, wandb = writers.get_tensorboard_writer(), writers.get_wandb_writer()
        for tag, norm in norms.items() if tensorboard else ():
            tensorboard.add_scalar(tag, norm, record.step)
        if wandb:
            wandb.log(norms, commit=False)  # with Megatron's next row, as W&B drops rows of earlier steps


def _iteration(clipper: GradClipper) -> int:
    """Return the number that Megatron logs this iteration by; without one the number of clips."""
    args: Any = getattr(sys.modules[_GLOBALS], "_GLOBAL_ARGS", None)
    before = getattr(args, "curr_iteration", None)
    return clipper.memory.calls if before is None else int(before) + 1
