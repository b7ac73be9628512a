"""Clipping in Hugging Face Accelerate: scripts that call ``accelerator.clip_grad_norm_`` stay as they are."""

from __future__ import annotations

import contextlib
import types
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import OptState

from dist_clip.adapter import make_clipper
from dist_clip.attachment import initialises_state, refuse_closure
from dist_clip.clipper import GradClipper
from dist_clip.errors import LayoutError
from dist_clip.layouts.process_groups import distributed
from dist_clip.optimizers import params_of, replace_step
from dist_clip.reduction.grad_version import ClippedGradients

try:
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.utils import DistributedType
except ImportError:
    raise ImportError("dist_clip.accelerate needs Accelerate: pip install 'dist-clip[accelerate]'") from None

__all__ = ["attach"]

_MARK = "_dist_clip_attachment"
"""Attribute of a prepared optimizer: what clips for it."""

_REFUSED = {
    DistributedType.DEEPSPEED: "DeepSpeed clips inside its engine (gradient_clipping in its configuration), and its "
    "gradients are not in .grad, so dist_clip cannot read them",
    DistributedType.MEGATRON_LM: "Megatron-LM clips inside its optimizer: use dist_clip.megatron.attach(optimizer, policy, "
    "model=...)",
    DistributedType.XLA: "on XLA devices Accelerate reduces gradients inside optimizer.step, after dist_clip would have "
    "clipped them",
}


def attach(
    accelerator: Any, model: nn.Module | Sequence[nn.Module], policy: Any = None, guard: Any = None, **options: Any
) -> GradClipper:
    """Clip by `policy` where a script calls ``accelerator.clip_grad_norm_``, or in the optimizer's step if it does not.

    Call it on every rank after ``accelerator.prepare``. From then on ``accelerator.clip_grad_norm_(parameters, max_norm)``
    clips all gradients of `model` by the policy, whatever `max_norm` is, and returns their global norm before clipping.
    Gradients that no such call clipped are clipped in the prepared optimizer's ``step``. Either way they are clipped
    once, and only where ``accelerator.sync_gradients`` is set. Under fp16 they are unscaled first. A step that is to be
    skipped is not taken, and ``accelerator.optimizer_step_was_skipped`` says so; prepared schedulers then wait, too.

    ``accelerator.save_state`` and ``load_state`` save and load the clipper's state.

    Args:
        accelerator: the `accelerate.Accelerator`.
        model: the prepared model, or a list of prepared models that are clipped together.
        policy: a policy, or its name, string, JSON or mapping, as for `dist_clip.policy`. None: what
            `dist_clip.recommended` returns, with its guard.
        guard: a guard in one of these forms, or a list of them; False: none. The guards see the losses that
            ``accelerator.backward`` is given: of each step their mean.
        options: further keyword arguments of `GradClipper`. ``log_global_norm`` is on, because the norm is returned.

    Returns:
        The clipper; ``clipper.last_report`` says what was done, and ``clipper.attachment.remove()`` detaches.

    Raises:
        RuntimeError: the model or its optimizer is not prepared yet, or the optimizer is attached already.
        ValueError: DeepSpeed, Megatron-LM or XLA; several optimizers under fp16; a policy with scope "shard" on several
            ranks, whose state Accelerate would save of one rank only.
        LayoutError: an optimizer holds a parameter that is not the model's.

    Example (needs Accelerate)::

        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        clipper = dist_clip.accelerate.attach(accelerator, model)
        ...
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)  # clips by the policy
        optimizer.step()
    """
    refuse(accelerator.distributed_type)
    models = [model] if isinstance(model, nn.Module) else list(model)
    trained = {id(param): param for each in models for param in each.parameters() if param.requires_grad}
    prepared = {id(param) for each in accelerator._models for param in each.parameters()}
    optimizers = [
        optimizer
        for optimizer in accelerator._optimizers
        if any(id(param) in trained for param in params_of(optimizer))
    ]
    if not optimizers or not trained.keys() <= prepared:
        what = "the model" if optimizers else "no optimizer of this model"
        raise RuntimeError(
            f"{what} is prepared{' yet' if not optimizers else ' only in part, or not at all'}: first "
            "model, optimizer = accelerator.prepare(model, optimizer), then attach(accelerator, model), whose parameters "
            "are those that the prepared optimizer steps"
        )
    options = {"log_global_norm": True, "scaler": accelerator.scaler, **options}
    clipper = make_clipper(models[0] if len(models) == 1 else models, policy, guard, **options)
    clipper.attachment = AcceleratedAttachment(clipper, optimizers, accelerator)
    accelerator.register_for_checkpointing(clipper)
    return clipper


def refuse(distributed_type: Any) -> None:
    """Raise a ValueError for a way of training whose gradients cannot be clipped from outside."""
    if distributed_type in _REFUSED:
        raise ValueError(f"{distributed_type.value}: {_REFUSED[distributed_type]}")


class AcceleratedAttachment:
    """Clips the gradients of one clipper once a step: in ``accelerator.clip_grad_norm_``, else in the optimizer's step.

    Args:
        clipper: clips them.
        optimizers: the prepared optimizers that step them.
        accelerator: its ``clip_grad_norm_`` is replaced, and its ``backward`` is listened to. None: it is out of reach, and
            who clips earlier than in the step calls `clip`.
        loss: "mean" if losses that ``backward`` gets are to be averaged over the micro-batches of a step, "sum" if they
            have been divided by their number.

    Attributes:
        attached: whether `remove` has not been called.

    Raises:
        LayoutError: an optimizer holds a parameter that the clipper does not know.
        RuntimeError: an optimizer has an attachment already.
        ValueError: several optimizers under fp16, or a policy whose state belongs to ranks.
    """

    def __init__(
        self, clipper: GradClipper, optimizers: Sequence[Any], accelerator: Any = None, *, loss: str = "mean"
    ) -> None:
        self.clipper, self.optimizers, self._accelerator = clipper, list(optimizers), accelerator
        self._scaler = clipper._options.scaler
        self._check()
        self.attached = True
        self._sums_losses = loss == "sum"
        self._loss: Tensor | float | None = None
        self._norm: Tensor | None = None
        self._new = False  # a backward since the last clip
        self._stepped: set[int] = set()
        self._clipped = ClippedGradients()
        self._warned = False
        self._undo = contextlib.ExitStack()
        for optimizer in self.optimizers:
            setattr(optimizer, _MARK, self)
            self._undo.callback(replace_step(optimizer, self._step))
        if accelerator is not None:
            for name in ("clip_grad_norm_", "clip_grad_value_", "backward"):
                self.replace(accelerator, name, getattr(self, f"_{name}"))

    @property
    def _known(self) -> frozenset[int]:
        return self.clipper._made.known

    def remove(self) -> None:
        """Detach: the accelerator and the optimizers do again what they did before, and save no state of the clipper."""
        self.attached = False
        self._undo.close()
        saved = getattr(self._accelerator, "_custom_objects", [])
        if any(each is self.clipper for each in saved):
            saved.remove(self.clipper)

    def replace(self, owner: Any, name: str, run: Callable[..., Any]) -> None:
        """Have ``owner.name(...)`` call ``run(what it was, ...)``, until `remove`."""
        native, own = getattr(owner, name), vars(owner).get(name)

        def replaced(_: Any, *args: Any, **kwargs: Any) -> Any:
            return run(native, *args, **kwargs)

        method = types.MethodType(replaced, owner)
        setattr(owner, name, method)

        def undo() -> None:
            if vars(owner).get(name) is not method:
                return  # a later one has replaced it once more, and calls ours, which then only passes on
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)

        self._undo.callback(undo)

    def clip(self, params: Iterable[Tensor] | None = None) -> Tensor:
        """Clip all gradients, unless they are clipped already. Returns the global norm before clipping, fp32 0-dim.

        Args:
            params: those of the clipper's parameters whose gradients are to be clipped now; None for all of them. All are
                clipped together, at the first call that finds new gradients.
        """
        wanted = None if params is None else {id(param) for param in params}
        owners = [
            optimizer
            for optimizer in self.optimizers
            if wanted is None or any(id(param) in wanted for param in params_of(optimizer))
        ]
        if self._is_due(owners):
            self._clip()
        assert self._norm is not None
        return self._norm

    def _check(self) -> None:
        for optimizer in self.optimizers:
            if not isinstance(optimizer, AcceleratedOptimizer):
                raise ValueError(f"{type(optimizer).__name__} is not an optimizer that Accelerate prepared")
            other = getattr(optimizer, _MARK, None)
            if other is not None and other.attached:
                raise RuntimeError(
                    "this optimizer is attached already: gradients would be clipped twice. "
                    "clipper.attachment.remove() takes the first one off"
                )
            for param in params_of(optimizer):
                if id(param) not in self._known:
                    raise LayoutError(
                        f"{type(optimizer.optimizer).__name__} holds a parameter of shape {list(param.shape)} that is not "
                        "in the model that is attached, and would not be clipped: attach all models that it steps, "
                        "attach(accelerator, [model, other])"
                    )
        if self._scaler is not None and len(self.optimizers) > 1:
            raise ValueError(
                "fp16 with several optimizers of one model: Accelerate updates the GradScaler after each of them, so the "
                "second one's gradients are unscaled twice. Use bf16, or one optimizer"
            )
        if distributed() and any(group.per_shard for group in self.clipper.memory.groups):
            raise ValueError(
                'a policy with scope "shard" has a state on each rank, of which the checkpoint would hold only one: use '
                'scope "tensor"'
            )

    def _is_due(self, owners: Sequence[Any]) -> bool:
        """Whether the gradients of these optimizers have not been clipped since they were computed.

        The order of calls says so, and it is the same on every rank. What the script does to gradients after they were
        clipped is its own affair, and no reason to clip again. Gradients that came past ``accelerator.backward`` are told
        by the marks, which new tensors lack.
        """
        if self._norm is None or self._new or all(id(optimizer) in self._stepped for optimizer in owners):
            return True
        covered = {id(tensor.param) for tensor in self.clipper.layout}  # not those in exclude=
        params = [param for optimizer in owners for param in params_of(optimizer) if id(param) in covered]
        return not all(self._clipped.is_marked(param) for param in params if param.grad is not None)

    def _clip(self) -> None:
        if self._scaler is not None and self._accelerator is not None:
            for optimizer in self.optimizers:
                if self._scaler._per_optimizer_states[id(optimizer.optimizer)]["stage"] is OptState.READY:
                    self._accelerator.unscale_gradients(optimizer)
        if self._loss is not None:
            self.clipper.observe_loss(self._loss)
            self._loss = None
        report = self.clipper.clip_()
        norm = report.global_norm
        # Only with log_global_norm=False, which the user asked for.
        self._norm = torch.full((), torch.nan, device=report.scales.device) if norm is None else norm
        self._new, self._stepped = False, set()
        self._clipped.remember(self.clipper.layout)

    def _step(self, optimizer: Any, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Clip unless that was done, then step; or leave the step out where the report says so."""
        if not self.attached or not optimizer.gradient_state.sync_gradients:
            return step(*args, **kwargs)
        refuse_closure(args, kwargs)
        if initialises_state(optimizer, args, kwargs, self.clipper._options.process_group):
            return step(*args, **kwargs)
        if self._is_due([optimizer]):
            self._clip()
        self._stepped.add(id(optimizer))
        if self._scaler is not None:  # it got the report's flag, and skips by itself
            return step(*args, **kwargs)
        report = self.clipper.last_report
        skip = self.clipper.may_skip and report is not None and bool(report.skip)
        optimizer._is_overflow = skip  # what step_was_skipped returns
        return None if skip else step(*args, **kwargs)

    def _clip_grad_norm_(
        self, native: Callable[..., Any], parameters: Any, max_norm: float, norm_type: float = 2
    ) -> Tensor:
        """Take the place of ``Accelerator.clip_grad_norm_``."""
        params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if not self.attached or not any(id(param) in self._known for param in params):
            return native(params, max_norm, norm_type)  # another model's
        for param in params:
            if param.requires_grad and id(param) not in self._known:
                raise ValueError(
                    "accelerator.clip_grad_norm_ got parameters of the attached model together with others (one of shape "
                    f"{list(param.shape)}): attach all of these models, attach(accelerator, [model, other]), or clip the "
                    "others by a call of their own"
                )
        if float(norm_type) != 2:
            raise ValueError(f"dist_clip measures L2 norms; clip_grad_norm_ was called with norm_type={norm_type}")
        self.warn_of(max_norm, "accelerator.clip_grad_norm_(max_norm=")
        if not self.optimizers[0].gradient_state.sync_gradients:
            return torch.zeros(()) if self._norm is None else self._norm
        return self.clip(params)

    def _clip_grad_value_(self, native: Callable[..., Any], parameters: Any, clip_value: float) -> Any:
        params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if self.attached and any(id(param) in self._known for param in params):
            raise RuntimeError(
                "accelerator.clip_grad_value_ beside dist_clip would clip the gradients twice: leave the call out"
            )
        return native(params, clip_value)

    def _backward(self, native: Callable[..., Any], loss: Any, *args: Any, **kwargs: Any) -> Any:
        if self.attached:
            self._new = True
            if self.clipper._guards.needs_loss and isinstance(loss, Tensor):
                if self._sums_losses:
                    self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()
                else:
                    self.clipper.observe_loss(loss)
        return native(loss, *args, **kwargs)

    def warn_of(self, max_norm: float | None, call: str) -> None:
        """Warn, once, that `max_norm` has no effect, unless the policy clips at it."""
        policy = self.clipper.policy
        own = (None, float("inf"), getattr(policy, "max_norm", None), getattr(policy, "post_max_norm", None))
        if max_norm not in own and not self._warned:
            warnings.warn(
                f"{call}{max_norm:g}) has no effect any more: {policy!r} clips. Pass inf to say so, or give the policy this "
                "threshold",
                stacklevel=4,
            )
            self._warned = True
