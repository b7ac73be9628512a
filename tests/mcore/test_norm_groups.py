"""Megatron's groups with a norm of their own (detached heads of multi-token prediction): a copy of the policy for each.

0.16.1 does not know them; there the parameters are marked by hand, as 0.19 marks them.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

import dist_clip
from tests.harness import pool

from . import training
from .setups import Config, Setup, build, megatron_version

LIMIT = 0.1
CONFIGS = [(2, Config(variant="mtp", zero=True)), (4, Config(variant="mtp", pp=2, bf16=True))]
WITH_MUON = [(2, Config(variant="mtp", muon="layer-wise + ZeRO-1", bf16=True))] if megatron_version() >= (0, 19) else []
"""There Megatron 0.19.2 clips by another norm on each rank."""


def setup_of(config: Config, **options: Any) -> Setup:
    setup = build(config)
    for node in (setup.optimizer, *setup.optimizer.chained_optimizers):
        for name, value in options.items():
            setattr(node.config, name, value)
    params = [*setup.named(), *((name, main) for name, _, main in training.main_params(setup))]
    for name, param in params:  # as newer versions copy it to the main parameters
        if "mtp." in name:
            param.grad_norm_group = "mtp"
    return setup


def grads_at_the_step(setup: Setup) -> tuple[Any, list[dict[str, list[float]]]]:
    """The gradients with which the optimizer steps, by name."""
    pieces = training.main_params(setup)
    inner, seen = setup.optimizer.step_with_ready_grads, []

    def recorded() -> Any:
        seen.append({name: main.grad.flatten().tolist() for name, _, main in pieces if main.grad is not None})
        return inner()

    setup.optimizer.step_with_ready_grads = recorded
    setup.backward(1)
    return setup.optimizer.step(), seen


def clipped(config: Config, ours: bool) -> dict[str, Any]:
    setup = setup_of(config, clip_grad=LIMIT)
    if not ours:
        (success, norm, _), seen = grads_at_the_step(setup)
        return {"success": success, "norm": float(norm), "grads": seen}
    clipper = dist_clip.megatron.attach(setup.optimizer, dist_clip.GlobalNorm(LIMIT), model=setup.chunks)
    (success, norm, _), seen = grads_at_the_step(setup)
    report = clipper.last_report
    rows = zip(report.names, report.tensor_norms.tolist(), report.scales.tolist(), strict=True)
    table = {name: (tensor_norm, scale) for name, tensor_norm, scale in rows}
    return {"success": success, "norm": float(norm), "grads": seen, "table": table}


@pytest.mark.parametrize(("world", "config"), [*CONFIGS, *WITH_MUON], ids=str)
def test_each_group_is_clipped_by_its_own_norm(world: int, config: Config) -> None:
    ranks = pool(world, "megatron").run(clipped, config, True)
    table = {name: row for rank in ranks for name, row in rank["table"].items()}
    for heads in (False, True):
        group = {name: row for name, row in table.items() if name.startswith("mtp.") == heads}
        norm = math.hypot(*(tensor_norm for tensor_norm, _ in group.values()))
        assert norm > LIMIT
        for _, scale in group.values():
            assert scale == pytest.approx(LIMIT / norm, rel=1e-5)
    assert ranks[0]["norm"] == pytest.approx(math.hypot(*(norm for norm, _ in table.values())), rel=1e-5)


@pytest.mark.skipif(megatron_version() < (0, 19), reason="needs megatron-core 0.19, which clips such groups by itself")
@pytest.mark.parametrize(("world", "config"), CONFIGS, ids=str)
def test_as_megatron_does_itself(world: int, config: Config) -> None:
    ours, theirs = (pool(world, "megatron").run(clipped, config, which) for which in (True, False))
    for our, their in zip(ours, theirs, strict=True):
        for name, grad in their["grads"][0].items():
            assert our["grads"][0][name] == pytest.approx(grad, rel=1e-4, abs=1e-8), name


def skips(config: Config, policy: Any, large: float, heads: float, threshold: float) -> list[dict[str, Any]]:
    """The second step's gradients are `large` times as large; those of the heads `heads` times that."""
    setup = setup_of(config, grad_norm_skip_threshold=threshold)
    clipper = dist_clip.megatron.attach(setup.optimizer, policy, model=setup.chunks)
    out = []
    for step in (1, 2, 3):
        setup.backward(step, factor=large if step == 2 else 1.0)
        for name, param in setup.named():
            if step == 2 and "mtp." in name:
                param.main_grad.mul_(heads)
        before = str(clipper.state_dict())
        success, _, _ = setup.optimizer.step()
        out.append({"success": bool(success), "same_state": before == str(clipper.state_dict())})
    clipper.attachment.remove()
    assert setup.optimizer.config.grad_norm_skip_threshold == threshold
    return out


@pytest.mark.parametrize(("large", "heads", "skipped"), [(1.0, 1e4, False), (1e4, 1.0, True)])
def test_megatrons_threshold_looks_at_the_other_tensors(large: float, heads: float, skipped: bool) -> None:
    config = Config(variant="mtp", pp=2)
    for rank in pool(2, "megatron").run(skips, config, dist_clip.AdaGC(warmup_steps=1), large, heads, 100.0):
        assert [record["success"] for record in rank] == [True, not skipped, True]
        assert [record["same_state"] for record in rank] == [False, skipped, False]
