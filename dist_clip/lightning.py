"""Clipping in Lightning's Trainer: one callback. docs/frameworks/lightning.md has the page.

Example:
    >>> from lightning.pytorch import Trainer
    >>> from dist_clip.lightning import ClipCallback
    >>> trainer = Trainer(callbacks=[ClipCallback("logclip ratio=3")], accelerator="cpu", logger=False)
"""

from __future__ import annotations

import glob
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dist_clip.adapter import make_clipper, refuse_native_clip
from dist_clip.clipper import GradClipper
from dist_clip.errors import LayoutError
from dist_clip.layouts.naming import named_parameters
from dist_clip.optimizers import SkippableStep, ids_of, params_of, warn_of_lost_state
from dist_clip.policies import ZClip
from dist_clip.reduction.grad_version import ClippedGradients
from dist_clip.step import ClipReport

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback  # type: ignore[assignment]
    except ImportError:
        raise ImportError(
            "dist_clip.lightning needs Lightning: pip install 'dist-clip[lightning]', or pip install pytorch-lightning"
        ) from None

__all__ = ["ClipCallback", "ZClipLightningCallback"]


class ClipCallback(Callback):
    """Clips before each optimizer step of a Lightning `Trainer`, logs the norms, and saves its state in the checkpoint.

    The clippers are made when training starts, from the model as the strategy wrapped it. Each optimizer has a clipper of
    its own, for its parameters: the optimizers of a GAN step by losses of their own.

    A step is not taken where a guard, ``nonfinite="skip"`` or the precision plugin's GradScaler skips it. Weights, moments
    and the optimizer's step count stay as they are; schedulers and Lightning's ``global_step`` go on.

    Args:
        policy: a policy, or its name, command line, JSON or dict (`dist_clip.policy`). None: `dist_clip.recommended`.
        guard: a guard or several, or as of `policy` (`dist_clip.guard`); None: none, or the recommended one where `policy`
            is None as well; False: none.
        together: one clipper for all optimizers, which all step after one backward (Muon and AdamW). It clips before the
            first of them steps; a guard skips all their steps or none.
        log: log "grad_norm" (before the clip) and the ``clip/...`` numbers of `ClipReport.metrics`, with
            ``LightningModule.log_dict``. With several optimizers (and without `together`) their number follows:
            "grad_norm/0", "grad_norm/1".
        prog_bar: show "grad_norm" in the progress bar.
        options: more keyword arguments of `GradClipper`. The ``scaler`` is the precision plugin's.

    Attributes:
        clippers: one a optimizer, or one with `together`; empty before training starts.

    Raises:
        ValueError: when training starts: the Trainer has a ``gradient_clip_val`` as well, or the state in the checkpoint
            is of another number of optimizers.
        TypeError: the strategy is DeepSpeed's, which clips by itself.
        RuntimeError: at a step: an optimizer calls its closure several times in a step (LBFGS).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from dist_clip.lightning import ClipCallback
        >>> trainer = Trainer(callbacks=[ClipCallback()], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        policy: Any = None,
        guard: Any = None,
        *,
        together: bool = False,
        log: bool = True,
        prog_bar: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.clippers: list[GradClipper] = []
        self._policy, self._guard, self._options = policy, guard, options
        self._together, self._log, self._prog_bar = together, log, prog_bar
        self._optimizers: list[Any] = []
        self._params: list[list[int]] = []
        self._steps: list[SkippableStep] = []
        self._losses: list[Tensor] = []
        self._round: set[int] = set()
        self._clipped = ClippedGradients()
        self._loaded: list[Mapping[str, Any]] | None = None

    @property
    def state_key(self) -> str:
        """The entry of ``checkpoint["callbacks"]``."""
        return "dist_clip"

    # ------------------------------------------------------------------------------------------------- Lightning's hooks

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what would clip a second time."""
        if stage == "fit":
            _refuse_other_clips(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the clippers, and load what the checkpoint had."""
        self._remove()
        self._optimizers = [getattr(each, "_optimizer", each) for each in trainer.strategy.optimizers]
        scaler = _scaler_of(trainer)
        if self._together and scaler is not None and len(self._optimizers) > 1:
            raise ValueError(
                "together=True needs the gradients of all optimizers at the first one's step, and Lightning lets the "
                "GradScaler unscale each optimizer's at its own: leave together=True out, or train in bf16"
            )
        groups = [self._optimizers] if self._together else [[each] for each in self._optimizers]
        self.clippers = [self._make(trainer, group) for group in groups]
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            warn_of_lost_state(self._optimizers, f"the checkpoint has no callbacks[{self.state_key!r}]", stacklevel=2)
        else:
            if len(loaded) != len(self.clippers):
                raise ValueError(
                    f"the checkpoint has the state of {len(loaded)} clippers, and here are {len(self.clippers)}: "
                    "the number of optimizers, or together=, has changed"
                )
            for clipper, state in zip(self.clippers, loaded, strict=True):
                clipper.load_state_dict(state)
        self._params = [ids_of(optimizer) for optimizer in self._optimizers]
        self._steps = [SkippableStep(optimizer) for optimizer in self._optimizers]
        self._losses, self._round = [], set()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Remember the loss, for guards that look at it."""
        loss, scaler = loss.detach(), _scaler_of(trainer)
        if scaler is not None:
            loss = loss / scaler.scale(torch.ones_like(loss))  # this hook sees the scaled loss
        if pl_module.automatic_optimization:
            loss = loss * trainer.accumulate_grad_batches  # and the loss divided by this
        self._losses.append(loss)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Clip, log, and have the step left out if it is to be skipped."""
        _refuse_other_clips(trainer, None)
        place = next(
            i for i, each in enumerate(self._optimizers) if each is getattr(optimizer, "_optimizer", optimizer)
        )
        step = self._steps[place]
        step.clips()
        which = 0 if self._together else place
        if (params := ids_of(optimizer)) != self._params[place]:
            self._params[place] = params
            self._follow(trainer, which)
        clipper, report = self.clippers[which], None
        if not self._together or self._begins_round(place):
            for loss in self._losses:
                clipper.observe_loss(loss)
            report = clipper.clip_()
            if self._together:
                self._clipped.remember(clipper.layout)
        self._losses = []
        if self._together:
            self._end_round(place)
        # A GradScaler has the skip as its own found_inf, and does not call the step.
        if clipper.may_skip and _scaler_of(trainer) is None:
            assert clipper.last_report is not None
            step.leave_out(bool(clipper.last_report.skip))
        if self._log and report is not None:
            self._log_report(pl_module, report, f"/{place}" if len(self.clippers) > 1 else "")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give the optimizers their own step back. The clippers stay, for checkpoints that are saved later."""
        if stage == "fit":
            self._remove()

    def state_dict(self) -> dict[str, Any]:
        """Return the clippers' states, or those that wait for training to start; empty if there are none."""
        states = self._loaded if self._loaded is not None else [clipper.state_dict() for clipper in self.clippers]
        return {"clippers": list(states)} if states else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until training starts, for Lightning loads them before the clippers can be made."""
        self._loaded = list(state_dict["clippers"])

    # ---------------------------------------------------------------------------------------------------------- the rest

    def _make(self, trainer: Any, optimizers: list[Any]) -> GradClipper:
        """Make the clipper of the parameters of `optimizers`.

        The others are excluded by name, and the whole model is passed, because FSDP1 tells from the modules alone how
        parameters are sharded.
        """
        held = {key for optimizer in optimizers for key in ids_of(optimizer)}
        model = trainer.strategy.model
        known = named_parameters(model)
        ids = {id(param) for _, param in known}
        others = [name for name, param in known if id(param) not in held]
        for optimizer in optimizers:
            for param in params_of(optimizer):
                if id(param) not in ids:
                    raise LayoutError(
                        f"{type(optimizer).__name__} holds a parameter of shape {list(param.shape)} that is none of the "
                        "LightningModule's: it would not be clipped. Make it an attribute of the module"
                    )
        options = {"scaler": _scaler_of(trainer), **self._options}
        options["exclude"] = [*options.get("exclude", ()), *map(glob.escape, others)]
        return make_clipper(model, self._policy, self._guard, **options)

    def _follow(self, trainer: Any, which: int) -> None:
        """Make a clipper anew after its optimizer was given other parameters (fine-tuning unfreezes layers)."""
        old = self.clippers[which]
        new = self._make(trainer, self._optimizers if self._together else [self._optimizers[which]])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tensors that came, or went
            new.load_state_dict(old.state_dict(), strict=False)
        self.clippers[which] = new

    def _begins_round(self, place: int) -> bool:
        """Whether this step is the first of those that follow one backward."""
        if not self._round or place in self._round:
            self._round = set()
            return True
        if any(self._clipped.is_new(param) for param in params_of(self._optimizers[place])):
            raise RuntimeError(
                "together=True clips the gradients of all optimizers before the first of them steps, and those of "
                f"{type(self._optimizers[place]).__name__} changed after that: step all optimizers after one backward, or "
                "leave together=True out, so that each optimizer's gradients are clipped at its own step"
            )
        return False

    def _end_round(self, place: int) -> None:
        self._round.add(place)
        if len(self._round) == len(self._optimizers):
            self._round = set()

    def _log_report(self, pl_module: Any, report: ClipReport, suffix: str) -> None:
        numbers = {f"{key}{suffix}": value for key, value in report.metrics().items()}
        if report.has_global_norm:
            norm = numbers[f"clip/grad_norm{suffix}"]
            pl_module.log(f"grad_norm{suffix}", norm, on_step=True, on_epoch=False, prog_bar=self._prog_bar)
        pl_module.log_dict(numbers, on_step=True, on_epoch=False)

    def _remove(self) -> None:
        for step in self._steps:
            step.remove()
        self._steps = []


class ZClipLightningCallback(ClipCallback):
    """A `ClipCallback` that takes the arguments of the zclip package's callback of this name.

    It clips as that one does (its norms are the same under FSDP2 and tensor parallelism as well, and NaN and Inf never enter
    its statistics), and saves the statistics in the checkpoint, which that one forgets.

    Args:
        max_grad_norm: ``max_norm`` of `ZClip`.
        zclip_kwargs: the other arguments of `ZClip`, which have the package's names.

    Example:
        >>> from dist_clip.lightning import ZClipLightningCallback
        >>> callback = ZClipLightningCallback(mode="zscore", alpha=0.97, z_thresh=2.5, max_grad_norm=1.0)
    """

    def __init__(self, *, max_grad_norm: float | None = 1.0, **zclip_kwargs: Any) -> None:
        super().__init__(ZClip(max_norm=max_grad_norm, **zclip_kwargs))


def _scaler_of(trainer: Any) -> Any:
    """Return the GradScaler of fp16 training; None in every other precision."""
    return getattr(trainer.precision_plugin, "scaler", None)


def _refuse_other_clips(trainer: Any, pl_module: Any) -> None:
    """Raise for what clips beside the callback; warn of what may. `pl_module`: None to leave the latter out."""
    if trainer.gradient_clip_val:
        refuse_native_clip("Lightning's Trainer", "gradient_clip_val", trainer.gradient_clip_val)
    if any(cls.__name__ == "DeepSpeedStrategy" for cls in type(trainer.strategy).__mro__):
        raise TypeError(
            "DeepSpeedStrategy keeps gradients in buffers of its own, and clips in its engine: dist_clip cannot clip there. "
            "Use DDP, FSDP or ModelParallelStrategy"
        )
    if pl_module is None:
        return
    own = type(pl_module).configure_gradient_clipping
    if not own.__module__.startswith(("lightning.", "pytorch_lightning.")):
        warnings.warn(
            f"{type(pl_module).__name__}.configure_gradient_clipping runs after ClipCallback has clipped: if it clips, the "
            "gradients are clipped twice",
            stacklevel=2,
        )
