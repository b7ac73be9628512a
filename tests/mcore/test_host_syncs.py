"""No host sync of ours on a Megatron step: its real layouts, with the gradients on a fake CUDA device.

The layout (groups, names, shards) is read off a real model and optimizer on CPU; then every gradient is replaced by a fake
CUDA tensor of its shape, of which nothing can be read back (see tests/unit/test_host_syncs.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dist_clip
from dist_clip.layouts import Layout
from dist_clip.megatron import compat
from dist_clip.megatron.reader import MegatronReader
from tests.harness import WorkerError, pool
from tests.unit.test_host_syncs import Copies

from .setups import Config, build, megatron_version

WARMUP = 2
POLICIES: dict[str, Callable[[], Any]] = {
    "global": dist_clip.GlobalNorm,
    "adagc": lambda: dist_clip.AdaGC(warmup_steps=WARMUP, gamma_init="median"),
    "adagc-shard": lambda: dist_clip.AdaGC(warmup_steps=WARMUP, scope="shard"),
    "adagc-global": lambda: dist_clip.AdaGC(warmup_steps=WARMUP, scope="global"),
    "logclip": lambda: dist_clip.LogClip(warmup_steps=WARMUP, post_max_norm=1.0),
    "zclip": lambda: dist_clip.ZClip(warmup_steps=WARMUP),
}


class OnFakeCuda:
    """A layout whose gradients are fake CUDA tensors."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def read_layout(self, skip: Any) -> Layout:
        def fake(numel: int) -> Callable[[], Any]:
            return lambda: torch.empty(numel, device="cuda") if numel else None

        tensors = tuple(
            dataclasses.replace(t, device=torch.device("cuda", 0), grad=fake(t.shard_numel)) for t in self.layout
        )
        return Layout(tensors, self.layout.stage_group)


def steps(config: Config, spoil: bool = False) -> list[str]:
    """The policies that ran; raises where something was read back."""
    from dist_clip.construction import draft

    setup = build(config)
    groups = compat.process_groups(None)
    layout = MegatronReader(setup.optimizer, setup.chunks, groups).read_layout(lambda name: False)
    # Construction may sync, and talks with real tensors: it is not what is tested here.
    agree, gather, check_coverage = draft.agree, draft.gather, draft.check_coverage
    draft.agree = lambda mine, *args: {0: mine}
    draft.gather = lambda value, group: {0: value}
    draft.check_coverage = lambda *args: None
    done = []
    try:
        for name, policy in POLICIES.items():
            for log_global_norm in (False, True):
                # Without the shim, which would send fake CUDA tensors to the CPU, too.
                with torch._C.DisableTorchFunction(), torch.no_grad(), FakeTensorMode():
                    clipper = dist_clip.GradClipper(
                        OnFakeCuda(layout),
                        policy(),
                        pp_group=groups.pp if groups.pp.size() > 1 else None,
                        log_global_norm=log_global_norm,
                        check_replicas=False,  # the clips 1, 2, 4, ... sync, which its docstring says
                    )
                    for step in range(WARMUP + 3):
                        with Copies() if step else torch.no_grad():
                            report = clipper.clip_()
                            if report.has_global_norm:
                                assert report.global_norm.device.type == "cuda"
                            if spoil and step == 2:
                                report.scales.sum().item()
            done.append(name)
    finally:
        draft.agree, draft.gather, draft.check_coverage = agree, gather, check_coverage
    return done


@pytest.mark.parametrize(
    ("world", "config"),
    [
        (2, Config(tp=2, sequence_parallel=True)),
        (2, Config(pp=2, tied=True)),
        (2, Config(zero=True)),
        (4, Config(tp=2, zero=True)),
        (4, Config(pp=2, zero=True, tied=True)),
        (4, Config(pp=2, ep=2, experts=4, zero=True)),
        (2, Config(layer_wise=True)),
        (4, Config(muon="layer-wise" + " + ZeRO-1" * (megatron_version() >= (0, 19)), tp=2, bf16=True)),
        (4, Config(fsdp="optim_grads_params", instances=2)),
    ],
    ids=str,
)
def test_a_step_has_no_host_sync(world: int, config: Config) -> None:
    assert pool(world, "megatron").run(steps, config) == [list(POLICIES)] * world


def test_reading_back_is_caught() -> None:
    with pytest.raises(WorkerError, match="DataDependentOutputException"):
        pool(2, "megatron").run(steps, Config(zero=True), spoil=True)
