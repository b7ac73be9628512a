"""What `attach` must know of an optimizer or a wrapper of one, and how it replaces its step.

Optimizers are any objects with ``step`` and ``param_groups``: torch's, subclasses, and other authors' wrappers.
"""

from __future__ import annotations

import contextlib
import functools
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_DEFERRING = ("accelerate", "lightning", "lightning_fabric", "pytorch_lightning")
"""Packages whose wrappers keep an optimizer as ``.optimizer`` and only decide whether it steps."""

BY_HAND = "clip by hand instead: clipper.clip_() before its step, and no step where clipper.last_report.skip is set"


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer inside of wrappers that keep it as ``.optimizer``.

    Raises:
        TypeError: no optimizer.
    """
    while (_only_defers(optimizer) or not _is_optimizer(optimizer)) and _is_optimizer(
        inner := getattr(optimizer, "optimizer", None)
    ):
        optimizer = inner
    if not _is_optimizer(optimizer):
        raise TypeError(
            f"attach() needs optimizers, with step() and param_groups, got {type(optimizer).__name__}: {optimizer!r}; "
            f"{BY_HAND}"
        )
    return optimizer


def _only_defers(optimizer: Any) -> bool:
    return any(cls.__module__.partition(".")[0] in _DEFERRING for cls in type(optimizer).__mro__)


def inside_of(optimizer: Any) -> list[Any]:
    """Return all optimizers that `optimizer` wraps, directly or not: attributes, or entries of lists and dictionaries."""
    found = {id(optimizer): optimizer}
    waiting = [optimizer]
    while waiting:
        outer = waiting.pop()
        for value in vars(outer).values() if hasattr(outer, "__dict__") else ():
            several = (
                value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
            )
            new = {id(each): each for each in several if _is_optimizer(each) and id(each) not in found}
            found |= new
            waiting += new.values()
    return list(found.values())[1:]


def has_gradients(optimizer: Any) -> bool:
    """Return whether a parameter of the optimizer has a gradient."""
    return any(param.grad is not None for param in params_of(optimizer))


def versions_of(optimizer: Any) -> list[int]:
    """Return how often each parameter of the optimizer was written to."""
    return [param._version for param in params_of(optimizer)]


def refuse_unfinished_gradients(optimizer: Any) -> None:
    """Raise for an optimizer whose step, or whose backward, does what has to come before the clip."""
    name = type(optimizer).__name__
    if getattr(optimizer, "_overlap_with_ddp", False):
        raise TypeError(
            f"{name} with overlap_with_ddp=True steps inside backward(), before the norm of all gradients is known: "
            "attach() needs overlap_with_ddp=False"
        )
    if callable(getattr(optimizer, "skip_synchronize", None)):
        raise TypeError(
            f"{name} averages gradients over the ranks inside its step, after attach() would have clipped them. Clip by "
            "hand: optimizer.synchronize(), clipper.clip_(), then its step inside `with optimizer.skip_synchronize():`"
        )


def is_fused_alone(optimizer: Any) -> bool:
    """Return whether the step is a fused kernel of torch's, which looks at ``found_inf``, and no more than that.

    A subclass, a wrapper that passes attributes on, and a step of the user's own do more, which a skip must skip, too.
    """
    if not isinstance(optimizer, torch.optim.Optimizer) or not vars(optimizer).get("_step_supports_amp_scaling", False):
        return False
    own = vars(optimizer).get("step")
    of_torch = own is None or hasattr(own, "_wrapped_by_lr_sched") or hasattr(own, "_torchdynamo_orig_callable")
    return of_torch and type(optimizer).step.__module__.startswith("torch.optim.")


def _is_optimizer(value: Any) -> bool:
    return callable(getattr(value, "step", None)) and isinstance(getattr(value, "param_groups", None), list)


def replace_step(optimizer: Any, run: Callable[..., Any]) -> Callable[[], None]:
    """Have ``optimizer.step(...)`` call ``run(optimizer, its own step, ...)``. Returns what undoes it.

    Raises:
        TypeError: the object does not let its step be replaced.
    """
    step = optimizer.step
    own = vars(optimizer).get("step") if hasattr(optimizer, "__dict__") else None

    @functools.wraps(step)
    def replaced(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not optimizer:  # a copy of it, which nobody attached to
            return type(self).step(self, *args, **kwargs)
        return run(optimizer, step, *args, **kwargs)

    # A method, for torch's schedulers ask for its __func__.
    method = types.MethodType(replaced, optimizer)
    try:
        optimizer.step = method
    except AttributeError:
        method = None  # type: ignore[assignment]
    if method is None or optimizer.step is not method:
        raise TypeError(f"attach() cannot replace the step of {type(optimizer).__name__}; {BY_HAND}")

    def undo() -> None:
        # A scheduler that was made later has replaced it once more, and calls ours, which then only passes on.
        if vars(optimizer).get("step") is method:
            if own is None:
                del optimizer.step
            else:
                optimizer.step = own

    return undo


def guard_step(optimizer: Any, check: Callable[..., None]) -> Callable[[], None]:
    """Run `check` in each step of `optimizer` that runs torch's hooks. Returns what undoes it."""
    try:
        return optimizer.register_step_pre_hook(check).remove
    except (AttributeError, KeyError, TypeError):  # a wrapper that has torch's methods, but not what they work on
        return lambda: None


STATE_KEY = "dist_clip"
"""The entry of an optimizer's state dict that holds a clipper's state."""


def carry(
    optimizer: Any, save: Callable[[], dict[str, Any]], load: Callable[[Mapping[str, Any]], None]
) -> Callable[[], None]:
    """Have the state of a clipper saved and loaded as an entry of the optimizer's. Returns what undoes it.

    Args:
        save: returns the clipper's state.
        load: loads it. Not called for a state dict without the entry, of which there is a warning.

    Raises:
        TypeError: the optimizer has none of torch's hooks for it.
    """

    def put(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, STATE_KEY: save()}

    def take(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        if STATE_KEY in state:
            load(state[STATE_KEY])
        else:
            warnings.warn(
                f"the optimizer's state has no entry {STATE_KEY!r}: the clipper's state was not saved with it, or the "
                "checkpoint functions of torch.distributed dropped it. The clipper goes on as it is",
                stacklevel=4,
            )
        return {key: value for key, value in state.items() if key != STATE_KEY}

    try:
        handles = [
            optimizer.register_state_dict_post_hook(put),
            optimizer.register_load_state_dict_pre_hook(take),
        ]
    except (AttributeError, KeyError, TypeError):
        raise TypeError(
            f"carry_state=True needs torch's hooks of state dicts, which {type(optimizer).__name__} has not: save "
            "clipper.state_dict() yourself"
        ) from None

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


def steps_taken(optimizer: Any) -> int:
    """Return how many steps the optimizer's state says were taken; 0 where it does not say. May sync the host."""
    state = getattr(optimizer, "state", None)
    kept = state.values() if isinstance(state, dict) else ()
    # Muon's parameters have no count where those of AdamW beside them have one.
    steps = next((each["step"] for each in kept if isinstance(each, dict) and "step" in each), 0)
    return int(steps) if isinstance(steps, (int, float, Tensor)) else 0


def warn_of_lost_state(optimizers: Iterable[Any], why: str, stacklevel: int) -> None:
    """Warn if `optimizers` have taken steps, for a clipper that has not. `why` says what to do, or what is missing."""
    steps = max(map(steps_taken, optimizers), default=0)
    if steps > 1:  # checkpoint functions make a state by a step that is none
        warnings.warn(
            f"the optimizer has taken {steps} steps, and the clipper begins at step 0 with its warm-up: {why}. No matter if "
            "this run clips for the first time",
            stacklevel=stacklevel + 1,
        )


def ids_of(optimizer: Any) -> list[int]:
    """Return the ids of the optimizer's parameters."""
    return list(map(id, params_of(optimizer)))


@contextlib.contextmanager
def found_inf_of(optimizer: Any, skip: Tensor) -> Iterator[None]:
    """Have a fused optimizer look at `skip` on the device. A GradScaler may have put a flag of its own there."""
    absent = object()
    before: Any = getattr(optimizer, "found_inf", absent)
    flag = skip.float()  # 0 or 1: the kernels compare it with exactly 1
    optimizer.found_inf = flag if before is absent or before is None else torch.maximum(before, flag)
    try:
        yield
    finally:
        if before is absent:
            del optimizer.found_inf
        else:
            optimizer.found_inf = before


def holds_dtensors(optimizer: Any) -> bool:
    """Return whether a parameter is a DTensor, beside which a fused kernel refuses a plain flag."""
    return any(isinstance(param, DTensor) for param in params_of(optimizer))


def params_of(optimizer: Any) -> list[Tensor]:
    """Return the optimizer's parameters, group by group."""
    return [param for group in optimizer.param_groups for param in group["params"]]


class SkippableStep:
    """Lets one step of an optimizer be left out, also from inside the closure that computes its gradients.

    A framework that calls ``step(closure)`` clips at the closure's end, when the step has begun. Optimizers evaluate the
    closure before anything else, so that leaving it by an exception takes no step at all, whatever the optimizer does
    beside what gradients tell it.

    Args:
        optimizer: an object with ``step``.

    Raises:
        TypeError: its step cannot be replaced.
    """

    def __init__(self, optimizer: Any) -> None:
        self._name = type(optimizer).__name__
        self._skip = self._running = self._clipped = False
        self.remove = replace_step(optimizer, self._run)

    def clips(self) -> None:
        """Say that the gradients of the coming, or of the running, step are about to be clipped.

        Raises:
            RuntimeError: they were already clipped in the running step.
        """
        if self._running and self._clipped:
            raise RuntimeError(
                f"{self._name} evaluates its closure several times in a step, and each would clip and count as a step: "
                "clip by hand in the closure, or use an optimizer that takes one step of one gradient"
            )
        self._clipped = self._running

    def leave_out(self, skip: bool) -> None:
        """Leave the coming, or the running, step out if `skip`."""
        self._skip = skip

    def _run(self, optimizer: Any, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        closure = args[0] if args else kwargs.get("closure")
        if closure is None:
            skip, self._skip = self._skip, False
            return None if skip else step(*args, **kwargs)

        def evaluate() -> Any:
            result = closure()
            if self._skip:
                raise _LeftOut(result)
            return result

        self._running, self._clipped = True, False
        try:
            return step(evaluate, *args[1:], **kwargs) if args else step(**{**kwargs, "closure": evaluate})
        except _LeftOut as left:
            return left.result
        finally:
            self._running = self._skip = False


class _LeftOut(Exception):
    def __init__(self, result: Any) -> None:
        self.result = result
