"""What each way of clipping sends in one step: counted by running it where it can be run, described where it cannot."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import dist_clip
from dist_clip.kernels import Kernels
from dist_clip.layouts import LogicalTensor
from scripts.policies import compared, label, make
from scripts.simulation.counting import Collective, CollectiveLog, logging_objects
from scripts.simulation.layouts import FSDP, PP, TP, Degrees, Meshes, make_parameters, splits
from scripts.simulation.ranks import ONES, AnsweringLog, fake_world
from scripts.simulation.shapes import ModelShape

WARMUP = 2
"""Warm-up steps of the policies here; steps 2 (within) and 4 (after) are the ones shown."""

MODES = {label(mode): mode for mode in compared("adagc-shard")}
"""What is simulated: name in the results -> mode."""

Basis = Literal["counted", "described"]


@dataclasses.dataclass(frozen=True)
class Step:
    """What one rank does in one step.

    Attributes:
        schedule: who clips.
        phase: "warm-up", "steady" (after it), "construction" or "first step" (beyond what a later one sends).
        basis: counted by running it, or described after its code.
        entries: the collectives, in order.
        host_syncs: times the host waits for the device to read a number.
        spans_stages: some collective has ranks of several pipeline stages.
        note: what to know about it.
    """

    schedule: str
    phase: str
    basis: Basis
    entries: tuple[Collective, ...]
    host_syncs: int
    spans_stages: bool
    note: str = ""


def simulate_rank(
    model: ModelShape, degrees: Degrees, rank: int, policies: Sequence[str] = tuple(MODES), torch_too: bool = True
) -> tuple[list[Step], dict[tuple[int, ...], str]]:
    """Construct real clippers on rank `rank` of a fake world, run real steps, and list what they and the others send.

    `torch_too`: run torch's GlobalGC as well, which takes minutes on many thousands of DTensors.

    Returns the steps, and names for the groups' ranks. Call it once a process.
    """
    with fake_world(rank, degrees.ranks):
        meshes = Meshes(degrees)
        stage_of = _stages(degrees)
        log = AnsweringLog(meshes, model)
        named = make_parameters(log.stage, meshes)
        steps: list[Step] = []
        for name in policies:
            steps += run_clipper(name, named, log, meshes, stage_of, check=lambda report: _check(report, log, model))
        if torch_too:
            steps.append(_global_gc_torch(model, meshes, stage_of))
        steps.append(_global_gc_megatron(degrees, rank))
        steps.append(_official_adagc(model, meshes, stage_of))
        return steps, group_names(meshes, rank)


def group_names(meshes: Meshes, rank: int) -> dict[tuple[int, ...], str]:
    """Ranks of a group -> what it is: a mesh dimension, the ranks of one copy of the model, or all ranks."""
    names: dict[tuple[int, ...], str] = {}
    for mesh in meshes.all:
        for dim in mesh.mesh_dim_names or ():
            names[tuple(dist.get_process_group_ranks(mesh.get_group(dim)))] = dim
    names.setdefault(model_ranks(meshes.degrees, rank), "copy of the model")
    everyone = tuple(range(meshes.degrees.ranks))
    known = names.get(everyone)
    names[everyone] = f"{known} = all ranks" if known in meshes.coordinates else "all ranks"
    return names


def run_clipper(
    name: str,
    named: Sequence[tuple[str, nn.Parameter]],
    log: Any,
    meshes: Meshes,
    stage_of: Callable[[int], int],
    *,
    check: Callable[[Any], None] = lambda report: None,
    kernels: Kernels | str | None = ONES,
) -> list[Step]:
    """A real `GradClipper`: its construction, and its steps within and after the warm-up.

    Args:
        named: the parameters, with gradients.
        log: `AnsweringLog`, or `PlainLog` on real processes.
        check: called with each step's report.
        kernels: None for the clipper's own, where gradients have memory.
    """
    sent: dict[str, tuple[Collective, ...]] = {}
    policy = make(MODES[name], warmup_steps=WARMUP)
    log.width = 1
    with log.logged() as entries:
        clipper = dist_clip.GradClipper(
            list(named),
            policy,
            pp_group=meshes.pp_group,
            kernels=kernels,
            check_replicas=False,  # a few clips in all a run, and none of the usual step
        )
    if kernels is ONES:
        clipper.layout = dataclasses.replace(clipper.layout, tensors=tuple(map(_as_it_is, clipper.layout)))
    sent["construction"] = tuple(entries)
    log.width = 2 if "weight_norms" in policy.needs(1) else 1
    for step in range(1, WARMUP + 3):
        with log.logged() as entries:
            report = clipper.clip_()
        check(report)
        if step == 1:
            sent["first step"] = tuple(entry for entry in entries if entry.kind == "all_gather_object")
        elif any(entry.kind == "all_gather_object" for entry in entries):
            raise AssertionError(f"step {step} exchanges objects")
        if step in (WARMUP, WARMUP + 2):
            sent["warm-up" if step == WARMUP else "steady"] = tuple(entries)
    return [
        Step(f"dist_clip {name}", phase, "counted", entries, 0, spans_stages(entries, stage_of))
        for phase, entries in sent.items()
    ]


def _as_it_is(tensor: LogicalTensor) -> LogicalTensor:
    """Read the gradient as it is: one number, expanded. A clipper would copy it, to write to each element."""

    def grad() -> Tensor | None:
        found = None if tensor.param is None else tensor.param.grad
        return found.to_local() if isinstance(found, DTensor) else found

    return dataclasses.replace(tensor, grad=grad)


class PlainLog:
    """Counts without answering: for real processes."""

    @contextlib.contextmanager
    def logged(self) -> Iterator[list[Collective]]:
        log = CollectiveLog()
        with log, logging_objects(log):
            yield log.entries


def _check(report: Any, log: AnsweringLog, model: ModelShape) -> None:
    """The norms that the clipper found are those of a model of ones: it added up all shards, and each once."""
    if report.global_norm is not None and not math.isclose(report.global_norm, math.sqrt(model.numel), rel_tol=1e-6):
        raise AssertionError(f"global norm {float(report.global_norm)}, expected {math.sqrt(model.numel)}")
    # Under scope "shard" the norms are those of this rank's shards.
    found, whole, own = report.tensor_norms, log.norms(whole=True), log.norms(whole=False)
    if not (torch.allclose(found, whole, rtol=1e-6) or torch.allclose(found, own, rtol=1e-6)):
        raise AssertionError("the tensors' norms are not those of tensors of ones")


def spans_stages(entries: Sequence[Collective], stage_of: Callable[[int], int]) -> bool:
    return any(stage_of(entry.ranks[0]) != stage_of(entry.ranks[-1]) for entry in entries)


def _stages(degrees: Degrees) -> Callable[[int], int]:
    per_stage = degrees.ranks // degrees.pp  # "pp" is the outermost mesh dimension
    return lambda rank: rank // per_stage


# ---- GlobalGC as torch and torchtitan do it: run


def _global_gc_torch(model: ModelShape, meshes: Meshes, stage_of: Callable[[int], int]) -> Step:
    """`torch.nn.utils.clip_grad_norm_` on DTensors of the same placements, without memory ("meta").

    Where experts live on a mesh of their own torch raises, and torchtitan's way is run: a norm for each mesh. Across
    stages it then adds, as torchtitan does.
    """
    tensors = model.stage(meshes.coordinates.get(PP, 0), meshes.degrees.pp)
    params = [p for _, p in make_parameters(tensors, meshes, device="meta")]
    log = CollectiveLog()
    with log:
        global_norm_of(params, meshes.pp_group)
    note = "" if len(_meshes_of(params)) < 2 else "torch raises on several meshes; one norm for each, as in torchtitan"
    return Step(
        "GlobalGC, torch", "steady", "counted", tuple(log.entries), 0, spans_stages(log.entries, stage_of), note
    )


def global_norm_of(params: Sequence[nn.Parameter], pp_group: Any) -> None:
    """The communication of torchtitan's `clip_grad_norm_`, whose scaling is local."""
    for on_mesh in _meshes_of(params).values():
        norm = torch.nn.utils.get_total_norm([p.grad for p in on_mesh if p.grad is not None])
        if isinstance(norm, DTensor):
            norm.full_tensor()
    if pp_group is not None:
        dist.all_reduce(torch.zeros(()), group=pp_group)


def _meshes_of(params: Sequence[nn.Parameter]) -> dict[Any, list[nn.Parameter]]:
    found: dict[Any, list[nn.Parameter]] = {}
    for param in params:
        found.setdefault(param.device_mesh if isinstance(param, DTensor) else None, []).append(param)
    return found


# ---- described


def _global_gc_megatron(degrees: Degrees, rank: int) -> Step:
    """One scalar all-reduce over every rank that holds a piece of this copy of the model, and a host sync.

    Megatron-core's `get_grad_norm_fp32` over `get_grad_stats_parallel_group()`: the model-parallel group without a
    distributed optimizer, one instance of it with ZeRO-1, which is what the layouts with FSDP are compared with.
    """
    ranks = model_ranks(degrees, rank)
    entries = (Collective("all_reduce", ranks, 4),)
    return Step("GlobalGC, Megatron", "steady", "described", entries, 1, degrees.pp > 1)


def model_ranks(degrees: Degrees, rank: int) -> tuple[int, ...]:
    """The ranks that together hold this rank's copy of the model: all coordinates but `replicate` and `dp`."""
    d = degrees
    grid = torch.arange(d.ranks).view(d.pp, d.replicate, d.dp, d.fsdp, d.tp)
    _, replicate, dp, _, _ = (int(i) for i in torch.unravel_index(torch.tensor(rank), grid.shape))
    return tuple(grid[:, replicate, dp].flatten().tolist())


def _official_adagc(model: ModelShape, meshes: Meshes, stage_of: Callable[[int], int]) -> Step:
    """The official code's schedule: for each tensor that tensor parallelism splits, one all-reduce and one host sync; then
    the global norm, all-reduced and read.

    That code knows no FSDP and no expert parallelism. For those layouts this is its schedule carried over, one all-reduce
    for each group that splits a tensor: what a straight port would do.
    """
    degrees, rank = meshes.degrees, dist.get_rank()
    tensors = model.stage(meshes.coordinates.get(PP, 0), degrees.pp)
    entries: list[Collective] = []
    split_tensors = 0
    for tensor in tensors:
        dims = [split.mesh_dim for split in splits(tensor, degrees)]
        split_tensors += bool(dims)
        for dim in dims:
            mesh = meshes.dense if dim in (FSDP, TP) else meshes.experts
            assert mesh is not None
            ranks = tuple(dist.get_process_group_ranks(mesh.get_group(dim)))
            entries.append(Collective("all_reduce", ranks, 4))
    entries.append(Collective("all_reduce", model_ranks(degrees, rank), 4))
    carried_over = degrees.fsdp > 1 or degrees.ep > 1
    note = "its schedule carried over: the official code has no FSDP and no EP" if carried_over else ""
    return Step("AdaGC, official", "steady", "described", tuple(entries), split_tensors + 1, degrees.pp > 1, note)
