"""Policies that ask for it see the parameters' own norms: of whole tensors, whatever the layout, in no collective more."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

import dist_clip
from tests.harness import pool

from .layouts import LAYOUTS
from .model import make_net, named_once
from .training import build

SEEN: list[Tensor | None] = []
"""In each worker: what the last step's policy saw."""


@dataclasses.dataclass(frozen=True)
class Watcher(dist_clip.Policy):
    """Scales nothing, and keeps what it sees."""

    asks: bool = True
    scope: dist_clip.Scope = "tensor"

    def needs(self, step: int) -> Any:
        return ("weight_norms",) if self.asks else ()

    def step(self, state: Any, inputs: dist_clip.StepInputs) -> Any:
        SEEN.append(inputs.weight_norms)
        return torch.ones_like(inputs.norms), state


def watched(layout: str) -> dict[str, Any]:
    """On each rank: {name: norm} as a policy sees them, the norm of all, and the collectives with and without."""
    setup = build(layout, torch.float32)
    found: dict[str, Any] = {}
    for key, policy in {
        "without": Watcher(asks=False),
        "tensor": Watcher(),
        "global": Watcher(scope="global"),
    }.items():
        clipper = dist_clip.GradClipper(setup.modules, policy, pp_group=setup.pp_group)
        for _ in range(2):  # the first clip also learns which gradients are Partial
            for _, param in setup.named:
                param.grad = None
            setup.backward(1)
            with CommDebugMode() as counted:
                clipper.clip_()
        found[f"{key} collectives"] = counted.get_total_counts()
        norms = SEEN[-1]
        if norms is not None:
            found[key] = dict(zip(clipper.layout.names if key == "tensor" else ["all"], norms.tolist(), strict=True))
    return found


@pytest.mark.parametrize(
    ("layout", "world"),
    [
        *[("ddp", 2), ("fsdp", 4), ("fsdp-offload", 2), ("hsdp", 4), ("tp-sequence", 2), ("tp-fsdp-uneven", 4)],
        *[("ep", 4), ("pp-tied-fsdp", 4), ("fsdp1", 2), ("fsdp1-flat", 4), ("fsdp1-hybrid-flat", 4)],
    ],
)
def test_weight_norms(layout: str, world: int) -> None:
    # A parameter that is frozen, or that the layout does not hold, is in no optimizer and in no norm of the model.
    net = make_net(LAYOUTS[layout].config)
    expected = {name: float(param.detach().double().norm()) for name, param in named_once([net])}
    seen: dict[str, float] = {}
    for rank in pool(world).run(watched, layout):
        for name, norm in rank["tensor"].items():
            assert norm == pytest.approx(expected[name], rel=1e-6), name
            assert seen.setdefault(name, norm) == norm, "copies know the same bits"
        assert rank["global"]["all"] == pytest.approx(math.hypot(*expected.values()), rel=1e-6)
        assert rank["tensor collectives"] == rank["without collectives"]
    assert seen.keys() == expected.keys()
