"""A trial of the kernels that decide, at construction: a kernel that fails or is wrong on this device is not used."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_clip.guards import GuardInputs
from dist_clip.kernels import Kernels
from dist_clip.memory import PolicyGroup
from dist_clip.memory.memory import GuardMemory
from dist_clip.policies.base import State, StepInputs, global_clip_scale

NORMS = (1.0, 3.0, 0.01, 0.0)
"""What is decided on: at the usual norms below, far above them, far below, and no gradient."""
LATE = 10**6
"""A step after every warm-up."""


def try_decide(kernels: Kernels, group: PolicyGroup, slots: tuple[str, ...], constants: dict[str, float]) -> None:
    """Decide once by the kernel and once by the policy.

    Raises:
        ArithmeticError: they differ.
        Exception: what Triton or the driver raises.
    """
    device, policy = group.index.device, group.policy
    norms = torch.tensor(NORMS, dtype=torch.float64).to(device)
    together = norms.square().sum().sqrt()
    state = _state(policy.init_state(1 if group.one_element else 4, device))
    mine = [state[slot].clone() for slot in slots]
    t, exact = torch.full((), LATE, device=device), torch.empty_like(norms)
    out = (t, exact.float(), exact, exact.float(), torch.empty_like(t, dtype=torch.bool), torch.zeros_like(t) > 0)
    assert kernels.decide is not None
    kernels.decide(
        norms.square(), torch.arange(4, device=device), mine, out, {**constants, "FIRST": True, "LAST": True}
    )
    seen = together.unsqueeze(0) if group.one_element else norms
    inputs = StepInputs(seen, torch.ones_like(seen, dtype=torch.int64), t + 1, LATE, together)
    scales, new = policy.step({slot: state[slot] for slot in slots}, inputs)
    scales = scales.expand(4)
    if policy.post_max_norm is not None:
        scales = scales * global_clip_scale(policy.post_max_norm, (norms * scales).square().sum().sqrt())
    _compare([scales, t.new_full((), LATE + 1), *(new[slot] for slot in slots)], [exact, t, *mine])


def try_guard(kernels: Kernels, memory: GuardMemory, slots: tuple[str, ...], constants: dict[str, float]) -> None:
    """As `try_decide`, for `MedianGuard`."""
    guard, device = memory.guard, memory.skips_in_a_row.device
    norms = 4.0 * torch.tensor(NORMS, dtype=torch.float64).to(device)
    state = _state(guard.init_state(4, device))
    mine = [state[slot].clone() for slot in slots]
    in_a_row = torch.zeros_like(memory.skips_in_a_row)
    skip = in_a_row > 0
    assert kernels.median_guard is not None
    kernels.median_guard(norms.square(), [*mine, in_a_row], constants, skip)
    tallies, zero = guard.tally(state, norms).double().sum(dim=1), torch.zeros_like(in_a_row)
    inputs = GuardInputs(norms, zero.long(), zero, tallies, norms.square().sum().sqrt())
    expected, new = guard.step(state, inputs)
    _compare([expected, *(new[slot] for slot in slots)], [skip, *mine])


def _state(fresh: State) -> State:
    """Return the state of a tensor that has been seen for long."""
    return {slot: torch.full_like(value, 0.5 if value.is_floating_point() else 3) for slot, value in fresh.items()}


def _compare(expected: list[Tensor], got: list[Tensor]) -> None:
    for theirs, mine in zip(expected, got, strict=True):
        if not torch.allclose(theirs.double(), mine.double(), rtol=1e-6, atol=0.0, equal_nan=True):
            raise ArithmeticError(f"it computes {mine.tolist()}, the policy {theirs.tolist()}")


def is_fake(device: torch.device) -> bool:
    """Whether the device is not there, as with fake tensors: nothing can be tried."""
    return device.type == "cuda" and not torch.cuda.is_available()
