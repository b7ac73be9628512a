"""Agreement of the ranks before the first step, checked once so that a mismatch raises instead of hanging."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from itertools import zip_longest

import torch.distributed as dist

from dist_clip.construction.selection import UNKNOWN
from dist_clip.errors import LayoutError
from dist_clip.layouts.process_groups import current_rank, gather

# Errors that keep their class on their way to the other ranks; any other becomes a LayoutError.
_KINDS = (LayoutError, ValueError, TypeError, ImportError)


@dataclasses.dataclass(frozen=True)
class RankConfig:
    """What one rank sends to the others: its error, or its stage, tensors, configuration and pattern matches.

    Attributes:
        error: what went wrong on this rank, in the form that `sendable` returns; None if nothing did.
        stage: this rank's pipeline stage.
        tensors: a description of each tensor, the same on all ranks of the stage.
        options: a description of the clipper's options, the same on all ranks.
        patterns: the FQN patterns that were passed, and the labels of other selectors.
        matched: those that match a tensor on this rank.
        names: FQNs of the tensors.
        shapes: shapes of the whole tensors.
        rules: the label of each rule, the default's last.
        numbers: the number of each tensor's rule, `UNKNOWN` where this rank cannot tell.
    """

    error: Exception | None
    stage: int
    tensors: tuple[str, ...] = ()
    options: str = ""
    patterns: frozenset[str] = frozenset()
    matched: frozenset[str] = frozenset()
    names: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    rules: tuple[str, ...] = ()
    numbers: tuple[int, ...] = ()


def agree(
    mine: RankConfig, process_group: dist.ProcessGroup | None, pp_group: dist.ProcessGroup | None
) -> dict[int, RankConfig]:
    """Exchange configurations over `process_group`, and raise the same error on all of its ranks if any differs.

    Ranks of one pipeline stage must hold the same tensors in the same order with the same placements. All ranks must be
    configured alike, and each pattern must match on some rank.

    Ranks first compare digests. Names are sent only where they are needed: between the stages of a pipeline, and
    between all ranks to name what differs.

    Returns:
        One configuration of each pipeline stage, by the global rank that sent it.

    Raises:
        LayoutError: ranks differ, or a pattern matches nothing.
        LayoutError, ValueError, TypeError, ImportError: the error of the first rank that has one.
    """
    brief = list(gather((mine.error is None, mine.stage, mine.options, _digest(mine)), process_group).values())
    stages = {stage for _, stage, _, _ in brief}
    # Which exchange follows may only depend on what all ranks have received, or some ranks would wait for ever.
    failed = not all(fine for fine, _, _, _ in brief)
    if failed or len({options for _, _, options, _ in brief}) > 1 or len(set(brief)) > len(stages):
        everyone = gather(mine, process_group)
    elif pp_group is not None:
        everyone = gather(mine, pp_group)
    else:
        everyone = {current_rank(): mine}
    _check(list(everyone.items()))
    return everyone


def agreed_numbers(everyone: Mapping[int, RankConfig]) -> dict[str, int]:
    """Return the number of the rule of each tensor of the whole model, by FQN, once `agree` has compared them.

    Raises:
        LayoutError: no rank can tell. The same on all ranks.
    """
    numbers: dict[str, int] = {}
    for config in everyone.values():
        for name, number in zip(config.names, config.numbers, strict=True):
            if numbers.get(name, UNKNOWN) == UNKNOWN:
                numbers[name] = number
    lost = sorted(name for name, number in numbers.items() if number == UNKNOWN)
    if lost:
        raise LayoutError(
            f"overrides=: no rank can tell whether its selectors select {lost[:3]}: select them by an FQN pattern"
        )
    return numbers


def sendable(error: Exception) -> Exception:
    """Return `error` in a form that can be pickled: a `LayoutError` unless its class is one of `_KINDS`."""
    known = next((k for k in _KINDS if isinstance(error, k)), None)
    return known(str(error)) if known else LayoutError(f"{type(error).__name__}: {error}")


def _digest(mine: RankConfig) -> str:
    content = repr((mine.tensors, sorted(mine.patterns), sorted(mine.matched), mine.numbers))
    return hashlib.sha256(content.encode()).hexdigest()


def _check(everyone: list[tuple[int, RankConfig]]) -> None:
    failed = [(rank, a.error) for rank, a in everyone if a.error is not None]
    if failed:
        rank, error = failed[0]
        others = f" (ranks {[r for r, _ in failed]} report an error)" if len(failed) > 1 else ""
        # All ranks raise the class of the first error if it is in _KINDS.
        kind = next((k for k in _KINDS if isinstance(error, k)), LayoutError)
        where = "" if len(everyone) == 1 or str(error).startswith("rank ") else f"on rank {rank}: "
        raise kind(f"{where}{error}{others}") from error
    first_rank, first = everyone[0]
    reference: dict[int, tuple[int, RankConfig]] = {}
    for rank, config in everyone:
        if config.options != first.options:
            raise LayoutError(
                f"rank {rank} is configured differently from rank {first_rank}: ({config.options}), not ({first.options})"
            )
        if config.patterns != first.patterns:
            raise LayoutError(
                f"rank {rank} has other patterns than rank {first_rank}: {sorted(config.patterns)} against "
                f"{sorted(first.patterns)}"
            )
        ref_rank, ref = reference.setdefault(config.stage, (rank, config))
        for i, (ours, theirs) in enumerate(zip_longest(config.tensors, ref.tensors)):
            if ours != theirs:
                stage = f" of pipeline stage {config.stage}" if len({a.stage for _, a in everyone}) > 1 else ""
                raise LayoutError(
                    f"the layouts{stage} differ: tensor {i} is {ours or 'missing'!r} on rank {rank} but "
                    f"{theirs or 'missing'!r} on rank {ref_rank}. Every rank must pass the same parameters in the same "
                    "order, sharded alike; under pipeline parallelism pass pp_group="
                )
    chosen: dict[str, tuple[int, int]] = {}
    for rank, config in everyone:
        for name, number in zip(config.names, config.numbers, strict=True):
            if number == UNKNOWN:
                continue
            ref_rank, ref_number = chosen.setdefault(name, (rank, number))
            if number != ref_number:
                raise LayoutError(
                    f"overrides= gives {name!r} to {config.rules[number]!r} on rank {rank} but to "
                    f"{config.rules[ref_number]!r} on rank {ref_rank}: a selector must select the same tensors on every rank"
                )
    held: dict[str, tuple[int, tuple[int, ...]]] = {}
    for rank, config in reference.values():
        for name, shape in zip(config.names, config.shapes, strict=True):
            other_rank, other = held.setdefault(name, (rank, shape))
            if other != shape:
                raise LayoutError(
                    f"{name!r} has shape {list(shape)} on rank {rank} but {list(other)} on rank {other_rank}, in another "
                    "pipeline stage: one name means one tensor, counted once; give different tensors different names"
                )
    if len(reference) > 1 and first.names and len({a.names for _, a in everyone}) == 1:
        raise LayoutError(
            f"all {len(reference)} ranks of pp_group hold the same {len(first.names)} tensors (first: {first.names[0]!r}): "
            "this is not the group across pipeline stages; pass pp_mesh.get_group(), or nothing without pipeline stages"
        )
    unmatched = first.patterns.difference(*(a.matched for _, a in everyone))
    if unmatched:
        some = ", ".join(list(first.names)[:5])
        raise LayoutError(f"no tensor on any rank matches {sorted(unmatched)}; names look like: {some}, ...")
