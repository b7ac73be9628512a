"""Local power sums and in-place scaling of many tensors, with torch operators only."""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

_CPU = torch.device("cpu")

_dtype, _is_cpu = operator.attrgetter("dtype"), operator.attrgetter("is_cpu")

# `_foreach_copy_` replaces `Tensor.copy_`, whose Python binding needs a CUDA build even for fake CUDA tensors. The
# tests use fake CUDA tensors to prove that no step syncs the host.

# torch's fp32 norm on CPU accumulates serially: it is off by 1e-5 at 1M elements and 2.7e-3 at 39M, and by 2e-6 already
# at 2048 equal elements, whose roundings do not average out. Rows of this length are off by at most 3e-7 in that worst
# case; the rows are then added in float64.
_BLOCK = 256
# Up to this many elements a torch call costs more than its work, so tensors of one shape are stacked and measured
# together.
_SMALL = 4096
# From this many elements on, a tensor is read as several streams, which takes a few more calls.
_LARGE = 1_000_000
# Elements that are stacked, or widened to fp32, at a time: scratch that does not grow with the model and stays in
# cache. Widening piece by piece is five times as fast as vector_norm's own widening (measured on 39M bf16 elements).
_CHUNK = 512 * _BLOCK
# fp32 is read in place: only the rows' norms need scratch, one number for every _BLOCK elements.
_CHUNK_IN_PLACE = 128 * _CHUNK
# Parts of a large tensor that are read in turn, row by row, so that several loads from memory are under way at once.
# That takes a seventh less time than reading it from end to end (2 parts do not help, 8 hurt; measured on GPT-2's
# tensors).
_STREAMS = 4
# Below this L2 norm fp32 squares may have underflowed; above it, what underflowed is less than 1e-7 of the norm.
_TINY = 1e-10


def power_sums(shards: Sequence[Tensor | None], p: float, device: torch.device, foreach: bool | None = None) -> Tensor:
    """Return ``sum(|x|**p)`` of each tensor (``max(|x|)`` for ``p = inf``).

    Args:
        shards: n real floating tensors of any shape, dtype and device; ``None`` and empty tensors give 0.
        p: order of the norm, positive, possibly ``inf``.
        device: where the result lives.
        foreach: ``False`` measures accelerator tensors one by one, as ``torch.nn.utils.clip_grad_norm_`` does.

    Returns:
        float64 tensor [n] on ``device``. Accumulation is blocked on CPU and in float64 elsewhere, so neither the number
        of elements nor squares outside fp32's range cost accuracy. Accelerator tensors cause no host sync.
    """
    if len(shards) and _all_on_cpu(shards):
        return _powers(_norms_cpu(shards, p), p).to(device)
    entries: list[Tensor | None] = [None] * len(shards)
    for shard_device, present in _by_device(shards).items():
        indices, tensors = [i for i, _ in present], [shard for _, shard in present]
        if shard_device.type == "cpu":
            norms = _norms_cpu(tensors, p)
        elif foreach is False:
            norms = torch.stack([torch.linalg.vector_norm(t, p, dtype=torch.float64) for t in tensors])
        else:
            norms = torch.stack(torch._foreach_norm(tensors, p, dtype=torch.float64))
        sums = _powers(norms, p).to(device)
        if len(indices) == len(shards):
            return sums
        for i, entry in zip(indices, sums.unbind(), strict=True):
            entries[i] = entry
    # Stacked rather than written at an index, because sending positions to an accelerator is a blocking copy.
    zero = torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack([zero if entry is None else entry for entry in entries]) if entries else zero.new_empty(0)


def _powers(norms: Tensor, p: float) -> Tensor:
    return norms if math.isinf(p) else norms.square() if p == 2.0 else norms.pow(p)


def _all_on_cpu(shards: Sequence[Any]) -> TypeGuard[Sequence[Tensor]]:
    """Whether all are tensors on the CPU that have elements. Asked by `map`, which many small tensors notice."""
    return type(None) not in set(map(type, shards)) and all(map(_is_cpu, shards)) and all(map(Tensor.numel, shards))


def _by_device(shards: Sequence[Tensor | None]) -> dict[torch.device, list[tuple[int, Tensor]]]:
    """Return the non-empty tensors with their positions, by device."""
    present = [(i, shard) for i, shard in enumerate(shards) if shard is not None and shard.numel() > 0]
    if all(shard.is_cpu for _, shard in present):  # reading each tensor's device takes longer than all else here
        return {_CPU: present} if present else {}
    by_device: dict[torch.device, list[tuple[int, Tensor]]] = defaultdict(list)
    for i, shard in present:
        by_device[shard.device].append((i, shard))
    return by_device


def _norms_cpu(tensors: Sequence[Tensor], p: float) -> Tensor:
    """Return the norms of CPU tensors, float64 [n]. A norm's bits do not depend on the other tensors in the list."""
    alike: dict[tuple[torch.Size, torch.dtype], list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        alike[tensor.shape, tensor.dtype].append(i)
    scratch = torch.empty(_CHUNK, dtype=torch.float32, device="cpu")
    order: list[int] = []
    parts: list[Tensor] = []
    for (shape, dtype), members in alike.items():
        numel = math.prod(shape)
        if dtype != torch.float64 and numel >= _LARGE:
            measure, at_once = _norm_of_large, 1
        elif dtype != torch.float64 and numel > _SMALL:
            measure, at_once = _norms_in_place, _CHUNK_IN_PLACE // numel
        else:
            measure, at_once = _norms_of_stack, max(1, _CHUNK // numel)
        for start in range(0, len(members), at_once):
            chosen = members[start : start + at_once]
            order += chosen
            parts.append(measure([tensors[i] for i in chosen], p, scratch))
    norms = torch.empty(len(tensors), dtype=torch.float64, device="cpu")
    norms.index_copy_(0, torch.tensor(order, device="cpu"), torch.cat(parts))
    # Norms outside the range in which fp32 powers are safe are measured again in float64. On the CPU that is no sync.
    suspect = torch.logical_not((norms >= _TINY) & (norms < math.inf))
    if not math.isinf(p) and bool(suspect.any()):
        for i in suspect.nonzero().flatten().tolist():
            largest = torch.linalg.vector_norm(tensors[i], math.inf)
            norms[i] = torch.linalg.vector_norm(tensors[i], p, dtype=torch.float64) if largest != 0 else 0.0
    return norms


# The following functions take tensors of one shape and dtype, and return their norms, float64 [k]. They overwrite
# `scratch`.


def _norms_of_stack(tensors: Sequence[Tensor], p: float, scratch: Tensor) -> Tensor:
    """Return the norms of small tensors, or of float64 tensors of any size."""
    first = tensors[0]
    if first.dtype == torch.float64:
        stacked = torch.stack(list(tensors))
    else:  # writing to `out` also widens to fp32
        place = scratch[: len(tensors) * first.numel()].view(len(tensors), *first.shape)
        stacked = torch.stack(list(tensors), out=place)
    return _add_rows(_row_norms(stacked.reshape(len(tensors), -1), p), p)


def _norms_in_place(tensors: Sequence[Tensor], p: float, scratch: Tensor) -> Tensor:
    """Return the norms of tensors that are large enough for one call each, but too small for several streams."""
    if tensors[0].dtype != torch.float32:
        return torch.cat([_norm_of_large([t], p, scratch) for t in tensors])
    if tensors[0].numel() % _BLOCK == 0 and all(t.is_contiguous() for t in tensors):  # the same with fewer calls
        return _add_rows(torch.stack([torch.linalg.vector_norm(t.view(-1, _BLOCK), p, dim=1) for t in tensors]), p)
    return _add_rows(torch.cat([_row_norms(_flat(t).view(1, -1), p) for t in tensors]), p)


def _norm_of_large(tensors: Sequence[Tensor], p: float, scratch: Tensor) -> Tensor:
    """Return the norm of one large tensor, read in chunks."""
    (tensor,) = tensors
    if tensor.dtype == torch.float32:
        chunks = torch.split(_flat(tensor), _CHUNK_IN_PLACE)
        parts = [part for chunk in chunks for part in _streamed_norms(chunk, p)]
    else:
        chunks = torch.split(_flat(tensor), _CHUNK)
        widened = (scratch[: chunk.numel()].copy_(chunk).view(1, -1) for chunk in chunks)
        parts = [_add_rows(_row_norms(chunk, p), p) for chunk in widened]
    return parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.cat(parts), p).view(1)


def _streamed_norms(flat: Tensor, p: float) -> list[Tensor]:
    """Return the norms, float64 [1] each, of parts that make up a contiguous fp32 vector."""
    # The number of rows is odd, because streams a multiple of 4 KiB apart would compete for the same sets of the cache.
    rows = (flat.numel() // (_STREAMS * _BLOCK) - 1) | 1
    end = _STREAMS * rows * _BLOCK
    parts = []
    if rows > 0:
        # torch iterates in the order of the output's strides: one row of each stream, then the next row of each.
        norms = flat.new_empty(rows, _STREAMS)
        torch.linalg.vector_norm(flat[:end].view(_STREAMS, rows, _BLOCK).transpose(0, 1), p, dim=2, out=norms)
        parts.append(_add_rows(norms.view(1, -1), p))
    rest = flat[max(end, 0) :]
    if rest.numel() > 0:
        parts.append(_add_rows(_row_norms(rest.view(1, -1), p), p))
    return parts


def _flat(tensor: Tensor) -> Tensor:
    """Return the elements in memory order, which a norm may use, without a copy if they fill their memory."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).reshape(-1)


def _row_norms(vectors: Tensor, p: float) -> Tensor:
    """Return the norms, [k, r], of the rows of `_BLOCK` elements of each vector, [k, m]; the last may be shorter."""
    k, m = vectors.shape
    whole = m // _BLOCK * _BLOCK
    if whole == m:
        return torch.linalg.vector_norm(vectors.view(k, -1, _BLOCK), p, dim=2)
    rest = torch.linalg.vector_norm(vectors[:, whole:], p, dim=1, keepdim=True)
    if whole == 0:
        return rest
    return torch.cat([torch.linalg.vector_norm(vectors[:, :whole].view(k, -1, _BLOCK), p, dim=2), rest], dim=1)


def _add_rows(norms: Tensor, p: float) -> Tensor:
    """Return the norms of vectors, float64 [k], from those of their rows, [k, r]. A norm's bits do not depend on k."""
    return torch.linalg.vector_norm(norms.double(), p, dim=1)


def scale_(
    shards: Sequence[Tensor | None], scales: Tensor, *, uniform: bool = False, foreach: bool | None = None
) -> None:
    """Multiply each tensor in place by its scale; a tensor whose scale is 1 keeps its bits.

    Args:
        shards: n tensors (``None`` and empty ones are ignored).
        scales: float64 tensor [n]. float64 gradients are multiplied by the scale itself, all others by its fp32 value;
            those of lower precision are multiplied in fp32 and rounded once.
        uniform: all entries of ``scales`` are equal, which lets an accelerator use one fused launch.
        foreach: ``False`` does not use that launch.
    """
    if scales.device.type == "cpu":
        # A scale of 1 needs no work. A NaN does not equal 1, so a non-finite norm propagates as in torch.
        chosen = [i for i, value in enumerate(scales.tolist()) if value != 1.0]
        if len(chosen) < len(shards):
            shards = [shards[i] for i in chosen]
            scales = scales.index_select(0, torch.tensor(chosen, dtype=torch.int64, device="cpu"))
        if _all_on_cpu(shards) and torch.float64 not in set(map(_dtype, shards)):  # as ever, but with fewer questions
            _multiply(shards, scales.float(), uniform)
            return
    for device, present in _by_device(shards).items():
        if device.type == "cpu":
            _scale_cpu(present, scales.cpu(), uniform)
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
    # The factors are 0-dim tensors, because torch would make a tensor of each Python float. Gradients below float64,
    # including bf16 and fp16, are multiplied in fp32, by the fp32 value of the scale.
    double = [(i, shard) for i, shard in present if shard.dtype == torch.float64]
    single = [(i, shard) for i, shard in present if shard.dtype != torch.float64] if double else present
    for entries, factors in ((double, scales), (single, scales.float())):
        chosen = torch.tensor([i for i, _ in entries], dtype=torch.int64, device="cpu")
        _multiply([shard for _, shard in entries], factors.index_select(0, chosen), uniform)


def _multiply(shards: Sequence[Any], factors: Tensor, uniform: bool) -> None:
    if len(shards):
        torch._foreach_mul_(list(shards), factors[0] if uniform else list(factors.unbind()))


def zero_where_(shards: Sequence[Tensor | None], flags: Tensor) -> None:
    """Set each tensor whose flag (bool [n]) is set to exactly 0; a product with 0 would turn NaN and Inf into NaN."""
    for device, present in _by_device(shards).items():
        local_flags = flags.to(device, non_blocking=True).unbind()
        for i, shard in present:
            shard.masked_fill_(local_flags[i], 0)
