"""What a GradScaler (fp16 training) has done to the gradients so far: they must be unscaled before they are measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState


def checked_scaler(scaler: Any, nonfinite: str) -> GradScaler | None:
    """Return `scaler` if it is a GradScaler that goes with `nonfinite`; None for None, and for a scaler that is disabled.

    Raises:
        TypeError, ValueError: it is not, or does not.
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
    """Raise unless `optimizer`'s gradients have been unscaled.

    Raises:
        RuntimeError: they are still multiplied by the scale.
    """
    # The scaler has no public way to ask. Keyed by optimizer: "stage", and a flag for each device.
    state = scaler._per_optimizer_states.get(id(optimizer), {"stage": OptState.READY})
    if state["stage"] is OptState.READY:
        raise RuntimeError(
            f"the gradients of {type(optimizer).__name__} are still multiplied by the GradScaler's scale, and are clipped "
            "together with those of the optimizer that steps now: call scaler.unscale_ for each of the attached optimizers "
            "before the first scaler.step"
        )


def found_inf(scaler: GradScaler, device: torch.device) -> Tensor:
    """Bool 0-dim on `device`: whether unscaling found a NaN or Inf on this rank, so that the scaler will skip the step.

    Raises:
        RuntimeError: no optimizer's gradients have been unscaled since its last step.
    """
    flags = [flag.to(device, non_blocking=True) for flag in _flags(scaler)]
    if not any(s["stage"] is OptState.UNSCALED for s in scaler._per_optimizer_states.values()):
        raise RuntimeError(
            f"the gradients are still multiplied by the GradScaler's scale, or were stepped with already: {_ORDER}"
        )
    return torch.stack(flags).sum() > 0 if flags else torch.zeros((), dtype=torch.bool, device=device)


def share_skip(scaler: GradScaler, skip: Tensor) -> None:
    """Have the scaler skip the step, and lower its scale, where `skip`, bool 0-dim, is set.

    A scaler looks at its own rank's gradients (with DTensors, at their mesh's). Under tensor or pipeline parallelism some
    ranks would step and others not, and from then on their scales would differ.
    """
    for flag in _flags(scaler):
        torch._foreach_copy_([flag], [torch.maximum(flag, skip.to(flag.device, non_blocking=True).to(flag.dtype))])


def _flags(scaler: GradScaler) -> list[Tensor]:
    """The scaler's flags, fp32, of the optimizers that have been unscaled and have not stepped: one each and device."""
    states = [s for s in scaler._per_optimizer_states.values() if s["stage"] is OptState.UNSCALED]
    return [flag for state in states for flag in state["found_inf_per_device"].values()]
