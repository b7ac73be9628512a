"""What `sharded` may hold, as far as that needs no other ranks."""

from __future__ import annotations

from typing import Any

import pytest

from dist_clip import LayoutError
from dist_clip.layouts.sharded import ShardedByHand, resolve, whole_shape


@pytest.mark.parametrize("value", ["tp", True, 1.0, [0], (0,), (0, 1), (None, None), (0, None), (True, None), {}])
def test_no_such_value(value: Any) -> None:
    with pytest.raises(TypeError, match=r"sharded=\{'\*\.sink': .*\}: expected an int \(split along that dimension\)"):
        resolve(value, None, "*.sink")


def test_a_dimension_without_a_group() -> None:
    with pytest.raises(LayoutError, match=r"sharded=\{'\*\.sink': 1\}: there is no group .*; pass \(1, group\)"):
        resolve(1, None, "*.sink")


@pytest.mark.parametrize(("shape", "dim"), [((4, 8), 2), ((4, 8), -3), ((), 0), ((3,), 1)])
def test_a_dimension_out_of_range(shape: tuple[int, ...], dim: int) -> None:
    with pytest.raises(LayoutError, match=rf"splits 'w' along dimension {dim}, but it has {len(shape)} dimensions"):
        whole_shape("w", shape, dim, 2)


@pytest.mark.parametrize("sharded", [["*"], {1: 0}, "*"])
def test_no_mapping(sharded: Any) -> None:
    with pytest.raises(TypeError, match="sharded must map patterns of names to an int"):
        ShardedByHand(sharded)


def test_the_first_pattern_counts_and_all_that_match_are_recorded() -> None:
    by_hand = ShardedByHand({"*.sink": 0, "*": None, "other": 1})
    assert by_hand.find("a.sink") == ("*.sink", 0)
    assert by_hand.find("b") == ("*", None)
    assert by_hand.matched == {"*.sink", "*"}
