"""Megatron's marks of tensor parallelism, checked against the model's own description of its checkpoints.

Megatron marks a parameter as tensor-parallel by attributes, which are sometimes wrong. ``sharded_state_dict()``, from
which checkpoints are saved, comes from the modules themselves and says of each tensor how the whole is cut.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dist_clip.megatron import compat

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Described:
    """What the model's sharded state dict says of one parameter.

    Attributes:
        dim: the dimension along which the parameter is split; None: it is replicated.
        pieces: the number of parts that the whole consists of.
        index: which part this rank's is.
        deliberate: whether the module's authors said so. Modules without a ``sharded_state_dict`` of their own are
            described as replicated by default, which says little.
    """

    dim: int | None
    pieces: int
    index: int
    deliberate: bool


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How tensor parallelism splits a parameter, and who says so.

    Attributes:
        dim: the dimension along which it is split; None: it is replicated.
        note: what to tell the user where the mark is overruled; empty where it is not.
        only_marked: nothing but the mark says that the parameter is split.
    """

    dim: int | None
    note: str = ""
    only_marked: bool = False


def judge(param: Tensor, described: Described | None, group: dist.ProcessGroup) -> Verdict:
    """Return how `group` splits `param`, by its mark and by what the model's sharded state dict says of it.

    A description as split wins over the mark, and so does a deliberate description as replicated. Against any other
    description, and without one, the mark is in force.
    """
    size, marked = group.size(), compat.is_tensor_parallel(param)
    if size == 1:
        return Verdict(None)
    dim = compat.partition_dim(param) if marked else None
    says = "its mark says replicated" if dim is None else f"its mark says along dim {dim}"
    if described is None:
        return Verdict(dim, only_marked=marked)
    if described.dim is not None:
        if described.pieces != size or described.index != group.rank():
            return Verdict(dim, only_marked=marked)  # cut over ranks that this group knows nothing of
        return Verdict(described.dim, "" if described.dim == dim else f"by sharded_state_dict; {says}")
    if marked and described.deliberate:
        return Verdict(None, f"by sharded_state_dict; {says}")
    return Verdict(dim, only_marked=marked)


def describe(chunks: Sequence[nn.Module], dp_group: dist.ProcessGroup | None) -> dict[int, Described]:
    """Return what the chunks' sharded state dicts say, by id of the parameter; without parameters of which they say nothing.

    Each parameter is looked up in the sharded state dict of the innermost module around it that has one. So a wrapper
    that hides a module, or a module that fails, takes nothing from the others.

    Nothing is communicated and no parameter is copied: Megatron's modules describe the parameters themselves. The hooks
    of ``state_dict`` run, and extra states are made (those of Transformer Engine under FP8 are read from the device).

    Args:
        dp_group: a data-parallel group, which Megatron wants for its replica numbers; they play no part here.
    """
    asked: dict[int, dict[int, list[Any]]] = {}
    out: dict[int, Described] = {}
    for chunk in chunks:
        for path, param in _owned(chunk):
            inner = list(itertools.takewhile(lambda module: not hasattr(module, "sharded_state_dict"), path))
            if len(inner) == len(path):
                continue  # no module around it describes anything
            module = path[len(inner)]
            if id(module) not in asked:
                asked[id(module)] = _ask(module, dp_group)
            cuts = {_cut(entry, param) for entry in asked[id(module)].get(id(param), ())}
            cut = cuts.pop() if len(cuts) == 1 else None  # under two keys, they must say the same
            if cut is not None:
                out[id(param)] = Described(*cut, deliberate=cut[0] is not None or _deliberate((*inner, module)))
    return out


def _ask(module: nn.Module, dp_group: dist.ProcessGroup | None) -> dict[int, list[Any]]:
    """Return the entries of the module's sharded state dict by id of the parameter that they describe; none if it fails."""
    params = list(module.parameters())
    if any(isinstance(param, DTensor) for param in params):
        return {}  # Megatron gathers some of those to describe them
    ask: Any = module.sharded_state_dict
    try:
        entries = list(_flat(ask(metadata={"dp_cp_group": dp_group})))
    except Exception as error:  # the module's own code, whose failure says nothing about clipping
        _log.debug("%s describes no checkpoint: %s: %s", type(module).__name__, type(error).__name__, error)
        return {}
    by_id: dict[int, Tensor] = {id(param): param for param in params}
    by_place: dict[tuple[int, int, int], Tensor] | None = None
    found: dict[int, list[Any]] = {}
    for entry in entries:
        data = getattr(entry, "data", None)
        if not isinstance(data, Tensor):
            continue
        param = by_id.get(id(data))
        if param is None and data.numel() and not data.is_meta:  # a buffer, or a view of a parameter
            if by_place is None:
                by_place = {_place(each): each for each in params if each.numel() and not each.is_meta}
            param = by_place.get(_place(data))
        if param is not None:
            found.setdefault(id(param), []).append(entry)
    return found


def _place(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.data_ptr(), tensor.numel(), tensor.element_size()


def _flat(state: Any) -> Iterator[Any]:
    if isinstance(state, Mapping):
        state = state.values()
    elif not isinstance(state, (list, tuple)):
        yield state
        return
    for value in state:
        yield from _flat(value)


def _cut(entry: Any, param: Tensor) -> tuple[int | None, int, int] | None:
    """Return (dimension, pieces, index of this rank's) by which `entry` says that `param` is cut; None if it is unclear.

    A factory (of SwiGLU's or Mamba's projections) consists of several tensors, each of which is cut by itself. The
    pipeline's and the experts' dimensions, which are prepended to the tensor's own, play no part.
    """
    parts = [entry]
    if hasattr(entry, "build_fn"):
        try:
            parts = list(_flat(entry.build()))
        except Exception as error:  # as above
            _log.debug("a factory of %s cannot be built: %s", getattr(entry, "key", "?"), error)
            return None
    mine: dict[str, int] = {}
    whole: dict[str, int] = {}
    dims, index = set(), 0
    for part in parts:
        before = getattr(part, "prepend_axis_num", None)
        if before is None or getattr(part, "axis_fragmentations", None) is None or part.flattened_range is not None:
            return None
        shape, local = part.global_shape[before:], part.local_shape
        if len(shape) != param.dim() or 0 in local:
            return None
        first = part.key not in mine
        mine[part.key] = mine.get(part.key, 0) + math.prod(local)
        whole[part.key] = math.prod(shape)
        for dim, (total, here, offset) in enumerate(zip(shape, local, part.global_offset[before:], strict=True)):
            if total != here:
                dims.add(dim)
                if first:
                    index = max(index, offset // here)
    if not parts or sum(mine.values()) != param.numel():
        return None
    counts = {whole[key] / mine[key] for key in mine}
    if counts == {1}:
        return None, 1, 0
    if len(counts) > 1 or len(dims) != 1 or not (pieces := counts.pop()).is_integer():
        return None
    return dims.pop(), int(pieces), index


def _owned(chunk: nn.Module) -> Iterator[tuple[tuple[nn.Module, ...], Tensor]]:
    """Yield (the module that owns the parameter and the modules around it, outwards; parameter), each parameter once."""
    seen: set[int] = set()

    def walk(path: tuple[nn.Module, ...]) -> Iterator[tuple[tuple[nn.Module, ...], Tensor]]:
        for param in path[0]._parameters.values():
            if param is not None and id(param) not in seen:
                seen.add(id(param))
                yield path, param
        for child in path[0].children():
            yield from walk((child, *path))

    return walk((chunk,))


def _deliberate(path: Sequence[nn.Module]) -> bool:
    """Return whether a description as replicated is what the authors of the modules meant.

    It is if the class that owns the parameter describes itself. It also is if all the modules come with torch or
    Megatron, whose checkpoints would be incomplete otherwise.

    Args:
        path: the module that owns the parameter, those around it, and the one that described it, outwards.
    """
    return "sharded_state_dict" in vars(type(path[0])) or all(_shipped(type(module)) for module in path)


def _shipped(kind: type) -> bool:
    """Return whether the class comes with torch or Megatron, and splits no parameter that it does not describe."""
    if kind.__module__.startswith(("transformer_engine.", "apex.")):
        return kind.__name__.endswith("Norm")  # their linear layers know tensor parallelism, but describe nothing
    return kind.__module__.startswith(("megatron.core.", "torch.nn.modules."))
