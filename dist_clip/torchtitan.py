"""Clipping in torchtitan: an override for its command line, and a Trainer. docs/frameworks/torchtitan.md has the page.

Without code of your own, on torchtitan's command line::

    --override.imports 'dist_clip.torchtitan.clip={"policy": "logclip"}' dist_clip.torchtitan.metrics
    --training.max_norm inf

Example:
    >>> from torchtitan.config.override import derive
    >>> from torchtitan.models.llama3.config_registry import llama3_8b
    >>> from dist_clip.torchtitan import ClipTrainer
    >>> def llama3_8b_clip():  # a config function of yours, for --config
    ...     config = derive(llama3_8b(), ClipTrainer.Config, clip={"policy": "logclip"})
    ...     config.training.max_norm = float("inf")
    ...     return config
"""

from __future__ import annotations

import functools
import math
import weakref
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dist_clip.adapter import make_clipper, numbers_of, refuse_native_clip
from dist_clip.clipper import GradClipper
from dist_clip.errors import LayoutError
from dist_clip.optimizers import replace_step

try:
    import tyro
    from torchtitan.components.metrics import MetricsProcessor
    from torchtitan.components.optimizer import OptimizersContainer
    from torchtitan.config.override import derive, override
    from torchtitan.distributed import utils as dist_utils
    from torchtitan.trainer import Trainer
except ImportError as error:
    raise ImportError(f"dist_clip.torchtitan needs torchtitan: pip install 'dist-clip[torchtitan]' ({error})") from None

__all__ = ["ClipMetrics", "ClipTrainer", "ClippingOptimizers", "clip", "metrics"]

STATE = "dist_clip"
"""Where the clipper's state lies: in the optimizers' state with `clip`, beside it with `ClipTrainer`."""


class ClippingOptimizers(OptimizersContainer):  # type: ignore[misc]
    """torchtitan's optimizers with a clipper, whose state is part of theirs. `clip` puts them in place.

    Gradients are clipped where torchtitan's loop would clip them, or else at the beginning of `step`. A step that a guard
    or ``nonfinite="skip"`` skips changes neither weights nor moments nor what hooks of the step keep; the learning rate's
    schedule goes on.

    Attributes:
        clipper: the clipper of all model parts.

    Raises:
        ValueError: at the first step: ``--training.max_norm`` is not inf, so that gradients would be clipped twice.
        LayoutError: the model is divided into pipeline stages, whose group only `ClipTrainer` knows.

    Example:
        >>> from torchtitan.components.optimizer import default_adamw
        >>> from dist_clip.torchtitan import clip
        >>> clip(default_adamw(lr=3e-4), policy="logclip").clip
        {'policy': 'logclip', 'guard': None}
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):  # type: ignore[misc]
        """The optimizers' configuration, and the clipper's.

        Attributes:
            clip: keyword arguments of the clipper, with policy and guard in any form of `dist_clip.policy`.
            fresh: begin with a new state, because the checkpoint that is loaded has none.
        """

        clip: Annotated[dict[str, Any], tyro.conf.Suppress] = field(default_factory=dict)
        fresh: Annotated[bool, tyro.conf.Suppress] = False

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        super().__init__(config, model_parts=model_parts)
        try:
            self._clip = _Clip(self, model_parts, config.clip)
        except LayoutError as error:
            if "pp_group" not in str(error):
                raise
            raise LayoutError(
                f"{error} (only dist_clip.torchtitan.ClipTrainer knows torchtitan's pipeline group)"
            ) from None
        self.clipper = self._clip.clipper
        self._fresh = config.fresh

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizers' state with the clipper's."""
        state = super().state_dict()
        return state if self._without_state else {**state, STATE: self.clipper.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        super().load_state_dict({key: value for key, value in state_dict.items() if key != STATE})
        if not self._without_state:
            self.clipper.load_state_dict(state_dict[STATE])

    @property
    def _without_state(self) -> bool:
        return self._fresh and self.clipper.last_report is None


@override(target=OptimizersContainer.Config, description="clips gradients with dist_clip")  # type: ignore[untyped-decorator]
def clip(
    config: OptimizersContainer.Config,
    *,
    policy: Any = None,
    guard: Any = None,
    fresh: bool = False,
    **options: Any,
) -> ClippingOptimizers.Config:
    """Have the optimizers clip, for ``--override.imports 'dist_clip.torchtitan.clip={"policy": "logclip"}'``.

    Set ``--training.max_norm inf`` beside it, which switches torchtitan's own clip off.

    Args:
        config: the optimizers' configuration, which torchtitan hands over.
        policy: a name, a command line or a dict (`dist_clip.policy`). None: `dist_clip.recommended`.
        guard: likewise (`dist_clip.guard`), or a list of them. None: none, or the recommended one where `policy` is None as
            well; False: none.
        fresh: True in the first run that clips, if it goes on from a checkpoint that has no state of a clipper.
        options: more keyword arguments of `GradClipper`, such as "nonfinite" or "exclude".

    Returns:
        The configuration of `ClippingOptimizers`.

    Raises:
        TypeError: another kind of optimizers than torchtitan's own; use `ClipTrainer`.

    Example:
        >>> from torchtitan.components.optimizer import default_adamw
        >>> from dist_clip.torchtitan import clip
        >>> clip(default_adamw(lr=3e-4), policy={"name": "adagc", "warmup_steps": 10}).implementation
        'fused'
    """
    if type(config) is not OptimizersContainer.Config:
        raise TypeError(
            f"dist_clip.torchtitan.clip replaces torchtitan's own OptimizersContainer, and here is a "
            f"{type(config).__qualname__}: use dist_clip.torchtitan.ClipTrainer"
        )
    return derive(config, ClippingOptimizers.Config, clip={"policy": policy, "guard": guard, **options}, fresh=fresh)


class ClipMetrics(MetricsProcessor):  # type: ignore[misc]
    """torchtitan's metrics with those of `ClipReport.metrics` beside them. `metrics` puts it in place, beside `clip`.

    Example:
        >>> from torchtitan.components.metrics import MetricsProcessor
        >>> from dist_clip.torchtitan import metrics
        >>> metrics(MetricsProcessor.Config(log_freq=5)).log_freq
        5
    """

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):  # type: ignore[misc]
        """torchtitan's configuration of its metrics."""

    def log(self, *args: Any, extra_metrics: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Log one step. The clipper's numbers are copied to the host once."""
        clipper = getattr(self.optimizers, "clipper", None)
        super().log(*args, extra_metrics={**(extra_metrics or {}), **_numbers(clipper)}, **kwargs)


@override(target=MetricsProcessor.Config, description="logs what dist_clip clips")  # type: ignore[untyped-decorator]
def metrics(config: MetricsProcessor.Config) -> ClipMetrics.Config:
    """Have the metrics show what `clip` clips, for ``--override.imports ... dist_clip.torchtitan.metrics``.

    Raises:
        TypeError: another kind of metrics than torchtitan's own.

    Example:
        >>> from torchtitan.components.metrics import MetricsProcessor
        >>> from dist_clip.torchtitan import metrics
        >>> config = metrics(MetricsProcessor.Config())
    """
    if type(config) is not MetricsProcessor.Config:
        raise TypeError(
            f"dist_clip.torchtitan.metrics replaces torchtitan's own MetricsProcessor, and here is a "
            f"{type(config).__qualname__}: use dist_clip.torchtitan.ClipTrainer"
        )
    return derive(config, ClipMetrics.Config)


class ClipTrainer(Trainer):  # type: ignore[misc]
    """torchtitan's Trainer with a clipper, also of a pipeline's stages. It logs the clipper's metrics as well.

    The clipper's state is ``"dist_clip"`` in the checkpoint, beside model and optimizer. In the first run that clips, if it
    goes on from a checkpoint without one, set ``--checkpoint.exclude_from_loading dist_clip``. Skipped steps are as in
    `ClippingOptimizers`. A guard that looks at the loss gets it.

    Attributes:
        clipper: the clipper of all model parts.

    Raises:
        ValueError: ``--training.max_norm`` is not inf, or `clip` is in ``--override.imports`` as well: gradients would be
            clipped twice.

    Example:
        >>> from torchtitan.config.override import derive
        >>> from torchtitan.models.llama3.config_registry import llama3_8b
        >>> from dist_clip.torchtitan import ClipTrainer
        >>> config = derive(llama3_8b(), ClipTrainer.Config, clip={"policy": "logclip"})
        >>> config.training.max_norm = float("inf")
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):  # type: ignore[misc]
        """The Trainer's configuration, and the clipper's.

        Attributes:
            clip: keyword arguments of the clipper, with policy and guard in any form of `dist_clip.policy`. The command
                line cannot set it.
        """

        clip: Annotated[dict[str, Any], tyro.conf.Suppress] = field(default_factory=dict)

        def to_dict(self) -> dict[str, Any]:
            """Return what torchtitan prints and saves as JSON."""
            return {**Trainer.Config.to_dict(self), "clip": {key: repr(value) for key, value in self.clip.items()}}

    def __init__(self, config: Config) -> None:
        _refuse_native(config.training.max_norm)
        super().__init__(config)
        if isinstance(self.optimizers, ClippingOptimizers):
            raise ValueError(
                "ClipTrainer clips already: take dist_clip.torchtitan.clip out of --override.imports, or use another Trainer"
            )
        pipeline = self.parallel_dims.get_optional_mesh("pp")
        self._clip = _Clip(self.optimizers, self.model_parts, {"pp_group": pipeline, **config.clip})
        self.clipper = self._clip.clipper
        if config.checkpoint.enable:
            self.checkpointer.states[STATE] = self.clipper
        self.metrics_processor.log = functools.partial(_log_with, self.metrics_processor.log, self.clipper)

    def forward_backward_step(self, **kwargs: Any) -> Tensor:
        """Run one micro-batch forward and backward, and keep its loss for guards."""
        loss: Tensor = super().forward_backward_step(**kwargs)
        if not self.parallel_dims.pp_enabled or self.pp_has_last_stage:
            # torchtitan's losses are to be summed over ranks and micro-batches, a clipper's to be averaged.
            mesh = self.parallel_dims.get_optional_mesh("loss")
            parts = self.gradient_accumulation_steps * (1 if mesh is None else mesh.size())
            loss_of_part = loss.detach()
            whole = loss_of_part.full_tensor() if isinstance(loss_of_part, DTensor) else loss_of_part
            self.clipper.observe_loss(whole * parts)
        return loss


class _Clip:
    """A clipper, the optimizers that it clips for, and whether their next step has been clipped yet."""

    def __init__(
        self, optimizers: OptimizersContainer, model_parts: list[nn.Module], arguments: dict[str, Any]
    ) -> None:
        # torchtitan logs the norm of all gradients, also across pipeline stages.
        self.clipper: GradClipper = make_clipper(model_parts, **{"log_global_norm": True, **arguments})
        self.params = frozenset(id(param) for part in model_parts for param in part.parameters())
        self._clipped = False
        replace_step(optimizers, self._step)
        _clips.add(self)
        dist_utils.clip_grad_norm_ = _clip_grad_norm_

    def clip_(self) -> Tensor:
        """Clip, unless this step's gradients are clipped, and return the norm of all gradients before it."""
        if not self._clipped:
            self.clipper.clip_()
        self._clipped = True
        assert self.clipper.last_report is not None
        norm = self.clipper.last_report.global_norm
        return torch.full((), math.nan) if norm is None else norm

    def _step(self, optimizers: OptimizersContainer, step: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._clipped:
            self.clipper.clip_()
        self._clipped, report = False, self.clipper.last_report
        assert report is not None
        # Gradients may lie where a CUDA graph writes them, so that a skip must not take them away.
        return None if self.clipper.may_skip and bool(report.skip) else step(*args, **kwargs)


_clips: weakref.WeakSet[_Clip] = weakref.WeakSet()
_native = dist_utils.clip_grad_norm_


@functools.wraps(_native)
def _clip_grad_norm_(parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> Tensor:
    """Stand in for torchtitan's function, which all of its trainers call between backward and the step.

    With max_norm=inf torchtitan's would still multiply all gradients by inf / norm: NaN wherever one tensor has an Inf.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    for each in _clips:
        if any(id(param) in each.params for param in parameters):
            _refuse_native(max_norm)
            return each.clip_()
    return _native(parameters, max_norm, *args, **kwargs)


def _refuse_native(max_norm: float) -> None:
    if max_norm != math.inf:
        refuse_native_clip("torchtitan", "--training.max_norm", max_norm, "inf")


def _log_with(
    log: Any, clipper: GradClipper, *args: Any, extra_metrics: dict[str, Any] | None = None, **kwargs: Any
) -> None:
    log(*args, extra_metrics={**(extra_metrics or {}), **_numbers(clipper)}, **kwargs)


def _numbers(clipper: GradClipper | None) -> dict[str, float]:
    """Return the metrics of the last clip; none before it."""
    return {} if clipper is None or clipper.last_report is None else numbers_of(clipper.last_report)
