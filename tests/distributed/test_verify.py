"""`verify()` finds every layout right, and names what was made wrong: a shard's norm, a sum, copies, parts.

What it measures is compared with a single process's gradients of the whole batch, in float64. Gradients travel in chunks of
a few elements, so that every tensor takes several.
"""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dist_clip
from dist_clip.kernels import TORCH
from dist_clip.layouts import Layout, LogicalTensor
from dist_clip.verify.gather import Gatherer
from tests.harness import pool

from . import training
from .layouts import CASES, LAYOUTS, group_of, mesh
from .model import backward, make_net

CHUNK = 37
FSDP1 = ["fsdp1", "fsdp1-flat", "fsdp1-hybrid-flat", "fsdp1-no-shard"]
WORLDS = {**dict(CASES), **dict.fromkeys(FSDP1, 4), "hsdp-tp": 8, "pp-tp-fsdp": 8}
"""Each layout at the largest of its world sizes."""


def verified(layout: str, steps: tuple[int, ...] = (1,), **kwargs: Any) -> list[dist_clip.VerifyReport]:
    setup = training.build(layout, torch.float64)
    clipper = training.make_clipper(setup, dist_clip.AdaGC(warmup_steps=2, scope="shard"))
    reports = []
    with mock.patch("dist_clip.verify.gather.CHUNK", CHUNK):
        for step in steps:
            for _, param in setup.named:
                param.grad = None
            setup.backward(step)
            reports.append(clipper.verify(**kwargs))
    return reports


def same_on_all(ranks: list[Any]) -> Any:
    assert all(repr(rank) == repr(ranks[0]) for rank in ranks)
    return ranks[0]


def single_process_norms(layout: str, step: int) -> dict[str, float]:
    config = LAYOUTS[layout].config
    net = make_net(config, torch.float64)
    backward(net, config, step)
    return {n: 0.0 if p.grad is None else float(p.grad.norm()) for n, p in net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("layout", "world"), WORLDS.items(), ids=lambda v: str(v))
def test_every_layout_is_right(layout: str, world: int) -> None:
    device = "cpu" if len(layout) % 2 else None  # the same here, but for the device's name
    (report,) = same_on_all(pool(world).run(verified, layout, device=device))
    assert report.ok, str(report)
    if LAYOUTS[layout].trajectory:
        expected = single_process_norms(layout, 1)
        rows = {row.name: row for row in report.tensors}
        assert expected.keys() <= rows.keys()
        for name, norm in expected.items():
            assert rows[name].measured == pytest.approx(norm, rel=1e-9, abs=1e-15), name
            assert rows[name].found == pytest.approx(norm, rel=1e-6, abs=1e-15), name
        total = math.sqrt(sum(norm**2 for norm in expected.values()))
        assert report.global_norm.measured == pytest.approx(total, rel=1e-9)


def test_gradients_that_are_missing_on_one_rank() -> None:
    """A piece without a gradient counts as zero (step 3), and a stage may have none at all."""
    for layout in ("fsdp-hole", "pp-hole"):
        reports = same_on_all(pool(2).run(verified, layout, steps=(2, 3)))
        assert all(report.ok for report in reports)
    assert [row.measured for row in reports[1].tensors if row.name.startswith("embed")] == [0.0]


# ---------------------------------------------------------------- what was made wrong is named


def off_by_a_thousandth(layout: str, name: str, rank: int) -> dist_clip.VerifyReport:
    """One rank measures one shard's norm 0.1 % too large."""
    setup = training.build(layout, torch.float32)
    wrong: list[int] = []

    def power_sums(*args: Any) -> Tensor:
        sums = TORCH.power_sums(*args)
        sums[wrong] *= 1.001**2
        return sums

    kernels = dataclasses.replace(TORCH, power_sums=power_sums)
    clipper = training.make_clipper(setup, dist_clip.GlobalNorm(1.0), kernels=kernels)
    if dist.get_rank() == rank:
        wrong = [clipper.layout.names.index(name)]
    setup.backward(1)
    return clipper.verify()


@pytest.mark.parametrize(("layout", "rank"), [("fsdp", 2), ("tp-fsdp", 1), ("hsdp", 0), ("pp-fsdp", 0)])
def test_a_shard_s_norm_that_is_off_by_a_thousandth(layout: str, rank: int) -> None:
    name = "blocks.0.up.weight"
    report = same_on_all(pool(4).run(off_by_a_thousandth, layout, name, rank))
    assert [row.name for row in report.mismatches if row is not report.global_norm] == [name]
    (row,) = (row for row in report.tensors if not row.ok)
    assert 1e-5 < row.difference <= 1.001e-3
    assert row.problems[0].startswith(f"the shard of rank {rank} has the norm ")
    assert str(report).splitlines()[2].startswith(name)
    assert str(report).splitlines()[2].endswith("DIFFERS")
    with pytest.raises(dist_clip.VerifyError, match=rf"1 of \d+ tensors differ.*{name}: the shard of rank {rank} has"):
        pickle.loads(pickle.dumps(report)).raise_if_wrong()


def not_added_up() -> dist_clip.VerifyReport:
    setup = training.build("fsdp", torch.float32)
    clipper = training.make_clipper(setup, dist_clip.GlobalNorm(1.0))
    setup.backward(1)
    clipper._made.plan.collectives = []
    return clipper.verify()


def test_a_sum_that_is_not_made() -> None:
    report = same_on_all(pool(2).run(not_added_up))
    row = next(row for row in report.tensors if row.name == "embed.weight")
    assert "the shards are measured right, but not added up right" in row.problems[0]
    assert not report.global_norm.ok


class Marked:
    """A reader that believes a mark: `groups` are the norm groups of every tensor, which is `times` a piece."""

    def __init__(self, named: dict[str, nn.Parameter], groups: tuple[Any, ...], times: int) -> None:
        self.named, self.groups, self.times = named, groups, times

    def read_layout(self, skip: Callable[[str], bool]) -> Layout:
        ranks = frozenset(dist.get_process_group_ranks(self.groups[0]) if self.groups else [dist.get_rank()])
        return Layout(tuple(self.logical(name, param, ranks) for name, param in self.named.items()))

    def logical(self, name: str, param: nn.Parameter, ranks: frozenset[int]) -> LogicalTensor:
        return LogicalTensor(
            name=name,
            shape=(self.times * len(param), *param.shape[1:]),
            dtype=param.dtype,
            param=param,
            shard_numel=param.numel(),
            norm_groups=self.groups,
            replica_ranks=ranks,
            mesh_ranks=ranks,
            device=param.device,
            placement="as marked",
            grad=lambda: param.grad,
            weight=param.detach,
        )


def with_marks(*, parts: bool, marked: bool, ones: bool = False) -> dist_clip.VerifyReport:
    """Two pairs of ranks. `parts`: the ranks of a pair hold different gradients; `marked`: their sums are added up."""
    pair = mesh((2, 2), ("dp", "tp"))["tp"]
    generator = torch.Generator().manual_seed(pair.get_local_rank() if parts else 0)
    named = {}
    for name, shape in {"weight": (6, 4), "bias": (6,)}.items():
        param = named[name] = nn.Parameter(torch.ones(shape) if ones else torch.randn(shape, generator=generator))
        param.grad = torch.ones(shape) if ones else torch.randn(shape, generator=generator)
    groups = (pair.get_group(),) if marked else ()
    reader = Marked(named, groups, 2 if marked else 1)
    clipper = dist_clip.GradClipper(reader, dist_clip.GlobalNorm(1.0))
    return clipper.verify()


def test_a_mark_that_is_missing() -> None:
    report = same_on_all(pool(4).run(with_marks, parts=True, marked=False))
    for row in report.tensors:
        (first, one), (second, other) = row.copies
        assert (first, second) == ((0, 2), (1, 3))
        assert row.problems == (
            f"its copies differ: they have the norm {one:.8g} on ranks 0,2, {other:.8g} on ranks 1,3",
        )


def test_a_mark_that_is_wrong() -> None:
    """Copies that are added up: each norm is too large by the square root of their number."""
    report = same_on_all(pool(4).run(with_marks, parts=False, marked=True))
    for row in report.tensors:
        assert len(row.problems) == 2
        for problem, ranks in zip(row.problems, ("0-1", "2-3"), strict=True):
            assert problem.startswith(f"the pieces of ranks {ranks} are the same, weights and gradients")


def test_right_marks_are_not_suspected() -> None:
    assert same_on_all(pool(4).run(with_marks, parts=True, marked=True)).ok
    assert same_on_all(pool(4).run(with_marks, parts=False, marked=False)).ok
    # Parts in which all numbers are the same tell nothing.
    assert same_on_all(pool(4).run(with_marks, parts=True, marked=True, ones=True)).ok


def copies_apart(factor: float) -> tuple[dist_clip.VerifyReport, list[int]]:
    """Rank 3's copy has another gradient, as that of a tensor on DDP's ignore list, or of an expert, has."""
    named = [("expert", nn.Parameter(torch.ones(5))), ("dense", nn.Parameter(torch.ones(5)))]
    for _, param in named:
        param.grad = torch.arange(5.0)
    if dist.get_rank() == 3:
        named[0][1].grad = torch.arange(5.0) * factor
    clipper = dist_clip.GradClipper(named, dist_clip.LogClip())
    return clipper.verify(), clipper.verify().ok


def test_copies_that_differ() -> None:
    report, _ = same_on_all(pool(4).run(copies_apart, 3.0))
    assert [row.name for row in report.tensors if not row.ok] == ["expert"]
    row = report.tensors[0]
    assert row.num_copies == 4
    assert row.copies == (((0, 1, 2), pytest.approx(30**0.5)), ((3,), pytest.approx(3 * 30**0.5)))
    assert "5.4772256 on ranks 0-2, 16.431677 on rank 3" in row.problems[0]
    # A difference that rounding may make is none.
    assert same_on_all(pool(4).run(copies_apart, 1.0001))[1]
    missing, _ = same_on_all(pool(4).run(copies_apart, math.nan))
    assert "nan on rank 3" in missing.tensors[0].problems[0]


def not_finite(value: float) -> dist_clip.VerifyReport:
    setup = training.build("fsdp", torch.float32)
    clipper = training.make_clipper(setup, dist_clip.AdaGC(), nonfinite="zero")
    setup.backward(1)
    tensor = clipper.layout.tensors[1]
    if dist.get_rank() == 1:
        grad = tensor.grad()
        assert grad is not None
        grad.view(-1)[0] = value
    return clipper.verify()


def nan_and_inf() -> bool:
    named = [(str(value), nn.Parameter(torch.ones(2))) for value in (math.nan, math.inf)]
    for value, (_, param) in zip((math.nan, math.inf), named, strict=True):
        param.grad = torch.tensor([1.0, value])
    return dist_clip.GradClipper(named, dist_clip.GlobalNorm(1.0)).verify().ok


def test_nan_beside_inf() -> None:
    assert pool(2).run(nan_and_inf) == [True, True]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite(value: float) -> None:
    """Both sides see it: the clipper is right, and the table shows the value."""
    report = same_on_all(pool(2).run(not_finite, value))
    assert report.ok
    assert repr(report.tensors[1].found) == repr(value)
    assert repr(report.tensors[1].measured) == repr(value)


# ---------------------------------------------------------------- nothing changes; bad input


def leaves_no_trace(layout: str) -> None:
    setup = training.build(layout, torch.float32)
    clippers = [training.make_clipper(setup, dist_clip.AdaGC(warmup_steps=2), detect_desync=True) for _ in range(2)]
    restore: Callable[[], None]
    for step in range(1, 4):
        for _, param in setup.named:
            param.grad = None
        setup.backward(step)
        owners = [param for module in setup.modules for param in module.parameters()]
        grads = [param.grad for param in owners]
        values = [training.local_grad(param) for param in owners]
        state = clippers[0].state_dict()["tensors"]
        assert clippers[0].verify().ok
        assert all(param.grad is grad for param, grad in zip(owners, grads, strict=True))
        for param, value in zip(owners, values, strict=True):
            assert value is None or torch.equal(training.local_grad(param), value)
        torch.testing.assert_close(clippers[0].state_dict()["tensors"], state, rtol=0, atol=0)
        restore = training.remember_gradients(setup.modules)
        reports = []
        for clipper in clippers:
            restore()
            reports.append(clipper.clip_())
        torch.testing.assert_close(reports[0].tensor_norms, reports[1].tensor_norms, rtol=0, atol=0)
        torch.testing.assert_close(reports[0].scales, reports[1].scales, rtol=0, atol=0)
    assert clippers[0].steps == clippers[1].steps == 3


@pytest.mark.parametrize("layout", ["dtensor-dp", "tp-sequence-fsdp", "fsdp1-flat"])
def test_nothing_changes(layout: str) -> None:
    pool(4).run(leaves_no_trace, layout)


def bad_call(case: str) -> tuple[str, str]:
    param = nn.Parameter(torch.ones(3))
    clipper = dist_clip.GradClipper([("p", param)], dist_clip.GlobalNorm(1.0))
    bad = dist.get_rank() == 1
    param.grad = None if case == "no gradient" else torch.ones(3)
    if case == "sparse" and bad:
        param.grad = torch.ones(3).to_sparse()
    arguments: dict[str, Any] = {
        "tolerance": {"tolerance": 0.0},
        "kind": {"tolerance": "1e-5"},
        "device": {"device": "cuda:1" if bad else None},
        "differs": {"tolerance": 1e-3 if bad else 1e-5},
    }.get(case, {})
    try:
        clipper.verify(**arguments)
    except Exception as error:
        dist.barrier()
        return type(error).__name__, str(error)
    return "nothing", ""


@pytest.mark.parametrize(
    ("case", "kind", "text"),
    [
        ("no gradient", "RuntimeError", "found no gradient on any rank: call it after backward"),
        ("sparse", "RuntimeError", "rank 1: the gradient of 'p' is sparse"),
        ("tolerance", "ValueError", "tolerance must be between 0 and 1, got 0.0"),
        ("kind", "TypeError", "tolerance must be a number, got '1e-5'"),
        ("device", "ValueError", "device must be None (measure where the gradients are) or 'cpu', got 'cuda:1'"),
        ("differs", "ValueError", "different tolerances on different ranks: 0.001, 1e-05"),
    ],
)
def test_bad_calls_are_named_on_every_rank(case: str, kind: str, text: str) -> None:
    for found, message in pool(2).run(bad_call, case):
        assert found == kind
        assert text in message


def in_a_part_of_the_world() -> dist_clip.VerifyReport | None:
    """Two models train side by side, each on its own process group."""
    rank = dist.get_rank()
    groups = [group_of((0, 1)), group_of((2, 3))]
    if rank < 2:
        return None
    param = nn.Parameter(torch.ones(4))
    param.grad = torch.full((4,), float(rank))
    return dist_clip.GradClipper([("p", param)], dist_clip.GlobalNorm(1.0), process_group=groups[1]).verify()


def test_a_process_group_of_some_ranks() -> None:
    *idle, first, second = pool(4).run(in_a_part_of_the_world)
    assert idle == [None, None]
    assert first == second
    assert first.tensors[0].copies == (((2,), 4.0), ((3,), 6.0))


class _Largest(TorchDispatchMode):
    """The most elements that one operation allocates; views allocate nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in given:
            self.seen = max(self.seen, out.numel())
        return out


def largest_buffer() -> int:
    param = nn.Parameter(distribute_tensor(torch.randn(500, 8), mesh((2,), ("dp",)), [Shard(0)]))
    param.grad = distribute_tensor(torch.randn(500, 8), mesh((2,), ("dp",)), [Shard(0)])
    clipper = dist_clip.GradClipper([("p", param)], dist_clip.GlobalNorm(1.0))
    largest = _Largest()

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with largest:
                return method(*args)

        return call

    with (
        mock.patch("dist_clip.verify.gather.CHUNK", CHUNK),
        mock.patch.object(Gatherer, "describe", watched(Gatherer.describe)),
        mock.patch.object(Gatherer, "assemble", watched(Gatherer.assemble)),
    ):
        assert clipper.verify().ok
    return largest.seen


def test_memory_is_bounded_whatever_the_size_of_a_tensor() -> None:
    """2,000 elements a rank, and no buffer of more than a chunk."""
    assert pool(2).run(largest_buffer) == [CHUNK, CHUNK]


def experts(sharded: bool) -> dist_clip.VerifyReport:
    """Each rank has experts of its own under one name, in plain tensors."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    param = nn.Parameter(torch.randn(3, 2, generator=generator))
    param.grad = torch.full((3, 2), float(1 + dist.get_rank()))
    said = {"expert": 0} if sharded else None
    return dist_clip.GradClipper([("expert", param)], dist_clip.GlobalNorm(1.0), sharded=said).verify()


def test_what_sharded_says_is_verified() -> None:
    assert not same_on_all(pool(4).run(experts, sharded=False)).ok
    report = same_on_all(pool(4).run(experts, sharded=True))
    assert report.ok
    assert report.tensors[0].copies == (((0, 1, 2, 3), pytest.approx((6 * (1 + 4 + 9 + 16)) ** 0.5)),)
