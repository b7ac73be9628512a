"""The command-line options of the test suite."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dist_clip")
    group.addoption(
        "--every-policy",
        action="store_true",
        help="every policy at 2 and at 4 processes of a layout, in each of its nonfinite modes and in all configurations of "
        "Megatron that differ in how they reduce; without it about half of these",
    )
    group.addoption(
        "--property-cases",
        type=int,
        default=500,
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
