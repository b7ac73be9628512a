"""Options and lanes of the test suite; docs/testing.md describes them.

- The usual run: everything but the pages.
- ``--fast``: tests/unit, and what is marked ``fast``: one training run each of DDP, FSDP2, TP + FSDP2, a pipeline and
  Megatron.
- ``--pages``: what is marked ``pages``. These tests compare tables and figures of the documentation with docs/data.
"""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parent

FIRST = (
    "test_study.py",
    "mcore/test_entry_points.py",
    "distributed/test_layouts.py",
    "mcore/test_layouts.py",
    "distributed/test_properties.py",
    "test_simulate.py",
    "test_launch.py",
    "test_bench.py",
)
"""Files with long tests. A worker takes whole files in this order; a long one at the end would leave the others idle."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dist_clip")
    group.addoption("--fast", action="store_true", help="the fast lane: tests/unit, and one training run of each kind")
    group.addoption("--pages", action="store_true", help="only the tests that compare pages with the committed data")
    group.addoption(
        "--every-policy",
        action="store_true",
        help="every policy in both runs of a layout and in each of its nonfinite modes; without it in half of these",
    )
    group.addoption(
        "--property-cases",
        type=int,
        default=300,
        help="random cases that tests/distributed/test_properties.py tries in all (the long run: 10000)",
    )
    group.addoption(
        "--property-seed",
        type=int,
        default=None,
        help="seed of the random cases; default 0, and in runs of more than the usual number of cases a new one",
    )
    group.addoption(
        "--property-case",
        default=None,
        metavar="CASE",
        help="one case of tests/distributed/test_properties.py, as a failure printed it: run by test_given_case",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    fast, pages = config.getoption("--fast"), config.getoption("--pages")
    if fast and pages:
        raise pytest.UsageError("--fast and --pages are lanes of their own: pass one of them")

    def chosen(item: pytest.Item) -> bool:
        if item.get_closest_marker("pages") is not None:
            return pages
        if fast:
            return TESTS / "unit" in item.path.parents or item.get_closest_marker("fast") is not None
        return not pages

    left_out = [item for item in items if not chosen(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if chosen(item)]
    order = {TESTS / name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))
