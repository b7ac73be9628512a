"""The way from what the user passes to a checked layout, and the reader of plain tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dist_clip.errors import LayoutError
from dist_clip.layouts.dtensor import MeshGroups, read_dtensor
from dist_clip.layouts.fsdp1 import FlatParameters, is_flat
from dist_clip.layouts.gradient import real, usable
from dist_clip.layouts.layout import Layout, LogicalTensor
from dist_clip.layouts.naming import modules_of, named_parameters
from dist_clip.layouts.process_groups import current_rank


def build_layout(target: Any, *, allow_empty: bool = False, skip: Callable[[str], bool] = lambda name: False) -> Layout:
    """Read and check the layout of `target`, without the names for which `skip` is true.

    Args:
        target: as for `named_parameters`.
        allow_empty: accept a target without parameters to clip.

    Raises:
        LayoutError: there is nothing to clip, or a tensor cannot be clipped; the message names it.
    """
    sparse = set()
    modules = modules_of(target)
    for module in modules:
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            sparse.add(id(module.weight))
    pairs = named_parameters(target)
    if not pairs and not allow_empty:
        raise LayoutError("there are no parameters to clip: the module or list passed has none")
    floating = [(name, p) for name, p in pairs if p.is_floating_point() or p.is_complex()]
    if pairs and not any(p.requires_grad for _, p in floating) and not allow_empty:
        raise LayoutError(f"all {len(pairs)} parameters are frozen (requires_grad=False): there is nothing to clip")
    flat = FlatParameters(modules)
    # A flat parameter holds several tensors, which are excluded one by one below.
    kept = [(name, p) for name, p in floating if is_flat(p) or not skip(name)]
    for name, param in kept:
        if param.is_meta:
            raise LayoutError(
                f"rank {current_rank()}: {name!r} is on the meta device: construct the clipper after the model was "
                "materialised (to_empty and initialisation), which makes new parameters"
            )
        if id(param) in sparse:
            raise LayoutError(
                f"rank {current_rank()}: {name!r} belongs to an embedding that makes sparse gradients, which cannot be "
                "clipped: construct it with sparse=False, or exclude this tensor"
            )
    layout = layout_of_parameters(kept, flat)
    tensors = tuple(t for t in layout if not (is_flat(t.param) and skip(t.name)))
    if not tensors and not allow_empty:
        raise LayoutError(f"all {len(pairs)} parameters are excluded: there is nothing to clip")
    return dataclasses.replace(layout, tensors=tensors)


def layout_of_parameters(pairs: Sequence[tuple[str, Tensor]], flat: FlatParameters | None = None) -> Layout:
    """Return the layout of (name, parameter) pairs; `flat` must know the modules of FSDP1's parameters.

    Raises:
        LayoutError: a tensor cannot be clipped; the message names it.
    """
    flat = flat or FlatParameters(())
    groups = MeshGroups()
    here = frozenset({current_rank()})
    tensors: list[LogicalTensor] = []
    for name, param in pairs:
        several = flat.read(name, param)
        if several is not None:
            tensors += several
        else:
            tensors.append(
                read_dtensor(name, param, groups) if isinstance(param, DTensor) else _read_plain(name, param, here)
            )
    return Layout(tuple(tensors))


def _read_plain(name: str, param: Tensor, here: frozenset[int]) -> LogicalTensor:
    """Return a tensor that is whole on this rank, `here`: single process, DDP, pipeline stages, replicated."""
    if getattr(param, "__fsdp_param__", False):
        raise LayoutError(
            f"rank {current_rank()}: {name!r} is what Megatron-FSDP computes with in the forward pass, without a gradient: "
            "pass the optimizer's param_groups, or make the clipper right after fully_shard_model()"
        )

    def read() -> Tensor | None:
        grad = param.grad
        if grad is None:
            return None
        if isinstance(grad, DTensor):
            raise RuntimeError(f"{name!r} is a plain tensor but its gradient is a DTensor")
        return usable(name, grad, put)

    def put(grad: Tensor) -> None:
        param.grad = grad

    return LogicalTensor(
        name=name,
        shape=tuple(param.shape),
        dtype=param.dtype,
        param=param,
        shard_numel=param.numel(),
        norm_groups=(),
        replica_ranks=here,
        mesh_ranks=here,
        grad=read,
        weight=lambda: real(param.detach()),
        device=param.device,
        placement="whole",
        own_grad=True,
    )
