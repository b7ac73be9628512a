"""Functions, Megatron's optimizers and their param_groups as selectors of overrides=; what cannot be resolved is refused."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import dist_clip
from tests.harness import pool

from .setups import Config, build
from .test_bad_input import bad_rank

PAGE = Path(__file__).parents[2] / "docs" / "muon.md"
LIMIT = 1e-3  # below every norm


def vectors(name: str, param: torch.Tensor) -> bool:
    return param.ndim == 1


def selector(kind: str, optimizer: Any) -> Any:
    chain = optimizer.chained_optimizers
    if kind == "leaf":
        return chain[1]  # of the experts
    if kind == "torch optimizer":
        return chain[1].optimizer
    if kind == "recipe":
        block = re.search(r"^def muons.*?^$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        assert block is not None
        names: dict[str, Any] = {}
        exec(block[0], names)
        return names["muons"]
    if kind == "groups":  # Megatron decays no vectors
        return [group for leaf in chain for group in leaf.param_groups if group["wd_mult"] == 0]
    return vectors


def selected(config: Config, kind: str) -> tuple[dict[str, float], dict[str, float], dict[str, str]]:
    """Scales, norms and policies of the tensors by global name."""
    setup = build(config)
    overrides = [(selector(kind, setup.optimizer), dist_clip.MeasureOnly())]
    clipper = dist_clip.megatron.attach(
        setup.optimizer, dist_clip.GlobalNorm(LIMIT), model=setup.chunks, overrides=overrides
    )
    setup.backward(1)
    setup.optimizer.step()
    report = clipper.last_report
    assert report is not None
    names = [*report.names, *clipper.memory.names_elsewhere]
    return (
        dict(zip(report.names, report.scales.tolist(), strict=True)),
        dict(zip(report.names, report.tensor_norms.tolist(), strict=True)),
        {name: type(clipper.memory.policy_for(name)).__name__ for name in names},
    )


def is_vector(name: str) -> bool:
    return name.endswith("bias") or "norm.weight" in name


def is_muons(name: str) -> bool:
    return not is_vector(name) and "embedding" not in name and "output_layer" not in name


def is_expert(name: str) -> bool:
    return ".experts." in name


@pytest.mark.parametrize(
    ("config", "world", "kind"),
    [
        (Config(ep=2, experts=4, zero=True), 2, "leaf"),
        (Config(ep=2, experts=4, zero=True, bf16=True), 4, "leaf"),
        (Config(ep=2, experts=4, bf16=True), 2, "torch optimizer"),
        (Config(ep=2, experts=4), 2, "function"),
        (Config(tp=2, zero=True), 4, "groups"),
        (Config(layer_wise=True), 2, "groups"),
        (Config(pp=2, tp=2, tied=True), 4, "function"),
        (Config(tp=2), 2, "recipe"),
    ],
    ids=[
        "experts-zero",
        "experts-zero-bf16",
        "experts-torch",
        "experts-function",
        "tp-groups",
        "layer-wise",
        "pp-tp",
        "recipe",
    ],
)
def test_the_same_tensors_on_every_rank(config: Config, world: int, kind: str) -> None:
    ranks = pool(world, "megatron").run(selected, config, kind)
    norms = {name: norm for _, seen, _ in ranks for name, norm in seen.items()}
    mine = {"leaf": is_expert, "torch optimizer": is_expert, "recipe": is_muons}.get(kind, is_vector)
    rest = math.hypot(*(norm for name, norm in norms.items() if not mine(name)))
    assert 0 < sum(map(mine, norms)) < len(norms), "the test is to blame"
    for scales, _, policies in ranks:
        assert policies == {name: "MeasureOnly" if mine(name) else "GlobalNorm" for name in norms}
        for name, scale in scales.items():
            assert scale == pytest.approx(1.0 if mine(name) else LIMIT / (rest + 1e-6), rel=1e-5), name


def refused(case: str) -> tuple[str, str]:
    setup = build(Config())
    threshold = {"grad_norm_skip_threshold": 5.0}
    other = torch.optim.SGD([torch.zeros(3, 5)], lr=1.0)
    leaf = setup.optimizer.chained_optimizers[0]
    overrides: Any = {
        "another": lambda: [(other, dist_clip.MeasureOnly())],
        "another on one": lambda: [(other if bad_rank() else leaf.optimizer, dist_clip.MeasureOnly())],
        "fails on one": lambda: [(lambda name, param: 1 if bad_rank() else True, dist_clip.MeasureOnly())],
        "threshold": lambda: [("*.bias", dist_clip.MeasureOnly(guarded=False))],
    }[case]()
    if case == "threshold":
        vars(setup.optimizer.config).update(threshold)
    try:
        dist_clip.megatron.attach(setup.optimizer, dist_clip.GlobalNorm(), model=setup.chunks, overrides=overrides)
    except Exception as error:
        return type(error).__name__, str(error)
    finally:
        vars(setup.optimizer.config).pop("grad_norm_skip_threshold", None)
    return "nothing", ""


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("another", ["SGD holds 1 tensors (shapes [[3, 5]]", "chained_optimizers"]),
        ("another on one", ["rank 1", "SGD holds 1 tensors"]),
        ("fails on one", ["rank 1", "returned 1 for 'embedding", "not True or False"]),
        ("threshold", ["grad_norm_skip_threshold=5", "guard=SkipAbove"]),
    ],
)
def test_refused_alike_on_every_rank(case: str, words: list[str]) -> None:
    results = pool(2, "megatron").run(refused, case, timeout=60)
    assert {kind for kind, _ in results} <= {"LayoutError", "TypeError", "ValueError"}, results
    for _, text in results:
        for word in words:
            assert word in text, text
