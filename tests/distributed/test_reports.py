"""Situations in which other software measured a wrong norm, or crashed, each as its report describes it.

The right value is that of one process with plain tensors: all whole gradients in one list, clipped by torch.
docs/conformance.md is made from the `report` markers.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

import dist_clip
from tests.harness import pool

from .layouts import mesh

WORLD = 4
MESHES: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "dp": ((4,), ("dp",)),
    "dp x tp": ((2, 2), ("dp", "tp")),
    "ep x edp": ((2, 2), ("ep", "edp")),
    "tp": ((4,), ("tp",)),
}


@dataclasses.dataclass(frozen=True)
class Cut:
    """A tensor, how the ranks hold it, and the L2 norm of its whole gradient.

    placements: over the mesh of that name; none for a plain tensor that is the same on all ranks.
    owned: by each rank for itself, under one name: the whole is all of them stacked, and `sharded=` says so.
    stage: the two ranks that hold it, where the ranks are two pipeline stages.
    partial: the gradient is a DTensor that is still a sum over the mesh.
    """

    norm: float
    placements: tuple[str, tuple[Placement, ...]] | None = None
    owned: bool = False
    stage: int | None = None
    partial: bool = False
    dtype: torch.dtype = torch.float32
    shape: tuple[int, ...] = (8, 4)

    def whole(self, name: str) -> Tensor:
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        grad = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        return (self.norm * grad / grad.norm()).to(self.dtype)


def over(mesh_name: str, *placements: Placement) -> tuple[str, tuple[Placement, ...]]:
    return mesh_name, placements


SPLIT, COPY = Shard(0), Replicate()

SITUATIONS: dict[str, dict[str, Cut]] = {
    "experts over other ranks than the dense layers": {
        "dense": Cut(5.0, over("dp x tp", COPY, SPLIT)),
        "router": Cut(3.0, over("dp x tp", COPY, COPY)),
        "experts.0": Cut(7.0, over("ep x edp", SPLIT, COPY)),
        "experts.1": Cut(8.0, over("ep x edp", SPLIT, SPLIT)),
        "experts.2": Cut(1.948949, over("ep x edp", COPY, COPY)),  # in all 12.28
    },
    "replicated beside split under tensor parallelism": {
        "linear": Cut(3.0, over("dp x tp", COPY, SPLIT)),
        "norm": Cut(4.0, over("dp x tp", COPY, COPY), shape=(4,)),
    },
    "FSDP over tensor parallelism": {
        "column": Cut(3.0, over("dp x tp", Shard(0), Shard(1))),
        "norm": Cut(4.0, over("dp x tp", SPLIT, COPY)),
        "row": Cut(12.0, over("dp x tp", Shard(1), Shard(0))),
    },
    "meshes of several kinds": {
        "a": Cut(2.0, over("dp", SPLIT)),
        "b": Cut(3.0, over("dp x tp", SPLIT, COPY)),
        "c": Cut(6.0, over("ep x edp", COPY, SPLIT)),
    },
    "DTensors beside plain tensors": {"sharded": Cut(3.0, over("dp", SPLIT)), "plain": Cut(4.0)},
    "one dimension": {"a": Cut(3.0, over("dp", SPLIT)), "b": Cut(4.0, over("dp", SPLIT))},
    "gradients that are still sums": {
        "a": Cut(3.0, over("tp", COPY), partial=True),
        "b": Cut(4.0, over("tp", SPLIT)),
    },
    "pipeline stages": {"embedding": Cut(3.0, stage=0), "head": Cut(4.0, stage=1)},
    "sharded pipeline stages": {
        "embedding": Cut(3.0, over("dp", SPLIT), stage=0),
        "head": Cut(4.0, over("dp", SPLIT), stage=1),
        "norm": Cut(12.0, over("dp", COPY), stage=1),
    },
    "experts that each rank owns": {
        "dense": Cut(5.0),
        "experts": Cut(math.sqrt(120.0), owned=True),
    },
    "bf16 beside fp32": {
        "a": Cut(0.125, over("dp", SPLIT)),
        "b": Cut(0.125, over("dp", SPLIT), dtype=torch.bfloat16),
        "c": Cut(0.125, over("dp", SPLIT)),
        "d": Cut(0.125, over("dp", SPLIT), dtype=torch.bfloat16),
    },
    "smaller than torch's 1e-6 on each rank": {"a": Cut(3e-6, over("dp", SPLIT)), "b": Cut(4e-6, over("dp", SPLIT))},
    "tensors that leave ranks empty": {
        "a": Cut(3.0, over("dp", SPLIT), shape=(2, 3)),
        "b": Cut(4.0, over("dp", SPLIT), shape=(1,)),
    },
}


def stage_mesh() -> Any:
    return mesh((2, 2), ("pp", "dp"))


def hold(name: str, cut: Cut) -> tuple[nn.Parameter, Tensor]:
    """This rank's parameter and its gradient."""
    whole = cut.whole(name)
    if cut.owned:
        part = whole.chunk(WORLD)[dist.get_rank()].clone()
        return nn.Parameter(torch.zeros_like(part)), part
    if cut.placements is None:
        return nn.Parameter(torch.zeros_like(whole)), whole
    mesh_name, placements = cut.placements
    on = stage_mesh()["dp"] if cut.stage is not None else mesh(*MESHES[mesh_name])
    param = nn.Parameter(distribute_tensor(torch.zeros_like(whole), on, placements))
    if cut.partial:
        # Every rank adds another multiple; together they are 1.
        weight = (0.5, 1.5, -2.0, 1.0)[dist.get_rank()]
        return param, DTensor.from_local(whole * weight, on, [Partial()], run_check=False)
    return param, distribute_tensor(whole, on, placements)


def clip_all(max_norm: float) -> dict[str, Any]:
    return {name: clip(cuts, max_norm) for name, cuts in SITUATIONS.items()}


def clip(cuts: dict[str, Cut], max_norm: float) -> dict[str, Any]:
    """Clip one situation by a clipper, and again by the function; norms and the gradients that this rank holds, whole."""
    stage = dist.get_rank() // 2
    staged = any(cut.stage is not None for cut in cuts.values())
    mine = {name: cut for name, cut in cuts.items() if cut.stage in (None, stage)}
    found: dict[str, Any] = {}
    for how in ("clipper", "function"):
        params = {name: hold(name, cut) for name, cut in mine.items()}
        for param, grad in params.values():
            param.grad = grad
        options = {"pp_group": stage_mesh()["pp"].get_group()} if staged else {}
        if how == "clipper":
            sharded = {name: dist.group.WORLD for name, cut in mine.items() if cut.owned}
            named = [(name, param) for name, (param, _) in params.items()]
            clipper = dist_clip.GradClipper(
                named, dist_clip.GlobalNorm(max_norm), log_global_norm=True, sharded=sharded or None, **options
            )
            found[how] = float(clipper.clip_().global_norm)  # type: ignore[arg-type]
        elif not any(cut.owned for cut in mine.values()):
            found[how] = float(dist_clip.clip_grad_norm_([param for param, _ in params.values()], max_norm, **options))
        else:
            continue  # which takes no sharded=
        found["grads of the " + how] = {name: gathered(mine[name], param.grad) for name, (param, _) in params.items()}
    return found


def gathered(cut: Cut, grad: Any) -> list[Any]:
    if isinstance(grad, DTensor):
        grad = grad.full_tensor()
    elif cut.owned:
        parts = [torch.empty_like(grad) for _ in range(WORLD)]
        dist.all_gather(parts, grad)
        grad = torch.cat(parts)
    return grad.float().tolist()


def right(cuts: dict[str, Cut], max_norm: float) -> tuple[float, dict[str, Tensor]]:
    """The norm and the clipped gradients of one process, in float64."""
    params = {name: nn.Parameter(torch.zeros(cut.shape, dtype=torch.float64)) for name, cut in cuts.items()}
    for name, param in params.items():
        param.grad = cuts[name].whole(name).double()
    norm = float(torch.nn.utils.clip_grad_norm_(params.values(), max_norm))
    return norm, {name: param.grad for name, param in params.items()}  # type: ignore[misc]


report = pytest.mark.report
MARKS: dict[str, list[pytest.MarkDecorator]] = {
    "experts over other ranks than the dense layers": [
        report(
            "NVIDIA/Megatron-LM#6489",
            "NVIDIA-NeMo/Automodel#3816",
            situation="dense layers and experts on different meshes",
            right="one norm, one scale for all",
        ),
        report(
            "NVIDIA/Megatron-LM#5916",
            "NVIDIA/Megatron-LM#6470",
            "NVIDIA/Megatron-LM#6099",
            "radixark/Megatron-LM#80",
            situation="expert parameters deduplicated by the dense layers' tensor-parallel rank",
            right="each expert once: 12.28, not 11.51",
        ),
    ],
    "replicated beside split under tensor parallelism": [
        report(
            "NVIDIA-NeMo/RL#3788",
            situation="replicated weights under tensor parallelism counted once for each rank",
            right="each once",
        ),
    ],
    "FSDP over tensor parallelism": [
        report(
            "meta-pytorch/torchtune#2420",
            "NVIDIA-NeMo/Automodel#3301",
            situation="FSDP2 over tensor parallelism, so that tensors differ in their placements",
            right="one norm, where torch raises",
        ),
        report(
            "pytorch/pytorch#126484",
            situation="the norm under FSDP2 x TP differs from one process's",
            right="the same to 1e-6",
        ),
    ],
    "meshes of several kinds": [
        report(
            "huggingface/transformers#48208",
            "pytorch/pytorch#180346",
            situation="DTensors of several meshes in one clip",
            right="one norm, where torch raises",
        ),
    ],
    "DTensors beside plain tensors": [
        report("huggingface/accelerate#4219", situation="DTensors beside plain tensors in one clip", right="one norm"),
    ],
    "one dimension": [
        report(
            "pytorch/pytorch#170862",
            "volcengine/verl#3655",
            "sgl-project/SpecForge#663",
            "radixark/miles_diffusion#35",
            "baidu-baige/LoongForge#152",
            situation="a shard's norm used or logged for the whole",
            right="the whole's, as a plain tensor; else too small by the root of the number of shards",
        ),
    ],
    "gradients that are still sums": [
        report(
            "pytorch/pytorch#159856",
            situation="the norm of a gradient that is Partial",
            right="that of the sum, not the sum of norms",
        ),
    ],
    "pipeline stages": [
        report(
            "pytorch/torchtitan#596",
            "pytorch/torchtitan#649",
            "pytorch/pytorch#162638",
            situation="pipeline stages clip by the norm of their own layers",
            right="one norm of all stages: 5, not 3 and 4",
        ),
    ],
    "sharded pipeline stages": [
        report(
            "Modalities/modalities#313",
            situation="FSDP2 inside pipeline stages",
            right="13 on all ranks",
        ),
    ],
    "experts that each rank owns": [
        report(
            "deepspeedai/DeepSpeed#8475",
            "deepspeedai/DeepSpeed#8478",
            situation="norms averaged over ranks that own different experts",
            right="sqrt(120) = 10.95 for the experts, not 7.24",
        ),
    ],
    "bf16 beside fp32": [
        report(
            "NVIDIA/Megatron-LM#7338",
            "NVIDIA/Megatron-LM#7279",
            situation="bf16 and fp32 gradients in one multi-tensor call",
            right="0.25, not 0.2165",
        ),
    ],
    "smaller than torch's 1e-6 on each rank": [
        report(
            "pytorch/pytorch#149768",
            situation="the 1e-6 of the scale added once for each rank",
            right="added once: as in one process",
        ),
    ],
    "tensors that leave ranks empty": [
        report(
            "pytorch/pytorch#88621",
            situation="FSDP's norm differs from DDP's; tensors with fewer rows than ranks",
            right="the same to 1e-6",
        ),
    ],
}


@pytest.mark.parametrize("max_norm", [1e-6, 1000.0], ids=["clips", "too large to clip"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=MARKS[name], id=name.replace(" ", "-")) for name in SITUATIONS]
)
def test_as_one_process_does(name: str, max_norm: float, results: dict[float, list[dict[str, Any]]]) -> None:
    due, grads = right(SITUATIONS[name], max_norm)
    assert due == pytest.approx(math.hypot(*(cut.norm for cut in SITUATIONS[name].values())), rel=3e-3)
    for rank in results[max_norm]:
        for how in ("clipper", "function"):
            if how not in rank[name]:
                continue
            assert rank[name][how] == pytest.approx(due, rel=1e-6)
            for tensor, found in rank[name]["grads of the " + how].items():
                rounding = 2**-7 if SITUATIONS[name][tensor].dtype == torch.bfloat16 else 2e-6
                torch.testing.assert_close(torch.tensor(found), grads[tensor].float(), rtol=rounding, atol=0)


@pytest.fixture(scope="module")
def results() -> dict[float, list[dict[str, Any]]]:
    return {max_norm: pool(WORLD).run(clip_all, max_norm) for max_norm in (1e-6, 1000.0)}


# ---------------------------------------------------------------------------------------- more than a norm


def skip_of_one_rank() -> list[tuple[bool, float]]:
    """A spike in the shard of one tensor-parallel rank alone."""
    on = mesh(*MESHES["tp"])
    param = nn.Parameter(distribute_tensor(torch.zeros(8, 2), on, [Shard(0)]))
    clipper = dist_clip.GradClipper([("w", param)], dist_clip.GlobalNorm(), guard=dist_clip.SkipAbove(50.0))
    optimizer = torch.optim.SGD([param], lr=1.0)
    clipper.attach(optimizer)
    steps = []
    for spike in (0.0, 1e4, 0.0):
        grad = torch.ones(8, 2)
        grad[5] += spike  # of rank 2
        param.grad = distribute_tensor(grad, on, [Shard(0)])
        before = param.detach().full_tensor()
        optimizer.step()
        steps.append((bool(clipper.last_report.skip), float((param.detach().full_tensor() - before).norm())))  # type: ignore[union-attr]
    return steps


@report(
    "allenai/OLMo-core#352",
    situation="whether to skip a step decided by each tensor-parallel rank's own norm",
    right="all ranks skip, or none",
)
def test_ranks_skip_together() -> None:
    for steps in pool(WORLD).run(skip_of_one_rank):
        assert [skip for skip, _ in steps] == [False, True, False]
        assert [moved for _, moved in steps] == pytest.approx([1.0, 0.0, 1.0])


def norms_by_partition() -> list[float]:
    """The norm of one bf16 gradient, whole, in two parts and in four."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(512, 96, generator=generator).bfloat16()
    norms = []
    for on, placements in (
        (mesh(*MESHES["dp"]), [Replicate()]),
        (mesh(*MESHES["dp x tp"]), [Replicate(), Shard(0)]),
        (mesh(*MESHES["dp x tp"]), [Shard(1), Shard(0)]),
        (mesh(*MESHES["dp"]), [Shard(1)]),
    ):
        param = nn.Parameter(distribute_tensor(torch.zeros_like(whole), on, placements))
        param.grad = distribute_tensor(whole, on, placements)
        norms.append(float(dist_clip.clip_grad_norm_([param], 1e9)))
    return [*norms, float(whole.double().norm())]


@report(
    "pytorch/pytorch#194033",
    "pytorch/torchtitan#4135",
    situation="norms of bf16 gradients depend on how they are cut",
    right="the same to 1e-6, that of float64",
)
def test_bf16_norms_do_not_depend_on_the_partition() -> None:
    for *norms, due in pool(WORLD).run(norms_by_partition):
        assert norms == pytest.approx([due] * 4, rel=1e-6)
