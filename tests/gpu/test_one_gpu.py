"""A clip of shards that lie on a GPU: several processes share one, through gloo, which also takes CUDA tensors.

What the tests on CPU tensors cannot show: that indices, packed vectors, the policies' state and the flags of
`detect_desync` are where they have to be, that a collective on a device meets what was queued there before it, and that
the result is that of a plain single process. nccl needs a GPU for each rank; where there is only one it is left out.

Tolerances: norms are summed in fp32 a few elements at a time (see `triton_jit.TILES`) and bf16 gradients rounded once
after scaling: 2e-6, and half a unit in the last place of bf16 (2**-8) on top.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

import dist_clip
from tests import reference
from tests.harness import WorkerError, pool

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

STEPS, WARMUP = 8, 3
SHAPES = {"w": (12, 10), "uneven": (7, 6), "wide": (300, 400), "norm": (6,)}
"""The last is a plain tensor, of which every rank holds a copy."""

MESHES: dict[str, tuple[tuple[int, ...], list[Placement]]] = {
    "fsdp": ((2,), [Shard(0)]),
    "fsdp-4": ((4,), [Shard(0)]),
    "hsdp": ((2, 2), [Replicate(), Shard(0)]),
    "fsdp+tp": ((2, 2), [Shard(0), Shard(1)]),
}
POLICIES = {
    "global_norm": (lambda: dist_clip.GlobalNorm(1.5), lambda: reference.GlobalGC(1.5)),
    "adagc": (
        lambda: dist_clip.AdaGC(warmup_steps=WARMUP, gamma_init="median"),
        lambda: reference.AdaGC(warmup_steps=WARMUP, gamma_init="median"),
    ),
    "logclip": (lambda: dist_clip.LogClip(warmup_steps=WARMUP), lambda: reference.LogClip(warmup_steps=WARMUP)),
    "zclip": (lambda: dist_clip.ZClip(warmup_steps=WARMUP), lambda: reference.ZClip(warmup_steps=WARMUP)),
}


def whole_gradient(name: str, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + list(SHAPES).index(name))
    size = 9.0 if step in (WARMUP + 2, WARMUP + 4) and name != "norm" else 1.0
    return size * 0.02 * torch.randn(SHAPES[name], generator=generator)


def piece_of(whole: Tensor, mesh: DeviceMesh, placements: list[Placement]) -> Tensor:
    """This rank's piece, cut as DTensor cuts: along one dimension of the mesh after the other."""
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    for dim, placement in enumerate(placements):
        if isinstance(placement, Shard):
            parts = torch.chunk(whole, mesh.size(dim), placement.dim)
            empty = whole.narrow(placement.dim, 0, 0)
            whole = parts[coordinate[dim]] if coordinate[dim] < len(parts) else empty
    return whole


def as_dtensor(whole: Tensor, mesh: DeviceMesh, placements: list[Placement]) -> DTensor:
    local = piece_of(whole, mesh, placements).contiguous().cuda()
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.contiguous().stride()
    )


class Model:
    def __init__(self, layout: str, dtype: torch.dtype) -> None:
        shape, self.placements = MESHES[layout]
        self.mesh = init_device_mesh("cuda", shape, mesh_dim_names=tuple("ab")[: len(shape)])
        self.dtype = dtype
        self.params = {name: nn.Parameter(self._laid_out(name, 0)) for name in SHAPES}

    def _laid_out(self, name: str, step: int) -> Tensor:
        whole = whole_gradient(name, step).to(self.dtype)
        return whole.cuda() if name == "norm" else as_dtensor(whole, self.mesh, self.placements)

    def backward(self, step: int) -> None:
        for name, param in self.params.items():
            param.grad = self._laid_out(name, step)

    def local_grads(self) -> dict[str, Tensor]:
        grads = {name: param.grad for name, param in self.params.items()}
        return {n: (g.to_local() if isinstance(g, DTensor) else g).float().cpu() for n, g in grads.items()}

    def expected_piece(self, name: str, whole: Tensor) -> Tensor:
        return whole if name == "norm" else piece_of(whole, self.mesh, self.placements)


def clip_and_compare(layout: str, policy: str, dtype: torch.dtype, kernels: str, detect: bool) -> list[list[float]]:
    """On one rank: clip made-up gradients and hold each against the whole tensors' clip. Returns the scales."""
    torch.cuda.set_device(0)
    model = Model(layout, dtype)
    clipper = dist_clip.GradClipper(
        list(model.params.items()), POLICIES[policy][0](), kernels=kernels, detect_desync=detect
    )
    rule = POLICIES[policy][1]()
    exact = 2e-6 if dtype == torch.float32 else 2e-6 + 2**-8
    scales = []
    for step in range(1, STEPS + 1):
        model.backward(step)
        wholes = {name: whole_gradient(name, step).to(dtype).float() for name in SHAPES}
        norms = {name: reference.l2_norm(whole) for name, whole in wholes.items()}
        expected = rule.scales(norms)
        report = clipper.clip_()
        torch.testing.assert_close(
            report.tensor_norms.cpu().double(), torch.tensor(list(norms.values())).double(), rtol=2e-6, atol=0.0
        )
        for name, got in model.local_grads().items():
            want = model.expected_piece(name, wholes[name]) * expected[name]
            torch.testing.assert_close(got, want, rtol=exact, atol=1e-9, msg=f"step {step}, {name}")
        scales.append([float(s) for s in report.scales.cpu()])
    clipper.check_in_sync()
    return scales


@pytest.mark.parametrize("detect", [False, True], ids=["", "detect_desync"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("layout", MESHES)
def test_shards_on_a_gpu(layout: str, policy: str, detect: bool) -> None:
    world = math.prod(MESHES[layout][0])
    for dtype, kernels in itertools.product((torch.float32, torch.bfloat16), ("triton", "torch")):
        ranks = pool(world, "gpu").run(clip_and_compare, layout, policy, dtype, kernels, detect)
        assert all(rank == ranks[0] for rank in ranks), "ranks must scale by the bitwise same numbers"
        assert min(map(min, ranks[0][WARMUP:])) < 1, "the data does not reach the rule"


def out_of_step(fault: str) -> dict[str, Any]:
    """Good clips, then rank 1 goes astray; what was raised, and how many clips it took to say so."""
    torch.cuda.set_device(0)
    model = Model("fsdp-4", torch.float32)
    clipper = dist_clip.GradClipper(
        list(model.params.items()), dist_clip.AdaGC(warmup_steps=WARMUP), detect_desync=True
    )
    for step in range(1, WARMUP + 3):
        model.backward(step)
        clipper.clip_()
    if dist.get_rank() == 1 and fault == "loaded":
        clipper.memory.set_steps(1)
    if dist.get_rank() == 1 and fault == "flipped":
        clipper.memory.groups[0].state["gamma"].view(torch.int32)[2] ^= 1
    for clips in range(1, 4):
        model.backward(WARMUP + 2 + clips)
        try:
            clipper.clip_()
        except dist_clip.DesyncError as error:
            return {"error": str(error), "clips": clips}
    return {"error": "", "clips": 0}


@pytest.mark.parametrize(("fault", "says"), [("loaded", "rank 1 is at step"), ("flipped", "'wide'")])
def test_desync_is_found_one_step_late(fault: str, says: str) -> None:
    """The flag travels to the host while the step goes on, and is read at the next one."""
    ranks = pool(4, "gpu").run(out_of_step, fault)
    assert all(rank == ranks[0] for rank in ranks)
    assert says in ranks[0]["error"]
    assert ranks[0]["clips"] == 2


def nonfinite(choice: str) -> dict[str, Any]:
    torch.cuda.set_device(0)
    model = Model("fsdp", torch.float32)
    clipper = dist_clip.GradClipper(list(model.params.items()), POLICIES["adagc"][0](), nonfinite=choice)  # type: ignore[arg-type]
    for step in range(1, WARMUP + 2):
        model.backward(step)
        clipper.clip_()
    model.backward(WARMUP + 2)
    if dist.get_rank() == 1:
        model.params["wide"].grad.to_local()[3, 4] = math.nan  # type: ignore[union-attr]
    report = clipper.clip_()
    return {"skip": bool(report.skip), "zeros": bool((model.local_grads()["wide"] == 0).all())}


def test_nonfinite_on_a_gpu() -> None:
    assert [rank["skip"] for rank in pool(2, "gpu").run(nonfinite, "skip")] == [True, True]
    assert [rank["zeros"] for rank in pool(2, "gpu").run(nonfinite, "zero")] == [True, True]
    with pytest.raises(WorkerError) as caught:
        pool(2, "gpu").run(nonfinite, "raise")
    assert str(caught.value).count("'wide' (rank 1)") >= 2
