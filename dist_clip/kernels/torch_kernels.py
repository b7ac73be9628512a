"""Local power sums of many tensors and their in-place scaling, with torch operators only."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

# `_foreach_copy_` stands in for `Tensor.copy_`, whose Python binding needs a CUDA build even for fake CUDA tensors, with
# which the tests prove that no step syncs the host.

# torch's fp32 norm on CPU accumulates serially: off by 1e-5 at 1M elements and 2.7e-3 at 39M, and by 2e-6 already at 2048
# equal elements, whose roundings do not average out. Rows of this length are off by at most 3e-7 in that worst case; the
# rows are then added in float64.
_BLOCK = 256
# Up to this many elements one foreach call in float64 is cheaper than an own call for each tensor.
_SMALL = 16_384
# Low-precision gradients are widened piece by piece into a buffer of this many fp32 elements, small enough for the L2
# cache: five times as fast as asking vector_norm to widen (measured on 39M bf16 elements).
_CHUNK = 1024 * _BLOCK
# Below this L2 norm fp32 squares may have underflowed; above it whatever underflowed is less than 1e-7 of the norm.
_TINY = 1e-10


def power_sums(shards: Sequence[Tensor | None], p: float, device: torch.device, foreach: bool | None = None) -> Tensor:
    """``sum(|x|**p)`` of each tensor (``max(|x|)`` for ``p = inf``).

    Args:
        shards: n real floating tensors of any shape, dtype and device; ``None`` and empty tensors give 0.
        p: order of the norm, positive, possibly ``inf``.
        device: where the result lives.
        foreach: ``False`` takes the tensors one by one, as ``torch.nn.utils.clip_grad_norm_`` does.

    Returns:
        float64 tensor [n] on ``device``. Accumulation is blocked on CPU and in float64 elsewhere, so neither the number
        of elements nor squares outside fp32's range cost accuracy. No host sync for accelerator tensors.
    """
    entries: list[Tensor | None] = [None] * len(shards)
    for shard_device, present in _by_device(shards).items():
        indices, tensors = [i for i, _ in present], [shard for _, shard in present]
        if shard_device.type == "cpu":
            norms = _norms_cpu(tensors, p)
        elif foreach is False:
            norms = torch.stack([torch.linalg.vector_norm(t, p, dtype=torch.float64) for t in tensors])
        else:
            norms = torch.stack(torch._foreach_norm(tensors, p, dtype=torch.float64))
        sums = (norms if math.isinf(p) else norms.square() if p == 2.0 else norms.pow(p)).to(device)
        if len(indices) == len(shards):
            return sums
        for i, entry in zip(indices, sums.unbind(), strict=True):
            entries[i] = entry
    # Stacked, not written at an index: sending positions to an accelerator is a blocking copy.
    zero = torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack([zero if entry is None else entry for entry in entries]) if entries else zero.new_empty(0)


def _by_device(shards: Sequence[Tensor | None]) -> dict[torch.device, list[tuple[int, Tensor]]]:
    """The non-empty tensors with their positions, by device."""
    by_device: dict[torch.device, list[tuple[int, Tensor]]] = defaultdict(list)
    for i, shard in enumerate(shards):
        if shard is not None and shard.numel() > 0:
            by_device[shard.device].append((i, shard))
    return by_device


def _norms_cpu(tensors: Sequence[Tensor], p: float) -> Tensor:
    """float64 [n] norms of CPU tensors: small ones in one foreach call, the rest in blocks."""
    norms = torch.empty(len(tensors), dtype=torch.float64, device="cpu")
    small = [i for i, t in enumerate(tensors) if t.numel() <= _SMALL]
    if small:
        norms[small] = torch.stack(torch._foreach_norm([tensors[i] for i in small], p, dtype=torch.float64))
    for i, tensor in enumerate(tensors):
        if tensor.numel() > _SMALL:
            norms[i] = _blocked_norm(_flat(tensor), p)
    # A norm outside the range in which fp32 powers are safe is measured again in float64. CPU data: no sync.
    suspect = ~torch.isfinite(norms) | (norms < _TINY)
    suspect[small] = False
    if not math.isinf(p) and bool(suspect.any()):
        for i in suspect.nonzero().flatten().tolist():
            largest = torch.linalg.vector_norm(tensors[i], math.inf)
            norms[i] = torch.linalg.vector_norm(tensors[i], p, dtype=torch.float64) if largest != 0 else 0.0
    return norms


def _flat(tensor: Tensor) -> Tensor:
    """The elements in memory order, without a copy when they fill their memory (a norm does not care for the order)."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).reshape(-1)


def _blocked_norm(flat: Tensor, p: float) -> Tensor:
    if flat.dtype == torch.float64:
        return torch.linalg.vector_norm(flat, p)
    if flat.dtype == torch.float32:
        return torch.linalg.vector_norm(_row_norms(flat, p), p)
    buffer = torch.empty(min(_CHUNK, flat.numel()), dtype=torch.float32, device="cpu")
    parts = []
    for chunk in torch.split(flat, _CHUNK):
        widened = buffer[: chunk.numel()].copy_(chunk)
        parts.append(_row_norms(widened, p))
    return torch.linalg.vector_norm(torch.cat(parts), p)


def _row_norms(flat: Tensor, p: float) -> Tensor:
    """float64 norms of rows of `_BLOCK` fp32 elements, the last row shorter."""
    whole = flat.numel() // _BLOCK * _BLOCK
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, _BLOCK), p, dim=1) if whole else flat.new_empty(0)
    if whole < flat.numel():
        rows = torch.cat([rows, torch.linalg.vector_norm(flat[whole:], p).view(1)])
    return rows.double()


def scale_(
    shards: Sequence[Tensor | None], scales: Tensor, *, uniform: bool = False, foreach: bool | None = None
) -> None:
    """Multiply each tensor in place by its scale; a tensor whose scale is 1 keeps its bits.

    Args:
        shards: n tensors (``None`` and empty ones are passed over).
        scales: float64 tensor [n]. float64 gradients are multiplied by it as it is, all others by its fp32 value; those
            of lower precision are multiplied in fp32 and rounded once.
        uniform: all entries of ``scales`` are equal, which lets an accelerator use one fused launch.
    """
    for device, present in _by_device(shards).items():
        if device.type == "cpu":
            # A Python float is rounded to the precision in which torch's CPU kernels compute: fp32 below float64.
            values: list[float] = scales.tolist()
            for i, shard in present:
                # `!=` also lets a NaN scale through: a non-finite norm propagates as it does in torch.
                if values[i] != 1.0:
                    shard.mul_(values[i])
            continue
        local = scales.to(device, non_blocking=True)
        by_dtype: dict[torch.dtype, list[tuple[int, Tensor]]] = defaultdict(list)
        for i, shard in present:
            by_dtype[shard.dtype].append((i, shard))
        for dtype, entries in by_dtype.items():
            factors = (local if dtype == torch.float64 else local.float()).unbind()
            if dtype not in (torch.float32, torch.float64):
                # bf16 * fp32 0-dim on an accelerator rounds the scale to bf16 first (0.99 becomes 0.9883).
                for i, shard in entries:
                    torch._foreach_copy_([shard], [shard.float() * factors[i]])
            elif uniform and foreach is not False:
                torch._foreach_mul_([shard for _, shard in entries], factors[entries[0][0]])
            else:
                torch._foreach_mul_([shard for _, shard in entries], tuple(factors[i] for i, _ in entries))


def zero_where_(shards: Sequence[Tensor | None], flags: Tensor) -> None:
    """Set a tensor to exactly 0 where its flag (bool [n]) is set; multiplying by 0 would keep NaN and Inf as NaN."""
    for device, present in _by_device(shards).items():
        local_flags = flags.to(device, non_blocking=True).unbind()
        for i, shard in present:
            shard.masked_fill_(local_flags[i], 0)
