"""Stateless global-norm clipping with torch's signature, correct where torch raises or gives a wrong norm."""

from __future__ import annotations

import dataclasses
import itertools
import math
import numbers
import operator
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.distributed.device_mesh import DeviceMesh

from dist_clip.errors import NonFiniteGradError
from dist_clip.kernels import Kernels, choose
from dist_clip.layouts import Gradients, Layout, LogicalTensor, PartialReducer, layout_of_parameters, merge_groups
from dist_clip.layouts.process_groups import checked_group, device_of, group_alive, group_size
from dist_clip.reduction import PipelineReducer, ReductionPlan
from dist_clip.step.fault import naming_what_fails


@_disable_dynamo
@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    pp_group: dist.ProcessGroup | DeviceMesh | None = None,
) -> Tensor:
    r"""Clip the norm of all gradients together, in place: :func:`torch.nn.utils.clip_grad_norm_` for sharded models.

    Each gradient is multiplied by ``min(1, max_norm / (N + 1e-6))``, where N is the total norm. Plain tensors and
    DTensors of different meshes may be mixed (TP + FSDP2, EP + FSDP2). Every rank that holds a piece must pass the same
    parameters.

    Args:
        parameters: a tensor or an iterable of tensors, whose ``.grad`` is clipped; warns if there are none.
        max_norm: threshold, at least 0.
        norm_type: order of the norm, positive, possibly ``inf``.
        error_if_nonfinite: raise if the total norm is NaN or Inf, before anything is scaled; syncs the host.
        foreach: False uses no fused kernels on accelerators; the result is the same up to rounding.
        pp_group: process group, or 1-D device mesh, across pipeline stages. Tensors have no names here, so a tensor of
            which two stages hold a copy counts twice; `GradClipper` counts it once.

    Returns:
        The total norm before clipping, a plain fp32 0-dim tensor (float64 if all gradients are), the same on every
        rank.

    Raises:
        NonFiniteGradError: a RuntimeError: the total norm is NaN or Inf and ``error_if_nonfinite`` is True.
        LayoutError: a ValueError: the parameters cannot be clipped as they are laid out, or ``pp_group`` is not usable.
        TypeError, ValueError: a bad argument, shown in the message.

    Example:
        >>> import dist_clip
        >>> model = torch.nn.Linear(2, 2)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> dist_clip.clip_grad_norm_(model.parameters(), 1.0)
        tensor(2.4495)

    Reference: Pascanu et al. 2013, arXiv 1211.5063; the formula of ``torch.nn.utils.clip_grad_norm_``.
    """
    max_norm, p = _checked(max_norm, norm_type)
    if not isinstance(error_if_nonfinite, bool):
        raise TypeError(f"error_if_nonfinite must be a bool, got {error_if_nonfinite!r}")
    if foreach is not None and not isinstance(foreach, bool):
        raise TypeError(f"foreach must be True, False or None, got {foreach!r}")
    stage_group = checked_group(pp_group, "pp_group")
    params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if not params:
        what = "empty" if isinstance(parameters, Sequence) else "an empty generator"
        warnings.warn(f"`parameters` is {what}, no gradient clipping will occur.", stacklevel=5)
    for i, param in enumerate(params):
        if not isinstance(param, Tensor):
            raise TypeError(f"parameters must be tensors, number {i} is {type(param).__name__}: {param!r}")

    stages = 1 if stage_group is None else stage_group.size()
    prepared, shards, magnitudes = _read(params, stages, p, stage_group)
    with naming_what_fails(prepared.names, shards):
        local = prepared.kernels.power_sums(magnitudes, p, prepared.device, foreach)
    sums = prepared.plan.reduce(local, p)
    total = sums.amax() if math.isinf(p) and shards else sums.sum()
    if stage_group is not None and stages > 1:
        total = PipelineReducer(stage_group).sum(total.view(1), p).squeeze(0)
    norm = total if math.isinf(p) else total.sqrt() if p == 2.0 else total.pow(1.0 / p)

    if error_if_nonfinite and not bool(torch.isfinite(norm)):
        raise NonFiniteGradError(
            f"the total norm of order {p:g} of the gradients is {norm.item()}, so they cannot be clipped; set "
            "error_if_nonfinite=False to scale them by it anyway"
        )
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    with naming_what_fails(prepared.names, shards):
        prepared.kernels.scale_(shards, scale.expand(len(shards)), uniform=True, foreach=foreach)
    dtypes = {shard.dtype for shard in shards if shard is not None}
    return norm if dtypes == {torch.float64} else norm.float()


def _read(
    params: list[Tensor], stages: int, p: float, stage_group: dist.ProcessGroup | None
) -> tuple[_Prepared, list[Tensor | None], list[Tensor | None]]:
    """Return what is known of the parameters, the shards of their gradients, and what the norm of order `p` is taken of."""
    known = _known(params)
    usual = None if known is None or not known.needs_no_layout(params, stages) else known.gradients.usual(params)
    if known is not None and usual is not None:
        shards = known.kernels.read(usual)
        return known, shards, shards
    # A tensor that is passed twice (tied weights) has one gradient, which is counted once and scaled once.
    unique = {id(param): (f"parameters[{i}]", param) for i, param in reversed(list(enumerate(params)))}
    layout = layout_of_parameters(list(reversed(unique.values())))
    prepared = _prepare(layout, stages, layout.device or device_of(stage_group))
    prepared.partial.reduce_(layout.tensors)
    shards = [tensor.grad() for tensor in layout]
    if p == 2.0:
        shards = prepared.kernels.read(shards)
        return prepared, shards, shards
    return prepared, shards, [_magnitudes(tensor, shard) for tensor, shard in zip(layout, shards, strict=True)]


def _magnitudes(tensor: LogicalTensor, shard: Tensor | None) -> Tensor | None:
    """Return the shard, or the magnitudes of the complex numbers that it shows as pairs of real ones."""
    return torch.view_as_complex(shard).abs() if shard is not None and tensor.dtype.is_complex else shard


_MARK = "_dist_clip_list"
"""Attribute of a parameter: which list it was in, and where. A weak reference would keep torch from moving the model."""

_KEPT = 16
_prepared: dict[int, _Prepared] = {}
"""What `_prepare` found for the last lists of parameters, by their number. It holds no parameter."""

_numbers = itertools.count()


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """What is known of a list of parameters. It holds none of them."""

    stages: int
    described: tuple[str, ...]
    names: tuple[str, ...]
    looks: list[Any]
    marks: list[tuple[int, int]]
    device: torch.device
    plan: ReductionPlan
    partial: PartialReducer
    gradients: Gradients
    kernels: Kernels

    def fits(self, layout: Layout, stages: int, device: torch.device) -> bool:
        described = tuple(t.describe() for t in layout)
        return self._lives(stages) and (self.described, self.device) == (described, device)

    def needs_no_layout(self, params: list[Tensor], stages: int) -> bool:
        """Whether its parameters are as they were, so that their layout need not be read again."""
        return self._lives(stages) and not self.partial.candidates and _looks(params) == self.looks

    def _lives(self, stages: int) -> bool:
        return stages == self.stages and all(group_alive(collective.group) for collective in self.plan.collectives)


_looks_of_one = operator.attrgetter("shape", "dtype", "device", "requires_grad")


def _looks(params: Sequence[Tensor | None]) -> list[Any]:
    """Return what may change of a parameter in place, and decides how it is laid out."""
    return [list(map(type, params)), list(map(_looks_of_one, params))]


def _known(params: Sequence[Tensor | None]) -> _Prepared | None:
    """Return what is known of the list of these parameters, in this order, from an earlier call."""
    marks = [getattr(param, _MARK, None) for param in params]
    found = _prepared.get(marks[0][0]) if marks and marks[0] is not None else None
    return found if found is not None and found.marks == marks else None


def _prepare(layout: Layout, stages: int, device: torch.device) -> _Prepared:
    """Return the plan, reducer and kernels for a list of parameters, made at the first call with it.

    They are kept because making them is slow: the plan sends positions to the device, the reducer exchanges on the host
    which gradients are Partial, and kernels are tried out before they are used. All ranks find them or none does, because
    the marks depend only on the calls.
    """
    params = [tensor.param for tensor in layout]
    found = _known(params)
    if found is not None and found.fits(layout, stages, device):
        return found
    number = next(_numbers)
    marks = [(number, i) for i in range(len(params))]
    made = _Prepared(
        stages=stages,
        described=tuple(t.describe() for t in layout),
        names=layout.names,
        looks=_looks(params),
        marks=marks,
        device=device,
        plan=ReductionPlan(merge_groups(layout), copies_among=group_size(None) // stages),
        partial=PartialReducer(layout.tensors),
        gradients=Gradients(layout.tensors),
        kernels=choose(None, device),
    )
    _prepared[number] = made
    for old in list(_prepared)[:-_KEPT]:
        del _prepared[old]
    for param, mark in zip(params, marks, strict=True):
        setattr(param, _MARK, mark)
    return made


def _checked(max_norm: object, norm_type: object) -> tuple[float, float]:
    if isinstance(max_norm, Tensor) and max_norm.numel() == 1:
        max_norm = max_norm.item()
    if isinstance(max_norm, bool) or not isinstance(max_norm, numbers.Real):
        raise TypeError(f"max_norm must be a number, got {max_norm!r}")
    if not float(max_norm) >= 0:
        raise ValueError(f"max_norm must be at least 0, got {max_norm!r}")
    try:
        p = float(norm_type)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"norm_type must be a number or 'inf', got {norm_type!r}") from None
    if not p > 0:
        raise ValueError(f"norm_type must be positive, got {norm_type!r}")
    return float(max_norm), p
