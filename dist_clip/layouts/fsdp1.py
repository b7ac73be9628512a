"""The reader of FSDP1 (FullyShardedDataParallel), whose flat parameters concatenate the original tensors.

Each rank holds a range of the concatenation. The reader uses the handles' attributes, which are private but have been
stable since torch 2.1: `flat_param._fqns`, `_shard_param_infos` (which range of each original tensor is where in this
rank's shard) and, with use_orig_params=True, `flat_param._params` (the parameters that the user's optimizer has, empty
where this rank holds nothing).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from dist_clip.errors import LayoutError
from dist_clip.layouts.gradient import usable
from dist_clip.layouts.layout import LogicalTensor
from dist_clip.layouts.naming import without_wrappers


class FlatParameters:
    """The flat parameters of all FSDP1 modules among `modules`, and the original parameters inside them."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._units: dict[int, _Unit] = {}  # by id(flat parameter)
        self._originals: dict[int, tuple[_Unit, int]] = {}  # id(original parameter) -> unit, position
        for module in modules:
            handle = getattr(module, "_handle", None) if type(module).__name__ == "FullyShardedDataParallel" else None
            if handle is None:  # a wrapper with no parameters of its own
                continue
            unit = self._units[id(handle.flat_param)] = _Unit(handle)
            for position, param in enumerate(handle.flat_param._params or ()):
                self._originals[id(param)] = (unit, position)

    def read(self, name: str, param: Tensor) -> list[LogicalTensor] | None:
        """Return the logical tensors behind the parameter `name`, or None if it does not belong to FSDP1.

        Raises:
            LayoutError: the parameter belongs to an FSDP1 module that was not passed, or is a DTensor inside FSDP1.
        """
        if id(param) in self._originals:
            unit, position = self._originals[id(param)]
            return [unit.read(position, name, param)]
        if id(param) in self._units:
            unit = self._units[id(param)]
            prefix = name.removesuffix("_flat_param")
            return [
                unit.read(position, prefix + without_wrappers(fqn), param)
                for position, fqn in enumerate(unit.flat._fqns)
            ]
        if getattr(param, "_fsdp_flattened", False):
            raise LayoutError(
                f"rank {dist.get_rank()}: {name!r} is sharded by FullyShardedDataParallel (FSDP1), and which part of it "
                "this rank holds cannot be read off the parameter alone: pass the wrapped module to GradClipper"
            )
        return None


def is_flat(param: Tensor | None) -> bool:
    """Return whether `param` is a flat parameter, which holds several tensors (use_orig_params=False)."""
    return getattr(param, "_is_flat_param", False)


class _Unit:
    """One flat parameter, and what its tensors share."""

    def __init__(self, handle: Any) -> None:
        self.flat = handle.flat_param
        self._handle = handle
        self._sharded = handle.uses_sharded_strategy
        self._ranks = frozenset(dist.get_process_group_ranks(handle.process_group))
        offsets = zip(handle._get_flat_param_offsets(), self.flat._is_padding_mask, strict=True)
        self._starts = [start for (start, _), padding in offsets if not padding]

    def read(self, position: int, name: str, param: Tensor) -> LogicalTensor:
        """Return tensor number `position`. `param` holds its gradient: the original or the flat parameter.

        Raises:
            LayoutError: the tensor is a DTensor inside FSDP1.
        """
        flat, group = self.flat, self._handle.process_group
        if any(extension is not None for extension in flat._param_extensions):
            raise LayoutError(
                f"rank {dist.get_rank()}: {name!r} is a DTensor inside FullyShardedDataParallel (FSDP1): use fully_shard "
                "(FSDP2), which shards such tensors along both meshes"
            )
        info = flat._shard_param_infos[position]
        numel = info.numel_in_shard or 0
        strategy, whole = self._handle._sharding_strategy.name, flat._unpadded_unsharded_size.numel()
        where = f"(FSDP1) over {group.size()} ranks, from {self._starts[position]} of {whole}"
        return LogicalTensor(
            name=name,
            shape=tuple(flat._shapes[position]),
            dtype=param.dtype,
            param=param,
            shard_numel=numel,
            norm_groups=(group,) if self._sharded and group.size() > 1 else (),
            replica_ranks=self._ranks if self._sharded else frozenset({dist.get_rank()}),
            mesh_ranks=self._ranks,
            grad=_flat_reader(name, flat, info) if param is flat else _original_reader(name, param, numel),
            weight=lambda: _flat_range(flat.detach(), info) if param is flat else param.detach(),
            # The model's device, because gradients may be offloaded to the CPU but the group reduces on this device.
            device=self._handle.device,
            # Where the tensor is in the flat parameter decides where it is cut.
            cut=where if self._sharded else "whole",
            placement=f"{strategy} {where}",
        )


def _original_reader(name: str, param: Tensor, numel: int) -> Callable[[], Tensor | None]:
    """Return a reader for use_orig_params=True, where the parameter's own gradient is this rank's piece."""

    def read() -> Tensor | None:
        grad = param.grad
        if grad is None:
            return None
        _check_reduced(name, grad.numel(), numel)
        return usable(name, grad, put)

    def put(grad: Tensor) -> None:
        param.grad = grad

    return read


def _flat_reader(name: str, flat: Any, info: Any) -> Callable[[], Tensor | None]:
    """Return a reader for use_orig_params=False, where this rank's piece is a range of the flat gradient."""

    def read() -> Tensor | None:
        grad = flat.grad
        if grad is None:
            return None
        _check_reduced(name, grad.numel(), flat._sharded_size.numel())
        return _flat_range(usable(name, grad, put), info)

    def put(grad: Tensor) -> None:
        flat.grad = grad

    return read


def _flat_range(flat: Tensor, info: Any) -> Tensor:
    """Return the part of this rank's flat shard that belongs to one tensor."""
    start, numel = (info.offset_in_shard, info.numel_in_shard) if info.in_shard else (0, 0)
    return flat[start : start + numel]


def _check_reduced(name: str, found: int, expected: int) -> None:
    if found != expected:
        raise RuntimeError(
            f"rank {dist.get_rank()}: the gradient of {name!r} has {found} elements where this rank's shard has {expected}: "
            "it was not reduced yet. Clip after a backward outside of no_sync(), and not within summon_full_params()"
        )
