"""The policy of docs/policies.md, taken from the page: trained under FSDP2, saved, loaded under another layout, resumed."""

from __future__ import annotations

import math
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp

import dist_clip
from tests.harness import pool

from .layouts import LAYOUTS
from .test_checkpoints import END, SAVED_AT, Training, merged, plain

PAGE = Path(__file__).parents[2] / "docs" / "policies.md"
MODULE = "policy_of_the_page"
SETTINGS: dict[str, Any] = {"warmup_steps": 4, "ratio": 1.05}


def code() -> str:
    """The first block of code of the page."""
    block = re.search(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert block
    return block[1]


def own_policy(**settings: Any) -> dist_clip.Policy:
    """The policy as a user has it: from a module of his own, by the name under which that registers it."""
    if MODULE not in sys.modules:
        module = sys.modules[MODULE] = types.ModuleType(MODULE)
        exec(code(), module.__dict__)
    return dist_clip.policy("qclip", **settings)


def train(layout: str, path: str, scope: str, *, resume: bool) -> dict[str, Any]:
    """On each rank: all steps with a checkpoint on the way, or those after it."""
    training = Training(layout, LAYOUTS["fsdp"].config, (), own_policy(scope=scope, **SETTINGS))
    reports = []
    clip_ = training.clipper.clip_

    def clip_and_keep() -> dist_clip.ClipReport:
        reports.append(clip_())
        return reports[-1]

    training.clipper.clip_ = clip_and_keep
    if resume:
        training.load(path)
        saved = plain(training.clipper)
        training.steps(SAVED_AT + 1, END)
    else:
        training.steps(1, SAVED_AT)
        saved = plain(training.clipper)
        dcp.save(training.checkpoint(), checkpoint_id=path)
        training.steps(SAVED_AT + 1, END)
    return {
        "saved": saved,
        **training.outcome(),
        "names": training.clipper.layout.names,
        "norms": [report.tensor_norms.tolist() for report in reports],
        "scales": [report.scales.tolist() for report in reports],
        "steps": SAVED_AT if resume else 0,
    }


def by_hand(norms: list[float]) -> list[float]:
    """The scales of one tensor with these norms, as the page says in words."""
    level = count = 0.0
    scales = []
    for norm in norms:
        scales.append(1.0)
        if norm > 0:
            if count >= SETTINGS["warmup_steps"]:
                scales[-1] = min(1.0, SETTINGS["ratio"] * math.exp(level) / norm)
            if count == 0:
                level = math.log(norm)
            else:
                level += 0.05 * (0.9 if math.log(norm) > level else -0.1)
            count += 1
    return scales


def test_the_page_says_under_forty_lines() -> None:
    assert len([line for line in code().splitlines() if line.strip()]) < 40


@pytest.mark.parametrize(("layout", "world"), [("tp-fsdp", 4), ("ddp", 2)])
def test_trained_saved_resharded_and_resumed(layout: str, world: int, tmp_path: Path) -> None:
    before = pool(2).run(train, "fsdp", str(tmp_path), "tensor", resume=False)
    after = pool(world).run(train, layout, str(tmp_path), "tensor", resume=True)
    for rank in before:
        for column, name in enumerate(rank["names"]):
            scales = [row[column] for row in rank["scales"]]
            assert scales == pytest.approx(by_hand([row[column] for row in rank["norms"]]), rel=1e-5), name
    assert any(scale < 1 for row in before[0]["scales"][SETTINGS["warmup_steps"] :] for scale in row)
    assert any(value < 0 for key, value in before[0]["state"].items() if key.endswith("/level"))
    assert merged(after, "saved") == merged(before, "saved")
    for key, value in merged(before, "state").items():
        assert merged(after, "state")[key] == pytest.approx(value, rel=1e-3, abs=1e-3), key
    for name, value in merged(before, "params").items():
        assert merged(after, "params")[name].sub(value).abs().max() < 1e-4, name
