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
# Up to this many elements the cost of a torch call outweighs that of the elements: tensors of one shape are stacked first.
_SMALL = 16_384
# Elements that are stacked, or widened to fp32, at a time: scratch that does not grow with the model and stays in cache.
# Widening piece by piece is five times as fast as asking vector_norm to do it (measured on 39M bf16 elements).
_CHUNK = 1024 * _BLOCK
# fp32 is read where it is: only the rows' norms need a place, this many times less one in _BLOCK.
_CHUNK_IN_PLACE = 64 * _CHUNK
# Parts of a large tensor that are read in turn, row by row, so that several loads from memory are under way at once: a
# seventh off the time of reading it from end to end (2 parts do not help, 8 hurt; measured over the tensors of GPT-2).
_STREAMS = 4
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
    """float64 [n] norms of CPU tensors, the same bits whatever other tensors are in the list."""
    small: dict[tuple[torch.Size, torch.dtype], list[int]] = defaultdict(list)
    order: list[int] = []
    parts: list[Tensor] = []
    for i, tensor in enumerate(tensors):
        if tensor.numel() <= _SMALL:
            small[tensor.shape, tensor.dtype].append(i)
        else:
            order.append(i)
            parts.append(_large_norm(_flat(tensor), p))
    for (shape, _), members in small.items():
        at_once = max(1, _CHUNK // math.prod(shape))
        for start in range(0, len(members), at_once):
            chosen = members[start : start + at_once]
            order += chosen
            stacked = torch.stack([tensors[i] for i in chosen]).reshape(len(chosen), -1)
            parts.append(_blocked_norms(stacked, p))
    norms = torch.empty(len(tensors), dtype=torch.float64, device="cpu")
    norms.index_copy_(0, torch.tensor(order, device="cpu"), torch.cat(parts))
    # A norm outside the range in which fp32 powers are safe is measured again in float64. CPU data: no sync.
    suspect = torch.logical_not((norms >= _TINY) & (norms < math.inf))
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


def _large_norm(flat: Tensor, p: float) -> Tensor:
    """float64 [1]: norm of a tensor of many elements, in chunks."""
    if flat.dtype == torch.float64:
        return torch.linalg.vector_norm(flat, p).view(1)
    if flat.dtype == torch.float32:
        parts = [part for chunk in torch.split(flat, _CHUNK_IN_PLACE) for part in _streamed_norms(chunk, p)]
    else:
        buffer = torch.empty(min(_CHUNK, flat.numel()), dtype=torch.float32, device="cpu")
        parts = [
            _blocked_norms(buffer[: chunk.numel()].copy_(chunk).view(1, -1), p) for chunk in torch.split(flat, _CHUNK)
        ]
    return parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.cat(parts), p).view(1)


def _streamed_norms(flat: Tensor, p: float) -> list[Tensor]:
    """float64 [1] each: norms of the parts of a contiguous fp32 vector that make up the whole."""
    # An odd number of rows: streams a multiple of 4 KiB apart would compete for the same sets of the cache.
    rows = (flat.numel() // (_STREAMS * _BLOCK) - 1) | 1
    end = _STREAMS * rows * _BLOCK
    if rows < 1 or end > flat.numel():
        return [_blocked_norms(flat.view(1, -1), p)]
    # torch walks in the order of the output's strides: one row of each stream, then the next of each.
    norms = flat.new_empty(rows, _STREAMS)
    torch.linalg.vector_norm(flat[:end].view(_STREAMS, rows, _BLOCK).transpose(0, 1), p, dim=2, out=norms)
    parts = [torch.linalg.vector_norm(norms.double(), p).view(1)]
    if end < flat.numel():
        parts.append(_blocked_norms(flat[end:].view(1, -1), p))
    return parts


def _blocked_norms(vectors: Tensor, p: float) -> Tensor:
    """float64 [k]: norms of the rows of [k, m], found block by block of each row, so that k does not change the bits."""
    if vectors.dtype not in (torch.float32, torch.float64):
        vectors = vectors.float()
    k, m = vectors.shape
    whole = m // _BLOCK * _BLOCK
    blocks = []
    if whole:
        blocks.append(torch.linalg.vector_norm(vectors[:, :whole].view(k, -1, _BLOCK), p, dim=2))
    if whole < m:
        blocks.append(torch.linalg.vector_norm(vectors[:, whole:], p, dim=1, keepdim=True))
    norms = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)
    return torch.linalg.vector_norm(norms.double(), p, dim=1)


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
            _scale_cpu(present, scales, uniform)
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


def _scale_cpu(present: Sequence[tuple[int, Tensor]], scales: Tensor, uniform: bool) -> None:
    """Only tensors with a scale other than 1 are touched, which on the CPU can be looked up."""
    values: list[float] = scales.tolist()
    # `!=` also lets a NaN scale through: a non-finite norm propagates as it does in torch.
    touched = [(i, shard) for i, shard in present if values[i] != 1.0]
    if not touched:
        return
    # 0-dim tensors, not Python floats, of which torch would make tensors one by one. Gradients below float64 are computed
    # with in fp32, and so with the fp32 value of the scale, bf16 and fp16 included.
    double = [(i, shard) for i, shard in touched if shard.dtype == torch.float64]
    single = [(i, shard) for i, shard in touched if shard.dtype != torch.float64] if double else touched
    for entries, factors in ((double, scales), (single, scales.float())):
        if not entries:
            continue
        shards = [shard for _, shard in entries]
        if uniform:
            torch._foreach_mul_(shards, factors[entries[0][0]])
        else:
            every = factors.unbind()
            torch._foreach_mul_(shards, [every[i] for i, _ in entries])


def zero_where_(shards: Sequence[Tensor | None], flags: Tensor) -> None:
    """Set a tensor to exactly 0 where its flag (bool [n]) is set; multiplying by 0 would keep NaN and Inf as NaN."""
    for device, present in _by_device(shards).items():
        local_flags = flags.to(device, non_blocking=True).unbind()
        for i, shard in present:
            shard.masked_fill_(local_flags[i], 0)
