"""fp16 with a GradScaler, bf16 and fp32 gradients in one model, and accumulation without synchronisation.

fp16: the scaler starts far too high, so that the first steps overflow and are skipped, and one more overflows after the
warm-up. The reference is handed the unscaled gradients of the steps that were taken, and never hears of the others.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor

import dist_clip
from dist_clip.memory.snapshot import snapshot
from tests import reference
from tests.harness import pool

from . import training
from .layouts import LAYOUTS, Setup, mesh
from .model import batch, loss_of
from .training import POLICIES, WARMUP

WORLD = 4
STEPS = 14
OVERFLOWS = 11  # a step, after the warm-up, whose loss is too large for fp16 at any scale
FP16_LAYOUTS = ["ddp", "fsdp-fp16", "fsdp1", "tp-fsdp"]


def scaled_backward(layout: str, setup: Setup, scaler: torch.amp.GradScaler, step: int) -> None:
    """Forward in fp16 (by FSDP2's policy, or by autocast), backward of the scaled loss."""
    parts, index = (2, dist.get_rank() // 2) if layout == "tp-fsdp" else (WORLD, dist.get_rank())
    tokens, targets = (tensor.chunk(parts)[index] for tensor in batch(LAYOUTS[layout].config, step))
    with torch.autocast("cpu", torch.float16, enabled=layout != "fsdp-fp16"):
        logits = setup.modules[0](tokens)
    loss = loss_of(logits.float(), targets) * (1e30 if step == OVERFLOWS else 1.0)
    scaler.scale(loss).backward()


def make_scaler(layout: str) -> torch.amp.GradScaler:
    kind = ShardedGradScaler if layout == "fsdp1" else torch.amp.GradScaler
    return kind("cpu", init_scale=2.0**40, growth_interval=1000, backoff_factor=2.0**-12)


def train_fp16(layout: str, policy: str, how: str) -> dict[str, Any]:
    """Fourteen steps under a GradScaler, recorded as training.train does; "after" is what the optimizer was given."""
    setup = training.build(layout, torch.float32)
    names, params = zip(*setup.named, strict=True)
    scaler = make_scaler(layout)
    optimizer = torch.optim.SGD(params, lr=0.05)
    clipper = training.make_clipper(setup, POLICIES[policy].ours(), scaler=scaler)
    if how == "attach":
        clipper.attach(optimizer)
    given: list[Any] = []
    optimizer.register_step_pre_hook(lambda *_: given.extend(training.local_grad(param) for param in params))
    records = []
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        given.clear()
        scaled_backward(layout, setup, scaler, step)
        scaler.unscale_(optimizer)
        before = [training.local_grad(param) for param in params]
        state = str(snapshot(clipper.memory))
        if how == "by hand":
            clipper.clip_()
        scaler.step(optimizer)
        scaler.update()
        record: dict[str, Any] = {"present": [grad is not None for grad in before], "before": training.flat(before)}
        record |= {"after": training.flat(given) if given else None, "scale": scaler.get_scale()}
        record |= {"state_moved": str(snapshot(clipper.memory)) != state, "steps": clipper.steps}
        record["tensors"], record["global"] = training.state_of(clipper)
        records.append(record)
    dtypes = [None if param.grad is None else training.local(param.grad).dtype for param in params]
    return {"names": names, "index": training.held(layout, torch.float32), "grad_dtypes": dtypes, "records": records}


# Not attached under TP: the scaler finds infinities on some ranks only, and those never reach the optimizer's hook.
FP16_CASES = [
    (layout, how) for layout in FP16_LAYOUTS for how in ("by hand", "attach") if (layout, how) != ("tp-fsdp", "attach")
]


@pytest.mark.parametrize("policy", ["adagc", "zclip"])
@pytest.mark.parametrize(("layout", "how"), FP16_CASES)
def test_grad_scaler(layout: str, policy: str, how: str) -> None:
    ranks = pool(WORLD).run(train_fp16, layout, policy, how)
    run, chosen = training.Run(ranks, LAYOUTS[layout]), POLICIES[policy]
    rule = chosen.theirs()
    taken = []
    for step in range(1, STEPS + 1):
        records = [rank["records"][step - 1] for rank in ranks]
        assert len({record["scale"] for record in records}) == 1, f"step {step}: the ranks' scales differ"
        finite = all(bool(record["before"].isfinite().all()) for record in records)
        for rank, record in enumerate(records):
            where = f"rank {rank}, step {step}"
            assert (record["after"] is not None) == finite, f"{where}: stepped, or not, against expectation"
            assert record["state_moved"] == finite, f"{where}: the state must move with the steps that are taken"
        if not finite:
            continue
        taken.append(step)
        outcome = reference.clip(rule, dict(run.whole_grads(step)))
        for rank, record in enumerate(records):
            assert record["steps"] == len(taken)
            training.check_clipped(run, rank, step, chosen, outcome)
            if len(taken) >= WARMUP:
                training.check_state(run, rank, step, chosen, rule)
        training.check_agreement_of_state(run, step)
    assert 1 not in taken, "the test is to blame: the first scale was not too high"
    assert OVERFLOWS not in taken
    assert len(taken) > WARMUP + 2


def wrong_order(layout: str) -> list[str]:
    """Clipping gradients that are still scaled, by hand and attached to two optimizers of which one is not unscaled."""
    setup = training.build(layout, torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    params = [param for _, param in setup.named]
    first, second = (torch.optim.SGD(half, lr=0.1) for half in (params[::2], params[1::2]))
    clipper = training.make_clipper(setup, dist_clip.AdaGC(warmup_steps=0), scaler=scaler)
    scaled_backward(layout, setup, scaler, 1)

    def gradients(of: list[nn.Parameter]) -> torch.Tensor:
        return training.flat([training.local_grad(param) for param in of])

    before, of_second = gradients(params), gradients(params[1::2])
    assert of_second.count_nonzero() > 0
    errors = []
    with pytest.raises(RuntimeError, match=r"scaler\.unscale_\(optimizer\)") as caught:
        clipper.clip_()
    errors.append(str(caught.value))
    assert torch.equal(gradients(params), before)
    clipper.attach(first, second)
    with pytest.raises(RuntimeError, match=r"scaler\.unscale_ for each of the attached optimizers") as caught:
        scaler.step(first)  # unscales its own parameters only
    errors.append(str(caught.value))
    assert torch.equal(gradients(params[1::2]), of_second), "still scaled, and not clipped"
    assert clipper.steps == 0
    # And the right order, after all.
    scaler.unscale_(second)
    scaler.step(first)
    scaler.step(second)
    scaler.update()
    assert clipper.steps == 1
    with pytest.raises(RuntimeError, match="stepped with already"):
        clipper.clip_()
    return errors


@pytest.mark.parametrize("layout", ["ddp", "fsdp-fp16"])
def test_clipping_before_unscaling_is_an_error(layout: str) -> None:
    results = pool(WORLD).run(wrong_order, layout)
    assert all(errors == results[0] for errors in results)


def infinity_elsewhere() -> dict[str, Any]:
    """The scaler finds an Inf where the clipper does not look."""
    setup = training.build("fsdp-fp16", torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.SGD(setup.modules[0].parameters(), lr=0.1)
    clipper = training.make_clipper(setup, dist_clip.AdaGC(warmup_steps=0), scaler=scaler, exclude=["embed.weight"])
    scaled_backward("fsdp-fp16", setup, scaler, 1)
    if dist.get_rank() == 1:
        training.local(setup.modules[0].embed.weight.grad).view(-1)[0] = float("inf")
    scaler.unscale_(optimizer)
    report = clipper.clip_()
    return {"skip": bool(report.skip), "steps": clipper.steps, "scales": report.scales.tolist()}


def test_an_infinity_that_the_clipper_does_not_measure() -> None:
    for rank in pool(WORLD).run(infinity_elsewhere):
        assert rank["skip"]
        assert rank["steps"] == 0
        assert set(rank["scales"]) == {1.0}


def found_on_one_rank(layout: str) -> dict[str, Any]:
    """Gradients as a scaled loss leaves them, an Inf among those of rank 1 at the third step."""
    setup = training.build(layout, torch.float32)
    params = [param for _, param in setup.named]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    scaler.scale(torch.ones(()))
    optimizer = torch.optim.SGD(params, lr=0.1)
    clipper = training.make_clipper(setup, dist_clip.AdaGC(warmup_steps=1), scaler=scaler)
    stepped: list[int] = []
    scales, counts = [], []
    for step in range(1, 6):
        optimizer.zero_grad()
        setup.backward(step)
        for param in params:
            if param.grad is not None:
                training.local(param.grad).mul_(scaler.get_scale())
        if step == 3 and dist.get_rank() == 1:
            hit = next(
                param for name, param in setup.named if name.endswith("up.weight")
            )  # no other rank has this piece
            training.local(hit.grad).view(-1)[0] = float("inf")
        scaler.unscale_(optimizer)
        handle = optimizer.register_step_pre_hook(lambda *_, step=step: stepped.append(step))
        clipper.clip_()
        scaler.step(optimizer)
        handle.remove()
        scaler.update()
        scales.append(scaler.get_scale())
        counts.append(clipper.steps)
    return {"stepped": stepped, "scales": scales, "counts": counts}


# Not under plain TP: torch's scaler refuses an optimizer with plain and DTensor gradients.
@pytest.mark.parametrize("layout", ["tp-fsdp", "pp", "pp-fsdp"])
def test_the_scaler_hears_what_other_ranks_found(layout: str) -> None:
    """Left to itself, torch's would skip on some ranks only, and from then on scale differently."""
    for rank in pool(WORLD).run(found_on_one_rank, layout):
        assert rank["stepped"] == [1, 2, 4, 5]
        assert rank["scales"] == [8, 8, 4, 4, 4]
        assert rank["counts"] == [1, 2, 2, 3, 4]


# ------------------------------------------------------------------------------------------- bf16 and fp32 in one model


class Mixed(nn.Module):
    """Tensors of three dtypes; no forward is needed."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.ModuleList(nn.Linear(8, 12).to(torch.bfloat16) for _ in range(3))
        self.medium = nn.Linear(5, 7).to(torch.float16)
        self.high = nn.ModuleList(nn.Linear(12, 4) for _ in range(2))


def whole_grad(name: str, param: nn.Parameter, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + sum(map(ord, name)))
    factor = 40.0 if step in (8, 9) else 1.0
    return (0.1 * factor * torch.randn(param.shape, generator=generator)).to(param.dtype)


def clip_mixed(policy: str, sharded: bool) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    net = Mixed()
    if sharded:
        for part in [*net.low, net.medium, *net.high]:
            fully_shard(part, mesh=mesh((WORLD,), ("dp",)))
    clipper = dist_clip.GradClipper(net, POLICIES[policy].ours())
    records = []
    for step in range(1, 11):
        for name, param in net.named_parameters():
            whole = whole_grad(name, param, step)
            if isinstance(param, DTensor):
                local = whole.chunk(WORLD)[dist.get_rank()] if dist.get_rank() < len(whole.chunk(WORLD)) else whole[:0]
                shape, stride = param.shape, param.stride()
                grad = DTensor.from_local(
                    local.clone(), param.device_mesh, param.placements, run_check=False, shape=shape, stride=stride
                )
            else:
                grad = whole
            param.grad = grad
        report = clipper.clip_()
        grads = {n: (p.grad.full_tensor() if sharded else p.grad).clone() for n, p in net.named_parameters()}
        records.append({"norms": report.tensor_norms, "scales": report.scales, "names": report.names, "grads": grads})
    return records


@pytest.mark.parametrize("policy", ["global_norm", "adagc", "zclip"])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.report("NVIDIA/Megatron-LM#7338")
def test_dtypes_in_one_model(sharded: bool, policy: str) -> None:
    """bf16, fp16 and fp32 gradients side by side: norms in float64, one rounding each."""
    results = pool(WORLD).run(clip_mixed, policy, sharded)
    rule = POLICIES[policy].theirs()
    clipped_low_precision = False
    for step in range(1, 11):
        whole = {name: whole_grad(name, param, step) for name, param in Mixed().named_parameters()}
        outcome = reference.clip(rule, whole)
        for rank in range(WORLD):
            record = results[rank][step - 1]
            for name, norm, scale in zip(
                record["names"], record["norms"].tolist(), record["scales"].tolist(), strict=True
            ):
                assert training.close(norm, outcome.norms[name]), (step, name)
                assert training.close(scale, outcome.scales[name]), (step, name)
                grad = record["grads"][name]
                assert grad.dtype == whole[name].dtype
                rtol = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[grad.dtype]
                torch.testing.assert_close(grad, outcome.grads[name], rtol=rtol, atol=1e-7)
                clipped_low_precision |= scale < 1 and grad.dtype == torch.bfloat16
            assert torch.equal(record["scales"], results[0][step - 1]["scales"])
    assert clipped_low_precision


# ---------------------------------------------------------------------------------------------------------- accumulation


def accumulate(layout: str, how: str) -> dict[str, Any]:
    """Each rank's share in two micro-batches, gradients synchronised with the second; clipped once."""
    setup = training.build(layout, torch.float64)
    names, params = zip(*setup.named, strict=True)
    model: Any = setup.modules[0]
    config = LAYOUTS[layout].config
    clipper = training.make_clipper(setup, POLICIES["adagc"].ours())
    optimizer = torch.optim.SGD(params, lr=0.0)
    if how == "attach":
        clipper.attach(optimizer)
    given: list[Any] = []
    before: list[Any] = []
    optimizer.register_step_pre_hook(lambda *_: given.extend(training.local_grad(param) for param in params))
    records = []
    for step in range(1, 10):
        optimizer.zero_grad()
        given.clear()
        share = [tensor.chunk(WORLD)[dist.get_rank()] for tensor in batch(config, step)]
        for micro in range(2):
            tokens, targets = (tensor.chunk(2)[micro] for tensor in share)
            quiet = contextlib.nullcontext()
            if hasattr(model, "no_sync") and micro == 0:
                quiet = model.no_sync()
            elif hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(micro == 1)
            with quiet:
                (loss_of(model(tokens), targets) / 2 * (30.0 if step == 8 else 1.0)).backward()
        before = [training.local_grad(param) for param in params]
        if how == "by hand":
            clipper.clip_()
        optimizer.step()
        record: dict[str, Any] = {"present": [grad is not None for grad in before], "before": training.flat(before)}
        record |= {"after": training.flat(given), "report": training.plain_report(clipper.last_report)}
        records.append(record)
    dtypes = [training.local(param.grad).dtype for param in params]
    return {"names": names, "index": training.held(layout), "grad_dtypes": dtypes, "records": records}


@pytest.mark.parametrize("how", ["by hand", "attach"])
@pytest.mark.parametrize("layout", ["ddp", "fsdp-uneven", "hsdp"])
def test_accumulation_without_synchronisation(layout: str, how: str) -> None:
    """What is clipped is the gradient of the whole batch, as a single process computes it in one backward, once a step."""
    ranks = pool(WORLD).run(accumulate, layout, how)
    run, chosen = training.Run(ranks, LAYOUTS[layout]), POLICIES["adagc"]
    rule = chosen.theirs()
    net = training.make_net(LAYOUTS[layout].config, torch.float64)
    for step in range(1, 10):
        net.zero_grad(set_to_none=True)
        tokens, targets = batch(LAYOUTS[layout].config, step)
        (loss_of(net(tokens), targets) * (30.0 if step == 8 else 1.0)).backward()
        alone = {name: param.grad for name, param in net.named_parameters()}
        whole = run.whole_grads(step)
        for name, grad in alone.items():
            torch.testing.assert_close(whole[name], grad.flatten(), rtol=1e-9, atol=1e-12)
        outcome = reference.clip(rule, alone)
        for rank in range(WORLD):
            report = ranks[rank]["records"][step - 1]["report"]
            for name, scale in zip(report["names"], report["scales"], strict=True):
                assert outcome.norms[name] == 0 or training.close(scale, outcome.scales[name]), (step, name)
            training.check_clipped(run, rank, step, chosen, outcome)
        assert step != 8 or min(outcome.scales.values()) < 0.1, "the test is to blame: nothing was clipped"
