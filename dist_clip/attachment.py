"""Clipping in an optimizer's step pre-hook."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dist_clip.errors import LayoutError

if TYPE_CHECKING:
    from dist_clip.clipper import GradClipper


class Attachment:
    """Step pre-hooks on one or more optimizers, clipping once a round. ``remove()`` takes them off."""

    def __init__(self, clipper: GradClipper, optimizers: tuple[torch.optim.Optimizer, ...]) -> None:
        if clipper.attachment is not None:
            raise RuntimeError("this clipper is attached already: gradients would be clipped twice; remove() the first")
        if not optimizers:
            raise TypeError("attach() needs an optimizer")
        for optimizer in optimizers:
            if not hasattr(optimizer, "register_step_pre_hook"):
                raise TypeError(f"attach() needs torch optimizers, got {type(optimizer).__name__}: {optimizer!r}")
        if len({id(optimizer) for optimizer in optimizers}) < len(optimizers):
            raise RuntimeError("attach() got the same optimizer twice: gradients would be clipped twice a step")
        self._clipper = clipper
        self._stepped: set[int] = set()
        self._sizes: dict[int, list[int]] = {}
        for optimizer in optimizers:
            self._check_parameters(optimizer)
        self._handles = [optimizer.register_step_pre_hook(self._before_step) for optimizer in optimizers]
        clipper.attachment = self

    def remove(self) -> None:
        """Detach from the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._clipper.attachment = None

    def _check_parameters(self, optimizer: torch.optim.Optimizer) -> None:
        known = self._clipper.known_parameters
        for g, group in enumerate(optimizer.param_groups):
            for i, param in enumerate(group["params"]):
                if id(param) not in known:
                    raise LayoutError(
                        f"{type(optimizer).__name__} holds a parameter the clipper does not know (param_groups[{g}], "
                        f"number {i}, shape {list(param.shape)}): it would not be clipped. Construct the clipper from "
                        "the same parameters after the model was parallelised, or name it in exclude="
                    )
        self._sizes[id(optimizer)] = [len(group["params"]) for group in optimizer.param_groups]

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        closure = kwargs.get("closure") if kwargs else None
        if closure is None and args:
            closure = next((a for a in args if callable(a)), None)
        if closure is not None:
            raise RuntimeError(
                "step(closure) computes gradients inside the step, after this hook: call clipper.clip_() at the end of the "
                "closure instead of attach()"
            )
        if getattr(optimizer, "grad_scale", None) is not None:
            raise RuntimeError(
                "the gradients are still multiplied by the GradScaler's scale (a fused optimizer unscales inside its "
                "step): call scaler.unscale_(optimizer) before scaler.step(optimizer)"
            )
        if [len(group["params"]) for group in optimizer.param_groups] != self._sizes[id(optimizer)]:
            self._check_parameters(optimizer)  # parameters were added since
        if not self._stepped or id(optimizer) in self._stepped:
            self._stepped = set()
            self._clip(optimizer)
        self._stepped.add(id(optimizer))
        if len(self._stepped) == len(self._handles):
            self._stepped = set()

    def _clip(self, optimizer: torch.optim.Optimizer) -> None:
        report = self._clipper.clip_()
        if self._clipper.nonfinite == "skip" and bool(report.nonfinite):
            # Optimizers pass over parameters without a gradient: the step does nothing, on every rank alike.
            for tensor in self._clipper.layout:
                tensor.param.grad = None
