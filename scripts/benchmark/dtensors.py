"""One process, hundreds of DTensors on meshes of one, two and three dimensions: what the first call and the others cost.

The process is rank 0 of torch's "fake" process group, whose collectives return at once: this is the time of the host's
own work, with no communication in it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import dist_clip
from scripts.benchmark.timing import Candidate, OperatorCount, Section, Timing, count, interleaved, once, settle
from scripts.policies import compared, label
from scripts.policies import make as make_policy

WORLD = 8


class Mesh(NamedTuple):
    """A mesh of `WORLD` ranks: sizes, and the placements of a column-sharded matrix, a row-sharded one and a vector."""

    label: str
    sizes: tuple[int, ...]
    placements: tuple[list[Any], list[Any], list[Any]]


MESHES = {
    1: Mesh("1-D: FSDP", (8,), ([Shard(0)], [Shard(0)], [Shard(0)])),
    2: Mesh("2-D: FSDP, TP", (4, 2), ([Shard(0), Shard(1)], [Shard(1), Shard(0)], [Shard(0), Replicate()])),
    3: Mesh(
        "3-D: HSDP, TP",
        (2, 2, 2),
        ([Replicate(), Shard(0), Shard(1)], [Replicate(), Shard(1), Shard(0)], [Replicate(), Shard(0), Replicate()]),
    ),
}
DIM = 256


def make(shape: tuple[int, ...], mesh: DeviceMesh, placements: list[Any]) -> DTensor:
    local = list(shape)
    for size, placement in zip(mesh.shape, placements, strict=True):
        if isinstance(placement, Shard):
            local[placement.dim] //= size
    stride = torch.empty(shape, device="meta").stride()
    values = torch.randn(local).mul_(1e-3)
    return DTensor.from_local(values, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def model(mesh: DeviceMesh, kinds: tuple[list[Any], ...], tensors: int) -> list[tuple[str, nn.Parameter]]:
    """Transformer-like: of four tensors two are column-sharded, one is row-sharded and one is a vector."""
    shapes = [(DIM, DIM), (DIM, 2 * DIM), (2 * DIM, DIM), (DIM,)]
    placements = [kinds[0], kinds[0], kinds[1], kinds[2]]
    named = []
    for i in range(tensors):
        param = nn.Parameter(make(shapes[i % 4], mesh, placements[i % 4]))
        param.grad = make(shapes[i % 4], mesh, placements[i % 4])
        named.append((f"p{i}", param))
    return named


def measure(dims: int, tensors: int, repeats: int) -> list[dict[str, Any]]:
    """The rows of one mesh. Needs a process of its own: it is about first calls."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
    chosen = MESHES[dims]
    mesh = init_device_mesh("cpu", chosen.sizes, mesh_dim_names=("a", "b", "c")[:dims])
    named = model(mesh, chosen.placements, tensors)
    params = [param for _, param in named]
    made: dict[str, dist_clip.GradClipper] = {}

    def construct(mode: str) -> None:
        made[label(mode)] = dist_clip.GradClipper(named, make_policy(mode, warmup_steps=1, max_norm=1e30))

    # The check adds up what the ranks hold, which needs the other ranks.
    with mock.patch("dist_clip.construction.draft.check_coverage"):
        built = {label(mode): once(lambda mode=mode: construct(mode)) for mode in compared()}  # type: ignore[misc]
    runs = {
        **{name: clipper.clip_ for name, clipper in made.items()},
        "dist_clip.clip_grad_norm_": lambda: dist_clip.clip_grad_norm_(params, 1e30),
        "torch clip_grad_norm_": lambda: torch.nn.utils.clip_grad_norm_(params, 1e30),
    }
    first: dict[str, Timing] = {name: once(run) for name, run in runs.items()}
    for clipper in made.values():
        settle(clipper.clip_, params)
    steady = interleaved({name: Candidate(run) for name, run in runs.items()}, repeats)
    counted: dict[str, OperatorCount] = {name: count(run) for name, run in runs.items()}
    dist.destroy_process_group()
    torchs = steady["torch clip_grad_norm_"]
    return [
        {
            "mesh": chosen.label,
            "name": name,
            "construct_ms": built[name].wall_ms if name in built else None,
            "first_ms": first[name].wall_ms,
            "first_cpu_ms": first[name].cpu_ms,
            "wall_ms": steady[name].wall_ms,
            "cpu_ms": steady[name].cpu_ms,
            "cpu_ratio": steady[name].cpu_ms / torchs.cpu_ms,
            "collectives": counted[name].collectives,
        }
        for name in runs
    ]


COLUMNS = {
    "mesh": "mesh of 8 ranks",
    "name": "",
    "construct_ms": "construction, ms",
    "first_ms": "first call, ms",
    "first_cpu_ms": "first call, CPU time, ms",
    "wall_ms": "steady step, ms",
    "cpu_ms": "steady step, CPU time, ms",
    "cpu_ratio": "ratio, CPU time",
    "collectives": "collectives",
}


def dtensor(quick: bool) -> Section:
    tensors, repeats = (24, 3) if quick else (723, 9)
    rows: list[dict[str, Any]] = []
    for dims in (2,) if quick else MESHES:  # torch's first call on the third takes long
        command = [sys.executable, "-m", "scripts.benchmark.dtensors", str(dims), str(tensors), str(repeats)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows += json.loads(done.stdout.splitlines()[-1])
    return Section(
        f"{tensors} DTensors",
        "One process, rank 0 of torch's \"fake\" process group of 8: collectives return at once, so this is the host's own "
        "work, without communication. Nothing is clipped. Each mesh in a process of its own.",
        COLUMNS,
        rows,
        {"tensors": tensors, "ranks": WORLD, "repeats": repeats},
    )


if __name__ == "__main__":
    print(json.dumps(measure(*map(int, sys.argv[1:]))))
