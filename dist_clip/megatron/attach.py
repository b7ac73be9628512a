"""Clipping inside a Megatron optimizer's step, and its state inside the optimizer's checkpoints."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_clip.clipper import GradClipper
from dist_clip.construction import Overrides
from dist_clip.errors import LayoutError
from dist_clip.guards import Guard, SkipAbove
from dist_clip.layouts import ShardedBy
from dist_clip.megatron import checkpoint, compat
from dist_clip.megatron.reader import MegatronReader
from dist_clip.megatron.selection import APART, selections, with_norm_groups
from dist_clip.policies import Policy
from dist_clip.step import ClipReport, NonFinite

_MARK = "_dist_clip_attachment"


def attach(
    optimizer: Any,
    policy: Policy,
    *,
    model: nn.Module | Sequence[nn.Module],
    nonfinite: NonFinite = "propagate",
    overrides: Overrides | None = None,
    exclude: Sequence[str] = (),
    guard: Guard | Sequence[Guard] | None = None,
    log_global_norm: bool = True,
    kernels: str | None = None,
    detect_desync: bool = False,
    sharded: Mapping[str, ShardedBy] | None = None,
    check_replicas: bool = True,
    pg_collection: Any = None,
) -> GradClipper:
    """Replace a Megatron optimizer's gradient clipping by `policy`; the training loop stays as it is.

    Call it on every rank once the optimizer exists, and before a checkpoint is loaded. From then on
    ``optimizer.step()`` clips after the gradients are prepared and before the update, and the built-in clipping is off.
    Under fp16 the gradients are unscaled by then, and a step that overflows is skipped before anything is clipped or
    remembered. The grad norm that the step returns is the global norm before clipping, fp32 0-dim, the same on every
    rank. The optimizer's checkpoints contain the state.

    Args:
        optimizer: what ``get_megatron_optimizer`` returned (chained, distributed, layer-wise, mixed-precision, fp32, or
            Megatron-FSDP's).
        policy: `GlobalNorm`, `AdaGC`, `LogClip`, `ZClip`, or a policy of your own (docs/policies.md).
        model: the model chunk, or the list of chunks, that the optimizer was made from.
        nonfinite, overrides, exclude: as for `GradClipper`; patterns match global names, as ``explain()`` lists them.
            With "skip" a skipped step returns that it was not successful, as Megatron's own skipped steps do. A function
            gets this rank's part of the model parameter; an optimizer is one of the chained_optimizers.
        guard: as for `GradClipper`; the same holds for the steps that it skips. The host reads whether to skip, on each
            step. Megatron's loop does not hand the loss to the optimizer: for a guard that looks at it, call
            ``clipper.observe_loss(loss)`` in the loss function.
        log_global_norm: return the global norm also on steps where no policy needs it. Across pipeline stages it costs
            one gather of two numbers, which overlaps with the optimizer step. False: such steps return None.
        kernels, detect_desync, check_replicas: as for `GradClipper`.
        sharded: as for `GradClipper`. A dimension without a group is split over the tensor's TP group, which is the expert
            TP group for experts; None says that a tensor is replicated although it is marked as split.
        pg_collection: Megatron's ProcessGroupCollection. None: the groups of megatron.core.parallel_state.

    Returns:
        The clipper, with ``explain()``, ``last_report`` and ``state_dict()``; ``clipper.attachment.remove()`` detaches.

    Raises:
        LayoutError: an optimizer, a parameter or a layout that cannot be clipped correctly; named, on every rank.
        TypeError, ValueError: an argument of the wrong type or value.
        RuntimeError: the optimizer is attached already.
        ImportError: megatron-core is not installed, or the kernels that were asked for do not work.

    Example (needs Megatron-core)::

        from megatron.core.optimizer import get_megatron_optimizer

        optimizer = get_megatron_optimizer(optimizer_config, model_chunks)
        clipper = dist_clip.megatron.attach(optimizer, dist_clip.LogClip(), model=model_chunks)
        print(clipper.explain())
        successful, grad_norm, _ = optimizer.step()  # clips; clipper.last_report says what it did
    """
    compat.warn_if_untested()
    for node in compat.inside(optimizer):
        if getattr(node, _MARK, None) is not None:
            raise RuntimeError(
                f"this {type(node).__name__} is attached already: gradients would be clipped twice. "
                "clipper.attachment.remove() takes the first one off"
            )
    chunks = [model] if isinstance(model, nn.Module) else list(model)
    if not chunks or not all(isinstance(chunk, nn.Module) for chunk in chunks):
        raise TypeError(f"model must be a module or a list of model chunks, got {type(model).__name__}")
    groups = compat.process_groups(pg_collection)
    pp_group = groups.pp if groups.pp is not None and groups.pp.size() > 1 else None
    threshold = compat.skip_threshold(getattr(optimizer, "config", None))
    # Megatron compares its own threshold with the norm that it gets, and does not step; nothing may remember such a step.
    own = [] if threshold is None else [SkipAbove(threshold)]
    overrides = with_norm_groups(selections(overrides, optimizer), policy, chunks, groups)
    given = [] if guard is None else [guard] if isinstance(guard, Guard) else guard
    clipper = GradClipper(
        MegatronReader(optimizer, chunks, groups, sharded),
        policy,
        pp_group=pp_group,
        nonfinite=nonfinite,
        overrides=overrides,
        exclude=exclude,
        log_global_norm=log_global_norm,
        guard=[*own, *given] if own and isinstance(given, Sequence) else given,
        kernels=kernels,
        detect_desync=detect_desync,
        sharded=sharded,
        check_replicas=check_replicas,
    )
    if own and not all(group.policy.guarded or group.pattern.startswith(APART) for group in clipper.memory.groups):
        raise ValueError(
            f"Megatron's grad_norm_skip_threshold={threshold:g} looks at the norm of all tensors, those of "
            "MeasureOnly(guarded=False) among them: switch it off, and pass guard=SkipAbove(...) in its place"
        )
    clipper.attachment = MegatronAttachment(
        clipper,
        optimizer,
        pp_group,
        skips=nonfinite == "skip" or bool(given),
        norm_at_once=bool(own),
        skips_by_threshold=bool(own) and any(group.pattern.startswith(APART) for group in clipper.memory.groups),
    )
    return clipper


class MegatronAttachment:
    """Replaces methods of one optimizer object. ``remove()`` restores the methods of its class.

    Args:
        clipper: clips the optimizer's gradients.
        optimizer: a Megatron optimizer.
        pp_group: the group across pipeline stages; None without them.
        skips: whether the clipper may ask for a step to be skipped that Megatron would take.
        norm_at_once: Megatron compares the norm with its own threshold, so the norm must be known before the step.
        skips_by_threshold: skip in Megatron's place the steps above its threshold: the norm that it would compare has
            tensors in it that are to be left out.

    Attributes:
        after_clip: is called after each clip, on every rank; None: nothing is.

    Raises:
        LayoutError: the optimizer lacks one of the methods.
    """

    def __init__(
        self,
        clipper: GradClipper,
        optimizer: Any,
        pp_group: dist.ProcessGroup | None,
        *,
        skips: bool,
        norm_at_once: bool,
        skips_by_threshold: bool,
    ) -> None:
        self._clipper = clipper
        self._optimizer = optimizer
        self._pp_group = pp_group
        self._skips = skips or skips_by_threshold
        self._norm_at_once = norm_at_once and not skips_by_threshold
        self._report: ClipReport | None = None
        self._norm: Tensor | None = None
        self.after_clip: Callable[[], None] | None = None
        self._saving = False
        self._megatron_fsdp = any(compat.is_megatron_fsdp(leaf.optimizer) for leaf in compat.leaves(optimizer))
        self._verifies = False
        self._thresholds: list[tuple[Any, str, float]] = []
        self._replaced: list[str] = []
        for name in (
            "prepare_grads",
            "get_grad_norm",
            "clip_grad_norm",
            "step_with_ready_grads",
            "state_dict",
            "sharded_state_dict",
            "load_state_dict",
        ):
            self._replace(name)
        setattr(optimizer, _MARK, self)
        # A chain scales by config.clip_grad inside its step; a bare optimizer calls clip_grad_norm, which is replaced.
        off = {"clip_grad": 0.0} if compat.is_chained(optimizer) else {}
        if skips_by_threshold:
            off["grad_norm_skip_threshold"] = math.inf
        configs = [getattr(node, "config", None) for node in compat.inside(optimizer)]
        for config in {id(config): config for config in configs if config is not None}.values():
            for field, value in off.items():
                self._thresholds.append((config, field, getattr(config, field)))
                setattr(config, field, value)

    @property
    def attached(self) -> bool:
        """Whether the methods are replaced: `remove` has not been called."""
        return bool(self._replaced)

    def verify_next(self) -> None:
        """Verify all norms at the next step that clips: print the report on rank 0, and raise if anything differs.

        A Megatron optimizer prepares its gradients inside its step, so ``clipper.verify()`` cannot be called before it.
        The step then raises `VerifyError` on every rank, before anything is clipped.
        """
        self._verifies = True

    def remove(self) -> None:
        """Detach from the optimizer, and restore Megatron's own clipping."""
        for name in self._replaced:
            delattr(self._optimizer, name)
        self._replaced = []
        delattr(self._optimizer, _MARK)
        for config, field, value in self._thresholds:
            setattr(config, field, value)

    def _replace(self, name: str) -> None:
        original = getattr(self._optimizer, name, None)
        if original is None:
            raise LayoutError(
                f"{type(self._optimizer).__name__} has no method {name}: megatron-core {compat.version()} is not one that "
                "dist_clip knows"
            )
        replacement: Callable[..., Any] = getattr(self, f"_{name}")
        setattr(self._optimizer, name, functools.wraps(original)(functools.partial(replacement, original)))
        self._replaced.append(name)

    # ------------------------------------------------------------------------------------------------------- a step

    def _prepare_grads(self, original: Callable[[], bool]) -> bool:
        self._report = self._norm = None
        if original():
            self._clipper.forget_loss()
            return True  # an overflow: the step is skipped before anything is clipped or remembered
        if self._verifies:
            self._verifies = False
            self._verify()
        report = self._report = self._clipper.clip_()
        if self.after_clip is not None:
            self.after_clip()
        # Reading the flag syncs the host, so it is read only where it is needed. Megatron compares its own threshold
        # with the norm that it gets.
        return self._skips and bool(report.skip)

    def _verify(self) -> None:
        report = self._clipper.verify()
        if dist.get_rank() == 0:
            print(report, flush=True)
        report.raise_if_wrong()

    def _get_grad_norm(self, original: Callable[[], Any]) -> Any:
        if self._report is None:
            return original()  # called outside of a step, for the norm of gradients that are not clipped
        if not self._report.has_global_norm:
            return None
        # The stages may still exchange their sums, so the norm is filled in when the optimizer has stepped.
        self._norm = torch.zeros((), dtype=torch.float32, device=self._report.skip.device)
        if self._norm_at_once:
            self._fill_in_norm()  # Megatron is about to compare it
        return self._norm

    def _clip_grad_norm(self, original: Callable[[float], Any], clip_grad: float) -> Any:
        return self._get_grad_norm(functools.partial(original, clip_grad))

    def _step_with_ready_grads(self, original: Callable[[], bool]) -> bool:
        success = original()
        self._fill_in_norm()
        self._report = None
        return success

    def _fill_in_norm(self) -> None:
        if self._norm is not None and self._report is not None and self._report.global_norm is not None:
            self._norm.copy_(self._report.global_norm)

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def _state_dict(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the optimizer's state dict with this stage's clipping state, for the "torch" checkpoint format."""
        state = original(*args, **kwargs)
        if self._saving:
            return state  # called by sharded_state_dict
        mine = self._clipper.state_dict()
        if isinstance(state, list):
            return [*state, {checkpoint.KEY: mine}]
        return {**state, checkpoint.KEY: mine}

    def _sharded_state_dict(
        self, original: Callable[..., Any], model_sharded_state_dict: Any, is_loading: bool = False, **kwargs: Any
    ) -> Any:
        self._saving = True
        try:
            state = original(model_sharded_state_dict, is_loading, **kwargs)
        finally:
            self._saving = False
        payload = None if is_loading else checkpoint.save(self._clipper.memory, self._pp_group)
        if self._megatron_fsdp:
            state[checkpoint.KEY] = checkpoint.to_bytes(payload)
        elif not is_loading:
            state[checkpoint.KEY] = payload
        return state

    def _load_state_dict(self, original: Callable[..., Any], state_dict: Any) -> Any:
        found = None
        # Taken out before the optimizer loads, because a chain counts the entries.
        if isinstance(state_dict, list):
            if state_dict and isinstance(state_dict[-1], Mapping) and set(state_dict[-1]) == {checkpoint.KEY}:
                found, state_dict = state_dict[-1][checkpoint.KEY], state_dict[:-1]
        elif checkpoint.KEY in state_dict:
            found = checkpoint.from_bytes(state_dict[checkpoint.KEY])
            state_dict = {key: value for key, value in state_dict.items() if key != checkpoint.KEY}
        result = original(state_dict)
        if found is None:
            warnings.warn(
                "the checkpoint has no clipping state (it was saved before dist_clip was attached): it starts afresh, with "
                "a warm-up",
                stacklevel=2,
            )
        elif isinstance(found, Mapping) and isinstance(found.get("tensors"), list):
            checkpoint.load(self._clipper.memory, found)
        else:
            self._clipper.load_state_dict(found)
        return result
