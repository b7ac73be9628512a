"""dist_clip's clipping and others' side by side: one command, one run, every number measured in it.

    python -m scripts.bench                                  # everything, some minutes on an idle core
    python -m scripts.bench --quick                          # small versions, under a minute: do they run?
    python -m scripts.bench --only gpt2 small                # some sections
    python -m scripts.bench --docs docs/performance.md       # and paste the tables into a page
    python -m scripts.bench --device cuda                    # the same questions on a GPU, a minute or two

On the CPU each process has one thread. Repeats are interleaved, so that a slow spell of the machine hits all candidates
alike, and ratios are of medians.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

import dist_clip
from scripts.benchmark import costs, dtensors, gpu, host, local, processes, training
from scripts.benchmark.output import markdown, paste, plot, write_json
from scripts.benchmark.timing import Section, load_average

SECTIONS: dict[str, Callable[[bool], Section]] = {
    "gpt2": local.gpt2,
    "small": local.small,
    "large": local.large,
    "optimizer": local.optimizer,
    "published": local.published,
    "costs": costs.costs,
    "host": host.host,
    "dtensor": dtensors.dtensor,
    "tensor_parallel": processes.tensor_parallel,
    "desync": processes.desync,
    "end_to_end": training.end_to_end,
}
SectionName = Literal[
    "gpt2", "small", "large", "optimizer", "published", "costs", "host", "dtensor", "tensor_parallel", "desync",
    "end_to_end",
    "gpu_gpt2_fp32", "gpu_gpt2_bf16", "gpu_small", "gpu_large", "gpu_published_many", "gpu_published_one",
    "gpu_step",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured, and where the results go."""

    device: Literal["cpu", "cuda"] = "cpu"
    """cuda: sections of their own, which need a GPU."""
    quick: bool = False
    """Small models and few repeats: to see that everything runs, not to compare."""
    only: tuple[SectionName, ...] = ()
    """Sections to run; default all of the device."""
    out: Path = Path("runs/bench")
    """Folder for bench.json (bench-cuda.json) and, without a page to paste them into, tables.md."""
    images: Path | None = None
    """Folder for the plots; default, that of the tables."""
    docs: Path | None = None
    """A page with markers, between which the tables are pasted."""


def main() -> None:
    cfg = tyro.cli(Config, description=__doc__)
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: there is no CUDA device")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that are started
    results: dict[str, Any] = {"meta": about(cfg), "sections": {}}
    started = time.monotonic()
    loads = [load_average()]
    sections = SECTIONS if cfg.device == "cpu" else gpu.SECTIONS
    for name in cfg.only or sections:
        if name not in sections:
            raise SystemExit(f"--only {name}: not a section of --device {cfg.device}, which has {', '.join(sections)}")
        section = sections[name](cfg.quick)
        results["sections"][name] = dataclasses.asdict(section)
        loads.append(load_average())
        print(f"{name}: done after {time.monotonic() - started:.0f} s, load {loads[-1]:.1f}", flush=True)
    low, high = min(loads), max(loads)
    cores = results["meta"]["cores"]
    results["meta"] |= {
        "load_low": low,
        "load_high": high,
        "busy": low > cores / 2,
        "seconds": time.monotonic() - started,
    }
    write_json(results, cfg.out / ("bench.json" if cfg.device == "cpu" else "bench-cuda.json"))
    text = markdown(results)
    plot(results, cfg.images or cfg.out)
    if cfg.docs is not None:
        paste(text, cfg.docs, cfg.device)
    else:
        (cfg.out / "tables.md").write_text(text)
    print(text)


def about(cfg: Config) -> dict[str, Any]:
    """What somebody needs to know to judge the numbers."""
    return {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "dist_clip": dist_clip.__version__,
        "zclip": importlib.metadata.version("zclip"),
        "pytorch_optimizer": importlib.metadata.version("pytorch_optimizer"),
        "python": platform.python_version(),
        "processor": processor(),
        "device": torch.cuda.get_device_name() if cfg.device == "cuda" else "cpu",
        "cuda": torch.version.cuda if cfg.device == "cuda" else None,
        "triton": importlib.metadata.version("triton") if cfg.device == "cuda" else None,
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "quick": cfg.quick,
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
