"""The state of a GradScaler (fp16 training), which must have unscaled the gradients before they are measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState


def checked_scaler(scaler: Any, nonfinite: str) -> GradScaler | None:
    """Return `scaler` if it is an enabled GradScaler; None for None and for a disabled one.

    Raises:
        TypeError: it is no GradScaler.
        ValueError: it is enabled, and `nonfinite` is "zero" or "raise".
    """
    if scaler is None:
        return None
    if not isinstance(scaler, GradScaler):
        raise TypeError(f"scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}: {scaler!r}")
    if not scaler.is_enabled():
        return None
    if nonfinite in ("zero", "raise"):
        raise ValueError(
            f"nonfinite={nonfinite!r} does not go with a GradScaler, which finds the largest scale by letting gradients "
            'overflow and skips those steps: leave nonfinite= out, or pass "skip"'
        )
    return scaler


_ORDER = (
    "the order is scaler.scale(loss).backward(), scaler.unscale_(optimizer), clipper.clip_(), scaler.step(optimizer)"
)


def check_unscaled(scaler: GradScaler, optimizer: torch.optim.Optimizer) -> None:
    """Check that the gradients of `optimizer` have been unscaled.

    Raises:
        RuntimeError: they are still multiplied by the scale.
    """
    # The scaler has no public attribute for this. `_per_optimizer_states` holds a "stage" and a flag for each device.
    state = scaler._per_optimizer_states.get(id(optimizer), {"stage": OptState.READY})
    if state["stage"] is OptState.READY:
        raise RuntimeError(
            f"the gradients of {type(optimizer).__name__} are still multiplied by the GradScaler's scale, and are clipped "
            "together with those of the optimizer that steps now: call scaler.unscale_ for each of the attached optimizers "
            "before the first scaler.step"
        )


def found_inf(scaler: GradScaler, device: torch.device) -> Tensor:
    """Return, as bool 0-dim on `device`, whether unscaling found a NaN or Inf on this rank, so that the scaler skips.

    Raises:
        RuntimeError: no optimizer's gradients have been unscaled since its last step.
    """
    flags = [flag.to(device, non_blocking=True) for flag in _flags(scaler)]
    if not any(s["stage"] is OptState.UNSCALED for s in scaler._per_optimizer_states.values()):
        raise RuntimeError(
            f"the gradients are still multiplied by the GradScaler's scale, or were stepped with already: {_ORDER}"
        )
    return torch.stack(flags).sum() > 0 if flags else torch.zeros((), dtype=torch.bool, device=device)


def share_skip(scaler: GradScaler, skip: Tensor, overflow: Tensor) -> None:
    """Make the scaler skip the step where `skip`, bool 0-dim, is set, and lower its scale where there is an `overflow`.

    A scaler looks at the gradients of its own rank only (with DTensors, of their mesh). Under tensor or pipeline
    parallelism some ranks would step and others not, and from then on their scales would differ.

    A scaler lowers its scale at each step that it skips. Those that a guard skips are no overflows, and fifty of them in
    a row would leave no gradient above fp16's smallest number: for them the scale is raised first.
    """
    for flag in _flags(scaler):
        torch._foreach_copy_([flag], [torch.maximum(flag, skip.to(flag.device, non_blocking=True).to(flag.dtype))])
    scale = scaler._scale
    if scale is not None:
        only_guards = torch.logical_and(skip, torch.logical_not(overflow)).to(scale.device, non_blocking=True)
        scale.mul_(torch.where(only_guards, 1 / scaler.get_backoff_factor(), 1.0))


def _flags(scaler: GradScaler) -> list[Tensor]:
    """Return the scaler's fp32 flags, one a device, of each optimizer that was unscaled and has not stepped."""
    states = [s for s in scaler._per_optimizer_states.values() if s["stage"] is OptState.UNSCALED]
    return [flag for state in states for flag in state["found_inf_per_device"].values()]
