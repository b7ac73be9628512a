"""overlap=: norms measured and reduced while backward runs. The same results, in any step, on any rank; never a hang.

Next to each clipper with overlap= one without it clips the very same gradients. Norms are float64 sums of the same addends:
only the order of the ranks in a sum differs, so they agree to 1e-12 before they are rounded to the report's float32, where
they may fall to either side (6e-8).
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import dist_clip
from tests.harness import pool

from . import training
from .counting import Collective
from .layouts import Setup
from .training import POLICIES, WARMUP

LAYOUT_NAMES = [
    ("fsdp", 2),
    ("fsdp-uneven", 4),
    ("fsdp-aux", 4),
    ("fsdp-frozen", 2),
    ("fsdp-tied", 2),
    ("fsdp-mp", 2),
    ("fsdp-offload", 2),
    ("fsdp-mixed-plain", 2),
    ("hsdp", 4),
    ("tp-fsdp", 4),
    ("tp-sequence-fsdp", 4),
    ("ep", 4),
    ("pp-fsdp-summed", 4),
    ("pp-tied-fsdp-summed", 4),
    ("pp-chunks-fsdp-summed", 4),
]
STEPS = WARMUP + 8


def parameter_bits(params: list[Any]) -> bytes:
    return training.flat([training.local(param.detach()) for param in params]).numpy().tobytes()


@contextlib.contextmanager
def launched(log: list[tuple[Collective, ...]], clipper: Any) -> Iterator[None]:
    """The collectives over the clipper's own group in a block."""
    group = clipper._overlap._group
    calls: list[Any] = []
    all_reduce, gather = dist.all_reduce, dist_clip.reduction._all_gather

    def noted(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, group: Any = None, **kwargs: Any) -> Any:
            if group is ours:
                calls.append(collective.__name__)
            return collective(*args, group=group, **kwargs)

        return call

    ours = group
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", noted(all_reduce))
        patch.setattr(dist_clip.reduction, "_all_gather", noted(gather))
        yield
    log.append(tuple(calls))


def trained(layout: str, policy: str, overlap: int, enter: str = "always", **kwargs: Any) -> dict[str, Any]:
    """Train on this rank with a clipper that overlaps; another one clips copies of the same gradients before it."""
    setup = training.build(layout, torch.float64)
    params = [param for _, param in setup.named]
    plain = training.make_clipper(setup, POLICIES[policy].ours(), **kwargs)
    clipper = training.make_clipper(setup, POLICIES[policy].ours(), overlap=overlap, **kwargs)
    optim = torch.optim.SGD(params, lr=3e-2, momentum=0.9, foreach=False)
    out: dict[str, Any] = {"reports": [], "plain": [], "backward": [], "clip": [], "params": [], "same": []}
    for step in range(1, STEPS + 1):
        for param in params:
            param.grad = None
        inside = enter == "always" or (enter == "sometimes" and step % 3 > 0)
        inside |= enter == "on-some-ranks" and dist.get_rank() % 2 == step % 2
        with launched(out["backward"], clipper), clipper.last_backward() if inside else contextlib.nullcontext():
            setup.backward(step)
        # The plain clipper works on other tensors, so that those that were measured are the very ones that are clipped.
        kept = [(param, param.grad) for param in params]
        for param, grad in kept:
            param.grad = None if grad is None else grad.detach().clone()
        out["plain"].append(training.plain_report(plain.clip_()))
        others = [training.local_grad(param) for param in params]
        for param, grad in kept:
            param.grad = grad
        with launched(out["clip"], clipper):
            out["reports"].append(training.plain_report(clipper.clip_()))
        for theirs, param in zip(others, params, strict=True):
            mine = training.local_grad(param)
            out["same"].append(mine is None if theirs is None else torch.allclose(mine, theirs, rtol=1e-6, atol=0))
        optim.step()
        out["params"].append(parameter_bits(params))
    out["early"] = len(clipper._overlap.early)
    out["stages"] = len(clipper.reduction_plan.stages)
    out["explain"] = clipper.explain()
    out["state"] = training.state_of(clipper), training.state_of(plain)
    out["shared"] = tuple(dist.get_process_group_ranks(clipper._overlap._group))
    return out


def check_same(ranks: list[dict[str, Any]]) -> None:
    for r, rank in enumerate(ranks):
        assert all(rank["same"]), f"rank {r}"
        for step, (ours, plain) in enumerate(zip(rank["reports"], rank["plain"], strict=True), start=1):
            where = f"rank {r}, step {step}"
            assert ours["names"] == plain["names"], where
            for field in ("tensor_norms", "scales"):
                assert ours[field] == pytest.approx(plain[field], rel=2.5e-7), (where, field)
            if plain["global_norm"] is not None:
                assert ours["global_norm"] == pytest.approx(plain["global_norm"], rel=2.5e-7), where
        (tensors, domain), (plain_tensors, plain_domain) = rank["state"]
        assert domain == pytest.approx(plain_domain, rel=1e-6), f"rank {r}"
        assert tensors.keys() == plain_tensors.keys(), f"rank {r}"
        for name, slots in tensors.items():
            assert slots == pytest.approx(plain_tensors[name], rel=1e-6), f"rank {r}, {name}"
        # Ranks of a stage share each bit of norms and scales.
        first = ranks[rank["shared"][0]]
        for ours, theirs in zip(rank["reports"], first["reports"], strict=True):
            assert (ours["tensor_norms"], ours["scales"]) == (theirs["tensor_norms"], theirs["scales"]), f"rank {r}"
        assert rank["state"][0] == first["state"][0], f"rank {r}"


@pytest.mark.parametrize(("layout", "world"), LAYOUT_NAMES, ids=[f"{name}-{world}" for name, world in LAYOUT_NAMES])
def test_every_layout(layout: str, world: int) -> None:
    """What is launched in backward, what is left for the clip, and that nothing else changes."""
    policy = ("adagc", "global_norm", "zclip")[LAYOUT_NAMES.index((layout, world)) % 3]
    ranks = pool(world).run(trained, layout, policy, 2)
    check_same(ranks)
    for rank in ranks:
        assert 1 <= rank["early"] <= 2
        for backward, clip in zip(rank["backward"], rank["clip"], strict=True):
            # A tensor without a gradient holds back its bucket and those that follow, until the clip.
            if layout != "fsdp-aux":
                assert len(backward) == rank["early"]
            assert len(backward) + len(clip) == rank["stages"]
        assert max(len(backward) for backward in rank["backward"]) >= 1
        assert f"the first {rank['early']} of these are launched in backward" in rank["explain"]


@pytest.mark.parametrize("nonfinite", ["zero", "skip", "raise"])
@pytest.mark.parametrize("policy", ["global_norm", "adagc", "adagc-global", "zclip"])
def test_every_policy(policy: str, nonfinite: str) -> None:
    ranks = pool(2).run(trained, "fsdp", policy, 2, nonfinite=nonfinite)
    check_same(ranks)


@pytest.mark.parametrize("overlap", [1, 2, 3, 100])
def test_number_of_buckets(overlap: int) -> None:
    """Three groups of FSDP2 (two blocks and the rest), of which one is always left for the clip."""
    for rank in pool(2).run(trained, "fsdp", "adagc", overlap):
        assert rank["early"] == min(overlap, 2)
        assert {len(backward) for backward in rank["backward"]} == {rank["early"]}
        assert {len(clip) for clip in rank["clip"]} == {1}


@pytest.mark.parametrize("enter", ["never", "sometimes", "on-some-ranks"])
@pytest.mark.parametrize("layout", ["fsdp-uneven", "pp-fsdp-summed"])
def test_it_may_be_left_out(layout: str, enter: str) -> None:
    check_same(pool(4).run(trained, layout, "zclip", 2, enter))


@pytest.mark.parametrize("layout", ["fsdp-uneven", "hsdp", "tp-fsdp", "pp-fsdp-summed"])
def test_with_detect_desync(layout: str) -> None:
    ranks = pool(4).run(trained, layout, "adagc", 2, detect_desync=True)
    check_same(ranks)
    for rank in ranks:
        assert {len(backward) + len(clip) for backward, clip in zip(rank["backward"], rank["clip"], strict=True)} == {
            rank["stages"]
        }


# ---------------------------------------------------------------- gradients that are missing, or accumulated


def small(overlap: int = 2, **kwargs: Any) -> tuple[Setup, Any]:
    setup = training.build("fsdp", torch.float64)
    return setup, training.make_clipper(setup, POLICIES["adagc"].ours(), overlap=overlap, **kwargs)


def unused(overlap: int) -> list[list[float]]:
    """Gradients are made by hand: on one rank, those of some blocks never come."""
    setup, clipper = small(overlap)
    norms = []
    for step in range(1, 5):
        for name, param in setup.named:
            param.grad = None
            if dist.get_rank() == 1 and (step == 2 or (step == 3 and name.startswith("blocks.1"))):
                continue
            local = torch.full_like(param.to_local(), 0.01 * step)
            param.grad = DTensor.from_local(
                local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
            )
        with clipper.last_backward():
            for _, param in reversed(setup.named):
                if param.grad is not None:
                    for hook in (param._post_accumulate_grad_hooks or {}).values():  # as FSDP2 does
                        hook(param)
        norms.append(clipper.clip_().tensor_norms.tolist())
    return norms


def test_a_rank_without_gradients() -> None:
    """It launches in the clip what it could not launch before: the others wait for it, and no longer."""
    with_it = pool(2).run(unused, 2)
    without = pool(2).run(unused, 0)
    assert with_it[0] == with_it[1]
    for ours, plain in zip(with_it[0], without[0], strict=True):
        assert ours == pytest.approx(plain, rel=2.5e-7)


def frozen_for_a_while() -> list[list[int]]:
    """Layers are frozen, and unfrozen again: a hook cannot be put on what has no gradient."""
    setup, clipper = small()
    block = setup.modules[0].blocks["1"]
    counts = []
    for step in range(1, 5):
        block.requires_grad_(step % 2 == 0)
        for _, param in setup.named:
            param.grad = None
        calls: list[Any] = []
        with launched(calls, clipper), clipper.last_backward():
            setup.backward(step)
        with launched(calls, clipper):
            clipper.clip_()
        counts.append([len(call) for call in calls])
    return counts


def test_frozen_and_unfrozen() -> None:
    for counts in pool(2).run(frozen_for_a_while):
        assert counts == [[2, 1]] * 4


def accumulated(around: str, sync: bool, exclude: tuple[str, ...] = ()) -> dict[str, Any]:
    """Two backwards a step, with and without overlap."""
    out: dict[str, Any] = {}
    for overlap in (0, 2):
        setup, clipper = small(overlap, exclude=exclude)
        norms, counts = [], []
        for step in range(1, 5):
            for _, param in setup.named:
                param.grad = None
            calls: list[Any] = []
            setup.modules[0].set_requires_gradient_sync(sync)
            with contextlib.nullcontext() if around == "last" else clipper.last_backward():
                setup.backward(step)
            setup.modules[0].set_requires_gradient_sync(True)
            with launched(calls, clipper) if overlap else contextlib.nullcontext(), clipper.last_backward():
                setup.backward(step + 100)
            counts.append([len(call) for call in calls])
            try:
                norms.append(clipper.clip_().tensor_norms.tolist())
            except dist_clip.EarlyGradientError as error:
                out["error"] = str(error)
                break
        out[overlap] = norms
    out["counts"] = counts
    return out


@pytest.mark.parametrize("exclude", [(), ("*.down.bias",)], ids=["all", "without biases"])
@pytest.mark.parametrize("sync", [True, False], ids=["reduced each time", "reduced once"])
def test_accumulation(sync: bool, exclude: tuple[str, ...]) -> None:
    """FSDP2 adds to the gradients of a group one by one, and each shows as a write to all: also that to an excluded one."""
    for rank in pool(2).run(accumulated, "last", sync, exclude):
        assert "error" not in rank, rank["error"]
        assert rank["counts"] == [[2]] * 4
        for ours, plain in zip(rank[2], rank[0], strict=True):
            assert ours == pytest.approx(plain, rel=2.5e-7)


def test_around_every_backward_is_an_error() -> None:
    errors = {rank.get("error") for rank in pool(2).run(accumulated, "all", True)}
    assert len(errors) == 1
    error = errors.pop()
    assert error is not None
    assert "last_backward() measured them: 'blocks.0." in error or "'blocks.1." in error
    assert "(rank 0, 1)" in error


# ---------------------------------------------------------------- gradients that change after they were measured


def changed(layout: str, how: str, policy: str = "global_norm") -> dict[str, Any]:
    """A good step, one in which rank 1 changes a gradient of each block, and another good one."""
    setup = training.build(layout, torch.float64)
    clipper = training.make_clipper(setup, POLICIES[policy].ours(), overlap=2)
    out: dict[str, Any] = {"errors": []}
    for step in range(1, WARMUP + 4):
        for _, param in setup.named:
            param.grad = None
        with clipper.last_backward():
            setup.backward(step)
        if step == WARMUP + 2 and dist.get_rank() == 1:
            change([param for name, param in setup.named if "blocks" in name], how)
        before = training.flat([training.local_grad(param) for _, param in setup.named])
        try:
            clipper.clip_()
            out["errors"].append(None)
        except dist_clip.EarlyGradientError as error:
            out["errors"].append(str(error))
            out["untouched"] = torch.equal(
                before, training.flat([training.local_grad(param) for _, param in setup.named])
            )
    return out


def change(params: list[nn.Parameter], how: str) -> None:
    if how == "in place":
        params[0].grad.mul_(2)
    elif how == "local":
        params[0].grad.to_local().mul_(2)
    elif how == "another":
        params[0].grad = params[0].grad * 2
    elif how == "none":
        params[0].grad = None
    else:  # what no version counter tells of, such as an all-reduce of one's own or a GradScaler's unscale_
        torch._foreach_mul_([param.grad for param in params], 2.0)


@pytest.mark.parametrize("how", ["in place", "local", "another", "none", "uncounted"])
def test_a_changed_gradient_is_an_error_on_every_rank(how: str) -> None:
    ranks = pool(2).run(changed, "fsdp", how)
    for rank in ranks:
        *before, found, after = rank["errors"]
        assert before == [None] * (WARMUP + 1)
        assert after is None
        assert "'blocks." in found
        assert "(rank 1)" in found
        assert found == ranks[0]["errors"][-2]
        assert rank["untouched"]


@pytest.mark.parametrize(
    ("layout", "policy"), [("hsdp", "adagc"), ("tp-fsdp", "adagc"), ("ep", "zclip"), ("pp-fsdp-summed", "zclip")]
)
def test_also_on_ranks_that_hold_other_tensors(layout: str, policy: str) -> None:
    """Replicas, tensor-parallel ranks and other pipeline stages raise as well."""
    errors = {rank["errors"][-2] for rank in pool(4).run(changed, layout, "in place", policy)}
    assert len(errors) == 1
    assert "(rank 1)" in errors.pop()


def test_other_stages_go_on_where_stages_do_not_talk() -> None:
    """After AdaGC's warm-up, as with DesyncError. Here stage 1 has ranks 2 and 3."""
    ranks = pool(4).run(changed, "pp-fsdp-summed", "in place", "adagc")
    assert [rank["errors"][-2] is None for rank in ranks] == [False, False, True, True]


def test_a_schedule_that_scales_gradients_is_an_error() -> None:
    """torch's schedules divide the gradients by the number of microbatches when backward is over, unless told not to."""
    for rank in pool(4).run(changed, "pp-fsdp", ""):
        assert "scale_grads=False" in rank["errors"][0]


def step_given_up() -> list[str | None]:
    """A backward whose gradients are thrown away without a clip, once; on rank 1 it fails half-way."""
    setup, clipper = small()
    errors: list[str | None] = []
    for step in range(1, 7):
        for _, param in setup.named:
            param.grad = None
        with contextlib.suppress(KeyError), clipper.last_backward():
            setup.backward(step)
            if step == 3 and dist.get_rank() == 1:
                raise KeyError
        if step == 3:
            continue
        try:
            clipper.clip_()
            errors.append(None)
        except dist_clip.EarlyGradientError as error:
            errors.append(str(error))
    return errors


def test_a_step_that_is_not_clipped() -> None:
    """The next one is an error, for its norms would be the other's; then all is well."""
    first, second = pool(2).run(step_given_up)
    assert first == second
    assert [error is None for error in first] == [True, True, False, True, True]
    assert "call clip_() before the next one" in str(first[2])


# ---------------------------------------------------------------- hooks, refusals


def dropped() -> dict[str, Any]:
    setup, clipper = small()
    params = [param for _, param in setup.named]

    def hooks() -> int:
        return sum(len(param._post_accumulate_grad_hooks or {}) for param in params)

    out: dict[str, Any] = {"hooks": []}
    for step in range(1, 4):
        for param in params:
            param.grad = None
        with clipper.last_backward():
            setup.backward(step)
        clipper.clip_()
        out["hooks"].append(hooks())
    gone = weakref.ref(clipper), weakref.ref(clipper._overlap)
    del clipper
    gc.collect()
    out["gone"] = [ref() is None for ref in gone]
    out["hooks"].append(hooks())
    setup.backward(4)
    return out


def test_hooks_go_with_the_clipper() -> None:
    for rank in pool(2).run(dropped):
        first, second, third, last = rank["hooks"]
        assert first == second == third > 0
        assert last == 0
        assert rank["gone"] == [True, True]


def attached() -> list[float]:
    out = []
    for overlap in (0, 2):
        setup, clipper = small(overlap)
        optimizer = torch.optim.SGD([param for _, param in setup.named], lr=0.1)
        clipper.attach(optimizer)
        for step in range(1, WARMUP + 4):
            optimizer.zero_grad()
            with clipper.last_backward():
                setup.backward(step)
            optimizer.step()
        out.append(clipper.last_report.tensor_norms.norm().item())
    return out


def test_attached() -> None:
    for plain, ours in pool(2).run(attached):
        assert ours == pytest.approx(plain, rel=1e-6)


def refused(layout: str, **kwargs: Any) -> str:
    setup = training.build(layout, torch.float32)
    target: Any = setup.modules[0]
    if kwargs.pop("parameters", False):
        target = list(target.parameters())
    if kwargs.pop("half", False):
        halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        kwargs["process_group"] = halves[dist.get_rank() // 2]
        target = nn.Linear(2, 2)
    policy = kwargs.pop("policy", dist_clip.AdaGC())
    try:
        dist_clip.GradClipper(target, policy, **kwargs)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    ("layout", "kwargs", "message"),
    [
        ("ddp", {"overlap": 2}, "ValueError: on rank 0: overlap= needs FSDP2"),
        ("tp", {"overlap": 2}, "ValueError: on rank 0: overlap= needs FSDP2"),
        ("fsdp1", {"overlap": 2}, "ValueError: on rank 0: overlap= needs FSDP2"),
        ("fsdp", {"overlap": 2, "parameters": True}, "overlap= needs to know the model's FSDP2 groups"),
        ("fsdp", {"overlap": 2, "policy": dist_clip.AdaGC(scope="shard")}, 'nothing to do for scope "shard"'),
        ("fsdp", {"overlap": 2, "half": True}, "all 4 ranks are needed, and process_group= has 2"),
        ("fsdp", {"overlap": 2, "scaler": torch.amp.GradScaler("cpu")}, "before a GradScaler can unscale"),
        ("fsdp", {"overlap": -1}, "ValueError: on rank 0: overlap must be at least 0, got -1"),
        ("fsdp", {"overlap": True}, "TypeError: on rank 0: overlap must be an int, got True"),
    ],
)
def test_refused(layout: str, kwargs: dict[str, Any], message: str) -> None:
    for error in pool(4).run(refused, layout, **kwargs):
        assert message in error


def differs() -> str:
    setup = training.build("fsdp", torch.float32)
    try:
        training.make_clipper(setup, dist_clip.AdaGC(), overlap=1 + dist.get_rank())
    except dist_clip.LayoutError as error:
        return str(error)
    return ""


def test_other_numbers_on_other_ranks() -> None:
    for error in pool(2).run(differs):
        assert "rank 1 is configured differently from rank 0" in error


def entered_twice() -> str:
    _, clipper = small()
    with clipper.last_backward():
        try:
            with clipper.last_backward():
                pass
        except RuntimeError as error:
            return str(error)
    return ""


def test_entered_twice() -> None:
    for error in pool(2).run(entered_twice):
        assert "entered already" in error
