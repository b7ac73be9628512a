"""Real gloo processes, one thread each: tensors that tensor parallelism splits, and what `detect_desync` costs."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.multiprocessing.spawn import spawn as start

import dist_clip
from launch.parallel import end_program
from scripts.benchmark.official import OfficialSchedule, Piece
from scripts.benchmark.timing import Section, Timing, count, settle
from scripts.policies import compared, label, make

DIM = 256
OFFICIAL = "official AdaGC's schedule (our rewrite)"


def spawn(task: Callable[..., Any], processes: int, *args: Any) -> Any:
    """`task(*args)` on every rank of a gloo group; what rank 0 returned."""
    with tempfile.TemporaryDirectory() as folder:
        start(_worker, (task, processes, folder, args), nprocs=processes)  # type: ignore[no-untyped-call]
        return json.loads((Path(folder) / "result.json").read_text())


def _worker(rank: int, task: Callable[..., Any], processes: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    try:
        result = task(*args)
        if rank == 0:
            (Path(folder) / "result.json").write_text(json.dumps(result))
        dist.barrier()
    finally:
        dist.destroy_process_group()
    end_program()


def timed(candidates: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Timing]:
    """Medians over interleaved repeats: from a barrier until the slowest rank is done, and CPU time of a rank on average.

    CPU time is that of the whole process: gloo works in threads of its own.
    """
    wall: dict[str, list[float]] = {name: [] for name in candidates}
    cpu: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, run in candidates.items():
            dist.barrier()
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            run()
            cpu_end, wall_end = time.process_time(), time.perf_counter()
            slowest = torch.tensor(wall_end - wall_start, dtype=torch.float64)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            used = torch.tensor(cpu_end - cpu_start, dtype=torch.float64)
            dist.all_reduce(used)
            if turn > 0:
                wall[name].append(slowest.item())
                cpu[name].append(used.item() / dist.get_world_size())
    return {n: Timing(1e3 * statistics.median(wall[n]), 1e3 * statistics.median(cpu[n])) for n in candidates}


def tensor_parallel_model(tensors: int) -> list[tuple[str, nn.Parameter]]:
    """Matrices of DIM x DIM, split over all ranks along their rows, with gradients that no rule below clips."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    named = []
    torch.manual_seed(dist.get_rank())
    for i in range(tensors):
        local = torch.zeros(DIM // mesh.size(), DIM)
        param = nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)], run_check=False))
        param.grad = DTensor.from_local(torch.randn_like(local).mul_(1e-3), mesh, [Shard(0)], run_check=False)
        named.append((f"p{i}", param))
    return named


def _tensor_parallel(tensors: int, repeats: int) -> list[dict[str, Any]]:
    named = tensor_parallel_model(tensors)
    params = [param for _, param in named]
    pieces = []
    for param in params:
        plain = nn.Parameter(torch.zeros(1).expand(_local(param).shape))
        plain.grad = _local(param.grad)
        pieces.append(Piece(plain, sharded=True))
    official = OfficialSchedule(pieces, warmup_steps=1, max_norm=1e30)
    policies = {label(mode): make(mode, warmup_steps=1, max_norm=1e30) for mode in compared("adagc-shard")}
    candidates: dict[str, Callable[[], Any]] = {
        OFFICIAL: official.step,
        **{name: dist_clip.GradClipper(named, policy).clip_ for name, policy in policies.items()},
        "torch clip_grad_norm_ (global norm only)": lambda: torch.nn.utils.clip_grad_norm_(params, 1e30),
    }
    for run in candidates.values():  # past every warm-up and first call
        settle(run, params)
    times = timed(candidates, repeats)
    counted = {name: count(run) for name, run in candidates.items()}
    return [
        {
            "processes": dist.get_world_size(),
            "name": name,
            "wall_ms": times[name].wall_ms,
            "cpu_ms": times[name].cpu_ms,
            "speedup": times[OFFICIAL].wall_ms / times[name].wall_ms,
            "cpu_speedup": times[OFFICIAL].cpu_ms / times[name].cpu_ms,
            "collectives": counted[name].collectives,
        }
        for name in candidates
    ]


def _local(value: Tensor | None) -> Tensor:
    assert isinstance(value, DTensor)
    return value.to_local()


def _desync(tensors: int, repeats: int) -> list[dict[str, Any]]:
    named = tensor_parallel_model(tensors)
    policy = dist_clip.AdaGC(warmup_steps=1, max_norm=1e30)
    plain = dist_clip.GradClipper(named, policy)
    watched = dist_clip.GradClipper(named, policy, detect_desync=True)
    candidates: dict[str, Callable[[], Any]] = {"without": plain.clip_, "detect_desync=True": watched.clip_}
    for run in candidates.values():
        settle(run, [param for _, param in named])
    times = timed(candidates, repeats)
    counted = {name: count(run) for name, run in candidates.items()}
    return [
        {
            "name": name,
            "wall_ms": times[name].wall_ms,
            "cpu_ms": times[name].cpu_ms,
            "wall_ratio": times[name].wall_ms / times["without"].wall_ms,
            "cpu_ratio": times[name].cpu_ms / times["without"].cpu_ms,
            "collectives": counted[name].collectives,
            "operators": counted[name].operators,
        }
        for name in candidates
    ]


def tensor_parallel(quick: bool) -> Section:
    tensors, repeats = (30, 3) if quick else (300, 11)
    rows: list[dict[str, Any]] = []
    for processes in (2,) if quick else (2, 4):
        rows += spawn(_tensor_parallel, processes, tensors, repeats)
    return Section(
        f"{tensors} tensors split by tensor parallelism",
        f"Real gloo processes on one machine, one thread each; matrices of {DIM} x {DIM}, nothing clipped, after the "
        "warm-ups. Elapsed: from a barrier until the slowest rank is done. CPU time: a rank's, gloo's threads included.",
        {
            "processes": "processes",
            "name": "",
            "wall_ms": "elapsed, ms",
            "cpu_ms": "CPU time, ms",
            "speedup": "times as fast as the official schedule",
            "cpu_speedup": "the same, CPU time",
            "collectives": "collectives",
        },
        rows,
        {"tensors": tensors, "repeats": repeats},
    )


def desync(quick: bool) -> Section:
    tensors, repeats, processes = (30, 3, 2) if quick else (300, 21, 4)
    return Section(
        "detect_desync",
        f"AdaGC after its warm-up on {tensors} sharded tensors, {processes} gloo processes; as above.",
        {
            "name": "",
            "wall_ms": "elapsed, ms",
            "cpu_ms": "CPU time, ms",
            "wall_ratio": "ratio, elapsed",
            "cpu_ratio": "ratio, CPU time",
            "collectives": "collectives",
            "operators": "operators",
        },
        spawn(_desync, processes, tensors, repeats),
        {"tensors": tensors, "processes": processes, "repeats": repeats},
    )
