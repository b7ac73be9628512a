"""scripts/compare_packages.py tells what is equal from what is not."""

from __future__ import annotations

import pytest
import torch

from scripts import compare_packages as compare


def test_verdicts() -> None:
    single = {"w": torch.ones(3)}
    near, far = {"w": torch.ones(3) + 1e-7}, {"w": torch.tensor([1.0, 1.5, 1.0])}
    assert compare.verdict([near, near], single) == "as one process"
    assert compare.verdict([far, far], single) == "**off by 0.5**"
    assert compare.verdict([near, far], single) == "**off by 0.5**, ranks 0.5 apart"
    assert compare.verdict(["RuntimeError", near], single) == "RuntimeError"


@pytest.mark.parametrize(("name", "expected"), [("dist_clip `ZClip`", "clips on"), ("zclip", "**clips no more**")])
def test_a_nan_that_stays_is_found(name: str, expected: str) -> None:
    if compare.version(compare.CANDIDATES[name][0]) is None:
        pytest.skip(f"{name} is not installed")
    assert compare.survives(name, compare.train(name, "one process")).startswith(expected)


def test_host_reads_are_counted() -> None:
    with compare.HostReads() as reads:
        assert torch.ones(2).sum().item() == 2.0
        assert bool(torch.ones(1) > 0)
    assert reads.count == 2
