"""Functions and optimizers as selectors of overrides= choose the same tensors under every layout, on all ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import dist_clip
from tests.harness import pool

from .layouts import LAYOUTS
from .model import make_net, named_once
from .training import build

LIMIT = 1e-3  # below every norm


def matrices(name: str, param: torch.Tensor) -> bool:
    return param.ndim >= 2


def chosen_by(layout: str, kind: str) -> dict[str, Any]:
    """On each rank: the scale and norm of each tensor, what a checkpoint has, and what it is after loading that."""
    setup = build(layout, torch.float32)
    selector: Any = matrices
    if kind == "optimizer":
        heavy = {name for name, param in named_once([make_net(LAYOUTS[layout].config)]) if param.ndim >= 2}
        mine = [param for name, param in setup.named if name in heavy]
        selector = torch.optim.SGD(mine, lr=0.1) if mine else torch.optim.SGD([torch.zeros(1)], lr=0.1)

    def clipper() -> Any:
        overrides = [(selector, dist_clip.MeasureOnly()), ("*norm*", dist_clip.ZClip(max_norm=LIMIT))]
        return dist_clip.GradClipper(
            setup.modules, dist_clip.GlobalNorm(LIMIT), overrides=overrides, pp_group=setup.pp_group
        )

    one = clipper()
    setup.backward(1)
    report = one.clip_()
    state = one.state_dict()
    again = clipper()
    again.load_state_dict(state)
    return {
        "scales": dict(zip(report.names, report.scales.tolist(), strict=True)),
        "norms": dict(zip(report.names, report.tensor_norms.tolist(), strict=True)),
        "labels": list(state["global"]),
        "loaded": str(again.state_dict()["global"]) == str(state["global"]),
    }


@pytest.mark.parametrize(
    ("layout", "world", "kind"),
    [
        ("fsdp", 2, "function"),
        ("fsdp", 2, "optimizer"),
        ("tp-fsdp-uneven", 4, "function"),
        ("pp-tied-fsdp", 4, "function"),
        ("pp-tied-fsdp", 4, "optimizer"),
        ("fsdp1", 2, "function"),
        ("fsdp1-flat", 4, "function"),
    ],
)
def test_the_same_tensors_under_every_layout(layout: str, world: int, kind: str) -> None:
    net = make_net(LAYOUTS[layout].config)
    dims = {name: param.ndim for name, param in named_once([net])}
    ranks = pool(world).run(chosen_by, layout, kind)
    norms = {name: norm for rank in ranks for name, norm in rank["norms"].items()}
    scales: dict[str, float] = {}
    for rank in ranks:
        for name, scale in rank["scales"].items():
            assert scales.setdefault(name, scale) == scale, f"{name}: ranks have other scales"
        assert rank["labels"] == ["*norm*", "*"]
        assert rank["loaded"]
    assert scales.keys() == dims.keys()
    groups = {
        "measured": {name for name, dim in dims.items() if dim >= 2},
        "norms": {name for name, dim in dims.items() if dim < 2 and "norm" in name},
    }
    groups["rest"] = dims.keys() - groups["measured"] - groups["norms"]
    for group, names in groups.items():
        assert names, f"the test is to blame: nothing is in {group}"
        total = math.hypot(*(norms[name] for name in names))
        for name in names:
            expected = 1.0 if group == "measured" else LIMIT / (total + 1e-6)
            assert scales[name] == pytest.approx(expected, rel=1e-5), f"{name}, {group}"
