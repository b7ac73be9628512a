"""The norms that a clipper finds on this machine, against those of the whole gradients of a small model."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn

from dist_clip.clipper import GradClipper
from dist_clip.recommended import recommended

_WIDTH = 7
"""Of the model's layers: no number of ranks divides it evenly, so that shards have padding."""


def verify_here(ranks: int) -> tuple[str, bool]:
    """Train a step of a small model under FSDP2 on `ranks` processes of this machine, and verify its clipper.

    On GPUs with nccl where there is one for each rank, else on CPUs with gloo.

    Args:
        ranks: how many processes, at least 1.

    Returns:
        The report as text, and whether all norms are right.

    Raises:
        ValueError: no rank.
    """
    if ranks < 1:
        raise ValueError(f"verify needs at least one rank, got {ranks}")
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (ranks, folder), nprocs=ranks)  # type: ignore[no-untyped-call]
        text = (Path(folder) / "report").read_text(encoding="utf-8")
    ok, _, report = text.partition("\n")
    return report, ok == "True"


def _rank(rank: int, ranks: int, folder: str) -> None:
    """What one process does; the first one writes the report."""
    cuda = torch.cuda.is_available() and torch.cuda.device_count() >= ranks
    device, backend = ("cuda", "nccl") if cuda else ("cpu", "gloo")
    if cuda:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    try:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.Tanh(), nn.Linear(_WIDTH, 1, bias=False)).to(device)
        mesh = init_device_mesh(device, (ranks,))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
        clipper = GradClipper(model, **recommended())
        torch.manual_seed(rank)
        model(torch.randn(4, _WIDTH, device=device)).square().mean().backward()
        report = clipper.verify()
        if rank == 0:
            about = f"FSDP2 on {ranks} processes, {backend} on {device}"
            (Path(folder) / "report").write_text(f"{report.ok}\n{about}\n{report}", encoding="utf-8")
        dist.barrier()
    finally:
        dist.destroy_process_group()
    # Python's own shutdown can abort in a thread of gloo's ("terminate called without an active exception").
    os._exit(0)
