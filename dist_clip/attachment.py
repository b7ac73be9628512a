"""Clipping in ``optimizer.step``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch._compile import _disable_dynamo
from torch.amp import GradScaler
from torch.distributed.tensor import DTensor

from dist_clip.errors import LayoutError
from dist_clip.layouts import Layout
from dist_clip.layouts.process_groups import any_rank
from dist_clip.memory.host_copy import capturing
from dist_clip.optimizers import (
    BY_HAND,
    found_inf_of,
    guard_step,
    has_gradients,
    holds_dtensors,
    ids_of,
    inside_of,
    is_fused_alone,
    params_of,
    refuse_unfinished_gradients,
    replace_step,
    unwrapped,
    versions_of,
    warn_of_lost_state,
)
from dist_clip.optimizers import (
    carry as carry_state,
)
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
    """Clips in the ``step`` of one or more optimizers, once a round. `GradClipper.attach` makes it.

    A round is one clip and the steps of the attached optimizers that follow it. It ends when all of them have stepped,
    when one steps again, or when one steps whose gradients changed since the last clip. Optimizers may therefore take
    turns, and a GradScaler may leave one out.

    It replaces ``step`` on the optimizer objects, and not only hooks into it: torch runs step hooks twice where a subclass
    calls its parent's step, and never where a wrapper's step is not torch's. A hook only guards: a step that reaches the
    optimizer on another way is an error, because nothing would clip it.

    Args:
        optimizers: objects with ``step`` and ``param_groups``, at least one, each once. Accelerate's and Lightning's
            wrappers are unwrapped: they may decide not to step. Others are not: what they do around the step of the
            optimizer inside belongs to the step, and a skip must skip it as well.
        clip_: clips all gradients and returns the report.
        layout: the logical tensors that are clipped.
        known: ids of all parameters of the clipper's target, excluded ones included.
        may_skip: whether a report may ask for its step to be skipped.
        scaler: the GradScaler, whose optimizers must all be unscaled before a clip; None without one.
        process_group: all ranks that train the model; None for all there are.
        fresh: whether the clipper has clipped nothing and was given no state.
        carry: saves and loads the clipper's state with the first optimizer's; None: neither.

    Raises:
        TypeError: no optimizer, or an object that is none, or one whose ``step`` cannot be replaced, or whose gradients
            are not complete before its step, or whose state dicts have no hooks for `carry`.
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
        optimizers: tuple[Any, ...],
        *,
        clip_: Callable[[], ClipReport],
        layout: Layout,
        known: frozenset[int],
        may_skip: bool,
        scaler: GradScaler | None,
        process_group: dist.ProcessGroup | None = None,
        fresh: Callable[[], bool] = lambda: False,
        carry: tuple[Callable[[], dict[str, Any]], Callable[[Mapping[str, Any]], None]] | None = None,
    ) -> None:
        if not optimizers:
            raise TypeError("attach() needs an optimizer")
        optimizers = tuple(unwrapped(optimizer) for optimizer in optimizers)
        if len({id(optimizer) for optimizer in optimizers}) < len(optimizers):
            raise RuntimeError("attach() got the same optimizer twice: gradients would be clipped twice a step")
        self._clip_, self._layout, self._known = clip_, layout, known
        self._may_skip, self._scaler, self._process_group = may_skip, scaler, process_group
        self._fresh = fresh
        self._optimizers = optimizers
        self._stepped: set[int] = set()
        self._inside: Any = None  # the optimizer whose step is running
        self._report: ClipReport | None = None
        self._clipped = ClippedGradients()
        self._params: dict[int, list[int]] = {}
        for optimizer in optimizers:
            refuse_unfinished_gradients(optimizer)
            self._check_parameters(optimizer)
        inside = {id(optimizer): inside_of(optimizer) for optimizer in optimizers}
        self._wrapped = {key: _Wrapped(inner, self._check_inner) for key, inner in inside.items() if inner}
        # Optimizers whose step is torch's fused kernel and nothing else: it skips itself, without a host sync.
        self._fused = {id(optimizer) for optimizer in optimizers if is_fused_alone(optimizer)}
        # Nothing is left on the optimizers unless all of them can be attached to.
        self._undo = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            for optimizer in optimizers:
                undo.callback(replace_step(optimizer, self._step))
                undo.callback(guard_step(optimizer, self._check_inside))
            for wrapped in self._wrapped.values():
                for inner in wrapped.inner:
                    undo.callback(guard_step(inner, wrapped.note))
            if carry is not None:
                undo.callback(carry_state(optimizers[0], *carry))
            self._undo = undo.pop_all()
        self._attached = True

    @property
    def attached(self) -> bool:
        """Whether the optimizers' steps clip: `remove` has not been called."""
        return self._attached

    def remove(self) -> None:
        """Detach from the optimizers: their own ``step`` is back."""
        self._attached = False
        self._undo.close()

    def follow(self, layout: Layout, known: frozenset[int]) -> None:
        """Go on with another layout of the same clipper."""
        self._layout, self._known = layout, known
        self._clipped = ClippedGradients()

    def _check_parameters(self, optimizer: Any) -> None:
        for g, group in enumerate(optimizer.param_groups):
            for i, param in enumerate(group["params"]):
                if id(param) not in self._known:
                    raise LayoutError(
                        f"{type(optimizer).__name__} holds a parameter the clipper does not know (param_groups[{g}], "
                        f"number {i}, shape {list(param.shape)}): it would not be clipped. Construct the clipper from "
                        "the same parameters after the model was parallelised, or name it in exclude="
                    )
        self._params[id(optimizer)] = ids_of(optimizer)

    @_disable_dynamo
    def _check_inside(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Raise for a step that did not come through `_step`; the steps that one takes inside itself did."""
        if self._inside is None:
            raise RuntimeError(
                f"{type(optimizer).__name__}.step was called past the attached clipper, so its gradients are not clipped: "
                "call optimizer.step() of the object that was attached, not a reference to step from before attach(). "
                "Accelerate keeps one where it has a GradScaler: attach before accelerator.prepare()"
            )

    def _check_inner(self, inner: Any, args: Any, kwargs: Any) -> None:
        """As `_check_inside`, for the optimizer inside a wrapper, which a checkpoint function may be given."""
        if not initialises_state(inner, args[1:], kwargs, self._process_group, first=self._report is None):
            self._check_inside(inner, args, kwargs)

    def _step(self, optimizer: Any, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Clip if this step begins a round, then step; or skip where the round's clip says so."""
        if not self._attached or self._inside is not None:
            return step(*args, **kwargs)  # a step inside of a step belongs to it
        refuse_closure(args, kwargs)
        self._inside = optimizer
        try:
            if initialises_state(optimizer, args, kwargs, self._process_group, first=self._report is None):
                return step(*args, **kwargs)
            self._clip_round(optimizer)
            if not self._may_skip:
                return self._run(optimizer, step, args, kwargs)
            assert self._report is not None
            skip = self._report.skip
            if id(optimizer) in self._fused and not holds_dtensors(optimizer):
                with found_inf_of(optimizer, skip):
                    return step(*args, **kwargs)
            return None if bool(skip) else self._run(optimizer, step, args, kwargs)
        finally:
            self._inside = None

    def _run(self, optimizer: Any, step: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Step, and raise if no step was taken of the gradients that were clipped."""
        before = self._look_before(optimizer)
        result = step(*args, **kwargs)
        self._look_after(optimizer, before)
        return result

    @_disable_dynamo
    def _look_before(self, optimizer: Any) -> tuple[bool, list[int]]:
        """Return whether there is a gradient, and how often each parameter was written to; see `_look_after`."""
        if wrapped := self._wrapped.get(id(optimizer)):
            wrapped.stepped = False
        gradients = has_gradients(optimizer)
        return gradients, versions_of(optimizer) if wrapped or not gradients else []

    @_disable_dynamo
    def _look_after(self, optimizer: Any, before: tuple[bool, list[int]]) -> None:
        """Raise for a wrapper that stepped nothing, and for an optimizer that moved parameters by gradients kept elsewhere.

        Both are told by writes to parameters, which torch counts; a wrapper's step also by the steps inside it, for some
        write past the count. Muon's authors make gradients of zeros where there are none, and step by momentum alone:
        that is no step by gradients kept elsewhere.
        """
        gradients, versions = before
        if not versions:
            return
        name, moved = type(optimizer).__name__, versions_of(optimizer) != versions
        if moved and not gradients and not has_gradients(optimizer):
            raise RuntimeError(
                f"{name}.step moved parameters, but none of them has a gradient in .grad: it keeps gradients elsewhere, "
                f"where attach() does not clip them. {BY_HAND[0].upper()}{BY_HAND[1:]}; or hand the gradients over in .grad"
            )
        wrapped = self._wrapped.get(id(optimizer))
        if wrapped and gradients and not moved and not wrapped.stepped:
            inner = " and the ".join(type(each).__name__ for each in wrapped.inner)
            raise RuntimeError(
                f"{name}.step took no step, but its gradients are clipped: if it gathers them over several calls, they are "
                f"clipped too often. Attach the {inner} that it wraps instead, whose steps are clipped where they are taken"
            )

    @_disable_dynamo
    def _clip_round(self, optimizer: Any) -> None:
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                f"{type(optimizer).__name__}.step was called inside backward(), before all gradients are there: their norm "
                "is not known yet. Step after backward(); or detach, and call clipper.clip_early_([param]) in the hook "
                "before the step (docs/in-backward.md)"
            )
        if getattr(optimizer, "grad_scale", None) is not None:
            raise RuntimeError(
                "the gradients are still multiplied by the GradScaler's scale (a fused optimizer unscales inside its "
                "step): call scaler.unscale_(optimizer) before scaler.step(optimizer)"
            )
        if ids_of(optimizer) != self._params[id(optimizer)]:
            self._check_parameters(optimizer)  # parameters were added or replaced since
        # The order of steps is the same on every rank; gradients are a second reason to clip, never one not to: a rank
        # that has none of them goes by the order alone.
        if not self._stepped or id(optimizer) in self._stepped or self._has_new_gradients(optimizer):
            if self._scaler is not None:
                for other in self._optimizers:
                    if self._has_new_gradients(other):
                        check_unscaled(self._scaler, other)
            if self._fresh() and not capturing(torch.device("cuda")):
                # The optimizers have taken steps and the clipper has not: looked at before the first clip only.
                warn_of_lost_state(
                    self._optimizers,
                    "load its state before the first step (clipper.load_state_dict), or attach(optimizer, carry_state=True) "
                    "when you save and when you load",
                    stacklevel=5,
                )
            self._report = self._clip_()
            self._stepped = set()
            self._clipped.remember(self._layout)
        self._stepped.add(id(optimizer))
        if len(self._stepped) == len(self._optimizers):
            self._stepped = set()

    def _has_new_gradients(self, optimizer: Any) -> bool:
        """Whether a gradient of `optimizer` is another one, or has been written to, since the last clip."""
        covered = {id(tensor.param) for tensor in self._layout}
        return any(id(param) in covered and self._clipped.is_new(param) for param in params_of(optimizer))


class _Wrapped:
    """The optimizers inside a wrapper, and whether one of them stepped."""

    def __init__(self, inner: list[Any], check: Callable[..., None]) -> None:
        self.inner, self._check = inner, check
        self.stepped = False

    @_disable_dynamo
    def note(self, inner: Any, args: Any, kwargs: Any) -> None:
        self._check(inner, args, kwargs)
        self.stepped = True


def refuse_closure(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise if an argument of ``step`` is a closure."""
    closures = [argument for argument in (*args, *kwargs.values()) if callable(argument)]
    if closures:
        functions = [getattr(each, "func", each) for each in closures]  # of partial()
        owners = {str(getattr(each, "__module__", "")).partition(".")[0] for each in functions}
        lightning = owners & {"lightning", "pytorch_lightning"}
        raise RuntimeError(
            "step(closure) computes gradients inside the step, after this hook: "
            + (
                "Lightning's Trainer does so always. Use Trainer(callbacks=[dist_clip.lightning.ClipCallback(policy)])"
                if lightning
                else "call clipper.clip_() at the end of the closure instead of attach()"
            )
        )


@_disable_dynamo
def initialises_state(
    optimizer: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    process_group: dist.ProcessGroup | None,
    *,
    first: bool = False,
) -> bool:
    """Return whether this is no step of training, but one that torch.distributed.checkpoint takes to make a state.

    It calls ``step(closure=None)`` on a fresh optimizer, with zero gradients and a learning rate of 0 (pytorch#164929).
    torchtitan's copy of it does the same. ``step()`` is always a step of training: the ranks would have to agree on anything
    else, and a rank whose optimizer never gets a state would be alone with that at a learning rate of 0.

    Accelerate's wrapper passes on either as ``step(None)``, which is therefore looked at only before the first clip.

    Args:
        first: whether nothing was clipped yet.
    """
    by_name = not args and kwargs == {"closure": None}
    passed_on = first and args == (None,) and not kwargs
    if not (by_name or passed_on) or getattr(optimizer, "state", None):
        return False
    if any("lr" not in group or float(group["lr"]) != 0 for group in optimizer.param_groups):
        return False
    grads = [param.grad for param in params_of(optimizer) if param.grad is not None]
    local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    flags = [grad.count_nonzero() > 0 for grad in local]
    # Other ranks' shards may have gradients where this rank's have none.
    device = flags[0].device if flags else torch.device("cpu")
    found = torch.stack([flag.to(device) for flag in flags]).any() if flags else torch.zeros((), dtype=torch.bool)
    return not bool(any_rank(found, process_group))
