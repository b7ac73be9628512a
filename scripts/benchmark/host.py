"""What a clip on a GPU takes of the host's time beside launching: measured on the CPU, with the launches left out.

Triton's kernels serve CPU tensors here. A launch or a copy to the device is counted and not carried out, so gradients and
numbers are nonsense, and nothing but the clipper's own Python and torch's small operators is timed. Gradients are elsewhere
in memory at each step, as after `zero_grad`.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

import dist_clip
from dist_clip.kernels import Kernels
from scripts.benchmark.timing import Section, count, settle

COLUMNS = {
    "name": "",
    "tensors": "tensors",
    "cpu_us": "CPU time, µs",
    "launches": "Triton launches",
    "operators": "torch operators, those for memory included",
    "copies": "copies to the device",
}
WARMUP = 2


def _clipper(params: list[nn.Parameter], setting: dict[str, Any], seen: dict[str, int]) -> dist_clip.GradClipper:
    from dist_clip.kernels.triton_kernels import TritonKernels

    class Counted(TritonKernels):
        def _launch(self, *args: Any, **constants: Any) -> None:
            seen["launches"] += 1

    kernels = Counted("cpu")

    def send(buffer: Tensor, device: torch.device) -> Tensor:
        seen["copies"] += 1
        return buffer

    kernels._tables._send = send  # type: ignore[method-assign]
    functions = (kernels.power_sums, kernels.scale_, kernels.zero_where_, kernels.read, kernels.decide)
    chosen = Kernels(
        "triton", "launches left out", *functions, kernels.median_guard, trusted=True, is_whole=kernels.is_whole
    )
    named = [(f"p{i}", param) for i, param in enumerate(params)]
    return dist_clip.GradClipper(named, **setting, kernels=chosen, check_replicas=False)


def _measure(name: str, setting: dict[str, Any], tensors: int, repeats: int) -> dict[str, Any]:
    params = [nn.Parameter(torch.zeros(4)) for _ in range(tensors)]
    seen = {"launches": 0, "copies": 0}

    def renew() -> None:
        for param in params:
            param.grad = torch.zeros(4)

    renew()
    clipper = _clipper(params, setting, seen)

    def clip() -> None:
        renew()
        clipper.clip_()

    settle(clip, params)
    taken = []
    for _ in range(repeats):
        renew()
        start = time.thread_time()
        clipper.clip_()
        taken.append(1e6 * (time.thread_time() - start))
    renew()
    seen.update(launches=0, copies=0)
    operators = count(clipper.clip_).operators
    return {"name": name, "tensors": tensors, "cpu_us": statistics.median(taken), **seen, "operators": operators}


def host(quick: bool) -> Section:
    repeats = 5 if quick else 41
    settings: dict[str, dict[str, Any]] = {
        "GlobalNorm": {"policy": dist_clip.GlobalNorm(1e30)},
        "AdaGC": {"policy": dist_clip.AdaGC(warmup_steps=WARMUP)},
        "LogClip": {"policy": dist_clip.LogClip(warmup_steps=WARMUP)},
        "ZClip": {"policy": dist_clip.ZClip(warmup_steps=WARMUP)},
        "recommended()": {
            "policy": dist_clip.LogClip(warmup_steps=WARMUP, post_max_norm=1.0),
            "guard": dist_clip.MedianGuard(warmup_steps=WARMUP),
        },
        "AutoClip, which has no kernel": {"policy": dist_clip.AutoClip()},
    }
    rows = [
        _measure(name, setting, tensors, repeats)
        for name, setting in settings.items()
        for tensors in ((10, 30) if quick else (148, 2000))
    ]
    return Section(
        "The host's part of a step on a GPU",
        "Measured on the CPU with Triton's launches left out, after the warm-up: what remains is the host's time for asking "
        "the gradients and for torch's operators. A launch costs some µs more each; these are counted. Gradients of one "
        "dtype, elsewhere in memory at each step.",
        COLUMNS,
        rows,
        {"repeats": repeats},
    )
