"""Runs other packages' clipping beside dist_clip's, on the CPU, for the table in docs/comparison.md; takes a minute.

    python -m scripts.compare_packages           # writes the table
    python -m scripts.compare_packages --print   # prints it

What is compared needs no judgement: after the same batches, with one loss multiplied by 1,000, two ranks must have the
parameters that one process has. A package that is not installed has no row.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

import dist_clip
from launch.parallel import end_program

PAGE = Path(__file__).resolve().parents[1] / "docs" / "comparison.md"
BEGIN, END = "<!-- scripts/compare_packages.py: begin -->", "<!-- scripts/compare_packages.py: end -->"
LAYOUTS = {"fsdp": "FSDP2", "tp": "TP, a plain tensor beside it", "both": "FSDP2 over TP, two meshes"}
STEPS, WARMUP, SPIKE, NAN = 30, 10, 20, 15


class Model(nn.Module):
    """An embedding, which tensor parallelism leaves a plain tensor, and two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.embed(tokens))))


Step = Callable[[], None]  # after backward: clip and step


def sgd(model: nn.Module, clip: Callable[[], Any]) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        clip()
        optimizer.step()

    return step


def with_torch(model: nn.Module) -> Step:
    return sgd(model, lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.05))


def with_zclip(model: nn.Module) -> Step:
    from zclip import ZClip

    clip = ZClip(warmup_steps=WARMUP, max_grad_norm=None)
    return sgd(model, lambda: clip.step(model))


def with_smartclip(model: nn.Module) -> Step:
    import smartclip

    clip = smartclip.AutoClip(mode="percentile", percentile=90.0, history="window", warmup_steps=WARMUP, min_history=1)
    return sgd(model, lambda: smartclip.apply(model, clip))


def with_timm(model: nn.Module) -> Step:
    # timm itself imports torchvision; this file of it needs torch alone.
    spec = importlib.util.find_spec("timm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    file = Path(spec.submodule_search_locations[0]) / "utils" / "agc.py"
    loader = importlib.util.spec_from_file_location("timm_agc", file)
    assert loader is not None
    assert loader.loader is not None
    module = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(module)
    adaptive_clip_grad = module.adaptive_clip_grad
    return sgd(model, lambda: adaptive_clip_grad(model.parameters()))


def with_pytorch_optimizer(model: nn.Module) -> Step:
    from pytorch_optimizer import AdaGC

    return AdaGC(model.parameters(), lr=1e-2, warmup_steps=WARMUP, weight_decay=0.0).step


def ours(policy: dist_clip.Policy) -> Callable[[nn.Module], Step]:
    return lambda model: sgd(model, dist_clip.GradClipper(model, policy).clip_)


CANDIDATES: dict[str, tuple[str, Callable[[nn.Module], Step]]] = {
    "torch `clip_grad_norm_`": ("torch", with_torch),
    "zclip": ("zclip", with_zclip),
    "smartclip `AutoClip`": ("smartclip", with_smartclip),
    "timm `adaptive_clip_grad`": ("timm", with_timm),
    "pytorch_optimizer `AdaGC`": ("pytorch_optimizer", with_pytorch_optimizer),
    "dist_clip `GlobalNorm`": ("dist-clip", ours(dist_clip.GlobalNorm(0.05))),
    "dist_clip `ZClip`": ("dist-clip", ours(dist_clip.ZClip(warmup_steps=WARMUP, max_norm=None))),
    "dist_clip `AutoClip`": ("dist-clip", ours(dist_clip.AutoClip(90.0))),
    "dist_clip `AGC`": ("dist-clip", ours(dist_clip.AGC())),
    "dist_clip `AdaGC`": ("dist-clip", ours(dist_clip.AdaGC(warmup_steps=WARMUP))),
}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def train(name: str, layout: str, nan: bool = False) -> dict[str, Tensor]:
    """Parameters after all steps. With `nan` one step has NaN in its gradients; that step is undone."""
    torch.manual_seed(0)
    model = Model()
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if layout == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    elif layout == "tp":
        parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    elif layout == "both":
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], plan)
        fully_shard(model, mesh=mesh["dp"])  # the embedding is on "dp" alone, the matrices on "dp" and "tp"
    step = CANDIDATES[name][1](model)
    batches = torch.Generator().manual_seed(1)
    for at in range(STEPS):
        tokens = torch.randint(16, (32,), generator=batches)
        targets = torch.randn(32, 8, generator=batches)
        model.zero_grad()
        loss = (model(tokens) - targets).square().mean() * (1000.0 if at == SPIKE else 1.0)
        loss.backward()
        before = [p.detach().clone() for p in model.parameters()]
        if nan and at == NAN:
            next(iter(model.parameters())).grad.view(-1)[0] = float("nan")  # type: ignore[union-attr]
        step()
        if nan and at == NAN:
            with torch.no_grad():
                for param, old in zip(model.parameters(), before, strict=True):
                    param.copy_(old)
    full = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    return {n: p.detach().clone() for n, p in full.items()}


def rank_main(rank: int, layout: str, file: str, out: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for name, (package, _) in CANDIDATES.items():
        if version(package) is not None:
            try:
                found[name] = train(name, layout)
            except Exception as error:  # whatever the package says
                found[name] = type(error).__name__
                if rank == 0:
                    print(f"{layout}, {name}: {error}"[:400], file=sys.stderr)
    torch.save(found, f"{out}-{rank}")
    dist.destroy_process_group()
    end_program()


def on_two_ranks(layout: str, folder: str) -> list[dict[str, Any]]:
    out = os.path.join(folder, layout)
    mp.spawn(rank_main, (layout, out + "-store", out), nprocs=2)
    return [torch.load(f"{out}-{rank}") for rank in range(2)]


def verdict(found: list[Any], single: dict[str, Tensor]) -> str:
    """Compare the ranks' parameters with one process's."""
    errors = sorted({each for each in found if isinstance(each, str)})
    if errors:
        return " / ".join(errors)
    off = max(float((rank[name] - value).abs().max()) for rank in found for name, value in single.items())
    apart = max(float((found[0][name] - found[1][name]).abs().max()) for name in single)
    if off < 1e-5:
        return "as one process"
    return f"**off by {off:.1g}**" + (f", ranks {apart:.1g} apart" if apart > 1e-5 else "")


class HostReads(TorchDispatchMode):
    """Counts the values that the host reads back from tensors."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def host_reads(name: str) -> int:
    """Values read back in one step after the warm-up, on a model of five tensors."""
    model = Model()
    step = CANDIDATES[name][1](model)
    for _ in range(WARMUP + 5):
        model.zero_grad()
        model(torch.arange(16)).square().mean().backward()
        with HostReads() as reads:
            step()
    return reads.count


def survives(name: str, single: dict[str, Tensor]) -> str:
    try:
        after = train(name, "one process", nan=True)
    except Exception as error:
        return type(error).__name__
    finite = all(bool(value.isfinite().all()) for value in after.values())
    if not finite:
        return "**NaN from then on**"
    spiked = max(float((after[n] - single[n]).abs().max()) for n in single)
    return "clips on" if spiked < 0.1 else f"**clips no more** (off by {spiked:.1g})"


def table() -> str:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    versions = {name: version(package) for name, (package, _) in CANDIDATES.items()}
    present = {name: number for name, number in versions.items() if number is not None}
    with redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        found = {layout: on_two_ranks(layout, folder) for layout in LAYOUTS}
        single = {name: train(name, "one process") for name in present}
        rows = []
        for name, number in present.items():
            verdicts = [verdict([rank[name] for rank in found[layout]], single[name]) for layout in LAYOUTS]
            cells = [
                f"{name} {number.partition('+')[0]}",
                *verdicts,
                survives(name, single[name]),
                str(host_reads(name)),
            ]
            rows.append(f"| {' | '.join(cells)} |")
    today = datetime.date.today()
    return "\n".join([
        f"Run on {today}, torch {torch.__version__}, Python {sys.version.split()[0]}, two gloo processes on the CPU.\n",
        f"| what | {' | '.join(LAYOUTS.values())} | after one NaN | values read by the host a step, CPU |",
        f"|---|{'---|' * len(LAYOUTS)}---|--:|",
        *rows,
    ])  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="print the table and write nothing")
    options = parser.parse_args(arguments)
    made = table()
    if options.print:
        print(made)
        return
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
