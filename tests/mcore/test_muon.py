"""Megatron's own Muon against a single process: norms, scales, state and parameters after 20 steps.

The ids say what Muon was made of: "real", the package from which Megatron takes it, or "stand-in" (`emerging`).
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import dist_clip
from dist_clip.megatron.launcher import OptimizerCatcher
from tests.harness import pool

from . import emerging, muon, test_checkpoints, test_guards, training
from .setups import Config, Setup, build, megatron_version, start

PAGE = Path(__file__).parents[2] / "docs" / "muon.md"
STEPS = 20
DUPLICATED = (("muon_tp_mode", "duplicated"),)
DISTRIBUTED = (("muon_tp_mode", "distributed"),)
WITH_ZERO = "layer-wise + ZeRO-1"


@dataclass(frozen=True)
class Case:
    """`select` makes the overrides that leave Muon's matrices alone; None: the policies clip all tensors."""

    world: int
    config: Config
    policies: tuple[str, ...] = ("adagc-rest",)
    select: Callable[[Setup], Any] | None = muon.by_function


EVERYTHING: dict[str, Any] = {"policies": ("adagc-median",), "select": None}
MOE = {"experts": 4, "sequence_parallel": True}
CASES: dict[str, Case] = {
    "plain-tp2-sp-distributed": Case(
        2, Config(muon="plain", tp=2, sequence_parallel=True, options=DISTRIBUTED), **EVERYTHING
    ),
    "plain-tp2-pp2-tied": Case(4, Config(muon="plain", tp=2, pp=2, tied=True), ("zclip-rest",), muon.by_optimizer),
    "layer-wise-tp2-ep2-etp1-bf16": Case(
        4, Config(muon="layer-wise", tp=2, ep=2, etp=1, bf16=True, **MOE), select=muon.by_optimizer
    ),
}
OLDER: dict[str, Case] = {
    "layer-wise": Case(2, Config(muon="layer-wise"), ("global-rest", "zclip-rest", "adagc-rest"), muon.by_groups),
}
"""Newer versions of Megatron have their layer-wise optimizer in bf16 alone."""
FURTHER: dict[str, Case] = {
    "plain": Case(2, Config(muon="plain")),
    "plain-bf16": Case(2, Config(muon="plain", bf16=True), **EVERYTHING),
    "plain-tp2-duplicated": Case(2, Config(muon="plain", tp=2, options=DUPLICATED), **EVERYTHING),
    "plain-tp2-blockwise": Case(2, Config(muon="plain", tp=2, sequence_parallel=True), **EVERYTHING),
    "plain-ep2": Case(4, Config(muon="plain", ep=2, experts=4), select=muon.by_optimizer),
    "plain-pp2-interleaved-tied": Case(2, Config(muon="plain", pp=2, vpp=2, tied=True, layers=4)),
    "layer-wise-bf16": Case(2, Config(muon="layer-wise", bf16=True), ("global-rest", "adagc-rest"), muon.by_groups),
    "layer-wise-bf16-all": Case(2, Config(muon="layer-wise", bf16=True), **EVERYTHING),
    "layer-wise-pp2-ep2-bf16": Case(4, Config(muon="layer-wise", pp=2, ep=2, experts=4, bf16=True)),
    "layer-wise-tp2-sp-distributed-bf16": Case(
        4, Config(muon="layer-wise", tp=2, sequence_parallel=True, bf16=True, options=DISTRIBUTED)
    ),
    "layer-wise-cp2-bf16": Case(4, Config(muon="layer-wise", cp=2, bf16=True)),
    "layer-wise-tp4-ep2-etp1-bf16": Case(4, Config(muon="layer-wise", tp=4, ep=2, etp=1, bf16=True, **MOE)),
    "layer-wise-pp2-interleaved-tied-bf16": Case(
        4, Config(muon="layer-wise", pp=2, vpp=2, tied=True, layers=4, bf16=True), ("zclip-rest",)
    ),
}
NEWER: dict[str, Case] = {
    "with-zero-bf16": Case(2, Config(muon=WITH_ZERO, bf16=True), ("zclip-rest", "adagc-rest"), muon.by_optimizer),
    "with-zero-bf16-by-part": Case(2, Config(muon=WITH_ZERO, bf16=True), select=muon.by_part),
    "with-zero-bf16-all": Case(2, Config(muon=WITH_ZERO, bf16=True), **EVERYTHING),
    "with-zero-overlap-bf16": Case(2, Config(muon=WITH_ZERO, bf16=True, overlap=True), select=muon.by_groups),
    "with-zero-tp2-sp-duplicated-bf16": Case(
        4, Config(muon=WITH_ZERO, tp=2, sequence_parallel=True, bf16=True, options=DUPLICATED), select=muon.by_groups
    ),
    "with-zero-pp2-tied-bf16": Case(4, Config(muon=WITH_ZERO, pp=2, tied=True, bf16=True)),
    "with-zero-ep2-bf16": Case(4, Config(muon=WITH_ZERO, ep=2, experts=4, bf16=True)),
}
needs_0_19 = pytest.mark.skipif(
    megatron_version() < (0, 19), reason="run on megatron-core 0.19 (scripts/test_megatron_latest.sh)"
)
HERE = {**CASES, **({} if megatron_version() >= (0, 18) else OLDER)}
MADE_OF = emerging.kind() if megatron_version() else ""


def named(cases: dict[str, Case]) -> list[Any]:
    return [pytest.param(case, id=f"{name}-{MADE_OF}") for name, case in cases.items()]


def check(case: Case) -> None:
    ranks = training.run(case.config, case.world, case.policies, steps=STEPS, select=case.select)
    training.check(case.config, ranks, case.policies)


@pytest.mark.parametrize("case", named(HERE))
def test_training(case: Case) -> None:
    check(case)


@needs_0_19
@pytest.mark.parametrize("case", named({**FURTHER, **NEWER}))
def test_training_on_0_19(case: Case) -> None:
    check(case)


# ---- attaching -------------------------------------------------------------------------------------------------------


def recipe(config: Config) -> list[dict[str, Any]]:
    """Docs' sample as it stands there, and what its clipper does in four steps, the third of which is bad."""
    setup = build(config)
    (text,) = re.findall(r"```python\n(def muons.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {"dist_clip": dist_clip, "optimizer": setup.optimizer, "model_chunks": setup.chunks}
    exec(text, names)
    clipper = names["clipper"]
    out = []
    for step in range(1, 5):
        setup.backward(step, factor=1e3 if step == 3 else 1.0)
        before = [main.detach().clone() for _, _, main in training.main_params(setup)]
        success, _, _ = setup.optimizer.step()
        mains = [main for _, _, main in training.main_params(setup)]
        report = clipper.last_report
        out.append(
            {
                "success": bool(success),
                "same": all(bool((old == new).all()) for old, new in zip(before, mains, strict=True)),
                "norms": dict(zip(report.names, report.tensor_norms.tolist(), strict=True)),
                "scales": dict(zip(report.names, report.scales.tolist(), strict=True)),
            }
        )
    return out


def check_recipe(world: int, config: Config) -> None:
    for records in pool(world, "megatron").run(recipe, config):
        for step, record in enumerate(records, start=1):
            assert (record["success"], record["same"]) == (step != 3, step == 3)
            rest = math.hypot(*(norm for name, norm in record["norms"].items() if not muon.is_muons(name)))
            assert all(norm > 0 for norm in record["norms"].values())
            for name, scale in record["scales"].items() if step != 3 else ():
                expected = 1.0 if muon.is_muons(name) else min(1.0, 1.0 / (rest + 1e-6))
                assert scale == pytest.approx(expected, rel=1e-5), name
    assert rest > 1, "the test is to blame"


@pytest.mark.parametrize("config", [pytest.param(Config(muon="layer-wise", bf16=True), id=f"layer-wise-{MADE_OF}")])
@pytest.mark.report(
    "NVIDIA/Megatron-LM#5394",
    "NVIDIA/Megatron-LM#5395",
    situation="Muon's matrices in the norm that clips AdamW's tensors, and in the threshold above which steps are skipped",
    right="the rest is clipped by its own norm, by which steps are skipped; Muon's norms are measured",
)
def test_the_recipe_of_the_docs(config: Config) -> None:
    check_recipe(2, config)


@needs_0_19
def test_the_recipe_of_the_docs_with_zero() -> None:
    check_recipe(2, Config(muon=WITH_ZERO, bf16=True))


def unwrapped(config: Config) -> str:
    """The chain as newer versions make it without bf16."""
    setup = build(config)
    parts = setup.optimizer.chained_optimizers
    parts[:] = [getattr(part, "optimizer", part) for part in parts]
    with pytest.raises(dist_clip.LayoutError) as error:
        dist_clip.megatron.attach(setup.optimizer, dist_clip.AdaGC(), model=setup.chunks)
    with pytest.raises(AttributeError, match="prepare_grads"):  # Megatron's own step
        setup.optimizer.step()
    return str(error.value)


def test_what_megatron_cannot_step_is_refused() -> None:
    for told in pool(2, "megatron").run(unwrapped, Config(muon="layer-wise")):
        assert "TensorParallelMuon is a torch optimizer that Megatron has not wrapped" in told


def copies_of_experts(config: Config) -> tuple[float, float]:
    """The norms of Megatron and of dist_clip."""
    setup = build(config)
    setup.backward(1)
    setup.optimizer.prepare_grads()
    theirs = setup.optimizer.get_grad_norm()
    clipper = dist_clip.megatron.attach(setup.optimizer, dist_clip.GlobalNorm(), model=setup.chunks)
    clipper.attachment.verify_next()
    setup.backward(1)
    _, norm, _ = setup.optimizer.step()
    return theirs, float(norm)


def test_one_data_parallel_rank_with_copies_of_experts() -> None:
    """The layer-wise optimizer then divides nothing. Megatron's own norm counts the experts' copies."""
    layer_wise, plain = (
        pool(4, "megatron").run(copies_of_experts, Config(muon=kind, tp=4, ep=2, etp=1, bf16=True, **MOE))
        for kind in ("layer-wise", "plain")
    )
    for (wrong, norm), (right, same) in zip(layer_wise, plain, strict=True):
        assert norm == same == pytest.approx(right, rel=1e-6)
        assert wrong > 1.05 * norm


MAKERS = ("get_megatron_optimizer", "get_megatron_muon_optimizer")


def launched(config: Config) -> list[int]:
    """How many clippers the launcher attaches, and how often the first clips in a step."""
    start()
    import megatron.core.optimizer.muon  # noqa: F401

    parser = dist_clip.megatron.add_clip_args(argparse.ArgumentParser())
    catcher = OptimizerCatcher(parser.parse_args(["--grad-clip-mode", "adagc"]))
    modules = [sys.modules[name] for name in ("megatron.core.optimizer", "megatron.core.optimizer.muon")]
    found = [(module, name, vars(module)[name]) for module in modules for name in MAKERS if name in vars(module)]
    try:
        for module in modules:
            catcher.change(module)
        setup = build(config)
    finally:
        for module, name, made in found:
            setattr(module, name, made)
    setup.backward(1)
    setup.optimizer.step()
    return [len(catcher.caught), catcher.caught[0]._dist_clip_attachment._clipper.steps]


def test_the_launcher_attaches_once() -> None:
    """0.16.1 makes Muon by a function that makes AdamW by another, both of which the launcher watches."""
    assert pool(2, "megatron").run(launched, Config(muon="layer-wise", bf16=True)) == [[1, 1]] * 2


# ---- other optimizers of newer versions --------------------------------------------------------------------------------


@needs_0_19
@pytest.mark.skipif(MADE_OF != "real", reason="needs the package emerging_optimizers")
@pytest.mark.parametrize("kind", ["plain", "layer-wise", WITH_ZERO])
@pytest.mark.parametrize(
    "options",
    [(("optimizer", "soap"),), (("optimizer", "lion"),), (("muon_scalar_optimizer", "lion"),)],
    ids=["soap", "lion", "muon-lion"],
)
def test_other_optimizers_of_the_package(options: tuple[Any, ...], kind: str) -> None:
    for theirs, norm in pool(2, "megatron").run(copies_of_experts, Config(muon=kind, bf16=True, options=options)):
        assert norm == pytest.approx(theirs, rel=1e-6)


# ---- checkpoints -----------------------------------------------------------------------------------------------------

LAYER_WISE = Config(muon="layer-wise", bf16=True)
BOTH = Config(muon=WITH_ZERO, bf16=True)
PAIRS: dict[str, tuple[Config, int, Config, int]] = {
    "plain-tp2-to-dp2": (Config(muon="plain", tp=2, options=DISTRIBUTED), 2, Config(muon="plain"), 2),
    "plain-dp2-to-tp2-pp2": (Config(muon="plain"), 2, Config(muon="plain", tp=2, pp=2, options=DISTRIBUTED), 4),
    "layer-wise-2-to-4": (LAYER_WISE, 2, LAYER_WISE, 4),
    "layer-wise-to-plain": (LAYER_WISE, 2, Config(muon="plain", bf16=True), 2),
    "with-zero-2-to-4": (BOTH, 2, BOTH, 4),
    "with-zero-pp2-to-2": (Config(muon=WITH_ZERO, bf16=True, pp=2), 4, BOTH, 2),
}


@needs_0_19
@pytest.mark.parametrize("name", PAIRS)
def test_a_change_of_layout(name: str, tmp_path: Path) -> None:
    test_checkpoints.test_a_change_of_layout(*PAIRS[name], tmp_path)


@pytest.mark.parametrize(
    "config",
    [pytest.param(LAYER_WISE, id="layer-wise"), pytest.param(BOTH, id="with-zero", marks=needs_0_19)],
)
def test_skipped_steps_change_nothing_and_states_are_saved(config: Config, tmp_path: Path) -> None:
    test_guards.test_skipped_steps_change_nothing_and_states_reshard(config, config, tmp_path)
