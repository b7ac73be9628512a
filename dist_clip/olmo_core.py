"""Clipping in OLMo-core's Trainer: one callback. docs/frameworks/olmo_core.md has the page.

Example:
    >>> from dist_clip.olmo_core import ClipCallback
    >>> callback = ClipCallback("logclip ratio=3")  # for trainer_config.with_callback("dist_clip", callback)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dist_clip.adapter import make_clipper, refuse_native_clip
from dist_clip.clipper import GradClipper
from dist_clip.optimizers import SkippableStep, warn_of_lost_state

try:
    from olmo_core.optim import SkipStepOptimizer
    from olmo_core.train.callbacks import Callback
    from olmo_core.train.common import OPTIM_GRAD_NORM_METRIC, TRAIN_CE_LOSS_METRIC, MetricMergeStrategy
except ImportError:
    raise ImportError("dist_clip.olmo_core needs OLMo-core: pip install 'dist-clip[olmo-core]'") from None

__all__ = ["ClipCallback"]


@dataclass
class ClipCallback(Callback):
    """Clips before each optimizer step of OLMo-core's `Trainer`, records the norms, and saves its state in the checkpoint.

    It records "optim/total grad norm", the norm before the clip, which `StabilityMonitorCallback` reads, and the numbers
    of `ClipReport.metrics`. SkipStep optimizers get the norm as their ``latest_grad_norm``.

    A step is not taken where a guard or ``nonfinite="skip"`` skips it. Weights, moments and the optimizer's step count stay
    as they are, and its norm stays out of a SkipStep optimizer's window; the learning rate's schedule goes on.

    Args:
        policy: a policy, or its name, command line, JSON or dict (`dist_clip.policy`). None: `dist_clip.recommended`. A
            name or a command line can be set from OLMo-core's own command line.
        guard: a guard or several, or as of `policy` (`dist_clip.guard`); None: none, or the recommended one where `policy`
            is None as well; False: none.
        options: more keyword arguments of `GradClipper`. The pipeline's group is the train module's.

    Attributes:
        clipper: the clipper, once the callback is attached; None before, and for a train module that only evaluates.

    Raises:
        ValueError: when it is attached: the train module has a ``max_grad_norm`` as well.
        TypeError: when it is attached: the optimizer is OLMoDDP's, which clips inside its step.

    Example:
        >>> from dist_clip.olmo_core import ClipCallback
        >>> callback = ClipCallback()  # for trainer_config.with_callback("dist_clip", callback)
    """

    policy: Any = None
    guard: Any = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clipper: GradClipper | None = None
        self._steps: list[SkippableStep] = []
        self._skipped = self._loaded = False

    def post_attach(self) -> None:
        """Make the clipper."""
        module: Any = self.trainer.train_module
        _refuse_other_clips(module)
        optimizers = _optimizers_of(module)
        if not optimizers:
            return  # built with eval_only
        # The norm is what StabilityMonitorCallback and SkipStep optimizers look at, also across pipeline stages.
        options = {"pp_group": getattr(module, "pp_group", None), "log_global_norm": True, **self.options}
        target = getattr(module, "model_parts", None) or module.model
        self.clipper = make_clipper(target, self.policy, self.guard, **options)
        self._steps = [SkippableStep(optimizer) for optimizer in optimizers]

    def pre_optim_step(self) -> None:
        """Clip, record, and have the step left out if it is to be skipped."""
        _refuse_other_clips(self.trainer.train_module)
        clipper = self.clipper
        assert clipper is not None
        loss = self.trainer.get_metric(TRAIN_CE_LOSS_METRIC)
        if loss is not None:  # only the pipeline's last stage may have it
            clipper.observe_loss(loss)
        report = clipper.clip_()
        self._skipped = clipper.may_skip and bool(report.skip)
        for step in self._steps:
            step.leave_out(self._skipped)
        norm = report.global_norm
        if norm is not None:
            self.trainer.record_metric(OPTIM_GRAD_NORM_METRIC, norm)
        for key, value in report.metrics().items():
            self.trainer.record_metric(key, value)
        if norm is not None and not self._skipped:
            for optimizer in _optimizers_of(self.trainer.train_module):
                if isinstance(optimizer, SkipStepOptimizer):
                    optimizer.latest_grad_norm = norm

    def post_train_batch(self) -> None:
        """Correct what a SkipStep optimizer says of a step that it was not asked for."""
        if self._skipped and isinstance(_optimizers_of(self.trainer.train_module)[0], SkipStepOptimizer):
            self.trainer.record_metric("optim/step skipped", 1.0, merge_strategy=MetricMergeStrategy.latest)
        self._skipped = False

    def post_checkpoint_loaded(self, path: Any) -> None:
        """Warn if the optimizer's state was loaded, and none of the clipper."""
        if self.clipper is not None and not self._loaded:
            optimizers = _optimizers_of(self.trainer.train_module)
            name = self.trainer.get_callback_name(self)
            warn_of_lost_state(optimizers, f"the checkpoint has no state of the callback {name!r}", stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        """Return the clipper's state; empty without a clipper."""
        return {} if self.clipper is None else self.clipper.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; nothing of a run that did not train."""
        if self.clipper is not None and state_dict:
            self.clipper.load_state_dict(state_dict)
            self._loaded = True


def _optimizers_of(module: Any) -> list[Any]:
    several = getattr(module, "optimizers", None)  # the pipeline's, one a stage
    one = getattr(module, "optim", None)
    return list(several) if several else [] if one is None else [one]


def _refuse_other_clips(module: Any) -> None:
    value = getattr(module, "max_grad_norm", None)
    if value is not None:
        refuse_native_clip("OLMo-core", "max_grad_norm", value)
    for part in (module, *_optimizers_of(module)):
        if any(cls.__name__ in ("OLMoDDPTrainModule", "OLMoDDPOptimizer") for cls in type(part).__mro__):
            raise TypeError(
                f"{type(part).__name__} keeps gradients in buffers of its own and clips inside its step: dist_clip cannot "
                "clip there. Use TransformerTrainModule or TransformerPipelineTrainModule"
            )
