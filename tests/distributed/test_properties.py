"""Random models, meshes, placements, gradients and policies: sharded equals single-process after each step.

    pytest tests/distributed/test_properties.py                              # as CI does: 300 cases, always the same
    pytest tests/distributed/test_properties.py --property-cases 10000       # the long run: others each time
    pytest tests/distributed/test_properties.py --property-seed 7 ...        # those of a seed
    pytest tests/distributed/test_properties.py --property-case 'Case(...)'  # one case, as a failure printed it

A case is a model (hand-made DTensors on random meshes, plain tensors beside them, pipeline stages; or a module that one of
torch's own wrappers has distributed), a clipper's arguments, and 4 to 8 steps of gradients. All ranks of a long-lived
group run it (properties/ranks.py) and record norms, scales, clipped gradients, state and collectives; what they should be
is worked out from the whole gradients by the reference in plain Python (properties/oracle.py).
"""

from __future__ import annotations

import math
import os
import tempfile
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, given, settings

import dist_clip
from tests import reference
from tests.harness import pool

from .properties import cases, oracle, ranks, strategies
from .properties.cases import Case

# Nothing is left in the tree.
hypothesis.configuration.set_hypothesis_home_dir(os.path.join(tempfile.gettempdir(), "dist_clip_hypothesis"))

USUAL = 300
SHARES = {
    ("placements", 4): 0.40,
    ("placements", 2): 0.12,
    ("pipeline", 4): 0.22,
    ("frameworks", 4): 0.13,
    ("frameworks", 2): 0.05,
    ("three-dims", 8): 0.08,  # meshes of 2 x 2 x 2
}
TIMEOUT = 60.0
"""Seconds for one case, which takes a tenth of one."""


def try_case(case: Case) -> None:
    oracle.check(case, pool(case.world).run(ranks.run_case, case, timeout=TIMEOUT))


def explore(kind: str, world: int, count: int, seed: int, *, shrink: bool = True) -> None:
    """Try `count` random cases; the failure of the simplest case that fails says how to see it again."""
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)

    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        phases=phases,
        database=None,
        deadline=None,
        derandomize=False,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(strategies.cases(world, kind))
    def tried(case: Case) -> None:
        try:
            try_case(case)
        except AssertionError as error:
            raise oracle.Mismatch(
                f"{error}\n\nThe case, simplified: pass it to --property-case\n{case!r}\n\n"
                f"Found among the {kind} cases for {world} ranks of --property-cases/--property-seed {seed}"
            ) from None

    tried()


@pytest.fixture(scope="module")
def budget(pytestconfig: pytest.Config) -> tuple[int, int]:
    """How many cases in all, and the seed."""
    count, seed = pytestconfig.getoption("--property-cases"), pytestconfig.getoption("--property-seed")
    if seed is None:
        seed = 0 if count <= USUAL else int.from_bytes(os.urandom(4), "little")
    return count, seed


@pytest.mark.parametrize(("kind", "world"), SHARES, ids=[f"{kind}-{world}" for kind, world in SHARES])
def test_random_cases(kind: str, world: int, budget: tuple[int, int]) -> None:
    count, seed = budget
    print(f"--property-seed {seed}")
    explore(kind, world, math.ceil(count * SHARES[kind, world]), seed)


def parsed(text: str) -> Case:
    """A case from its repr."""
    names: dict[str, Any] = {name: getattr(cases, name) for name in ("Case", "Hand", "Wrapped", "Mesh", "Placed")}
    names |= {"Layer": cases.Layer, "Step": cases.Step, "inf": math.inf}
    names |= {name: getattr(dist_clip, name) for name in ("GlobalNorm", "AdaGC", "LogClip", "ZClip")}
    return eval(text, names)


def test_given_case(pytestconfig: pytest.Config) -> None:
    text = pytestconfig.getoption("--property-case")
    if text is None:
        pytest.skip("--property-case was not given")
    try_case(parsed(text))


def test_a_mistake_is_found_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a reference that adds norms up wrongly, some case fails; what is printed runs it again."""
    with monkeypatch.context() as patch:
        patch.setattr(reference, "total_norm", lambda norms: sum(norms.values()))
        with pytest.raises(oracle.Mismatch) as error:
            explore("placements", 2, 100, seed=3, shrink=False)
        (line,) = (line for line in str(error.value).splitlines() if line.startswith("Case("))
        assert "global norm" in str(error.value) or "scale" in str(error.value)
        assert "--property-seed 3" in str(error.value)
        with pytest.raises(oracle.Mismatch):
            try_case(parsed(line))
    try_case(parsed(line))
