"""Clipping inside a Megatron optimizer's step, and its state inside the optimizer's checkpoints."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_clip.clipper import GradClipper
from dist_clip.errors import LayoutError
from dist_clip.megatron import checkpoint, compat
from dist_clip.megatron.reader import MegatronReader
from dist_clip.policies import Policy
from dist_clip.step import ClipReport, NonFinite

_MARK = "_dist_clip_attachment"


def attach(
    optimizer: Any,
    policy: Policy,
    *,
    model: nn.Module | Sequence[nn.Module],
    nonfinite: NonFinite = "propagate",
    overrides: Mapping[str, Policy] | None = None,
    exclude: Sequence[str] = (),
    log_global_norm: bool = True,
    kernels: str | None = None,
    detect_desync: bool = False,
    pg_collection: Any = None,
) -> GradClipper:
    """Replace a Megatron optimizer's gradient clipping by `policy`; the training loop stays as it is.

    Call it on every rank once the optimizer exists, before a checkpoint is loaded. From then on ``optimizer.step()``
    clips between the preparation of the gradients (unscaled, and found finite under fp16: a step that overflows is
    skipped before anything is clipped or remembered) and the update, and the built-in clipping is off. The returned grad
    norm is the global norm before clipping, a 0-dim tensor that is the same on every rank. The optimizer's checkpoints
    carry the state.

    Args:
        optimizer: what ``get_megatron_optimizer`` returned (chained, distributed, layer-wise, mixed-precision or fp32).
        policy: any policy, such as `LogClip()`.
        model: the model chunk, or the list of chunks, that the optimizer was made from.
        nonfinite, overrides, exclude: as for `GradClipper`; patterns match global names, as ``explain()`` lists them. With
            "skip" the step reports itself unsuccessful, as Megatron's own skipped steps do.
        log_global_norm: return the global norm also on steps where the policy has no need of it. Across pipeline stages
            it costs one gather of two numbers, under way while the optimizer steps. False: such steps return None.
        kernels, detect_desync: as for `GradClipper`.
        pg_collection: Megatron's ProcessGroupCollection, where the groups are not those of parallel_state.

    Returns:
        The clipper: ``explain()``, ``last_report``, ``state_dict()``; ``clipper.attachment.remove()`` detaches.

    Raises:
        LayoutError: an optimizer, a parameter or a layout that cannot be clipped rightly, named, on every rank.
        RuntimeError: attached already.
    """
    compat.warn_if_untested()
    for node in (optimizer, *getattr(optimizer, "chained_optimizers", ())):
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
    skip_above = compat.skip_threshold(getattr(optimizer, "config", None))
    clipper = GradClipper(
        MegatronReader(optimizer, chunks, groups),
        policy,
        pp_group=pp_group,
        nonfinite=nonfinite,
        overrides=overrides,
        exclude=exclude,
        log_global_norm=log_global_norm,
        skip_above=skip_above,
        kernels=kernels,
        detect_desync=detect_desync,
    )
    clipper.attachment = MegatronAttachment(
        clipper, optimizer, pp_group, skips=nonfinite == "skip", norm_at_once=skip_above is not None
    )
    return clipper


class MegatronAttachment:
    """Methods of one optimizer object, replaced. ``remove()`` puts the class's own back in force.

    Args:
        skips: the user wants steps with a non-finite gradient to be skipped.
        norm_at_once: Megatron compares the norm with a threshold of its own, so it must be there before the step.
    """

    def __init__(
        self,
        clipper: GradClipper,
        optimizer: Any,
        pp_group: dist.ProcessGroup | None,
        *,
        skips: bool,
        norm_at_once: bool,
    ) -> None:
        self._clipper = clipper
        self._optimizer = optimizer
        self._pp_group = pp_group
        self._skips, self._norm_at_once = skips, norm_at_once
        self._report: ClipReport | None = None
        self._norm: Tensor | None = None
        self._saving = False
        self._thresholds: list[tuple[Any, float]] = []
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
        if compat.is_chained(optimizer):
            # A chain scales by config.clip_grad inside its step; a bare optimizer calls clip_grad_norm, which is ours.
            configs = [getattr(node, "config", None) for node in (optimizer, *optimizer.chained_optimizers)]
            for config in {id(config): config for config in configs if config is not None}.values():
                self._thresholds.append((config, config.clip_grad))
                config.clip_grad = 0.0

    @property
    def attached(self) -> bool:
        """Whether the methods are replaced: `remove` has not been called."""
        return bool(self._replaced)

    def remove(self) -> None:
        """Detach: Megatron's own clipping is back."""
        for name in self._replaced:
            delattr(self._optimizer, name)
        self._replaced = []
        delattr(self._optimizer, _MARK)
        for config, threshold in self._thresholds:
            config.clip_grad = threshold

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
            return True  # an overflow: the step is skipped before anything is clipped or remembered
        report = self._report = self._clipper.clip_()
        # The host looks at the flag only where the user wants steps to be skipped. Megatron compares a threshold of its own
        # with the norm that it gets.
        return self._skips and bool(report.skip)

    def _get_grad_norm(self, original: Callable[[], Any]) -> Any:
        if self._report is None:
            return original()  # nobody has clipped: somebody wants to know the norm
        if not self._report.has_global_norm:
            return None
        # The stages may still exchange their sums: the optimizer steps meanwhile, and the number is there at its end.
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
        """For the "torch" format, one file a rank: this stage's state."""
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
        if not is_loading:
            state[checkpoint.KEY] = checkpoint.save(self._clipper.memory, self._pp_group)
        return state

    def _load_state_dict(self, original: Callable[..., Any], state_dict: Any) -> Any:
        found = None
        # Taken out first: a chain counts the entries.
        if isinstance(state_dict, list):
            if state_dict and isinstance(state_dict[-1], Mapping) and set(state_dict[-1]) == {checkpoint.KEY}:
                found, state_dict = state_dict[-1][checkpoint.KEY], state_dict[:-1]
        elif checkpoint.KEY in state_dict:
            found = state_dict[checkpoint.KEY]
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
