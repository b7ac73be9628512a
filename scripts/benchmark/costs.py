"""What is independent of the machine's speed: memory beyond the gradients, state, and operators as a proxy for launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import dist_clip
from scripts.benchmark.local import (
    MODES,
    NO_LIMIT,
    TORCH,
    Gradients,
    Shapes,
    clipper,
    gpt2_shapes,
    package_zclip,
    steady,
)
from scripts.benchmark.timing import Section, count, peak_bytes, settle
from scripts.policies import label


def state_bytes(made: dist_clip.GradClipper) -> int:
    """What lasts from step to step and grows with the number of tensors."""
    return sum(value.nbytes for group in made.memory.groups for value in group.state.values())


def on_cuda(shapes: Shapes) -> dict[str, int]:
    """Operators of a step on CUDA tensors that have no data: which would be launched, without a GPU."""
    counted = {}
    with torch.no_grad(), FakeTensorMode():
        params = [nn.Parameter(torch.empty(shape, device="cuda")) for shape in shapes]
        for param in params:
            param.grad = torch.empty_like(param)
        named = [(f"p{i}", param) for i, param in enumerate(params)]
        for mode in MODES:
            made = dist_clip.GradClipper(named, steady(mode))
            settle(made.clip_, params)
            counted[label(mode)] = count(made.clip_).operators
        run = lambda: torch.nn.utils.clip_grad_norm_(params, NO_LIMIT, foreach=True)  # noqa: E731
        counted[TORCH] = count(run).operators
    return counted


def costs(quick: bool) -> Section:
    shapes = gpt2_shapes(layers=2, vocab=2048) if quick else gpt2_shapes()
    gradients = Gradients(shapes)
    clippers = {label(mode): clipper(gradients, steady(mode)) for mode in MODES}
    runs: dict[str, Callable[[], Any]] = {
        TORCH: lambda: torch.nn.utils.clip_grad_norm_(gradients.params, NO_LIMIT, foreach=True),
        "zclip package": package_zclip(gradients, NO_LIMIT),
        **{name: made.clip_ for name, made in clippers.items()},
    }
    launches = on_cuda(shapes)
    rows = []
    for name, run in runs.items():
        run()
        state = state_bytes(clippers[name]) if name in clippers else None
        rows.append(
            {
                "name": name,
                "peak_kib": peak_bytes(run) / 1024,
                "state_bytes_per_tensor": None if state is None else state / len(shapes),
                "operators_cpu": count(run).operators,
                "operators_cuda": launches.get(name),
            }
        )
    return Section(
        "Memory and operators",
        "A step on GPT-2's tensors, nothing clipped. Peak: most that torch's allocator held for the call, beyond "
        "what was there before it. Operators that compute or copy, counted below autograd; foreach operators count "
        "once. On CUDA: fake tensors with no data, which tell what would be launched.",
        {
            "name": "",
            "peak_kib": "peak extra memory, KiB",
            "state_bytes_per_tensor": "state, bytes a tensor",
            "operators_cpu": "operators on the CPU",
            "operators_cuda": "operators on (fake) CUDA",
        },
        rows,
        {"tensors": len(shapes), "gradient_mib": gradients.nbytes / 2**20},
    )
