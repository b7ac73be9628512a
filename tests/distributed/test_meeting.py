"""Calls that all ranks must make, made by some of them only: an error that names the others, also where they come late."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn

import dist_clip
from tests.harness import pool

PATIENCE = 3.0


def message(call: Callable[[], Any], kind: type[Exception]) -> str:
    try:
        call()
    except kind as error:
        return str(error)
    return ""


def construct(group: dist.ProcessGroup | None = None) -> dist_clip.GradClipper:
    return dist_clip.GradClipper(nn.Linear(2, 2), dist_clip.LogClip(), process_group=group)


def on_some_ranks(what: str, absent: tuple[int, ...], late: float | None) -> str:
    """What each rank is told; `late`: seconds after which the absent ranks come after all."""
    clipper = construct()
    call: Callable[[], Any] = {
        "construct": construct,
        "refresh": clipper.refresh,
        "check_in_sync": clipper.check_in_sync,
    }[what]
    if dist.get_rank() in absent:
        if late is None:
            return "absent"
        time.sleep(late)
    return message(call, dist_clip.DesyncError if what == "check_in_sync" else dist_clip.LayoutError)


@pytest.mark.parametrize("what", ["construct", "refresh", "check_in_sync"])
def test_a_rank_that_does_not_come_is_named(what: str) -> None:
    told, absent, third = pool(3, f"meeting {what}", PATIENCE).run(on_some_ranks, what, (1,), None)
    assert absent == "absent"
    assert told == third
    assert f"waited {PATIENCE:g} s for rank 1 to " in told
    assert ("check_in_sync()" if what == "check_in_sync" else "construct or refresh a GradClipper") in told
    assert "process_group=" in told


def test_ranks_that_come_too_late_are_told_the_same() -> None:
    results = pool(3, "meeting late", PATIENCE).run(on_some_ranks, "construct", (0, 2), PATIENCE + 1)
    assert len(set(results)) == 1
    assert "rank 1 waited 3 s for ranks 0, 2 to construct" in results[0]


def on_groups(times: int) -> tuple[str, float]:
    """Each half of the ranks constructs clippers of its own, another number of times; then all ranks do."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = halves[dist.get_rank() // 2]
    start = time.monotonic()
    told = "".join(message(lambda: construct(mine), Exception) for _ in range(times * (1 + dist.get_rank() // 2)))
    told += "".join(message(construct, Exception) for _ in range(times))
    return told, time.monotonic() - start


def test_groups_meet_by_themselves_and_again_and_again() -> None:
    for told, seconds in pool(4).run(on_groups, 10):
        assert told == ""
        assert seconds < 30
