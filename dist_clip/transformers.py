"""Clipping in Hugging Face's Trainer, and in what is built on it: TRL's trainers, axolotl, LLaMA-Factory."""

from __future__ import annotations

import warnings
from typing import Any

from dist_clip import policies
from dist_clip.adapter import from_json, make_clipper, numbers_of, to_json
from dist_clip.clipper import GradClipper

try:
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers.trainer_callback import ExportableState, TrainerCallback
except ImportError:
    raise ImportError("dist_clip.transformers needs transformers: pip install 'dist-clip[transformers]'") from None

from dist_clip.accelerate import AcceleratedAttachment, refuse

__all__ = ["ClipCallback", "ClipMixin", "attach"]

_NAME = "ClipCallback"
"""The entry of the checkpoint's trainer_state.json: Trainer takes the name of the class."""

_TRAINER_DEFAULT = 1.0
"""Of max_grad_norm: who did not set it did not ask for that clip."""


def attach(trainer: Any, policy: Any = None, guard: Any = None, **options: Any) -> ClipCallback:
    """Replace the gradient clipping of a `transformers.Trainer`, or of a subclass of it such as TRL's, by `policy`.

    Call it on every rank, before ``trainer.train()``. Trainer then logs as ``grad_norm`` the global norm before clipping,
    and beside it ``clip/grad_norm_after``, ``clip/fraction``, ``clip/min_scale``, ``clip/skipped`` and ``clip/nonfinite``.
    ``max_grad_norm`` has no effect. A step that is to be skipped is not taken, and the learning rate waits for it.

    The clipper's state is in ``trainer_state.json`` of each checkpoint; ``trainer.train(resume_from_checkpoint=...)`` loads
    it. It warns if the checkpoint has none.

    Args:
        trainer: the trainer.
        policy, guard, options: as for `dist_clip.accelerate.attach`. A guard that looks at the loss sees the one that
            Trainer logs.

    Returns:
        The callback that was added, first of all callbacks. ``callback.clipper`` is the `GradClipper`, which is made when
        training begins, because only then the model is sharded.

    Raises:
        ValueError: DeepSpeed, SageMaker's model parallelism, XLA, or ``restore_callback_states_from_checkpoint=True``, which
            would make the callback anew without its policy.
        RuntimeError: the trainer has a `ClipCallback` already.

    Example (needs transformers)::

        trainer = transformers.Trainer(model, args, train_dataset=data)
        dist_clip.transformers.attach(trainer)
        trainer.train()
    """
    if any(isinstance(each, ClipCallback) for each in trainer.callback_handler.callbacks):
        raise RuntimeError("this trainer clips with dist_clip already: gradients would be clipped twice")
    refuse(trainer.accelerator.distributed_type)
    callback = ClipCallback(policy, guard, **options)
    callback._check(trainer.args)
    callback._trainer = trainer
    # First, because trackers log what is in the dictionary when their turn comes.
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback


class ClipMixin:
    """Attaches itself: for those who subclass a trainer. Put it before the trainer's class.

    Attributes:
        clip_policy, clip_guard, clip_options: as for `attach`; class attributes, or keyword arguments of the trainer.
        clip_callback: the callback that `attach` returned.

    Example (needs TRL)::

        class Trainer(dist_clip.transformers.ClipMixin, trl.SFTTrainer):
            clip_policy = "logclip ratio=3 post_max_norm=1"
    """

    clip_policy: Any = None
    clip_guard: Any = None
    clip_options: Any = None

    def __init__(
        self, *args: Any, clip_policy: Any = None, clip_guard: Any = None, clip_options: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.clip_callback = attach(
            self,
            self.clip_policy if clip_policy is None else clip_policy,
            self.clip_guard if clip_guard is None else clip_guard,
            **{**(self.clip_options or {}), **(clip_options or {})},
        )


class ClipCallback(TrainerCallback, ExportableState):  # type: ignore[misc, unused-ignore]
    """Clips in a Trainer that only takes ``callbacks=[...]``. Prefer `attach` wherever you have the trainer.

    It sets ``max_grad_norm`` to 0. Trainer then still measures the norm for its log, and multiplies all gradients by 1.
    With an Inf in one gradient that factor is NaN, so that all gradients are NaN before they are clipped:
    ``nonfinite="zero"`` then zeroes all of them, where `attach` zeroes one. The ``clip/*`` metrics reach only those
    callbacks that come later (the progress bar, not the trackers) and ``state.log_history``. A guard that looks at the
    loss does not get one.

    Args:
        policy, guard, options: as for `attach`.

    Attributes:
        clipper: the `GradClipper`; None before training begins.

    Example (needs transformers)::

        trainer = transformers.Trainer(model, args, train_dataset=data, callbacks=[ClipCallback()])
    """

    def __init__(self, policy: Any = None, guard: Any = None, *, remade: bool = False, **options: Any) -> None:
        if remade:
            raise ValueError(_REMADE)
        self._policy = None if policy is None else policies.policy(policy)  # a mistake in it shows here
        self._guard, self._options = guard, options
        self._trainer: Any = None
        self._optimizer: Any = None
        self.clipper: GradClipper | None = None

    def state(self) -> dict[str, Any]:
        """Return what Trainer writes into the checkpoint. Syncs the host."""
        attributes = {} if self.clipper is None else {"clipper": to_json(self.clipper.state_dict())}
        return {"args": {"remade": True}, "attributes": attributes}

    def _check(self, args: Any) -> None:
        if getattr(args, "restore_callback_states_from_checkpoint", False):
            raise ValueError(_REMADE)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the clipper, of the model as it is trained, and load its state."""
        self._check(args)
        optimizer, trainer = kwargs["optimizer"], self._trainer
        if not isinstance(optimizer, AcceleratedOptimizer):
            raise ValueError(
                f"Trainer steps a {type(optimizer).__name__} that Accelerate did not prepare (SageMaker's model "
                "parallelism), whose gradients dist_clip does not clip"
            )
        refuse(optimizer.accelerator_state.distributed_type)
        old, goes_on = self.clipper, optimizer is self._optimizer
        if old is not None and old.attachment is not None:
            old.attachment.remove()
        options = {"log_global_norm": True, "scaler": optimizer.scaler, **self._options}
        clipper = make_clipper(kwargs["model"], self._policy, self._guard, **options)
        self._load(clipper, state, old.state_dict() if old is not None and goes_on else None)
        attachment = AcceleratedAttachment(
            clipper, [optimizer], None if trainer is None else trainer.accelerator, loss="sum"
        )
        if args.max_grad_norm != _TRAINER_DEFAULT and args.max_grad_norm:
            attachment.warn_of(args.max_grad_norm, "TrainingArguments(max_grad_norm=")
        if trainer is None:
            args.max_grad_norm = 0
        elif hasattr(trainer, "_clip_grad_norm"):  # not all of its ways lead to accelerator.clip_grad_norm_
            attachment.replace(trainer, "_clip_grad_norm", lambda native, *args, **kwargs: attachment.clip())
        clipper.attachment = attachment
        self.clipper, self._optimizer, self._attachment = clipper, optimizer, attachment

    def _load(self, clipper: GradClipper, state: Any, before: Any) -> None:
        """Load the checkpoint's state, or, where `train` was called again and the optimizer goes on, the one before it."""
        # Trainer looks the name up when it saves, and a checkpoint without this callback does not have it.
        kept = state.stateful_callbacks.setdefault(_NAME, {})
        if state.global_step == 0:
            if before is not None:
                clipper.load_state_dict(before)
            return
        if isinstance(kept, list):
            raise RuntimeError(f"the checkpoint has the states of {len(kept)} ClipCallbacks; a trainer has one")
        saved = kept.get("attributes", {}).get("clipper")
        if saved is None:
            warnings.warn(
                f"the checkpoint of step {state.global_step} has no state of dist_clip: the policy starts afresh, with its "
                "warm-up",
                stacklevel=2,
            )
        else:
            clipper.load_state_dict(from_json(saved))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Clip, unless Trainer's own call has done so."""
        self._attachment.clip()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Put the metrics beside the ``grad_norm`` that Trainer logs. One copy to the host."""
        if self.clipper is None or self.clipper.last_report is None or "grad_norm" not in (logs or {}):
            return
        found = numbers_of(self.clipper.last_report)
        found.pop("clip/grad_norm", None)  # it is the grad_norm
        logs.update(found)
        state.log_history[-1].update(found)


_REMADE = (
    "restore_callback_states_from_checkpoint=True makes callbacks anew, and dist_clip's without its policy and its trainer: "
    "leave it False. The clipper's state is restored without it"
)
