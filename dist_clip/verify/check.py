"""The comparison of the norms that the clipper finds with those of the whole gradients."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_clip.construction import Construction
from dist_clip.errors import LayoutError
from dist_clip.layouts import Layout
from dist_clip.layouts.process_groups import current_rank, distributed, gather
from dist_clip.memory import Memory
from dist_clip.reduction import Channel
from dist_clip.reduction.replicas import TOLERANCE, tolerance_of
from dist_clip.step import GlobalNorms, Meter, NonFiniteMode
from dist_clip.step.global_norms import Scales, Totals
from dist_clip.verify.gather import Copy, Gatherer, Piece, per_element
from dist_clip.verify.report import VerifiedNorm, VerifyReport, ranks_label

_BATCH = 64  # tensors whose records travel together
_SHOWN = 4  # ranks that a sentence names one by one

# Errors that keep their class on their way to the other ranks; any other becomes a RuntimeError.
_KINDS: tuple[type[Exception], ...] = (LayoutError, ValueError, TypeError)


@dataclasses.dataclass(frozen=True)
class Found:
    """What the clipper finds on this rank.

    Attributes:
        whole: norms of the whole tensors.
        here: norms of this rank's shards.
        global_norm: the global norm.
    """

    whole: list[float]
    here: list[float]
    global_norm: float


def verify(
    made: Construction,
    memory: Memory,
    read: Callable[[], Sequence[Tensor | None]],
    *,
    device: Any,
    tolerance: Any,
) -> VerifyReport:
    """Compare the clipper's norms with those of the whole gradients, as ``GradClipper.verify`` documents.

    Args:
        made: the parts of the clipper.
        memory: its memory, which is only read.
        read: returns this rank's shards of the gradients, in the layout's order.

    Raises:
        TypeError, ValueError, RuntimeError, LayoutError: as ``GradClipper.verify`` documents, on every rank.
    """
    group = (made.options.process_group or dist.group.WORLD) if distributed() else None
    # Reading may replace a gradient by its reduced form.
    before = [(t.param, t.param.grad) for t in made.layout if t.param is not None]
    try:
        measure_on, grads = _together(lambda: (_checked(device, tolerance), read()), tolerance, group)
        found = _find(made, memory, grads)
        return _compare(made.layout, grads, found, Gatherer(group, made.device, measure_on), group, float(tolerance))
    finally:
        for param, grad in before:
            if param.grad is not grad:
                param.grad = grad


def _checked(device: Any, tolerance: Any) -> torch.device | None:
    if device is not None and str(device) != "cpu":
        raise ValueError(f"device must be None (measure where the gradients are) or 'cpu', got {device!r}")
    if isinstance(tolerance, bool) or not isinstance(tolerance, numbers.Real):
        raise TypeError(f"tolerance must be a number, got {tolerance!r}")
    if not 0 < float(tolerance) < 1:
        raise ValueError(f"tolerance must be between 0 and 1, got {tolerance!r}")
    return None if device is None else torch.device("cpu")


def _together(
    prepare: Callable[[], tuple[torch.device | None, Sequence[Tensor | None]]],
    tolerance: Any,
    group: dist.ProcessGroup | None,
) -> tuple[torch.device | None, Sequence[Tensor | None]]:
    """Return what `prepare` returns, or raise on all ranks what it raises on one. Collective."""
    prepared: tuple[torch.device | None, Sequence[Tensor | None]] = (None, ())
    failure: Exception | None = None
    try:
        prepared = prepare()
    except Exception as caught:  # any error at all, because the other ranks wait for this one
        failure = caught
    kind = next((k for k in _KINDS if isinstance(failure, k)), RuntimeError)
    mine = None if failure is None else (kind, str(failure))
    told = (mine, any(grad is not None for grad in prepared[1]), repr(tolerance))
    everyone = {current_rank(): told} if group is None else gather(told, group)
    for rank, (error, _, _) in everyone.items():
        if error is not None:
            kind, text = error
            raise kind(text if failure is not None or text.startswith("rank ") else f"rank {rank}: {text}") from failure
    tolerances = {theirs for _, _, theirs in everyone.values()}
    if len(tolerances) > 1:
        raise ValueError(f"verify() got different tolerances on different ranks: {', '.join(sorted(tolerances))}")
    if not any(theirs for _, theirs, _ in everyone.values()):
        raise RuntimeError("verify() found no gradient on any rank: call it after backward and before zero_grad")
    return prepared


def _find(made: Construction, memory: Memory, grads: Sequence[Tensor | None]) -> Found:
    """Measure as `clip_` does, with every norm reduced, and change nothing. Collective."""
    options, mode = made.options, NonFiniteMode("propagate")
    # A channel of its own: one with a detector would take this for a step.
    channel = Channel(made.plan, options.pp_group, options.process_group, None)
    meter = Meter(memory, channel, made.kernels, mode, every_norm=True)
    measured = meter.measure(meter.squares(grads))
    counts = torch.tensor(made.counted, dtype=torch.bool, device=made.device)
    norms = GlobalNorms(memory, channel, counts, mode, may_skip=False, every_norm=True)
    nothing: list[Tensor | None] = [None] * len(memory.groups)
    totals = Totals(nothing, nothing, measured.bad.any(), None)
    total = norms.for_report(measured, totals, Scales(torch.ones_like(measured.local), nothing)).get()[0]
    assert measured.whole is not None
    assert total is not None
    return Found(measured.whole.tolist(), measured.local.sqrt().tolist(), float(total))


def _compare(
    layout: Layout,
    grads: Sequence[Tensor | None],
    found: Found,
    gatherer: Gatherer,
    group: dist.ProcessGroup | None,
    tolerance: float,
) -> VerifyReport:
    own = {name: i for i, name in enumerate(layout.names)}
    everything = _all_tensors(layout, group)
    rows: list[VerifiedNorm] = []
    ranges: list[tuple[float, float]] = []
    for first in range(0, len(everything), _BATCH):
        batch = everything[first : first + _BATCH]
        mine = [own.get(name) for name, _, _ in batch]
        tensors = [None if i is None else layout.tensors[i] for i in mine]
        held = [None if i is None else grads[i] for i in mine]
        told = [
            gatherer.describe(tensor, grad, *((0.0, 0.0) if i is None else (found.whole[i], found.here[i])))
            for i, tensor, grad in zip(mine, tensors, held, strict=True)
        ]
        pieces = gatherer.exchange(told)
        put_together = [
            gatherer.assemble(first + k, tensor, grad, pieces[k])
            for k, (tensor, grad) in enumerate(zip(tensors, held, strict=True))
        ]
        for (name, shape, dtype), theirs, copies in zip(batch, pieces, gatherer.exchange(put_together), strict=True):
            rows.append(_row(name, shape, dtype, theirs, copies, tolerance))
            ranges.append(_range([copy.norm for copy in copies.values() if copy.owner]))
    return VerifyReport(tuple(rows), _global_row(ranges, found.global_norm, gatherer, tolerance), tolerance)


def _all_tensors(layout: Layout, group: dist.ProcessGroup | None) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Return name, shape and dtype of every tensor of every rank, in the same order on all ranks. Collective."""
    mine = [(tensor.name, tensor.shape, tensor.dtype) for tensor in layout]
    if group is None:
        return mine
    digests = gather(hashlib.sha256(repr(mine).encode()).hexdigest(), group)
    known: dict[str, tuple[str, tuple[int, ...], torch.dtype]] = {}
    # One rank of each pipeline stage sends its names.
    for sender in {digest: rank for rank, digest in reversed(digests.items())}.values():
        sent: list[Any] = [mine]
        dist.broadcast_object_list(sent, src=sender, group=group)
        for entry in sent[0]:
            known.setdefault(entry[0], entry)
    return list(known.values())


def _row(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    pieces: dict[int, Piece],
    results: dict[int, Copy],
    tolerance: float,
) -> VerifiedNorm:
    """Return the row of one tensor, from what all ranks told: the same on every rank."""
    numel = math.prod(shape) * per_element(dtype)
    apart = tolerance_of(dtype, numel)  # a relative difference of two copies' norms that no rounding explains
    members: dict[int, list[int]] = {}
    for rank, piece in pieces.items():
        if piece.holds:
            members.setdefault(piece.copy, []).append(rank)
    norms = {pieces[rank].copy: result.norm for rank, result in results.items() if result.owner}
    problems = [*_shards(pieces, tolerance), *_parts(numel, members.values(), pieces, results)]
    # Copies with the lowest ranks first, each with those that have its norm.
    entries: list[tuple[list[int], float]] = []
    for copy, ranks in members.items():
        entry = next((e for e in entries if difference(norms[copy], e[1]) <= apart), None)
        if entry is None:
            entries.append((list(ranks), norms[copy]))
        else:
            entry[0].extend(ranks)
    copies = tuple((tuple(sorted(ranks)), norm) for ranks, norm in entries)
    if len(copies) > 1:
        texts = [f"{norm:.8g} on {ranks_label(ranks)}" for ranks, norm in copies[:_SHOWN]]
        more = f" and {len(copies) - _SHOWN} norms more" if len(copies) > _SHOWN else ""
        problems.append(f"its copies differ: they have the norm {', '.join(texts)}{more}")
    found = {rank: piece.found for rank, piece in pieces.items() if piece.listed}
    wrong = [rank for rank, norm in found.items() if _nearest(norm, norms.values())[1] > tolerance]
    if wrong:
        right = ", or ".join(f"{norm:.8g}" for _, norm in copies[:_SHOWN])
        problems.append(
            f"the clipper finds the norm {found[wrong[0]]:.8g} on {ranks_label(tuple(wrong))}, and the whole gradient has "
            f"{right}{'' if problems else ': the shards are measured right, but not added up right'}"
        )
    worst = max(found.values(), key=lambda norm: _nearest(norm, norms.values())[1])
    measured, off = _nearest(worst, norms.values())
    return VerifiedNorm(name, shape, copies, len(members), worst, measured, off, tuple(problems))


def _shards(pieces: dict[int, Piece], tolerance: float) -> list[str]:
    wrong = [rank for rank, p in pieces.items() if p.holds and difference(p.found_here, p.norm) > tolerance]
    texts = [
        f"the shard of rank {rank} has the norm {pieces[rank].norm:.8g}, for which the clipper finds "
        f"{pieces[rank].found_here:.8g}"
        for rank in wrong[:_SHOWN]
    ]
    return texts + ([f"so it is on {len(wrong) - _SHOWN} ranks more"] if len(wrong) > _SHOWN else [])


def _parts(numel: int, copies: Any, pieces: dict[int, Piece], results: dict[int, Copy]) -> list[str]:
    """Return what is wrong with the way in which pieces make up copies."""
    problems = []
    for ranks in copies:
        parts = [pieces[rank] for rank in ranks]
        held, label = sum(part.numel for part in parts), ranks_label(tuple(ranks))
        if held != numel:
            problems.append(f"the pieces of {label} have {held} numbers, and the tensor has {numel}")
        if any(not results[rank].agrees for rank in ranks):
            problems.append(f"{label} do not agree on who holds their copy")
        if _all_twins([part for part in parts if part.numel]):
            problems.append(
                f"the pieces of {label} are the same, weights and gradients: are they copies, and not parts of one tensor?"
            )
    return problems[:_SHOWN]


def _all_twins(parts: list[Piece]) -> bool:
    """Return whether each part is the same as another one, so that they must be copies.

    Weights must have the same bits. Gradients may differ by rounding. Parts in which all numbers are the same tell
    nothing.
    """
    if len(parts) < 2 or not any(part.varied for part in parts) or not any(part.norm > 0 for part in parts):
        return False
    alike: dict[tuple[int, int], list[Piece]] = {}
    for part in parts:
        alike.setdefault((part.weights, part.numel), []).append(part)
    for group in alike.values():
        group.sort(key=lambda part: part.norm)
        for i, part in enumerate(group):
            if not any(_same_grad(part, other) for other in (*group[max(i - 1, 0) : i], *group[i + 1 : i + 2])):
                return False
    return True


def _same_grad(a: Piece, b: Piece) -> bool:
    scale = TOLERANCE * max(a.norm, b.norm)
    return math.isfinite(scale) and abs(a.norm - b.norm) <= scale and abs(a.projection - b.projection) <= scale


def _range(norms: list[float]) -> tuple[float, float]:
    """Return the least and the largest norm of a tensor's copies; NaN twice if one is NaN."""
    if any(map(math.isnan, norms)):
        return math.nan, math.nan
    return min(norms, default=0.0), max(norms, default=0.0)


def _global_row(ranges: list[tuple[float, float]], mine: float, gatherer: Gatherer, tolerance: float) -> VerifiedNorm:
    """Return the row of the global norm. Collective.

    Args:
        ranges: the least and the largest norm of each tensor's copies, any of which may count.
        mine: the global norm that the clipper finds on this rank.
    """
    # Not hypot alone, for which an Inf beside a NaN is Inf.
    low, high = (math.nan if any(map(math.isnan, ends)) else math.hypot(*ends) for ends in zip(*ranges, strict=True))
    (told,) = gatherer.exchange([Piece(listed=True, found=mine)])
    found = {rank: piece.found for rank, piece in told.items()}
    off = {rank: 0.0 if low <= norm <= high else _nearest(norm, (low, high))[1] for rank, norm in found.items()}
    worst = max(off, key=lambda rank: off[rank])
    measured = _nearest(found[worst], (low, high))[0]
    wrong = tuple(rank for rank, by in off.items() if by > tolerance)
    problem = f"the clipper finds {found[worst]:.8g} on {ranks_label(wrong)}, and all gradients have {measured:.8g}"
    return VerifiedNorm(
        name="(global norm)",
        shape=(),
        copies=((tuple(found), measured),),
        num_copies=1,
        found=found[worst],
        measured=measured,
        difference=off[worst],
        problems=(problem,) if wrong else (),
    )


def _nearest(norm: float, copies: Any) -> tuple[float, float]:
    """Return the copies' norm that is nearest to `norm` (without copies 0), and the difference between the two."""
    return min(((copy, difference(norm, copy)) for copy in copies or (0.0,)), key=lambda pair: pair[1])


def difference(found: float, measured: float) -> float:
    """Return the relative difference; 0 where both are NaN or the same Inf, inf where only one is 0 or not finite."""
    if found == measured or (math.isnan(found) and math.isnan(measured)):
        return 0.0
    if not math.isfinite(found) or not math.isfinite(measured) or measured == 0:
        return math.inf
    return abs(found - measured) / measured
