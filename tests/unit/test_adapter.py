"""What adapters share: policies and guards in every form, states as JSON, states that wait, the numbers for dashboards."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

import dist_clip
from dist_clip.adapter import from_json, make_clipper, refuse_native_clip, to_json

LOGCLIP = dist_clip.LogClip(ratio=3, post_max_norm=None, scope="global")


@pytest.mark.parametrize(
    "spec",
    [
        LOGCLIP,
        "logclip-global ratio=3",
        "logclip ratio=3 scope=global post_max_norm=None",
        ' {"name": "logclip", "ratio": 3, "scope": "global", "post_max_norm": null}',
        {"name": "logclip-global", "ratio": 3},
    ],
)
def test_a_policy_in_every_form(spec: Any) -> None:
    assert dist_clip.policy(spec) == LOGCLIP
    assert make_clipper(nn.Linear(2, 2), spec).policy == LOGCLIP


def test_texts_have_numbers_texts_and_truth_values() -> None:
    assert dist_clip.policy("adagc gamma_init=median beta=1e-1") == dist_clip.AdaGC(gamma_init="median", beta=0.1)
    assert dist_clip.guard("skipstep loss=False window=64") == dist_clip.SkipStep(loss=False, window=64)
    assert dist_clip.guard("skipstep loss=false") == dist_clip.guard({"name": "skipstep", "loss": False})
    assert dist_clip.guard(dist_clip.SkipAbove(2.0)) == dist_clip.guard('{"name": "skipabove", "max_norm": 2.0}')
    assert dist_clip.policy("logclip ratio=3", rate=0.1) == dist_clip.LogClip(ratio=3, rate=0.1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: dist_clip.policy("logclip ratio"), ValueError, "'ratio' in 'logclip ratio' is no option=value"),
        (lambda: dist_clip.policy("logclip ratio=3 ratio=4"), ValueError, "'logclip' is given ratio twice"),
        (lambda: dist_clip.policy("logclip ratio=3", ratio=4), ValueError, "'logclip' is given ratio twice"),
        (lambda: dist_clip.policy('{"name": "logclip"'), ValueError, "must be JSON"),
        (lambda: dist_clip.policy({"ratio": 3}), ValueError, "has no name"),
        (lambda: dist_clip.policy(""), ValueError, "has no name"),
        (lambda: dist_clip.policy(3), TypeError, "a policy is a name"),
        (lambda: dist_clip.policy(LOGCLIP, ratio=4), TypeError, "LogClip is made already"),
        (lambda: dist_clip.policy("logclip sigma=4"), TypeError, "logclip has no option sigma; it has ratio"),
        (lambda: dist_clip.policy("clip"), ValueError, "no policy is called 'clip'; there are"),
        (lambda: dist_clip.guard("skipabove"), TypeError, "max_norm"),
        (lambda: dist_clip.guard("midian"), ValueError, "no guard is called 'midian'; there are"),
        (lambda: dist_clip.guard(None), TypeError, "a guard is a name"),
        (lambda: make_clipper(nn.Linear(2, 2), guard=True), TypeError, "guard=True names no guard"),
        (
            lambda: refuse_native_clip("Trainer", "max_grad_norm", 1.0, "0"),
            ValueError,
            r"Trainer clips too, with max_grad_norm=1\.0: gradients would be clipped twice\. Set max_grad_norm=0",
        ),
    ],
)
def test_bad_forms(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def guards_of(clipper: dist_clip.GradClipper) -> list[dist_clip.Guard]:
    return [memory.guard for memory in clipper.memory.guards]


def test_without_a_policy_the_recommended_one_with_its_guard() -> None:
    model = nn.Linear(2, 2)
    default = dist_clip.recommended()
    assert make_clipper(model).policy == default["policy"]
    assert guards_of(make_clipper(model)) == [default["guard"]]
    assert guards_of(make_clipper(model, guard=False)) == []
    assert guards_of(make_clipper(model, "logclip")) == []
    assert guards_of(make_clipper(model, guard="skipabove max_norm=9")) == [dist_clip.SkipAbove(9)]
    both = make_clipper(model, "global", ["median", {"name": "skipstep"}], exclude=["bias"])
    assert guards_of(both) == [dist_clip.MedianGuard(), dist_clip.SkipStep()]
    assert both.layout.names == ("weight",)


def trained(clipper: dist_clip.GradClipper, model: nn.Module, steps: int) -> dist_clip.GradClipper:
    for step in range(steps):
        for param in model.parameters():
            param.grad = torch.full_like(param, 0.1 * (step + 1))
        clipper.clip_()
    return clipper


@pytest.mark.parametrize(
    "policy", ["adagc warmup_steps=4 gamma_init=median", "zclip warmup_steps=2", "logclip", "autoclip"]
)
@pytest.mark.parametrize("steps", [0, 3, 6])
def test_a_state_survives_json_bit_for_bit(policy: str, steps: int) -> None:
    model = nn.Linear(2, 2)
    clipper = trained(make_clipper(model, policy, "median"), model, steps)
    kept = from_json(json.loads(json.dumps(to_json(clipper.state_dict()), allow_nan=False)))
    again = make_clipper(model, policy, "median")
    again.load_state_dict(kept)
    (ours, form), (theirs, same_form) = (tree_flatten(each.state_dict()) for each in (clipper, again))
    assert form == same_form
    for one, other in zip(ours, theirs, strict=True):
        assert type(one) is type(other)
        if isinstance(one, torch.Tensor):
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            assert torch.equal(one, other)
        else:
            assert repr(one) == repr(other)  # NaN is there, too


def test_json_has_every_number_and_shape() -> None:
    odd = {
        "tensor": torch.tensor([math.nan, math.inf, -math.inf, 1e-45, 0.1]),
        "empty": torch.zeros(0, 3, dtype=torch.int32),
        "scalar": torch.tensor(True),
        "list": [1, math.inf, "text", None],
    }
    back = from_json(json.loads(json.dumps(to_json(odd), allow_nan=False)))
    assert str(back) == str(odd)
    assert torch.equal(back["tensor"].view(torch.int32)[1:], odd["tensor"].view(torch.int32)[1:])  # type: ignore[attr-defined]
    assert back["empty"].shape == (0, 3)


def test_metrics_are_the_reports_numbers() -> None:
    model = nn.Linear(2, 2)
    clipper = make_clipper(model, "global max_norm=0.1")
    model(torch.ones(1, 2)).sum().backward()
    report = clipper.clip_()
    got = {key: value.item() for key, value in report.metrics().items()}
    assert report.global_norm is not None
    assert got == {
        "clip/grad_norm": report.global_norm.item(),
        "clip/grad_norm_after": pytest.approx(0.1),
        "clip/fraction": 1.0,
        "clip/min_scale": report.min_scale.item(),
        "clip/skipped": 0.0,
        "clip/nonfinite": 0.0,
    }
