"""What `sharded` may hold, as far as that needs no other ranks."""

from __future__ import annotations

from typing import Any

import pytest

from dist_clip import LayoutError
from dist_clip.layouts.sharded import checked_divisions, division_of, whole_shape


@pytest.mark.parametrize("value", ["tp", True, 1.0, [0], (0,), (0, 1), (None, None), (0, None), (True, None), {}])
def test_no_such_value(value: Any) -> None:
    with pytest.raises(TypeError, match=r"sharded=\{'\*\.sink': \.\.\.\} must be a dimension, a process group"):
        checked_divisions({"*.sink": value})


@pytest.mark.parametrize(("shape", "dim"), [((4, 8), 2), ((4, 8), -3), ((), 0), ((3,), 1)])
def test_a_dimension_out_of_range(shape: tuple[int, ...], dim: int) -> None:
    with pytest.raises(LayoutError, match=rf"'w' is cut along dim {dim}, but its shape is"):
        whole_shape("w", shape, dim, 2)


@pytest.mark.parametrize("sharded", [["*"], {1: 0}, "*"])
def test_no_mapping(sharded: Any) -> None:
    with pytest.raises(TypeError, match="sharded"):
        checked_divisions(sharded)


def test_the_first_pattern_counts() -> None:
    divisions = checked_divisions({"*.sink": 0, "*": None})
    found = [division_of(name, divisions) for name in ("a.sink", "b")]
    assert [(said.dim, said.whole) for said in found if said is not None] == [(0, False), (None, True)]
    assert division_of("b", {}) is None
