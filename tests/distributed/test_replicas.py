"""What should be copies of one tensor is compared by its norms; `sharded=` says by hand what nothing marks.

The oracle is one process with plain tensors: the whole gradients of all ranks in one list, clipped by torch.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import dist_clip
from dist_clip.layouts import Layout, build_layout
from tests.harness import pool

from .counting import CollectiveLog
from .layouts import mesh


class Experts(nn.Module):
    """A dense layer that all ranks share, and an expert that each rank has for itself under one name."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.dense = nn.Linear(6, 6)
        torch.manual_seed(10 + rank)
        self.expert = nn.Linear(6, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.expert(self.dense(x).relu())


def batch(rank: int) -> torch.Tensor:
    torch.manual_seed(100 + rank)
    return torch.randn(5, 6)


def whole_gradients(world: int) -> dict[str, torch.Tensor]:
    """The gradients in one process: the dense layer's averaged over the ranks' batches, the experts' stacked."""
    models = [Experts(rank) for rank in range(world)]
    for rank, model in enumerate(models):
        model(batch(rank)).square().mean().backward()
    dense = {
        name: torch.stack([dict(model.named_parameters())[name].grad for model in models]).mean(0)
        for name in ("dense.weight", "dense.bias")
    }
    return {**dense, "expert.weight": torch.stack([model.expert.weight.grad for model in models])}


def experts_under(kind: str) -> nn.Module:
    """The model under DDP's ignore list, FSDP2's ignored_params, or beside DTensors of tensor parallelism."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = Experts(rank)
    if kind == "ddp":
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["expert.weight"])
        return DistributedDataParallel(model)
    if kind == "fsdp2":
        fully_shard(model, mesh=mesh((world,), ("dp",)), ignored_params={model.expert.weight})
        return model
    tp = mesh((world,), ("tp",))
    for name in ("weight", "bias"):
        whole = getattr(model.dense, name)
        setattr(model.dense, name, nn.Parameter(distribute_tensor(whole.detach(), tp, [Shard(0)])))
    return model


def backward(kind: str, model: nn.Module) -> None:
    """Give every parameter the gradient that data parallelism gives, times the parameter's part under DTensor."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if kind != "tp":
        model(batch(rank)).square().mean().backward()
        return
    gradients = whole_gradients(world)
    for name, param in model.named_parameters():
        whole = gradients[name]
        param.grad = (
            distribute_tensor(whole, param.device_mesh, [Shard(0)]) if isinstance(param, DTensor) else whole[rank]
        )


def clip(kind: str, **arguments: Any) -> Any:
    model = experts_under(kind)
    if arguments.get("sharded") == "world":
        arguments["sharded"] = {"*expert.weight": dist.group.WORLD}
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(0.1), log_global_norm=True, **arguments)
    backward(kind, model)
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    try:
        report = clipper.clip_()
    except dist_clip.LayoutError as error:
        dist.barrier()
        same = all(torch.equal(local(p.grad), local(before[name])) for name, p in model.named_parameters())
        return {"error": str(error), "untouched": same, "steps": clipper.steps}
    norms = dict(zip(report.names, report.tensor_norms.tolist(), strict=True))
    return {
        "global": float(report.global_norm),
        "norms": norms,
        "scale": report.scales.tolist(),
        "text": clipper.explain(),
    }


def local(grad: torch.Tensor) -> torch.Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "tp"])
@pytest.mark.report(
    "hpcaitech/ColossalAI#2192",
    situation="ranks hold other experts under one name, unmarked, and are taken for copies",
    right="an error on all ranks; with `sharded=`, one norm of all experts",
    here="error by name",
)
def test_plain_experts_are_an_error_on_every_rank(kind: str) -> None:
    ranks = pool(2).run(clip, kind)
    assert len({rank["error"] for rank in ranks}) == 1
    expert = whole_gradients(2)["expert.weight"]
    for rank in ranks:
        assert rank["untouched"]
        assert rank["steps"] == 0
        assert "'expert.weight' should be one tensor with copies on ranks 0, 1" in rank["error"]
        found = {int(i): float(norm) for norm, i in re.findall(r"([\d.e-]+) on rank (\d)", rank["error"])}
        assert found == pytest.approx({i: float(expert[i].norm()) for i in range(2)}, rel=1e-5)
        assert "sharded={'expert.weight': " in rank["error"]
        assert "check_replicas=False" in rank["error"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "tp"])
@pytest.mark.report("hpcaitech/ColossalAI#2192")
@pytest.mark.report("deepspeedai/DeepSpeed#8475")
def test_plain_experts_said_by_hand_are_measured_as_one(kind: str) -> None:
    ranks = pool(2).run(clip, kind, sharded="world")
    gradients = whole_gradients(2)
    total = torch.nn.utils.clip_grad_norm_([_with_grad(g) for g in gradients.values()], 0.1)
    for rank in ranks:
        assert rank["global"] == pytest.approx(float(total), rel=1e-5)
        for name, whole in gradients.items():
            assert rank["norms"][name] == pytest.approx(float(whole.norm()), rel=1e-5)
        assert rank["scale"] == ranks[0]["scale"]
        assert rank["scale"][0] == pytest.approx(0.1 / float(total), rel=1e-4)
        assert "divided by hand (stacked over 2)" in rank["text"]


def _with_grad(grad: torch.Tensor) -> torch.Tensor:
    param = torch.zeros_like(grad, requires_grad=True)
    param.grad = grad.clone()
    return param


def test_off_by_argument() -> None:
    for rank in pool(2).run(clip, "ddp", check_replicas=False):
        assert "error" not in rank
        assert "replicas: not compared (check_replicas=False)" in rank["text"]


# ------------------------------------------------------------------------------------------- when, and at what price


def clips_with(noise: float) -> dict[str, Any]:
    """Ten clips of replicas whose gradients are `noise` apart; the collectives of each, and what explain() says."""
    model = nn.Linear(8, 8)
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(1.0))
    counts, texts = [], [clipper.explain()]
    for step in range(1, 11):
        for param in model.parameters():
            param.grad = torch.full_like(param, step * (1 + noise * dist.get_rank()))
        with CollectiveLog() as log:
            clipper.clip_()
        counts.append(len(log.entries))
    return {"counts": counts, "texts": [*texts, clipper.explain()]}


def test_compared_at_clips_that_double_and_rounding_is_counted() -> None:
    for rank in pool(2).run(clips_with, 1e-5):
        assert rank["counts"] == [1, 1, 0, 1, 0, 0, 0, 1, 0, 0]
        assert "replicas: compared by their norms at clips 1, 2, 4, 8, ...; not yet" in rank["texts"][0]
        found = re.search(r"up to clip 8 2 tensors differed by rounding, at most by (\S+)", rank["texts"][1])
        assert found is not None
        assert float(found[1]) == pytest.approx(1e-5, rel=0.05)
    for rank in pool(2).run(clips_with, 0.0):
        assert "up to clip 8 all the same" in rank["texts"][1]


def nothing_to_compare() -> tuple[list[int], str]:
    """One copy of each tensor, divided among all ranks."""
    model = nn.Linear(8, 8)
    fully_shard(model, mesh=mesh((dist.get_world_size(),), ("dp",)))
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(1.0))
    counts = []
    for _ in range(4):
        model(torch.ones(2, 8)).sum().backward()
        with CollectiveLog() as log:
            clipper.clip_()
        counts.append(len(log.entries))
    return counts, clipper.explain()


def test_no_collective_where_each_tensor_has_one_copy() -> None:
    for counts, text in pool(2).run(nothing_to_compare):
        assert counts == [1] * 4
        assert "replicas: none, each tensor has one copy" in text


def one_lacks(what: str) -> str:
    """Copies of which one has no gradient, a NaN, or, alone in bf16 and of one element, another rounding."""
    rank = dist.get_rank()
    param = nn.Parameter(torch.ones(1 if what == "bf16" else 4, dtype=torch.bfloat16 if what == "bf16" else None))
    clipper = dist_clip.GradClipper([("w", param)], dist_clip.GlobalNorm(1.0))
    param.grad = torch.ones_like(param)
    if rank == 1:
        param.grad = {"gradient": None, "nan": param.grad * torch.nan, "bf16": param.grad * (1 + 2**-7)}[what]
    try:
        clipper.clip_()
    except dist_clip.LayoutError as error:
        return str(error)
    return "nothing"


def test_a_copy_without_a_gradient_is_no_copy_and_nan_is_no_difference() -> None:
    for text in pool(2).run(one_lacks, "gradient"):
        assert "0 on rank 1, 2 on rank 0" in text
    assert pool(2).run(one_lacks, "nan") == ["nothing"] * 2
    assert pool(2).run(one_lacks, "bf16") == ["nothing"] * 2


# ------------------------------------------------------------------------------------------------ by hand, everywhere


def cut_by_hand(how: str) -> tuple[float, tuple[int, ...], list[float], list[float]]:
    """A weight cut by hand along dim 1 without any mark, as in a tensor-parallel layer of the user's own."""
    rank, world = dist.get_rank(), dist.get_world_size()
    whole, grad = torch.zeros(4, 2 * world), torch.randn(4, 2 * world, generator=torch.Generator().manual_seed(3))
    part = nn.Parameter(whole[:, 2 * rank : 2 * rank + 2].clone())
    copy = nn.Parameter(torch.zeros(4))
    said = {"dim": 1, "dim from the end": -1, "pair": (1, dist.group.WORLD), "mesh": (1, mesh((world,), ("tp",)))}[how]
    clipper = dist_clip.GradClipper(
        [("part", part), ("copy", copy)], dist_clip.AdaGC(warmup_steps=0), sharded={"pa*": said}
    )
    norms, scales = [], []
    for factor in (1.0, 50.0):
        part.grad = factor * grad[:, 2 * rank : 2 * rank + 2]
        copy.grad = torch.full((4,), factor)
        report = clipper.clip_()
        norms.append(float(report.tensor_norms[0]))
        scales.append(float(report.scales[0]))
    return float(grad.norm()), clipper.layout.tensors[0].shape, norms, scales


@pytest.mark.parametrize("how", ["dim", "dim from the end", "pair", "mesh"])
def test_a_dimension_by_hand(how: str) -> None:
    ranks = pool(2).run(cut_by_hand, how)
    for whole, shape, norms, scales in ranks:
        assert shape == (4, 4)
        assert norms == pytest.approx([whole, 50 * whole], rel=1e-5)
        assert scales == ranks[0][3]


def experts_in_expert_meshes() -> tuple[float, float, tuple[int, ...], float]:
    """Experts that FSDP2 shards over two ranks, other ones in each of two expert-parallel groups, under one name."""
    both = mesh((2, 2), ("ep", "fsdp"))
    ep, fsdp = both["ep"].get_local_rank(), both["fsdp"]
    grads = [torch.randn(4, 3, generator=torch.Generator().manual_seed(7 + i)) for i in range(2)]
    dense = nn.Parameter(torch.zeros(5))
    expert = nn.Parameter(distribute_tensor(torch.zeros(4, 3), fsdp, [Shard(0)]))
    clipper = dist_clip.GradClipper(
        [("dense", dense), ("expert", expert)], dist_clip.GlobalNorm(0.1), sharded={"expert": both["ep"]}
    )
    dense.grad = torch.ones(5)
    expert.grad = distribute_tensor(grads[ep], fsdp, [Shard(0)])
    report = clipper.clip_()
    right = torch.cat([g.flatten() for g in (*grads, torch.ones(5))]).norm()
    return float(right), float(report.global_norm), clipper.layout.tensors[1].shape, float(report.scales[1])


@pytest.mark.report("NVIDIA/Megatron-LM#6489")
def test_experts_that_fsdp_shards_within_expert_groups() -> None:
    for right, found, shape, scale in pool(4).run(experts_in_expert_meshes):
        assert found == pytest.approx(right, rel=1e-5)
        assert shape == (2, 4, 3)
        assert scale == pytest.approx(0.1 / right, rel=1e-4)


BAD = {
    "no tensor": ({"nothing*": 0}, "no tensor on any rank matches ['nothing*']"),
    "out of range": ({"part": 2}, "cut along dim 2, but its shape is [4, 2]"),
    "no mapping": ([("part", 0)], "sharded must be a mapping"),
    "no pattern": ({3: 0}, "FQN patterns, which are strings, got 3"),
    "a bool": ({"part": True}, "must be a dimension, a process group"),
    "a word": ({"part": "columns"}, "must be a dimension, a process group"),
    "two dims": ({"part": (0, 1)}, "must be a dimension, a process group"),
    "replicated": ({"dtensor": None}, "is replicated, but it is laid out as"),
    "twice": ({"dtensor": 0}, "over which it is divided already"),
    "on one rank": ({"part": 0}, "is configured differently"),
}


def construct_badly(case: str) -> str:
    device_mesh = mesh((dist.get_world_size(),), ("tp",))
    named = [
        ("part", nn.Parameter(torch.zeros(4, 2))),
        ("dtensor", nn.Parameter(distribute_tensor(torch.zeros(4, 2), device_mesh, [Shard(0)]))),
    ]
    sharded = BAD[case][0] if case != "on one rank" or dist.get_rank() == 1 else None
    try:
        dist_clip.GradClipper(named, dist_clip.AdaGC(), sharded=sharded)  # type: ignore[arg-type]
    except (TypeError, dist_clip.LayoutError) as error:
        dist.barrier()
        return str(error)
    return "nothing"


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_error_on_all_ranks(case: str) -> None:
    texts = pool(2).run(construct_badly, case)
    assert texts[0] == texts[1]
    assert BAD[case][1] in texts[0]


# ----------------------------------------------------------------------------------- marks that nothing else vouches for


@dataclasses.dataclass
class Marked:
    """A framework whose mark says that its one tensor is divided over all ranks."""

    param: nn.Parameter

    def read_layout(self, skip: Callable[[str], bool]) -> Layout:
        group, world = dist.group.WORLD, dist.get_world_size()
        tensor = build_layout([("w", self.param)]).tensors[0]
        ranks = frozenset(range(world))
        shape = (self.param.shape[0] * world, *self.param.shape[1:])
        marked = dataclasses.replace(
            tensor, shape=shape, norm_groups=(group,), marked_groups=(group,), replica_ranks=ranks, mesh_ranks=ranks
        )
        return Layout((marked,))


def clip_marked(truly: bool) -> tuple[str, float]:
    rank = dist.get_rank() if truly else 0
    values = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(20 + rank))
    param = nn.Parameter(values[0].clone())
    clipper = dist_clip.GradClipper(Marked(param), dist_clip.GlobalNorm(1.0))
    param.grad = values[1].clone()
    try:
        return "", float(clipper.clip_().global_norm)
    except dist_clip.LayoutError as error:
        assert torch.equal(param.grad, values[1])
        return str(error), 0.0


def test_copies_that_are_marked_as_parts() -> None:
    for text, _ in pool(2).run(clip_marked, False):
        assert (
            "'w' is marked as split over the tensor-parallel ranks, but its weights and its gradient have the same"
            in text
        )
        assert "sharded={'w': None}" in text
    grads = [torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(20 + rank))[1] for rank in range(2)]
    for text, norm in pool(2).run(clip_marked, True):
        assert text == ""
        assert norm == pytest.approx(float(torch.stack(grads).norm()), rel=1e-5)


# ------------------------------------------------------------------------------------- groups of the same ranks, twice


def groups_that_two_ranks_share() -> tuple[float, float, str]:
    """Two tensors over the same ranks: ranks 0 and 1 have a group for each, ranks 2 and 3 one for both.

    So torch may have it for two device meshes. By first appearance, the groups of the matrix would come in one order on
    ranks 0 and 1, and in the other on ranks 2 and 3.
    """
    rank = dist.get_rank()
    columns, rows, other_rows = (
        [dist.new_group(ranks) for ranks in pairs] for pairs in (((0, 2), (1, 3)), ((0, 1), (2, 3)), ((0, 1), (2, 3)))
    )
    over_rows = rows[rank // 2]
    device_mesh = DeviceMesh.from_group(
        [columns[rank % 2], over_rows], "cpu", mesh=torch.tensor([[0, 1], [2, 3]]), mesh_dim_names=("column", "row")
    )
    whole, part = (torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6 + rank % 2))
    first = nn.Parameter(torch.zeros(4, 3))
    matrix = nn.Parameter(distribute_tensor(torch.zeros(4, 3), device_mesh, [Shard(0), Shard(0)], src_data_rank=None))
    clipper = dist_clip.GradClipper(
        [("first", first), ("matrix", matrix)],
        dist_clip.GlobalNorm(1.0),
        sharded={"first": over_rows if rank > 1 else other_rows[0]},
    )
    first.grad = part
    matrix.grad = distribute_tensor(whole, device_mesh, [Shard(0), Shard(0)], src_data_rank=None)
    try:
        report = clipper.clip_()
    except dist_clip.LayoutError as error:
        return float(whole.norm()), 0.0, str(error)
    return float(whole.norm()), float(report.tensor_norms[1]), ""


def test_groups_of_the_same_ranks_are_one() -> None:
    for right, found, error in pool(4).run(groups_that_two_ranks_share):
        assert error == ""
        assert found == pytest.approx(right, rel=1e-5)
