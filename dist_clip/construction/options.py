"""The clipper's options, as the user passed them and as a step uses them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch.amp import GradScaler
from torch.distributed.device_mesh import DeviceMesh

from dist_clip.construction.selection import Overrides
from dist_clip.guards import Guard
from dist_clip.guards.trial import checked_guards
from dist_clip.kernels import Kernels
from dist_clip.layouts.process_groups import checked_group
from dist_clip.layouts.sharded import Division, ShardedBy, checked_divisions
from dist_clip.step.grad_scaler import checked_scaler
from dist_clip.step.nonfinite import NonFinite, NonFiniteMode


@dataclasses.dataclass(frozen=True)
class Options:
    """The keyword arguments of `GradClipper`, which documents them."""

    pp_group: dist.ProcessGroup | DeviceMesh | None
    process_group: dist.ProcessGroup | DeviceMesh | None
    nonfinite: NonFinite
    overrides: Overrides | None
    exclude: Sequence[str]
    log_global_norm: bool
    guard: Guard | Sequence[Guard] | None
    kernels: str | Kernels | None
    scaler: GradScaler | None
    detect_desync: bool
    sharded: Mapping[str, ShardedBy] | None
    check_replicas: bool

    def checked(self) -> CheckedOptions:
        """Check the options that need no parameters, but `overrides`, `exclude` and `kernels`, which others check.

        Raises:
            LayoutError, TypeError, ValueError: an argument of the wrong type or value.
        """
        process_group = checked_group(self.process_group, "process_group")
        pp_group = checked_group(self.pp_group, "pp_group")
        mode = NonFiniteMode(self.nonfinite)
        scaler = checked_scaler(self.scaler, self.nonfinite)
        for name in ("log_global_norm", "detect_desync", "check_replicas"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}")
        return CheckedOptions(
            pp_group,
            process_group,
            NonFiniteMode("skip") if scaler is not None else mode,
            self.log_global_norm,
            checked_guards(self.guard),
            scaler,
            self.detect_desync,
            checked_divisions(self.sharded),
            self.check_replicas,
        )


@dataclasses.dataclass(frozen=True)
class CheckedOptions:
    """`Options`, checked, as a step uses them. With a scaler, `nonfinite` is "skip"."""

    pp_group: dist.ProcessGroup | None = None
    process_group: dist.ProcessGroup | None = None
    nonfinite: NonFiniteMode = NonFiniteMode("propagate")  # noqa: RUF009 (frozen)
    log_global_norm: bool = False
    guards: tuple[Guard, ...] = ()
    scaler: GradScaler | None = None
    detect_desync: bool = False
    divisions: Mapping[str, Division] = dataclasses.field(default_factory=dict)
    check_replicas: bool = True

    @property
    def may_skip(self) -> bool:
        """Whether a step may turn out to be skipped."""
        return self.nonfinite.skips or bool(self.guards)

    @property
    def needs_loss(self) -> bool:
        """Whether a guard looks at the loss, so that the loss is to be added over all ranks."""
        return any("loss" in guard.needs() for guard in self.guards)

    def why_not_early(self, *, megatron: bool) -> str | None:
        """Return why nothing can be clipped before backward has ended; None if these options allow it."""
        if megatron:
            return "Megatron's optimizers reduce gradients, and copy them to their own, after backward"
        if self.scaler is not None:
            return "the GradScaler unscales gradients after backward"
        if self.guards:
            return f"{type(self.guards[0]).__name__} decides on the step once all norms are known"
        if self.nonfinite.skips or self.nonfinite.raises:
            return f"nonfinite={self.nonfinite.name!r} decides on the step once all norms are known"
        return None

    def describe(self) -> str:
        """Return a description of the options, which must be the same on all ranks."""
        return (
            f"nonfinite={self.nonfinite.name!r}, log_global_norm={self.log_global_norm}, guards={list(self.guards)}, "
            f"pp_group={'given' if self.pp_group is not None else None}, detect_desync={self.detect_desync}, "
            f"scaler={'given' if self.scaler is not None else None}, check_replicas={self.check_replicas}, "
            f"sharded={{{', '.join(f'{pattern!r}: {said.describe()}' for pattern, said in self.divisions.items())}}}"
        )
