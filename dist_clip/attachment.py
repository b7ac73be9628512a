"""Clipping in a pre-hook of ``optimizer.step``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.amp import GradScaler
from torch.distributed.tensor import DTensor

from dist_clip.errors import LayoutError
from dist_clip.layouts import Layout
from dist_clip.reduction.grad_version import ClippedGradients
from dist_clip.step import ClipReport
from dist_clip.step.grad_scaler import check_unscaled


class Detachable(Protocol):
    """The protocol of ``clipper.attachment``, which detaches the clipper again."""

    @property
    def attached(self) -> bool:
        """Whether `remove` has not been called."""
        ...

    def remove(self) -> None:
        """Detach the clipper."""
        ...


class Attachment:
    """Step pre-hooks on one or more optimizers, which clip once a round. `GradClipper.attach` makes it.

    A round is one clip and the steps of the attached optimizers that follow it. It ends when all of them have stepped,
    when one steps again, or when one steps whose gradients changed since the last clip. Optimizers may therefore take
    turns, and a GradScaler may leave one out.

    Args:
        optimizers: torch optimizers, at least one, each once.
        clip_: clips all gradients and returns the report.
        layout: the logical tensors that are clipped.
        known: ids of all parameters of the clipper's target, excluded ones included.
        may_skip: whether a report may ask for its step to be skipped.
        scaler: the GradScaler, whose optimizers must all be unscaled before a clip; None without one.

    Raises:
        TypeError: no optimizer, or an object that is none.
        RuntimeError: the same optimizer twice.
        LayoutError: an optimizer holds a parameter that is not in `known`.

    Example:
        >>> import dist_clip
        >>> model = torch.nn.Linear(2, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> attachment = dist_clip.GradClipper(model, dist_clip.LogClip()).attach(optimizer)
        >>> attachment.remove()
        >>> attachment.attached
        False
    """

    def __init__(
        self,
        optimizers: tuple[torch.optim.Optimizer, ...],
        *,
        clip_: Callable[[], ClipReport],
        layout: Layout,
        known: frozenset[int],
        may_skip: bool,
        scaler: GradScaler | None,
    ) -> None:
        if not optimizers:
            raise TypeError("attach() needs an optimizer")
        for optimizer in optimizers:
            if not hasattr(optimizer, "register_step_pre_hook"):
                raise TypeError(f"attach() needs torch optimizers, got {type(optimizer).__name__}: {optimizer!r}")
        if len({id(optimizer) for optimizer in optimizers}) < len(optimizers):
            raise RuntimeError("attach() got the same optimizer twice: gradients would be clipped twice a step")
        self._clip_, self._layout, self._known = clip_, layout, known
        self._may_skip, self._scaler = may_skip, scaler
        self._stepped: set[int] = set()
        self._report: ClipReport | None = None
        self._clipped = ClippedGradients()
        self._sizes: dict[int, list[int]] = {}
        self._found_inf: dict[int, Any] = {}
        for optimizer in optimizers:
            self._check_parameters(optimizer)
        self._handles = [optimizer.register_step_pre_hook(self._before_step) for optimizer in optimizers]
        if may_skip:
            self._handles += [optimizer.register_step_post_hook(self._after_step) for optimizer in optimizers]
        self._optimizers = optimizers

    @property
    def attached(self) -> bool:
        """Whether the hooks are on the optimizers: `remove` has not been called."""
        return bool(self._handles)

    def remove(self) -> None:
        """Remove the hooks from the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _check_parameters(self, optimizer: torch.optim.Optimizer) -> None:
        for g, group in enumerate(optimizer.param_groups):
            for i, param in enumerate(group["params"]):
                if id(param) not in self._known:
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
        # The order of steps is the same on every rank, so it alone starts a round on a rank without gradients. New
        # gradients are a second reason to start one; their absence is never a reason not to.
        if not self._stepped or id(optimizer) in self._stepped or self._has_new_gradients(optimizer):
            if self._scaler is not None:
                for other in self._optimizers:
                    if self._has_new_gradients(other):
                        check_unscaled(self._scaler, other)
            self._report = self._clip_()
            self._stepped = set()
            self._clipped.remember(self._layout)
        self._stepped.add(id(optimizer))
        if len(self._stepped) == len(self._optimizers):
            self._stepped = set()
        if self._may_skip:
            self._make_skip(optimizer)

    def _has_new_gradients(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether a gradient of `optimizer` was replaced or written to since the last clip."""
        covered = {id(tensor.param) for tensor in self._layout}
        params = [param for group in optimizer.param_groups for param in group["params"]]
        return any(id(param) in covered and self._clipped.is_new(param) for param in params)

    def _make_skip(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the step of `optimizer` change nothing if the round's report says to skip it."""
        assert self._report is not None
        skip = self._report.skip
        if getattr(optimizer, "_step_supports_amp_scaling", False) and not _holds_dtensors(optimizer):
            # A fused optimizer reads this flag on the device. A GradScaler may have set its own flag already.
            before = getattr(optimizer, "found_inf", None)
            self._found_inf[id(optimizer)] = before
            flag = skip.float()  # 0 or 1: the kernels compare it with exactly 1
            optimizer.found_inf = flag if before is None else torch.maximum(before, flag)  # type: ignore[attr-defined]
        elif bool(skip):
            # Optimizers ignore parameters without a gradient, so the step does nothing, on every rank alike.
            for group in optimizer.param_groups:
                for param in group["params"]:
                    param.grad = None

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if id(optimizer) in self._found_inf:
            optimizer.found_inf = self._found_inf.pop(id(optimizer))  # type: ignore[attr-defined]


def _holds_dtensors(optimizer: torch.optim.Optimizer) -> bool:
    # A fused kernel refuses a plain flag beside DTensor parameters.
    return any(isinstance(param, DTensor) for group in optimizer.param_groups for param in group["params"])
