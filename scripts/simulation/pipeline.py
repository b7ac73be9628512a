"""What it costs that all pipeline stages wait for one another before they may step their optimizers.

Two answers. `expected_wait`: stages whose compute times vary independently, all waiting for the slowest: how long the
average one idles. `one_f_one_b`: a discrete simulation of the 1F1B schedule with and without that barrier: by how much
the step itself gets longer, which is less, for a pipeline that fills and drains has idle time there anyway.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np


def expected_maximum(n: int) -> float:
    """Expected maximum of `n` independent standard normal variables."""
    if n < 2:
        return 0.0
    x = np.linspace(-10.0, 10.0, 20001)
    below = np.array([0.5 * (1.0 + math.erf(value / math.sqrt(2.0))) for value in x])
    density = np.exp(-(x**2) / 2.0) / math.sqrt(2.0 * math.pi)
    return float(np.sum(x * n * below ** (n - 1) * density) * (x[1] - x[0]))


def expected_wait(stages: int, parameters: dict[str, Any]) -> float:
    """Seconds that the average stage idles where all wait for the slowest: jitter * step * E[max of `stages` normals]."""
    return float(parameters["jitter"] * parameters["step_s"] * expected_maximum(stages))


def refill(stages: int, parameters: dict[str, Any]) -> float:
    """Seconds to fill the pipeline again, stages - 1 forward passes.

    A schedule that never drains between steps (zero bubble, arXiv 2401.10241) would be spared this, but for a barrier.
    """
    return (stages - 1) * _forward_s(stages, parameters)


def _forward_s(stages: int, parameters: dict[str, Any]) -> float:
    """One stage's forward pass of a micro-batch, such that a step of 1F1B without jitter takes `step_s`."""
    slots = parameters["micro_batches_per_stage"] * stages + stages - 1
    share = 1.0 - parameters["optimizer_share"]
    return float(parameters["step_s"] * share / (slots * (1.0 + parameters["backward_over_forward"])))


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Mean over the simulated steps, in seconds: the step's length, and how long the average stage waited in the barrier."""

    step_s: float
    wait_s: float


def one_f_one_b(stages: int, parameters: dict[str, Any], *, barrier: bool, seed: int = 0) -> Schedule:
    """1F1B over `stages` stages, several steps in a row, each stage's compute varying from step to step.

    Without the barrier a stage steps its optimizer when its own last backward pass is done and goes on with its next
    forward pass; with it, when those of all stages are. Communication takes no time.
    """
    random = np.random.default_rng(seed)
    micro_batches = parameters["micro_batches_per_stage"] * stages
    optimizer = parameters["optimizer_share"] * parameters["step_s"]
    forward = _forward_s(stages, parameters)
    backward = parameters["backward_over_forward"] * forward
    free = np.zeros(stages)
    waits, starts = [], [0.0]
    for _ in range(parameters["steps"]):
        factor = np.maximum(1.0 + parameters["jitter"] * random.standard_normal(stages), 0.0)
        free = _passes(free, forward * factor, backward * factor, micro_batches)
        if barrier:
            waits.append(float((free.max() - free).mean()))
            free = np.full(stages, free.max())
        free = free + optimizer * factor
        starts.append(float(free.max()))
    return Schedule((starts[-1] - starts[0]) / parameters["steps"], float(np.mean(waits)) if waits else 0.0)


def _passes(free: np.ndarray, forward: np.ndarray, backward: np.ndarray, micro_batches: int) -> np.ndarray:
    """When each stage has done its last backward pass, given when it becomes free."""
    stages = len(free)
    orders = [_order(stage, stages, micro_batches) for stage in range(stages)]
    done_forward = np.full((stages, micro_batches), np.nan)
    done_backward = np.full((stages, micro_batches), np.nan)
    clock, at = free.copy(), [0] * stages
    while any(at[s] < len(orders[s]) for s in range(stages)):
        progress = False
        for s in range(stages):
            while at[s] < len(orders[s]):
                is_forward, i = orders[s][at[s]]
                if is_forward:
                    ready = 0.0 if s == 0 else done_forward[s - 1, i]
                else:
                    ready = done_forward[s, i] if s == stages - 1 else done_backward[s + 1, i]
                if np.isnan(ready):
                    break
                clock[s] = max(clock[s], ready) + (forward[s] if is_forward else backward[s])
                (done_forward if is_forward else done_backward)[s, i] = clock[s]
                at[s] += 1
                progress = True
        assert progress, "the schedule is stuck"
    return clock


def _order(stage: int, stages: int, micro_batches: int) -> list[tuple[bool, int]]:
    """(is forward, micro-batch) in the order in which a stage of 1F1B does them."""
    ahead = min(stages - 1 - stage, micro_batches)
    order = [(True, i) for i in range(ahead)]
    for i in range(micro_batches - ahead):
        order += [(True, ahead + i), (False, i)]
    return order + [(False, i) for i in range(micro_batches - ahead, micro_batches)]
