"""What ranks must agree on before the first step: checked once, so that a mismatch is an error and not a hang."""

from __future__ import annotations

import dataclasses
from itertools import zip_longest
from typing import Any

import torch.distributed as dist

from dist_clip.errors import LayoutError


@dataclasses.dataclass(frozen=True)
class Announcement:
    """What one rank tells the others: its own failure, or its stage, tensors, configuration and pattern matches."""

    error: str | None
    stage: int
    tensors: tuple[str, ...] = ()
    config: str = ""
    patterns: frozenset[str] = frozenset()
    matched: frozenset[str] = frozenset()
    names: tuple[str, ...] = ()


def agree(mine: Announcement, process_group: Any) -> list[tuple[int, Announcement]]:
    """Exchange announcements over `process_group` and raise the same `LayoutError` on all of its ranks if any differs.

    Ranks of one pipeline stage must hold the same tensors in the same order with the same placements; all ranks must be
    configured alike, and each pattern must match somewhere. Returns the announcements with their global ranks.

    To keep the exchange small at scale ranks first compare digests; texts travel only between stages and on an error.
    """
    if not _distributed():
        everyone = [(0, mine)]
    else:
        group = process_group if process_group is not None else dist.group.WORLD
        gathered: list[Any] = [None] * dist.get_world_size(group)
        digest = hash_of(mine)
        dist.all_gather_object(gathered, (mine.error, mine.stage, digest), group=group)
        ranks = dist.get_process_group_ranks(group)
        alike = len(set(gathered)) == 1 and mine.error is None
        if alike:
            everyone = [(ranks[0], mine)]
        else:
            full: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(full, mine, group=group)
            everyone = list(zip(ranks, full, strict=True))
    _check(everyone)
    return everyone


def hash_of(mine: Announcement) -> str:
    import hashlib

    content = repr((mine.tensors, mine.config, sorted(mine.patterns), sorted(mine.matched)))
    return hashlib.sha256(content.encode()).hexdigest()


def _check(everyone: list[tuple[int, Announcement]]) -> None:
    failed = [(rank, a.error) for rank, a in everyone if a.error is not None]
    if failed:
        rank, error = failed[0]
        others = f" (ranks {[r for r, _ in failed]} report an error)" if len(failed) > 1 else ""
        raise LayoutError(error if len(everyone) == 1 else f"on rank {rank}: {error}{others}")
    first_rank, first = everyone[0]
    reference: dict[int, tuple[int, Announcement]] = {}
    for rank, announced in everyone:
        if announced.config != first.config:
            raise LayoutError(
                f"rank {rank} is configured differently from rank {first_rank}: {announced.config} against {first.config}"
            )
        if announced.patterns != first.patterns:
            raise LayoutError(
                f"rank {rank} has other patterns than rank {first_rank}: {sorted(announced.patterns)} against "
                f"{sorted(first.patterns)}"
            )
        ref_rank, ref = reference.setdefault(announced.stage, (rank, announced))
        for i, (ours, theirs) in enumerate(zip_longest(announced.tensors, ref.tensors)):
            if ours != theirs:
                stage = f" of pipeline stage {announced.stage}" if len({a.stage for _, a in everyone}) > 1 else ""
                raise LayoutError(
                    f"the layouts{stage} differ: tensor {i} is {ours or 'missing'!r} on rank {rank} but "
                    f"{theirs or 'missing'!r} on rank {ref_rank}. Every rank must pass the same parameters in the same "
                    "order, sharded alike; under pipeline parallelism pass pp_group="
                )
    unmatched = first.patterns.difference(*(a.matched for _, a in everyone))
    if unmatched:
        some = ", ".join(list(first.names)[:5])
        raise LayoutError(f"no tensor on any rank matches {sorted(unmatched)}; names look like: {some}, ...")


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
