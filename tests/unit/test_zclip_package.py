"""ZClip against the zclip 1.0.0 package, step by step: parameters, returned norm, mean and variance.

200 SGD steps on two small models fed the same gradients, with spikes, in every mode of the package. Tolerances: the
package measures the norm in fp32 (about 1e-7 relative) and keeps its statistics in float64. Norms, means and parameters
agree to 1e-6; the variance sums squared differences of nearby numbers, which magnifies those 1e-7: 1e-5.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zclip
from torch import nn

import dist_clip

STEPS = 200
ADAPTIVE = {"mode": "zscore", "clip_option": "adaptive_scaling"}
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "zscore-adaptive": {**ADAPTIVE, "max_norm": 20.0},
    "zscore-mean": {"mode": "zscore", "clip_option": "mean", "max_norm": 20.0},
    "percentile": {"mode": "percentile", "max_norm": 20.0},
    "skip-update-adaptive": {**ADAPTIVE, "skip_update_on_spike": True, "max_norm": 20.0},
    "skip-update-mean": {"clip_option": "mean", "skip_update_on_spike": True, "max_norm": None},
    "skip-update-percentile": {"mode": "percentile", "skip_update_on_spike": True, "max_norm": None},
    "no-max-norm-adaptive": {**ADAPTIVE, "max_norm": None},
    "no-max-norm-mean": {"clip_option": "mean", "max_norm": None},
    "no-max-norm-percentile": {"mode": "percentile", "max_norm": None},
    "clip-factor": {"clip_factor": 0.7, "max_norm": None},
    "clip-factor-max-norm": {"clip_factor": 0.7, "max_norm": 2.0},
    "other-numbers": {"alpha": 0.9, "z_thresh": 1.5, "warmup_steps": 10, "eps": 1e-3, "max_norm": 5.0},
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3, bias=False))


def labels(step: int) -> Callable[[str], Callable[[str], str]]:
    return lambda what: lambda message: f"step {step}: {what}: {message}"


def find(tree: Any, key: str) -> Any:
    """The first value under `key` in nested dicts and lists, or None."""
    if isinstance(tree, dict) and key in tree:
        return tree[key]
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return next((found for child in children if (found := find(child, key)) is not None), None)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_package(name: str) -> None:
    settings = CASES[name]
    ours, theirs = model(), model()
    clipper = dist_clip.GradClipper(ours, dist_clip.ZClip(**settings))
    package_settings = dict(settings)
    if "max_norm" in settings:
        package_settings["max_grad_norm"] = package_settings.pop("max_norm")
    package = zclip.ZClip(**package_settings)
    opt_ours, opt_theirs = torch.optim.SGD(ours.parameters(), lr=1e-3), torch.optim.SGD(theirs.parameters(), lr=1e-3)

    rng, gen = random.Random(1), torch.Generator().manual_seed(1)
    clipped = 0
    for step in range(1, STEPS + 1):
        level = rng.lognormvariate(0.0, 0.5) * (10 ** rng.uniform(0.5, 2.5) if rng.random() < 0.08 else 1.0)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = level * torch.randn(p.shape, generator=gen) / 4
            q.grad = p.grad.clone()
        report = clipper.clip_()
        norm = package.step(theirs)
        assert report.global_norm is not None
        assert report.global_norm.item() == pytest.approx(norm, rel=1e-6), f"step {step}"
        clipped += int((report.scales < 1).any())
        label = labels(step)
        opt_ours.step()
        opt_theirs.step()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=2e-6, atol=1e-9, msg=label("gradient"))
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7, msg=label("parameter"))
        if package.initialized:
            state = clipper.state_dict()["global"]
            assert float(find(state, "mean")) == pytest.approx(package.mean, rel=1e-6), f"step {step}"
            assert float(find(state, "var")) == pytest.approx(package.var, rel=1e-5), f"step {step}"
    assert package.initialized
    assert 5 <= clipped <= STEPS, "the stream should make the rule act"


def test_missing_gradients() -> None:
    ours, theirs = model(), model()
    clipper, package = dist_clip.GradClipper(ours, dist_clip.ZClip(warmup_steps=5)), zclip.ZClip(warmup_steps=5)
    gen = torch.Generator().manual_seed(2)
    for step in range(40):
        for i, (p, q) in enumerate(zip(ours.parameters(), theirs.parameters(), strict=True)):
            grad = torch.randn(p.shape, generator=gen) * (30.0 if step == 20 else 1.0)
            missing = i > 0 and (step + i) % 3 == 0
            p.grad, q.grad = (None, None) if missing else (grad, grad.clone())
        report, norm = clipper.clip_(), package.step(theirs)
        assert report.global_norm.item() == pytest.approx(norm, rel=1e-6)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=2e-6, atol=1e-9)
