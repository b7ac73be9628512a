"""The simulation of scripts/simulate.py: that what it counts is what real processes do, and that it computes what it says.

- on real gloo processes the same layouts send the same collectives, over the same ranks, of the same size, in the same
  order, and find the same norms;
- the placements that it writes down are those of the real parallelize_module and fully_shard;
- the number of collectives does not depend on the ranks or the tensors (a quick run);
- the network's and the pipeline's formulas, against numbers worked out by hand.
"""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # DTensor imports it when first used: once here, not in each forked process
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from scripts.simulation import pipeline
from scripts.simulation.layouts import (
    EFSDP,
    EP,
    FAMILIES,
    FSDP,
    PP,
    REPLICATE,
    TP,
    Degrees,
    Meshes,
    local_shape,
    make_parameters,
)
from scripts.simulation.ranks import AnsweringLog, fake_world
from scripts.simulation.schedules import MODES, PlainLog, global_norm_of, run_clipper, simulate_rank
from scripts.simulation.shapes import MODELS, ModelShape, TensorShape, latent_moe, llama, mixtral
from tests.harness import pool

pytest.importorskip("tomllib")  # Python 3.10 has none

from scripts.simulation.network import Network

ROOT = Path(__file__).parents[1]

DENSE = llama("dense", "", layers=3, dim=16, hidden=24, heads=4, kv_heads=2, vocab=37)
MOE = mixtral("moe", "", layers=3, dim=16, hidden=24, heads=4, kv_heads=2, vocab=37, experts=4)

# Name -> model, degrees. A vocabulary of 37 and routers of 4 rows leave uneven and empty shards; under TP all divides.
EVEN = llama("even", "", layers=3, dim=16, hidden=24, heads=4, kv_heads=2, vocab=38)
LAYOUTS: dict[str, tuple[ModelShape, Degrees]] = {
    "fsdp": (DENSE, Degrees(fsdp=4)),
    "hsdp": (DENSE, Degrees(replicate=2, fsdp=2)),
    "tp-fsdp": (EVEN, Degrees(fsdp=2, tp=2)),
    "ep-fsdp": (MOE, Degrees(fsdp=4, ep=2)),
    "pp-fsdp": (DENSE, Degrees(pp=2, fsdp=2)),
    "pp-tp": (EVEN, Degrees(pp=2, tp=2)),
    "tp-dp": (EVEN, Degrees(dp=2, tp=2)),
}


def in_a_process(function: Callable[..., Any], *args: Any) -> Any:
    """A fake world needs a process of its own: DTensor remembers groups of earlier ones."""
    with multiprocessing.get_context("fork").Pool(1) as forked:
        return forked.apply(function, args)


# ---- real processes


def real_steps(layout: str) -> list[Any]:
    model, degrees = LAYOUTS[layout]
    meshes = Meshes(degrees)
    stage = model.stage(meshes.coordinates.get(PP, 0), degrees.pp)
    steps = []
    for policy in MODES:
        named = make_parameters(stage, meshes, real=True)
        norms: list[float | None] = []

        def note(report: Any, norms: list[float | None] = norms) -> None:
            norms.append(None if report.global_norm is None else float(report.global_norm))

        ran = run_clipper(policy, named, PlainLog(), meshes, stage_of(degrees), check=note, kernels=None)
        steps.append((plain(ran), norms[0]))
    params = [param for _, param in make_parameters(stage, meshes, real=True)]
    with PlainLog().logged() as entries:
        global_norm_of(params, meshes.pp_group)
    return [steps, tuple(entries)]


def fake_steps(layout: str, rank: int) -> list[Any]:
    model, degrees = LAYOUTS[layout]
    steps, _ = simulate_rank(model, degrees, rank)
    ours = [plain([s for s in steps if s.schedule == f"dist_clip {policy}"]) for policy in MODES]
    (torch_step,) = (s for s in steps if s.schedule == "GlobalGC, torch")
    return [ours, torch_step.entries]


def plain(steps: Any) -> Any:
    """What is compared; texts announced at construction name the kernels, so their length differs."""
    return [
        (
            s.schedule,
            s.phase,
            s.spans_stages,
            [(e.kind, e.ranks, 0 if "object" in e.kind else e.bytes) for e in s.entries],
        )
        for s in steps
    ]


def stage_of(degrees: Degrees) -> Callable[[int], int]:
    return lambda rank: rank // (degrees.ranks // degrees.pp)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_fake_rank_sends_what_a_real_one_does(layout: str) -> None:
    model, _ = LAYOUTS[layout]
    ranks = pool(4).run(real_steps, layout)
    for rank in (0, 3):  # the first and the last stage, the fullest and the emptiest shards
        real, real_torch = ranks[rank]
        fake, fake_torch = in_a_process(fake_steps, layout, rank)
        assert [steps for steps, _ in real] == fake
        assert fake_torch == real_torch
        assert [
            len(entries) for _, phase, _, entries in fake[list(MODES).index('AdaGC scope="shard"')] if phase == "steady"
        ] == [0]
        for policy, (_, norm) in zip(
            MODES, real, strict=True
        ):  # the simulation checks that its fake ranks find this norm
            if policy == "AGC" and LAYOUTS[layout][1].pp > 1:
                assert norm is None, "AGC needs nothing of the other stages"
                continue
            assert norm is not None
            assert math.isclose(norm, math.sqrt(model.numel), rel_tol=1e-6)


def wrong_answer(rank: int) -> str:
    """A rank that sends something else than the others would take it to."""
    model, degrees = LAYOUTS["fsdp"]
    with fake_world(rank, degrees.ranks):
        meshes = Meshes(degrees)
        log = AnsweringLog(meshes, model)
        named = make_parameters(log.stage, meshes)
        named[0], named[1] = named[1], named[0]
        try:
            run_clipper("AdaGC", named, log, meshes, stage_of(degrees))
        except AssertionError as error:
            return str(error)
    return "nothing was noticed"


def test_what_a_fake_rank_sends_is_checked() -> None:
    assert "this rank sends" in in_a_process(wrong_answer, 0)


# ---- placements


class Holder(nn.Module):
    """A module of nothing but parameters: stacked experts, low-rank projections' norms."""


def build(tensors: tuple[TensorShape, ...]) -> nn.Module:
    """Modules under the tensors' names, on the meta device: linear layers, embeddings, norms, bare parameters."""
    root = nn.Module()
    for tensor in tensors:
        *path, leaf = tensor.name.split(".")
        module = root
        for i, part in enumerate(path):
            if part not in module._modules:
                last = i == len(path) - 1 and leaf == "weight"
                module.add_module(part, leaf_module(tensor) if last else Holder())
            module = module._modules[part]  # type: ignore[assignment]
        if leaf not in dict(module.named_parameters(recurse=False)):
            module.register_parameter(leaf, nn.Parameter(torch.empty(tensor.shape, device="meta")))
    return root


def leaf_module(tensor: TensorShape) -> nn.Module:
    if len(tensor.shape) == 1:
        return nn.RMSNorm(tensor.shape[0], device="meta")
    if tensor.name.startswith("tok_embeddings"):
        return nn.Embedding(*tensor.shape, device="meta")
    return nn.Linear(tensor.shape[1], tensor.shape[0], bias=False, device="meta")


def parallelize(root: nn.Module, tensors: tuple[TensorShape, ...], meshes: Meshes) -> None:
    """As torchtitan does it: TP and EP plans first, then fully_shard on experts, layers and the rest."""
    degrees = meshes.degrees
    if degrees.tp > 1:
        styles = {"columns": ColwiseParallel, "rows": RowwiseParallel, "whole": SequenceParallel}
        plan = {}
        for tensor in tensors:
            if not tensor.expert:
                embedding = tensor.name.startswith("tok_embeddings")
                style = RowwiseParallel if embedding else styles[tensor.split]
                plan[tensor.name.removesuffix(".weight")] = style()
        parallelize_module(root, meshes.dense[TP], plan)
    dense_names = tuple(n for n, size in ((REPLICATE, degrees.replicate), (FSDP, degrees.fsdp)) if size > 1)
    expert_names = tuple(n for n, size in ((REPLICATE, degrees.replicate), (EFSDP, degrees.efsdp)) if size > 1)
    layers = root._modules["layers"]
    assert layers is not None
    for layer in layers.children():
        experts = layer.moe.experts if hasattr(layer, "moe") else None
        if experts is not None and meshes.experts is not None:
            for name, param in list(experts.named_parameters()):
                sharded = distribute_tensor(param.data, meshes.experts[EP], [Shard(0)])
                experts.register_parameter(name, nn.Parameter(sharded))
            few = degrees.ep * degrees.efsdp > next(t for t in tensors if t.expert).shape[0]
            shard = functools.partial(lambda dim, param: Shard(dim), 1 if few else 0)
            fully_shard(experts, mesh=meshes.experts[expert_names], shard_placement_fn=shard)
        fully_shard(layer, mesh=meshes.dense[dense_names])
    fully_shard(root, mesh=meshes.dense[dense_names])


REAL: dict[str, tuple[ModelShape, Degrees]] = {
    "fsdp": (DENSE, Degrees(fsdp=8)),
    "hsdp": (DENSE, Degrees(replicate=2, fsdp=4)),
    "tp-fsdp": (EVEN, Degrees(fsdp=4, tp=2)),
    "pp-tp-fsdp": (EVEN, Degrees(pp=2, fsdp=4, tp=2)),
    "ep-fsdp": (MOE, Degrees(fsdp=4, ep=2)),
    "ep-fsdp-dim1": (MOE, Degrees(fsdp=8, ep=2)),
    "pp-tp-ep-hsdp": (
        latent_moe("moe", "", layers=4, dim=16, dense_hidden=24, hidden=24, heads=4, vocab=38, experts=8),
        Degrees(pp=2, replicate=2, fsdp=4, tp=2, ep=4),
    ),
}


def compare_placements(layout: str, rank: int) -> list[str]:
    model, degrees = REAL[layout]
    different = []
    with fake_world(rank, degrees.ranks):
        meshes = Meshes(degrees)
        tensors = model.stage(meshes.coordinates.get(PP, 0), degrees.pp)
        root = build(tensors)
        parallelize(root, tensors, meshes)
        params = dict(root.named_parameters())
        assert set(params) == {t.name for t in tensors}
        for tensor in tensors:
            param, laid_out = params[tensor.name], meshes.under(tensor)
            assert isinstance(param, DTensor)
            assert laid_out is not None
            mesh, placements = laid_out
            real = (param.device_mesh.mesh_dim_names, param.placements, tuple(param.to_local().shape))
            ours = (mesh.mesh_dim_names, placements, local_shape(tensor, degrees, meshes.coordinates))
            same_ranks = torch.equal(param.device_mesh.mesh, mesh.mesh)
            if real != ours or not same_ranks:
                different.append(f"{tensor.name}: {real} is real, {ours} is simulated; the same ranks: {same_ranks}")
    return different


@pytest.mark.parametrize("layout", REAL)
def test_placements_are_those_of_fully_shard_and_parallelize_module(layout: str) -> None:
    _, degrees = REAL[layout]
    for rank in (0, degrees.ranks - 1):
        different = in_a_process(compare_placements, layout, rank)
        assert not different, "\n".join(different)


def test_models_have_their_published_sizes() -> None:
    sizes = {name: round(model.numel / 1e9, 1) for name, model in MODELS.items()}
    assert sizes == {"Llama-2-7B": 6.7, "Llama-3-70B": 70.6, "Mixtral-8x22B": 140.6, "MoE-1T": 1026.4}
    assert len(MODELS["Llama-3-70B"].tensors) == 723
    for model in MODELS.values():
        for stages in (1, 2, 8, 16):
            parts = [model.stage(i, stages) for i in range(stages)]
            assert sorted(t.name for part in parts for t in part) == sorted(t.name for t in model.tensors)


def test_degrees_multiply_to_the_ranks() -> None:
    for family in FAMILIES:
        for ranks in (family.smallest, 128, 4096, 65536):
            degrees = family.degrees(ranks)
            assert degrees.ranks == ranks
            assert degrees.efsdp * degrees.ep == degrees.fsdp * degrees.tp
            for name in (*family.caps, family.rest):
                assert getattr(degrees, name) > 1, f"{family.name} at {ranks}: {degrees}"
        with pytest.raises(ValueError, match="power of 2"):
            family.degrees(100)


# ---- a quick run


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("simulate")
    page = out / "page.md"
    page.write_text("before\n<!-- generated by scripts/simulate.py: begin -->\nold\n<!-- end -->\nafter\n")
    command = [sys.executable, "-m", "scripts.simulate", "--quick", "--out", str(out), "--docs", str(page)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLCONFIGDIR": str(out)}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {"simulate-time.png", "simulate-counts.png", "tables.md"} <= {path.name for path in out.iterdir()}
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "Collectives a step" in text
    return json.loads((out / "simulate.json").read_text())


def counts(quick: dict[str, Any], family: str, schedule: str, phase: str) -> dict[int, list[tuple[str, int]]]:
    """Ranks -> kinds of collectives and how often."""
    found = {}
    for layout in quick["layouts"]:
        if layout["family"] == family:
            for name, when, _, _, _, _, calls in layout["rows"]:
                if (name, when) == (schedule, phase):
                    made = [layout["calls"][index] for index in calls]
                    kinds = [(call[0], call[quick["call"].index("times")]) for call in made]
                    found[layout["ranks"]] = sorted(kinds)
    return found


@pytest.mark.parametrize("phase", ["warm-up", "steady"])
@pytest.mark.parametrize("policy", MODES)
@pytest.mark.parametrize("family", ["FSDP", "PP + TP + FSDP", "PP + TP + EP + HSDP"])
def test_collectives_do_not_depend_on_the_ranks(quick: dict[str, Any], family: str, policy: str, phase: str) -> None:
    found = counts(quick, family, f"dist_clip {policy}", phase)
    assert {512, 65536} <= set(found)
    first, *others = found.values()
    assert all(other == first for other in others), found
    if policy == 'AdaGC scope="shard"' and phase == "steady":
        assert first == []
    else:
        # A chain over the mesh dimensions at most, and the gather over the stages.
        assert 1 <= sum(times for _, times in first) <= 5


def test_collectives_do_not_depend_on_the_tensors(quick: dict[str, Any]) -> None:
    found: dict[str, dict[int, list[Any]]] = {}
    for entry in quick["tensors"]:
        ours = [(schedule, phase, n) for schedule, phase, n, _ in entry["collectives"] if "dist_clip" in schedule]
        found.setdefault(entry["family"], {})[entry["tensors"]] = ours
    assert found
    for by_tensors in found.values():
        assert sorted(by_tensors) == [10, 10000]
        assert by_tensors[10] == by_tensors[10000]


def test_described_rows_say_so(quick: dict[str, Any]) -> None:
    basis = {(row[0], row[2]) for layout in quick["layouts"] for row in layout["rows"]}
    described = {"GlobalGC, Megatron", "AdaGC, official"}
    assert {name for name, how in basis if how == "described"} == described
    assert {name for name, how in basis if how == "counted"} == {f"dist_clip {p}" for p in MODES} | {"GlobalGC, torch"}


# ---- formulas


@pytest.mark.parametrize(
    ("kind", "ranks", "nodes", "num_bytes", "expected"),
    [
        # ring LL inside a node: 6.6 + 14 * 0.6; the bytes take 4 / (141e3 * 8 / 14) us
        ("all_reduce", 8, 1, 4, 6.6 + 14 * 0.6 + 4 / (141e3 * 8 / 14)),
        # tree LL over 8 nodes: 6.8 + 2 * (7 * 0.6 + 3 * 5); 20.4 GB/s (400 * 0.242 is more), half of it
        ("all_reduce", 64, 8, 4, 6.8 + 2 * (7 * 0.6 + 3 * 5.0) + 4 / (20.4e3 / 2)),
        # one GPU on each of 4 nodes, ring LL: 6.6 + 6 * 5.0 (a tree takes 6.8 + 2 * 2 * 5.0)
        ("all_reduce", 4, 4, 4, 6.8 + 2 * 2 * 5.0 + 4 / (50e3 * 0.242 / 2)),
        # ring LL over 2 nodes: 15 steps, of them one at 2.7 and the others at the network's 1.0
        ("all_gather", 16, 2, 1024, 6.6 + 14 * 1.0 + 2.7 + 1024 / (39e3 * 16 / 15)),
        # PAT, one GPU a node: 8 + log2(1024) * 4 + 1024 * 2.8 (a ring takes 6.6 + 1023 * 5)
        ("all_gather", 1024, 1024, 8192, 8.0 + 10 * 4.0 + 1024 * 2.8 + 8192 / (50e3 * 0.75)),
        ("all_reduce", 1, 1, 4, 0.0),
    ],
)
def test_network_by_hand(kind: str, ranks: int, nodes: int, num_bytes: int, expected: float) -> None:
    assert Network.load().collective_us(kind, ranks, nodes, num_bytes) == pytest.approx(expected, rel=1e-9)


def test_nodes_of_a_group() -> None:
    network = Network.load()
    assert network.nodes(tuple(range(64))) == 8
    assert network.nodes(tuple(range(0, 64, 8))) == 8
    assert network.nodes((0, 1, 2, 3)) == 1


def test_pipeline_by_hand() -> None:
    assert pipeline.expected_maximum(1) == 0
    assert pipeline.expected_maximum(2) == pytest.approx(1 / math.sqrt(math.pi), rel=1e-6)
    assert pipeline.expected_maximum(3) == pytest.approx(1.5 / math.sqrt(math.pi), rel=1e-6)
    parameters = {**Network.load().parameters["pipeline"], "jitter": 0.0, "optimizer_share": 0.0, "steps": 3}
    # Without jitter a step takes what 1F1B takes, (m + p - 1) (forward + backward), which is how `step_s` is spread.
    for stages in (1, 2, 4):
        schedule = pipeline.one_f_one_b(stages, parameters, barrier=True)
        assert schedule.step_s == pytest.approx(parameters["step_s"], rel=1e-9)
        # Stage s ends (stages - 1 - s) backward passes before ... the first; the average waits half of the spread.
        forward = parameters["step_s"] / ((5 * stages - 1) * 3)
        assert schedule.wait_s == pytest.approx((stages - 1) / 2 * 2 * forward, abs=1e-9)
    assert pipeline.refill(4, parameters) == pytest.approx(3 * parameters["step_s"] / (19 * 3))


def test_a_wait_that_the_pipeline_has_anyway_costs_nothing() -> None:
    """1F1B drains between steps, so the first stage's last backward pass ends last, barrier or not."""
    parameters = {**Network.load().parameters["pipeline"], "steps": 10}
    with_barrier = pipeline.one_f_one_b(4, parameters, barrier=True)
    without = pipeline.one_f_one_b(4, parameters, barrier=False)
    assert without.step_s <= with_barrier.step_s <= without.step_s * 1.0005
    assert with_barrier.wait_s > 0.01 * with_barrier.step_s
