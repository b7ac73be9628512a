"""Clipping inside backward on several ranks: the same bits as after it, no collective of its own, and no rank that waits."""

from __future__ import annotations

import re
import types
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, distribute_tensor

import dist_clip
from tests.distributed.counting import CollectiveLog
from tests.harness import pool
from tests.unit.test_in_backward import flat
from tests.unit.test_in_backward_recipes import recipe

STEPS = 30
WARMUP = 5

Policies = dict[str, Any]

POLICIES: Policies = {
    "AdaGC": lambda scope: dist_clip.AdaGC(scope=scope, gamma_init="median", warmup_steps=WARMUP),
    "LogClip": lambda scope: dist_clip.LogClip(scope=scope, warmup_steps=WARMUP, patience=3),
}


class Model(nn.Module):
    """A weight that two layers share, a branch that every third batch takes, and widths that no world size divides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 7)
        self.shared = nn.Linear(7, 7)
        self.branch = nn.Linear(7, 7)
        self.last = nn.Linear(7, 1)

    def forward(self, x: Tensor, step: int) -> Tensor:
        x = self.shared(torch.tanh(self.shared(torch.tanh(self.first(x)))))
        return self.last(x + self.branch(x) if step % 3 == 2 else x)


def loss_of(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    x = torch.randn(4, 6, generator=generator) * (10 if step % 7 == 6 else 1)
    return model(x, step).float().square().mean()


def trained(model: nn.Module, clipper: dist_clip.GradClipper, reports: list[Any]) -> dict[str, Tensor]:
    weights = {
        name: param.to_local() if isinstance(param, DTensor) else param.detach()
        for name, param in model.named_parameters()
    }
    return {**flat(weights), **flat(clipper.state_dict()), **flat(reports)}


def counted(clipper: dist_clip.GradClipper) -> list[None]:
    """A list that grows with each call of clip_early_."""
    calls: list[None] = []
    original = clipper.clip_early_

    def clip_early_(*args: Any, **kwargs: Any) -> None:
        calls.append(None)
        original(*args, **kwargs)

    clipper.clip_early_ = clip_early_  # type: ignore[method-assign]
    return calls


def sharded(bf16: bool) -> nn.Module:
    model = Model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else None)
    for part in (model.shared, model.branch):
        fully_shard(part, mesh=mesh, mp_policy=precision)
    return fully_shard(model, mesh=mesh, mp_policy=precision)


def train_fsdp2(policy: str, early: bool, bf16: bool, mixed: bool) -> tuple[dict[str, Tensor], list[str]]:
    """Train by the page's recipe or in the usual order. Returns what came of it and the last step's collectives.

    Args:
        mixed: one tensor has a policy of scope "tensor", and can be clipped after backward only.
    """
    model = sharded(bf16)
    rule = POLICIES[policy]("shard")
    options: dict[str, Any] = {"detect_desync": True}
    if mixed:
        options["overrides"] = {"first.weight": dist_clip.LogClip(warmup_steps=WARMUP)}
    optimizers = {param: torch.optim.AdamW([param], lr=0.01) for param in model.parameters()}
    parts: dict[str, Any] = {
        "model": model,
        "loss_of": lambda step: loss_of(model, step),
        "optimizers": optimizers,
        "torch": torch,
        "short": types.SimpleNamespace(
            GradClipper=lambda model, _: dist_clip.GradClipper(model, rule, **options), AdaGC=lambda **_: rule
        ),
    }
    if early:
        code = recipe("FSDP2").replace("import dist_clip", "dist_clip = short")
        if mixed:
            code = code.replace("if clipper.can_clip_early:", "if clipper.can_clip_early and param is not left:")
            parts["left"] = model.first.weight
        exec(code, parts)
        clipper, step_of = parts["clipper"], parts["train_step"]
        calls = counted(clipper)
    else:
        clipper = dist_clip.GradClipper(model, rule, **options)

        def step_of(step: int) -> Any:
            loss_of(model, step).backward()
            report = clipper.clip_()
            for optimizer in optimizers.values():
                optimizer.step()
                optimizer.zero_grad()
            return report

    reports = []
    for step in range(STEPS):
        with CollectiveLog() as log:
            report = step_of(step)
        reports.append((report.tensor_norms, report.scales, torch.tensor(report.num_grads)))
    assert float(torch.stack([scales.min() for _, scales, _ in reports[WARMUP:]]).min()) < 1
    assert not early or len(calls) > 5 * (STEPS - WARMUP)
    return trained(model, clipper, reports), sorted(f"{c.name} {c.ranks}" for c in log.entries)


@pytest.mark.parametrize(
    ("world", "policy", "bf16", "mixed"),
    [(2, "AdaGC", True, True), (2, "LogClip", False, False), (4, "LogClip", True, False), (4, "AdaGC", False, True)],
)
def test_fsdp2_with_scope_shard(world: int, policy: str, bf16: bool, mixed: bool) -> None:
    early = pool(world).run(train_fsdp2, policy, True, bf16, mixed)
    usual = pool(world).run(train_fsdp2, policy, False, bf16, mixed)
    for (got, collectives), (want, others) in zip(early, usual, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        assert collectives == others  # those of FSDP2 itself, and clip_()'s where a norm must be reduced


def train_ddp(policy: str, early: bool, views: bool) -> dict[str, Tensor]:
    model = Model()
    ddp = nn.parallel.DistributedDataParallel(
        model, bucket_cap_mb=1e-4, gradient_as_bucket_view=views, find_unused_parameters=True
    )
    rule = POLICIES[policy]("tensor")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    clipper = dist_clip.GradClipper(ddp, rule)
    calls = counted(clipper)
    if early:
        parts: dict[str, Any] = {
            "ddp": ddp,
            "loss_of": lambda step: loss_of(ddp, step),
            "optimizer": optimizer,
            "short": types.SimpleNamespace(GradClipper=lambda *_: clipper, LogClip=lambda **_: rule),
        }
        exec(recipe("DDP").replace("import dist_clip", "dist_clip = short"), parts)
    reports = []
    for step in range(STEPS):
        if early:
            report = parts["train_step"](step)
        else:
            loss_of(ddp, step).backward()
            report = clipper.clip_()
            optimizer.step()
            optimizer.zero_grad()
        reports.append((report.tensor_norms, report.scales, report.global_norm))
    assert not early or len(calls) > STEPS - WARMUP
    assert float(torch.stack([scales.min() for _, scales, _ in reports[WARMUP:]]).min()) < 1
    return trained(model, clipper, reports)


@pytest.mark.parametrize(("policy", "views"), [("AdaGC", True), ("LogClip", False)])
def test_ddp_by_a_communication_hook(policy: str, views: bool) -> None:
    """Several buckets, gradients that are views of them or not, unused parameters."""
    early, usual = pool(2).run(train_ddp, policy, True, views), pool(2).run(train_ddp, policy, False, views)
    torch.testing.assert_close(early, usual, rtol=0, atol=0)


def a_rank_without_gradients(early: bool) -> dict[str, Tensor]:
    """Experts that are other tensors on each rank; at some steps only rank 0 has a gradient, at others none has."""
    torch.manual_seed(dist.get_rank())
    model = nn.Linear(3, 3)
    group = dist.group.WORLD
    clipper = dist_clip.GradClipper(
        model, dist_clip.LogClip(scope="shard", warmup_steps=0), sharded={"*": group}, detect_desync=True
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for param in model.parameters() if early else ():
        param.register_post_accumulate_grad_hook(lambda param: clipper.clip_early_([param]))
    reports = []
    for step in range(12):
        if step % 3 == 0 or (step % 3 == 1 and dist.get_rank() == 0):
            (model(torch.ones(1, 3) * (1 + step)).square().sum()).backward()
        report = clipper.clip_()
        reports.append((report.tensor_norms, report.scales, torch.tensor(report.num_grads)))
        optimizer.step()
        optimizer.zero_grad()
    return trained(model, clipper, reports)


def test_a_rank_without_gradients_makes_nobody_wait() -> None:
    early, usual = pool(2).run(a_rank_without_gradients, True), pool(2).run(a_rank_without_gradients, False)
    torch.testing.assert_close(early, usual, rtol=0, atol=0)


def refusals(kind: str) -> str:
    """Return the error of a hook in backward."""
    clipper: dist_clip.GradClipper
    if kind == "fsdp2":
        model = sharded(False)
    elif kind == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        model = FullyShardedDataParallel(Model(), device_id=torch.device("cpu"), use_orig_params=True)
    else:
        model = Model() if kind == "partial" else nn.parallel.DistributedDataParallel(Model())
    if kind == "partial":
        mesh = init_device_mesh("cpu", (2,))
        layer = nn.Linear(3, 3, bias=False)
        layer.weight = nn.Parameter(distribute_tensor(torch.ones(3, 3), mesh))
        layer.weight.grad = DTensor.from_local(torch.ones(3, 3), mesh, [Partial()])
        clipper = dist_clip.GradClipper(layer, dist_clip.AGC())
        try:
            clipper.clip_early_(layer.parameters())
        except RuntimeError as error:
            return str(error)
        return ""
    clipper = dist_clip.GradClipper(model, dist_clip.LogClip(warmup_steps=0))
    if kind == "fsdp1":
        loss_of(model, 0).backward()
        param = next(p for p in model.parameters() if p.grad is not None)
        try:
            clipper.clip_early_([param])
        except RuntimeError as error:
            return str(error)
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda param: clipper.clip_early_([param]))
    try:
        loss_of(model, 0).backward()
    except RuntimeError as error:
        return str(error)
    return ""


REFUSED = {
    "fsdp2": r"cannot be clipped early: its norm is added over the ranks .* Use LogClip\(scope=\"shard\"\), or leave it to",
    "ddp": r"other ranks have copies, and inside backward its .grad is not averaged .* gradients=bucket.gradients\(\)",
    "partial": r"cannot be clipped early: its gradient is placed .*Partial.* Leave it to clip_\(\)",
    "fsdp1": r"FSDP1 puts its gradient in place after backward. Use fully_shard \(FSDP2\)",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_takes_a_collective_is_refused_on_every_rank(kind: str) -> None:
    for message in pool(2).run(refusals, kind):
        assert re.search(REFUSED[kind], message), message


def clips_before_averaging() -> str:
    """A communication hook that clips this rank's own gradients and averages them then."""
    ddp = nn.parallel.DistributedDataParallel(Model(), find_unused_parameters=True)
    clipper = dist_clip.GradClipper(ddp, dist_clip.LogClip(warmup_steps=0))

    def hook(group, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations, which are strings here
        clipper.clip_early_(bucket.parameters(), gradients=bucket.gradients())
        return allreduce_hook(group, bucket)

    ddp.register_comm_hook(None, hook)
    loss_of(ddp, 0).backward()
    try:
        clipper.clip_()
    except dist_clip.LayoutError as error:
        return str(error)
    return ""


def test_copies_that_were_clipped_before_they_were_averaged_are_found() -> None:
    """The comparison of replicas, which runs in clip_(), compares the norms that were found in backward."""
    messages = pool(2).run(clips_before_averaging)
    assert messages[0] == messages[1]
    assert "should be one tensor with copies on ranks 0, 1, but the norms of its gradient differ" in messages[0]
