"""One GPU: every policy and every kind of kernel against torch, the zclip package, the official schedule and the memory.

Three times of one call, each the median over interleaved rounds:

- *device*: from the first kernel to the last, by CUDA events, the device having been kept busy until the host had queued
  everything, so that gaps in which it waits for the host are not in it;
- *host*: what the call takes of the host's time while the device is busy, i.e. until it returns;
- *elapsed*: from an idle device to an idle device, as in a loop that reads the loss on every step.

Calls that wait for the device (a host read inside) have an elapsed time only, and so have those of more launches than the
device's queue takes: the host would wait in them, too.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import zclip
from torch import nn

import dist_clip
from dist_clip.policies import registered
from launch.model import VOCAB_SIZE, ModelConfig, build_model, next_byte_loss
from scripts.benchmark.local import NO_LIMIT, TORCH, Dtypes, Gradients, Shapes, gpt2_shapes, published_shapes, shares
from scripts.benchmark.official import OfficialSchedule, Piece
from scripts.benchmark.timing import Section
from scripts.benchmark.training import clips, share_table

READ = "read the same bytes once"
READ_WRITE = "read and write them once"
KERNELS = ("triton", "torch")
"""Of the first ones' calls CUDA graphs are timed, too."""
BUSY_CYCLES = 60_000_000
"""Some 30 ms at 2 GHz: longer than the host takes to queue any of the calls."""

COLUMNS = {
    "name": "",
    "device_us": "device, µs",
    "host_us": "host, µs",
    "elapsed_us": "elapsed, µs",
    "graph_us": "in a CUDA graph, device, µs",
    "device_ratio": "ratio, device",
    "elapsed_ratio": "ratio, elapsed",
    "floor_ratio": "to the read floor, device",
}


@dataclasses.dataclass(frozen=True)
class Call:
    """Something to time.

    Attributes:
        run: what is timed.
        prepare: puts the gradients back, untimed.
        waits: reads something back from the device.
        graph: replays the same work, captured; None: not captured.
    """

    run: Callable[[], Any]
    prepare: Callable[[], Any]
    waits: bool = False
    graph: Callable[[], Any] | None = None


def timed(calls: Mapping[str, Call], rounds: int) -> dict[str, dict[str, float | None]]:
    """Microseconds of each call: "device", "host", "elapsed" and "graph", None where it has no such time."""
    kinds = ("device", "host", "elapsed", "graph")
    seen: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in kinds} for name in calls}
    for turn in range(rounds + 2):
        for name, call in calls.items():
            taken = _times_of(call)
            if turn >= 2:
                for kind, value in taken.items():
                    seen[name][kind].append(value)
    return {n: {k: statistics.median(v) if v else None for k, v in kinds.items()} for n, kinds in seen.items()}


def _times_of(call: Call) -> dict[str, float]:
    call.prepare()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call.run()
    torch.cuda.synchronize()
    taken = {"elapsed": 1e6 * (time.perf_counter() - start)}
    queued = None if call.waits else _behind_other_work(call.run, call.prepare)
    if queued is not None:
        taken["device"], taken["host"] = queued
    replayed = None if call.graph is None else _behind_other_work(call.graph, call.prepare)
    if replayed is not None:
        taken["graph"] = replayed[0]
    return taken


def _behind_other_work(run: Callable[[], Any], prepare: Callable[[], Any]) -> tuple[float, float] | None:
    """Microseconds on the device and of the host, of a call queued while the device is busy; None: it did not stay busy."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    prepare()
    torch.cuda._sleep(BUSY_CYCLES)
    begin.record()
    start = time.perf_counter()
    run()
    host = 1e6 * (time.perf_counter() - start)
    end.record()
    gaps = begin.query()  # the device has come this far before everything was queued
    torch.cuda.synchronize()
    return None if gaps else (1e3 * begin.elapsed_time(end), host)


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def compare(title: str, shapes: Shapes, dtypes: Dtypes, rounds: int) -> Section:
    gradients = Gradients(shapes, "cuda", dtypes)
    params = gradients.params

    def call(run: Callable[[], Any], spikes: int = 0, *, waits: bool = False, graph: bool = False) -> Call:
        return Call(run, functools.partial(gradients.restore, spikes), waits, captured(run) if graph else None)

    calls = {TORCH: call(lambda: torch.nn.utils.clip_grad_norm_(params, NO_LIMIT, foreach=True), graph=True)}
    package = zclip.ZClip(warmup_steps=2, max_grad_norm=NO_LIMIT)
    model = nn.ParameterList(params)
    calls["zclip package, 0 % clipped"] = call(lambda: package.step(model), waits=True)
    official = OfficialSchedule([Piece(param, sharded=False) for param in params], warmup_steps=2, max_norm=NO_LIMIT)
    calls["official AdaGC's host reads (our rewrite), 0 % clipped"] = call(official.step, waits=True)
    ours = [one for kernels in KERNELS for mode in registered() for one in shares(mode, gradients, kernels)]
    for one in ours:
        calls[one.name] = call(one.clipper.clip_, one.spikes, graph=one.name.endswith(KERNELS[0]))
    calls["dist_clip.clip_grad_norm_"] = call(lambda: dist_clip.clip_grad_norm_(params, NO_LIMIT))
    calls[READ] = call(gradients.sums)
    calls[READ_WRITE] = call(lambda: [flat.mul_(1.0) for flat in gradients.flats])
    times = timed(calls, rounds)
    for one in ours:
        one.check()
    rows = []
    for name, taken in times.items():
        row: dict[str, Any] = {"name": name, **{f"{kind}_us": value for kind, value in taken.items()}}
        row["device_ratio"] = _ratio(taken["device"], times[TORCH]["device"])
        row["elapsed_ratio"] = _ratio(taken["elapsed"], times[TORCH]["elapsed"])
        row["floor_ratio"] = _ratio(taken["device"], times[READ]["device"])
        rows.append(row)
    facts = {
        "tensors": len(shapes),
        "gradient_mib": gradients.nbytes / 2**20,
        "read_gb_s": gradients.nbytes / (times[READ]["device"] or 1.0) / 1e3,
        "rounds": rounds,
    }
    about = (
        "Times of one call: on the device, of the host, and from an idle device to an idle device. Calls that wait for the "
        "device have the last only."
    )
    names = " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return Section(f"{title}, {names}", about, COLUMNS, rows, facts)


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def gpt2_fp32(quick: bool) -> Section:
    return compare(*_gpt2(quick), (torch.float32,), 3 if quick else 15)


def gpt2_bf16(quick: bool) -> Section:
    return compare(*_gpt2(quick), (torch.bfloat16,), 3 if quick else 15)


def _gpt2(quick: bool) -> tuple[str, Shapes]:
    return ("GPT-2, cut", gpt2_shapes(layers=2, vocab=2048)) if quick else ("GPT-2, 124M", gpt2_shapes())


def small(quick: bool) -> Section:
    n = 300 if quick else 2000
    return compare(f"{n} tensors of 1,000 elements", [(1000,)] * n, (torch.float32,), 3 if quick else 15)


def large(quick: bool) -> Section:
    n, size = (2, 1_000_000) if quick else (10, 100_000_000)
    return compare(f"{n} tensors of {size:,} elements", [(size,)] * n, (torch.bfloat16,), 3 if quick else 9)


def published_many(quick: bool) -> Section:
    return compare(
        "Published: many matrices", published_shapes(quick), (torch.float32, torch.bfloat16), 3 if quick else 9
    )


def published_one(quick: bool) -> Section:
    """Of the same page: one gradient of a billion and a half elements (H100: 7.32 ms by Triton, 7.89 by TE)."""
    return compare(
        "Published: one tensor", [(10_000_000 if quick else 1_536_066_816,)], (torch.bfloat16,), 3 if quick else 9
    )


def step(quick: bool) -> Section:
    """Forward and backward of launch's GPT under bf16 autocast, clip, AdamW: by CUDA events, the host never waiting."""
    cfg = (
        ModelConfig(dim=64, layers=2, seq_len=128) if quick else ModelConfig(dim=768, layers=12, heads=12, seq_len=1024)
    )
    rows_of_text, rounds = (4, 3) if quick else (16, 15)
    model = build_model(cfg, seed=0).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    candidates: dict[str, Callable[[], Any]] = {
        "no clipping": lambda: None,
        TORCH: lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True),
        **clips(model),
    }
    text = torch.randint(VOCAB_SIZE, (rows_of_text, cfg.seq_len + 1), device="cuda")
    marks: dict[str, list[list[torch.cuda.Event]]] = {name: [] for name in candidates}
    for _ in range(rounds + 2):
        for name, clip in candidates.items():
            events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
            events[0].record()
            with torch.autocast("cuda", torch.bfloat16):
                logits = model(text[:, :-1])
            next_byte_loss(logits, text[:, 1:]).backward()  # type: ignore[no-untyped-call]
            events[1].record()
            clip()
            events[2].record()
            optimizer.step()
            events[3].record()
            optimizer.zero_grad()
            marks[name].append(events)
    torch.cuda.synchronize()
    milliseconds = {
        name: [statistics.median(e[i].elapsed_time(e[i + 1]) for e in steps[2:]) for i in range(3)]
        for name, steps in marks.items()
    }
    size = sum(param.numel() for param in model.parameters())
    about = (
        f"{size:,} parameters, {rows_of_text} x {cfg.seq_len} random bytes a step, bf16 autocast: forward and backward, "
        "clip, AdamW (fused); device times, the host ahead of the device."
    )
    return share_table(about, milliseconds, model, rounds)


def in_a_world_of_one(section: Callable[[bool], Section]) -> Callable[[bool], Section]:
    """The official schedule's all-reduce needs a process group."""

    def run(quick: bool) -> Section:
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        try:
            return section(quick)
        finally:
            dist.destroy_process_group()
            torch.cuda.empty_cache()

    return run


SECTIONS = {
    "gpu_gpt2_fp32": in_a_world_of_one(gpt2_fp32),
    "gpu_gpt2_bf16": in_a_world_of_one(gpt2_bf16),
    "gpu_small": in_a_world_of_one(small),
    "gpu_large": in_a_world_of_one(large),
    "gpu_published_many": in_a_world_of_one(published_many),
    "gpu_published_one": in_a_world_of_one(published_one),
    "gpu_step": in_a_world_of_one(step),
}
