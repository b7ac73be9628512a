"""The Triton kernels against plain float64 and fp32 arithmetic, under Triton's interpreter and, marked gpu, on a GPU.

The interpreter runs the kernels' own code on CPU tensors: it shows that indices, masks, tables, ranges and roundings are
right. It does not show that the code compiles (a test here compiles it for two GPUs), nor what only a GPU has: streams,
CUDA graphs, its order of reduction. The tests marked gpu do.

Norms must be right to 2.4e-7, which is what eight fp32 additions of one sign can lose (see `triton_jit.TILES`).
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib.util
import math
import multiprocessing
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dist_clip
from dist_clip.kernels import TORCH, Kernels, torch_kernels
from tests.interpreter import interpreted

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = 2.5e-7

# Around a tile (2048) and a chunk (16384), and a few chunks.
SIZES = (0, 1, 3, 1023, 1024, 1025, 2047, 2048, 2049, 16_383, 16_384, 16_385, 70_001)

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda t: t,
    "transposed": lambda t: t[:2400].view(60, 40).t(),
    "permuted": lambda t: t[:2400].view(4, 20, 30).permute(2, 0, 1),
    "channels_last": lambda t: t[:2400].view(2, 3, 20, 20).contiguous(memory_format=torch.channels_last),
    "0-dim": lambda t: t[5],
    "one element off": lambda t: t[1:18_001],
    "seven elements off": lambda t: t[7:20_000],
    "every other column": lambda t: t[:2400].view(40, 60)[:, ::2],
    "corner": lambda t: t[:2400].view(40, 60)[:30, :50],
    "every other element": lambda t: t[::2],
}
TORCHS_VIEWS = ("every other column", "corner", "every other element")


def triton_kernels(device: torch.device) -> Any:
    from dist_clip.kernels.triton_kernels import TritonKernels

    return TritonKernels(device.type)


def squares(tensor: Tensor | None) -> float:
    return 0.0 if tensor is None else math.fsum(tensor.double().square().flatten().tolist())


def assert_norms(sums: Tensor, tensors: list[Tensor | None]) -> None:
    assert sums.dtype == torch.float64
    norms = [math.sqrt(squares(t)) for t in tensors]
    torch.testing.assert_close(sums.sqrt().tolist(), norms, rtol=TOLERANCE, atol=0.0, equal_nan=True)


def scaled(tensor: Tensor, scale: Tensor) -> Tensor:
    return tensor * scale if tensor.dtype == torch.float64 else (tensor.float() * scale.float()).to(tensor.dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, but for the bits of a NaN."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    a, b = a.contiguous(), b.contiguous()
    return a.dtype == b.dtype and bool(((a.view(bits) == b.view(bits)) | (a.isnan() & b.isnan())).all())


def normal(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...] = SIZES) -> list[Tensor | None]:
    return [torch.randn(n).to(device, dtype) for n in sizes]


# ---- norms -----------------------------------------------------------------------------------------------------------


def check_sizes(device: torch.device, dtype: torch.dtype) -> None:
    tensors = normal(device, dtype)
    tensors[4:4] = [None, torch.randn(77, dtype=torch.float64, device=device), None]
    assert_norms(triton_kernels(device).power_sums(tensors, 2.0, device), tensors)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(dtype: torch.dtype) -> None:
    check_sizes(CPU, dtype)


def check_constants(device: torch.device) -> None:
    """Equal elements are the worst case: the roundings of their partial sums all go one way."""
    tensors: list[Tensor | None] = [torch.full((40_000,), x).to(device) for x in (0.1, 0.7, 1.1, 1.7320508, 0.57735027)]
    assert_norms(triton_kernels(device).power_sums(tensors, 2.0, device), tensors)


@interpreted
def test_constants() -> None:
    check_constants(CPU)


def check_values(device: torch.device) -> None:
    """Ranges in which squares leave fp32; each must leave its neighbours alone."""
    inf, nan = math.inf, math.nan
    fp32 = [0.0, 1e-45, 1e-40, 1e-25, 1e-19, 1e-13, 1e-12, 1e19, 2e19, 1e25, 3e38, inf, -inf, nan]
    values = {torch.float32: fp32, torch.bfloat16: fp32, torch.float16: [0.0, 6e-8, 65504.0, -65504.0, inf, nan]}
    tensors: list[Tensor | None] = []
    for dtype, some in values.items():
        for value in some:
            tensors += [torch.full((n,), value, device=device).to(dtype) for n in (1, 5000)]
            for rest in (torch.randn(18_000), torch.zeros(3000)):
                rest[-1] = value
                tensors.append(rest.to(device, dtype))
    sums = triton_kernels(device).power_sums(tensors, 2.0, device)
    assert_norms(sums, tensors)
    assert sums.isnan().sum() == 3 * 4
    assert sums.isinf().sum() == 5 * 4
    assert (sums[sums > 0] < 1e-40).any()
    assert (sums[sums < inf] > 1e40).any()


@interpreted
def test_values() -> None:
    check_values(CPU)


def check_views(device: torch.device, dtype: torch.dtype) -> None:
    kernels = triton_kernels(device)
    tensors: list[Tensor | None] = [view(torch.randn(30_000).to(device, dtype)) for view in VIEWS.values()]
    assert [list(VIEWS)[i] for i in sorted(kernels.read(tensors).reading.rest)] == list(TORCHS_VIEWS)
    assert_norms(kernels.power_sums(tensors, 2.0, device), tensors)
    scales = torch.linspace(0.1, 0.9, len(tensors), dtype=torch.float64, device=device)
    want = [scaled(t, scale) for t, scale in zip(tensors, scales, strict=True) if t is not None]
    strides = [t.stride() for t in tensors if t is not None]
    kernels.scale_(tensors, scales)
    for name, tensor, expected, stride in zip(VIEWS, tensors, want, strides, strict=True):
        assert tensor is not None
        assert same(tensor, expected), name
        assert tensor.stride() == stride, name


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views(dtype: torch.dtype) -> None:
    """Any alignment and any dense order; strides with gaps are left to torch."""
    check_views(CPU, dtype)


def check_outside_of_a_view(device: torch.device, dtype: torch.dtype) -> None:
    """Not an element before or after a tensor is written to."""
    for n in (1, 100, 2048, 5000, 16_384, 20_000):
        for offset in (8, 9):
            base = torch.randn(n + 32).to(device, dtype)
            before = base.clone()
            view = base[offset : offset + n]
            kernels = triton_kernels(device)
            kernels.scale_([view], torch.tensor([0.5], dtype=torch.float64, device=device))
            kernels.zero_where_([view], torch.tensor([True], device=device))
            assert not view.any()
            assert same(base[:offset], before[:offset])
            assert same(base[offset + n :], before[offset + n :])


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outside_of_a_view(dtype: torch.dtype) -> None:
    check_outside_of_a_view(CPU, dtype)


@interpreted
def test_what_is_left_to_torch() -> None:
    """Other norms, foreach=False; lists with nothing for the kernels, and lists of nothing."""
    kernels = triton_kernels(CPU)
    tensors = [torch.randn(50), None, torch.randn(7, 3), torch.randn(4).bfloat16()]
    for p, foreach in ((1.0, None), (3.0, None), (math.inf, None), (2.0, False)):
        expected = torch_kernels.power_sums(tensors, p, CPU, foreach)
        assert torch.equal(kernels.power_sums(tensors, p, CPU, foreach), expected)
    for nothing in ([], [None], [None, torch.empty(0)], [torch.empty(0), torch.empty(3, 0).bfloat16()]):
        sums = kernels.power_sums(nothing, 2.0, CPU)
        assert sums.tolist() == [0.0] * len(nothing)
        kernels.scale_(nothing, torch.full((len(nothing),), 0.5, dtype=torch.float64))
        kernels.zero_where_(nothing, torch.ones(len(nothing), dtype=torch.bool))
    doubles: list[Tensor | None] = [None, torch.randn(9, dtype=torch.float64)]
    assert torch.equal(kernels.power_sums(doubles, 2.0, CPU), torch_kernels.power_sums(doubles, 2.0, CPU))


# ---- scales ----------------------------------------------------------------------------------------------------------


def every_value(dtype: torch.dtype) -> Tensor:
    """All bit patterns of 16 bits; of fp32, every exponent with mantissas around halfway between two bf16 ones."""
    if dtype != torch.float32:
        return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    upper = torch.arange(-(2**15), 2**15).to(torch.int32) << 16
    return torch.cat([upper, upper + 0x7FFF, upper + 0x8000, upper + 0x8001]).view(torch.float32)


def check_scales(device: torch.device, dtype: torch.dtype) -> None:
    scales = [1.0, 0.5, 0.99, 1 / 3, 1e-8, 0.0, 1e-30, 3.0, math.inf, math.nan]
    tensors: list[Tensor | None] = [every_value(dtype).to(device) for _ in scales]
    factors = torch.tensor(scales, dtype=torch.float64, device=device)
    want = [scaled(t, factor) for t, factor in zip(tensors, factors, strict=True) if t is not None]
    triton_kernels(device).scale_(tensors, factors)
    for scale, tensor, expected in zip(scales, tensors, want, strict=True):
        assert tensor is not None
        assert same(tensor, expected), scale


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales(dtype: torch.dtype) -> None:
    """Every value there is, subnormal, infinite and NaN, is multiplied in fp32 and rounded once, to nearest even."""
    check_scales(CPU, dtype)


@interpreted
def test_scales_of_a_list() -> None:
    """Each tensor gets its own scale, whatever its dtype, beside ones that are None or torch's."""
    tensors: list[Tensor | None] = []
    for n in SIZES:
        tensors += [
            torch.randn(n),
            None,
            torch.randn(n).half(),
            torch.randn(n, dtype=torch.float64),
            torch.randn(n).bfloat16(),
        ]
    scales = torch.rand(len(tensors), dtype=torch.float64) + 0.1
    scales[::3] = 1.0
    want = [None if t is None else scaled(t, s) for t, s in zip(tensors, scales, strict=True)]
    triton_kernels(CPU).scale_(tensors, scales)
    for tensor, expected in zip(tensors, want, strict=True):
        assert (tensor is None and expected is None) or same(tensor, expected)
    one_for_all = torch.tensor(0.25, dtype=torch.float64).expand(len(tensors))
    triton_kernels(CPU).scale_(tensors, one_for_all, uniform=True)
    for tensor, expected in zip(tensors, want, strict=True):
        assert (tensor is None and expected is None) or same(tensor, expected * 0.25)


def check_scale_one(device: torch.device, dtype: torch.dtype) -> None:
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    tensor = every_value(dtype).to(device)
    before = tensor.view(bits).clone()
    triton_kernels(device).scale_([tensor], torch.ones(1, dtype=torch.float64, device=device))
    assert torch.equal(tensor.view(bits), before)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_one_keeps_every_bit(dtype: torch.dtype) -> None:
    """Those of NaNs and of negative zeros as well."""
    check_scale_one(CPU, dtype)


@contextmanager
def counted_memory() -> Iterator[list[int]]:
    """Counts the elements that interpreted kernels load and store, blocks of them only (scalars are the tables)."""
    from triton.runtime import interpreter

    counts = [0, 0]
    with pytest.MonkeyPatch.context() as patch:
        for k, name in enumerate(("load", "store")):
            original = getattr(interpreter._interpreter, name)

            def counting(pointers: Any, *args: Any, k: int = k, original: Any = original) -> Any:
                counts[k] += pointers.size if pointers.size > 1 else 0
                return original(pointers, *args)

            patch.setattr(interpreter, "_interpreter", _Replaced(interpreter._interpreter, name, counting))
        yield counts


class _Replaced:
    def __init__(self, module: Any, name: str, function: Any) -> None:
        self._module = module
        setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_one_touches_no_element(dtype: torch.dtype) -> None:
    tensors = normal(CPU, dtype, (4096, 20_000, 5))
    kernels = triton_kernels(CPU)
    for scales, touched in (([1.0, 1.0, 1.0], 0), ([1.0, 1.0, 0.5], 2048), ([0.5, 1.0, 1.0], 4096)):
        with counted_memory() as counts:
            kernels.scale_(tensors, torch.tensor(scales, dtype=torch.float64))
        assert counts == [touched, touched], scales


def check_zeroing(device: torch.device, dtype: torch.dtype) -> None:
    tensors = normal(device, dtype)
    tensors[3:3] = [None, torch.full((5,), math.nan, dtype=torch.float64, device=device)]
    for tensor in tensors[:-1]:
        if tensor is not None and tensor.numel():
            tensor[-1] = math.nan
    flags = torch.tensor([i % 2 == 0 for i in range(len(tensors))], device=device)
    want = [t if t is None else torch.zeros_like(t) if f else t.clone() for t, f in zip(tensors, flags, strict=True)]
    triton_kernels(device).zero_where_(tensors, flags)
    for tensor, expected in zip(tensors, want, strict=True):
        assert (tensor is None and expected is None) or same(tensor, expected)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeroing(dtype: torch.dtype) -> None:
    check_zeroing(CPU, dtype)


# ---- the same bits, whatever else is the case ------------------------------------------------------------------------


def check_same_bits(device: torch.device, dtype: torch.dtype) -> None:
    """A tensor's sum does not depend on the run, its address, its place in the list, the others there, or the kernels."""
    values = torch.randn(20_001).to(device, dtype)
    alone = triton_kernels(device).power_sums([values], 2.0, device)
    for offset in (0, 1, 3, 8):
        base = torch.empty(20_001 + offset, dtype=dtype, device=device)
        moved = base[offset:]
        moved.copy_(values)
        others = normal(device, dtype, (17, 17_000))
        kernels = triton_kernels(device)
        for sums in (
            kernels.power_sums([moved], 2.0, device),
            kernels.power_sums([moved], 2.0, device),
            kernels.power_sums([*others, None, moved], 2.0, device)[3:],
            kernels.power_sums([torch.randn(9).to(device, torch.float16), moved, *others], 2.0, device)[1:2],
        ):
            assert torch.equal(sums, alone)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits(dtype: torch.dtype) -> None:
    check_same_bits(CPU, dtype)


# ---- what a step costs -----------------------------------------------------------------------------------------------


class Costs:
    """Counts launches, worked-out plans and copies to the device of one TritonKernels; can leave the launches out."""

    def __init__(self, kernels: Any, run: bool = True) -> None:
        self.launches = self.plans = self.sent = 0
        launch, plan, send = kernels._launch, kernels._tables._plan, kernels._tables._send

        def counted_launch(*args: Any, **kwargs: Any) -> None:
            self.launches += 1
            if run:
                launch(*args, **kwargs)

        def counted_plan(*args: Any) -> Any:
            self.plans += 1
            return plan(*args)

        def counted_send(*args: Any) -> Any:
            self.sent += 1
            return send(*args)

        kernels._launch, kernels._tables._plan, kernels._tables._send = counted_launch, counted_plan, counted_send

    def of(self, call: Callable[..., Any], *args: Any) -> tuple[int, int, int]:
        """(launches, plans, copies) of a call."""
        before = (self.launches, self.plans, self.sent)
        call(*args)
        return self.launches - before[0], self.plans - before[1], self.sent - before[2]


@interpreted
def test_launches() -> None:
    """One for each dtype, and one more to add up chunks, for 3 tensors and for 300. (Counted, not run.)"""
    device = CPU
    for n in (1, 100):
        tensors: list[Tensor | None] = [torch.randn(50).to(device, dtype) for dtype in DTYPES for _ in range(n)]
        scales = torch.full((3 * n,), 0.5, dtype=torch.float64, device=device)
        kernels = triton_kernels(device)
        costs = Costs(kernels, run=False)
        assert costs.of(kernels.power_sums, tensors, 2.0, device) == (4, 1, 2)
        assert costs.of(kernels.scale_, tensors, scales) == (3, 0, 0)
        assert costs.of(kernels.zero_where_, tensors, scales > 1) == (3, 0, 0)
        of_one_dtype = tensors[:n]
        assert costs.of(kernels.power_sums, of_one_dtype, 2.0, device) == (2, 1, 2)
        assert costs.of(kernels.scale_, of_one_dtype, scales[:n]) == (1, 0, 0)


def check_addresses(device: torch.device) -> None:
    """Gradients elsewhere in memory on every step: right every time, for one copy of addresses and nothing else."""
    kernels = triton_kernels(device)
    costs = Costs(kernels)
    kept = []
    for step in range(4):
        tensors = [*normal(device, torch.float32, (100, 20_000)), None, *normal(device, torch.bfloat16, (7, 3000))]
        scales = torch.tensor([0.5, 1.0, 0.5, 0.25, 0.125], dtype=torch.float64, device=device)
        want = [None if t is None else scaled(t, s) for t, s in zip(tensors, scales, strict=True)]
        sums = []
        cost = costs.of(lambda *args, sums=sums: sums.append(kernels.power_sums(*args)), tensors, 2.0, device)
        assert cost == (3, 1 if step == 0 else 0, 2 if step == 0 else 1)
        assert_norms(sums[0], tensors)
        assert costs.of(kernels.scale_, tensors, scales) == (2, 0, 0)
        for tensor, expected in zip(tensors, want, strict=True):
            assert (tensor is None and expected is None) or same(tensor, expected)
        assert costs.of(kernels.power_sums, tensors, 2.0, device) == (3, 0, 0)
        kept.append(tensors)  # or the next ones might be where these were
    # Another set of gradients that are None is another plan; it, too, is remembered.
    fewer = [kept[0][0], None, None, None, kept[0][4]]
    assert costs.of(kernels.power_sums, fewer, 2.0, device) == (3, 1, 2)
    assert costs.of(kernels.power_sums, kept[0], 2.0, device) == (3, 0, 0), "four lists of addresses are kept"
    assert costs.of(kernels.power_sums, fewer, 2.0, device) == (3, 0, 0)


@interpreted
def test_addresses() -> None:
    check_addresses(CPU)


# ---- a clipper -------------------------------------------------------------------------------------------------------

POLICIES: dict[str, Callable[[], Any]] = {
    "AdaGC": lambda: dist_clip.AdaGC(warmup_steps=3),
    "GlobalNorm": lambda: dist_clip.GlobalNorm(0.5),
    "ZClip": lambda: dist_clip.ZClip(warmup_steps=3, z_thresh=0.5),
}


def model(device: torch.device, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(1)
    layers = (nn.Linear(16, 130), nn.Tanh(), nn.Linear(130, 20), nn.LayerNorm(20), nn.Linear(20, 1))
    return nn.Sequential(*layers).to(device, dtype)


def check_clipper(device: torch.device, policy: str, dtype: torch.dtype, nonfinite: Any) -> None:
    """Both clip the same gradients, of a model in training: all that comes of it agrees to the last bit or so."""
    kernels = triton_kernels(device)
    costs = Costs(kernels)
    chosen = Kernels("triton", "by the test", kernels.power_sums, kernels.scale_, kernels.zero_where_, kernels.read)
    ours, theirs = model(device, dtype), model(device, dtype)
    clippers = [
        dist_clip.GradClipper(m, POLICIES[policy](), nonfinite=nonfinite, kernels=k)
        for m, k in ((ours, chosen), (theirs, "torch"))
    ]
    assert "kernels: triton (by the test)" in clippers[0].explain()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.05)
    clipped = zeroed = 0
    for step in range(10):
        x = torch.randn(8, 16, device=device).to(dtype) * (1 + step % 3)
        optimizer.zero_grad()
        (ours(x).float() * 3).square().mean().backward()
        if nonfinite == "zero" and step == 5:
            ours[0].weight.grad[3, 3] = math.nan  # type: ignore[union-attr, index]
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert a.grad is not None
            b.grad = a.grad.clone()
        mine, other = [clipper.clip_() for clipper in clippers]
        torch.testing.assert_close(mine.tensor_norms, other.tensor_norms, rtol=1e-6, atol=0.0, equal_nan=True)
        torch.testing.assert_close(mine.scales, other.scales, rtol=2e-6, atol=0.0)
        clipped += int((mine.scales < 1).sum())
        zeroed += int(mine.nonfinite)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            rtol = {torch.float32: 2e-6, torch.bfloat16: 2**-7}[dtype]
            torch.testing.assert_close(a.grad, b.grad, rtol=rtol, atol=0.0)
        optimizer.step()
    assert clipped > 0, "nothing was clipped"
    assert zeroed == (nonfinite == "zero")
    assert costs.launches == 10 * (4 if nonfinite == "zero" else 3)
    states = [clipper.memory.groups[0].state for clipper in clippers]
    torch.testing.assert_close(states[0], states[1], rtol=2e-6, atol=0.0)


CLIPPERS = [(policy, dtype, "propagate") for policy in POLICIES for dtype in (torch.float32, torch.bfloat16)]


@interpreted
@pytest.mark.parametrize(("policy", "dtype", "nonfinite"), [*CLIPPERS, ("AdaGC", torch.bfloat16, "zero")], ids=str)
def test_clipper(policy: str, dtype: torch.dtype, nonfinite: str) -> None:
    check_clipper(CPU, policy, dtype, nonfinite)


# ---- the decision ----------------------------------------------------------------------------------------------------

DECIDED: dict[str, Callable[[], Any]] = {
    "GlobalNorm": lambda: dist_clip.GlobalNorm(0.7),
    **{
        f"AdaGC-{scope}-{init}": lambda scope=scope, init=init: dist_clip.AdaGC(  # type: ignore[misc]
            warmup_steps=4, lambda_rel=1.1, beta=0.9, scope=scope, gamma_init=init
        )
        for scope, init in (
            ("tensor", "min"),
            ("tensor", "median"),
            ("tensor", "mean"),
            ("shard", "last"),
            ("global", "min"),
        )
    },
    **{
        f"LogClip-{scope}-{post}": lambda scope=scope, post=post: dist_clip.LogClip(  # type: ignore[misc]
            warmup_steps=4, patience=3, rate=0.1, scope=scope, post_max_norm=post
        )
        for scope in ("tensor", "shard", "global")
        for post in (None, 0.7)
    },
    **{
        f"ZClip-{i}": lambda options=options: dist_clip.ZClip(warmup_steps=5, z_thresh=1.5, **options)  # type: ignore[misc]
        for i, options in enumerate(
            (
                {},
                {"scope": "tensor", "max_norm": None, "clip_factor": 0.9},
                {"clip_option": "mean"},
                {"mode": "percentile", "skip_update_on_spike": True},
            )
        )
    },
}


def odd_norms(seed: int, n: int, steps: int) -> Iterator[list[float | None]]:
    """Norms with, at every third step, NaN, Inf, zeros, tiny ones, missing gradients and jumps; and a lasting rise."""
    rng = random.Random(seed)
    sizes = [10 ** rng.uniform(-3, 2) for _ in range(n)]
    for step in range(steps):
        norms: list[float | None] = [
            size * rng.lognormvariate(0, 0.4) * (50 if step > 0.6 * steps else 1) for size in sizes
        ]
        for _ in range(n // 5 if step % 3 == 0 else 0):
            norms[rng.randrange(n)] = rng.choice([None, math.nan, math.inf, 0.0, 1e-30, 1e30, 3.0])
        yield norms


def same_states(clippers: list[dist_clip.GradClipper], rtol: float) -> None:
    for ours, theirs in zip(*(clipper.memory.groups for clipper in clippers), strict=True):
        assert ours.state.keys() == theirs.state.keys()
        for slot, value in ours.state.items():
            torch.testing.assert_close(value, theirs.state[slot], rtol=rtol, atol=0.0, equal_nan=True)
    assert len({int(clipper.memory.t) for clipper in clippers}) == 1


@interpreted
@pytest.mark.parametrize("policy", DECIDED)
def test_a_decision_is_that_of_the_policy(policy: str) -> None:
    """One launch against the policies in torch, 100 steps: the same bits. Two exceptions are held to 1e-12: LogClip, whose
    exp is another one, and ZClip's state in float64, where sums in another order show.

    Both measure and scale by torch's kernels. The 1,300 tensors of one policy are more than a block of the kernel.
    """
    decided = [0]
    n, kernels = (1300 if policy == "LogClip-tensor-0.7" else 40), triton_kernels(CPU)

    def decide(*args: Any, **kwargs: Any) -> None:
        decided[0] += 1
        kernels.decide(*args, **kwargs)

    one_launch = dataclasses.replace(TORCH, decide=decide, is_whole=lambda shards: True)
    models = [[nn.Parameter(torch.zeros(1)) for _ in range(n)] for _ in range(2)]
    overrides = {"*1": DECIDED[policy](), "*2": dist_clip.GlobalNorm(2.0)} if policy.endswith(("-0.7", "min")) else None
    clippers = [
        dist_clip.GradClipper(
            [(f"p{i}", p) for i, p in enumerate(params)],
            DECIDED[policy](),
            overrides=overrides,
            kernels=k,
            check_replicas=False,
        )
        for params, k in zip(models, (one_launch, TORCH), strict=True)
    ]
    long = ("GlobalNorm", "AdaGC-tensor-min", "LogClip-tensor-None", "ZClip-0")
    decided[0] = 0  # the trial at construction
    steps = 100 if policy in long else 40 if n == 40 else 12
    rtol = 1e-12 if "LogClip" in policy else 0.0
    clipped = 0
    for step, norms in enumerate(odd_norms(len(policy), n, steps)):
        for params in models:
            for param, norm in zip(params, norms, strict=True):
                param.grad = None if norm is None else torch.tensor([norm])
        if step == steps // 2:  # the two ways share their state
            saved = [clipper.state_dict() for clipper in clippers]
            for clipper, state in zip(clippers, saved[::-1], strict=True):
                clipper.load_state_dict(state)
        ours, theirs = [clipper.clip_() for clipper in clippers]
        clipped += int((theirs.scales < 1).sum())
        for field in ("tensor_norms", "scales", "nonfinite", "skip", "global_norm", "clipped_global_norm"):
            mine, other = getattr(ours, field), getattr(theirs, field)
            exact = rtol if field == "scales" else 1e-6 if "global" in field else 0.0
            torch.testing.assert_close(mine, other, rtol=exact, atol=0.0, equal_nan=True)
        for mine, other in zip(*models, strict=True):
            assert (mine.grad is None) == (other.grad is None)
            if mine.grad is not None and other.grad is not None:
                assert rtol > 0 or same(mine.grad, other.grad)
        same_states(clippers, 1e-12 if "Clip" in policy else 0.0)
    assert clipped > 40
    warm = 4 if isinstance(DECIDED[policy](), (dist_clip.AdaGC, dist_clip.LogClip)) else 0
    late = (
        2 if "mean" in policy or "median" in policy else 0
    )  # a step after the warm-up, and after a load, drops its record
    assert decided[0] == (steps - warm - late) * len(clippers[0].memory.groups)


@interpreted
@pytest.mark.parametrize(
    ("policy", "n"), [("LogClip-tensor-0.7", 300), ("AdaGC-tensor-min", 7), ("ZClip-0", 7), ("GlobalNorm", 3)]
)
def test_a_guard_skips_as_in_torch(policy: str, n: int) -> None:
    """`MedianGuard` with a rule, two launches, against both in torch: the same skips, and states to 1e-6 or better.

    Bad batches, bad tensors, NaN, an episode of low norms, and a lasting rise that uses up the budget.
    """
    kernels, used = triton_kernels(CPU), [0]

    def guard(*args: Any) -> None:
        used[0] += 1
        kernels.median_guard(*args)

    one_launch = dataclasses.replace(TORCH, decide=kernels.decide, median_guard=guard, is_whole=lambda shards: True)
    models = [[nn.Parameter(torch.zeros(1)) for _ in range(n)] for _ in range(2)]
    clippers = [
        dist_clip.GradClipper(
            params,
            DECIDED[policy](),
            guard=dist_clip.MedianGuard(warmup_steps=6, window=12, max_skips_in_a_row=5),
            kernels=k,
            check_replicas=False,
        )
        for params, k in zip(models, (one_launch, TORCH), strict=True)
    ]
    used[0] = 0  # the trial at construction
    rng = random.Random(n)
    sizes = [10 ** rng.uniform(-2, 1) for _ in range(n)]
    skips = []
    for step in range(120):
        together = rng.lognormvariate(0, 0.1) * {20: 7.0, 21: 1e4, 40: math.nan}.get(step, 1.0)
        together *= 0.05 if 50 <= step < 70 else 9.0 if step >= 85 else 1.0
        norms: list[float | None] = [size * together * rng.lognormvariate(0, 0.3) for size in sizes]
        if step % 7 == 3:
            norms[rng.randrange(n)] = rng.choice([None, 0.0, 1e5, math.inf])
        for params in models:
            for param, norm in zip(params, norms, strict=True):
                param.grad = None if norm is None else torch.tensor([norm])
        ours, theirs = [clipper.clip_() for clipper in clippers]
        assert bool(ours.skip) == bool(theirs.skip), step
        skips.append(bool(ours.skip))
        torch.testing.assert_close(ours.scales, theirs.scales, rtol=1e-6, atol=0.0, equal_nan=True)
        assert torch.equal(ours.nonfinite, theirs.nonfinite)
        same_states(clippers, 1e-6)
        mine, other = (clipper.memory.guards[0] for clipper in clippers)
        for slot, value in mine.state.items():
            torch.testing.assert_close(value, other.state[slot], rtol=1e-6, atol=1e-7)
        assert torch.equal(mine.skips_in_a_row, other.skips_in_a_row)
    assert skips[20]
    assert skips[40]
    assert 4 <= sum(skips[85:]) < 20
    assert used[0] > 100


@interpreted
@pytest.mark.parametrize("fault", ["raises", "is wrong", "guard is wrong"])
def test_a_decision_that_does_not_work_is_found_at_construction(fault: str) -> None:
    kernels = triton_kernels(CPU)

    def decide(*args: Any) -> None:
        if fault == "raises":
            raise RuntimeError("PTX JIT compilation failed")
        kernels.decide(*args)
        if fault == "is wrong":
            args[3][2].mul_(0.99)

    def guard(*args: Any) -> None:
        kernels.median_guard(*args)
        args[1][0].mul_(1.01)

    chosen = dataclasses.replace(TORCH, decide=decide, median_guard=guard, is_whole=lambda shards: True)
    param = nn.Parameter(torch.zeros(1))
    with pytest.warns(UserWarning, match="rank 0: the kernel that decides a step does not work on cpu"):
        clipper = dist_clip.GradClipper(
            [param],
            dist_clip.AdaGC(warmup_steps=0),
            guard=dist_clip.MedianGuard() if fault == "guard is wrong" else None,
            kernels=chosen,
        )
    param.grad = torch.ones(1)
    assert clipper.clip_().scales.tolist() == [1.0], "torch's operators decide"


@interpreted
@pytest.mark.parametrize("policy", ["AdaGC-tensor-median", "LogClip-tensor-None", "ZClip-1"])
def test_clipping_early_decides_as_a_whole_step_does(policy: str) -> None:
    """The kernel on parts of the tensors and on all: the same bits, also where no gradient is left for `clip_`."""
    kernels, decided = triton_kernels(CPU), [0]

    def decide(*args: Any, **kwargs: Any) -> None:
        decided[0] += 1
        kernels.decide(*args, **kwargs)

    k = dataclasses.replace(TORCH, decide=decide, is_whole=lambda shards: any(shard is not None for shard in shards))
    models = [[nn.Parameter(torch.zeros(3)) for _ in range(40)] for _ in range(2)]
    clippers = [
        dist_clip.GradClipper(
            [(f"p{i}", p) for i, p in enumerate(params)],
            DECIDED[policy](),
            overrides={"*1": dist_clip.GlobalNorm(2.0)} if "LogClip" in policy else None,
            kernels=k,
        )
        for params in models
    ]
    early, whole = clippers
    for step, norms in enumerate(odd_norms(len(policy), 40, 16)):
        for params in models:
            for param, norm in zip(params, norms, strict=True):
                param.grad = None if norm is None else torch.tensor([norm, 0.0, 0.0])
        expected = whole.clip_()
        mine = [(param, other.grad) for param, other in zip(*models, strict=True) if param.grad is not None]
        before = decided[0]
        if early.can_clip_early:
            able = [
                (param, other.grad)
                for i, (param, other) in enumerate(zip(*models, strict=True))
                if param.grad is not None and (i % 10 != 1 or "LogClip" not in policy)  # not those of GlobalNorm
            ]
            for part in (able[: len(able) // 2], able[len(able) // 2 : None if step % 2 else -3]):
                early.clip_early_([param for param, _ in part])
                for param, want in part:
                    assert param.grad is not None
                    assert same(param.grad, want)  # type: ignore[arg-type]
                    param.grad = None
        report = early.clip_()
        # The first step after a warm-up drops its record, and is decided by torch's operators.
        assert decided[0] - before >= 3 or step < 6
        for param, want in mine:
            assert param.grad is None or same(param.grad, want)  # type: ignore[arg-type]
        for field in ("tensor_norms", "scales", "nonfinite", "global_norm"):
            torch.testing.assert_close(getattr(report, field), getattr(expected, field), rtol=0, atol=0, equal_nan=True)
        assert report.num_grads == expected.num_grads
        same_states(clippers, 0.0)


# ---- compiled for a GPU, which need not be there ---------------------------------------------------------------------


def compiled() -> dict[tuple[int, str, str], str]:
    """PTX by compute capability, kernel and dtype: for one kind of GPU all kernels, for another those for bf16."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dist_clip.kernels import rules, triton_decide, triton_guard, triton_jit

    options: dict[str, Any] = {"add_chunks": {}, "decide": {"enable_fp_fusion": False}}
    options["median_guard"] = options["decide"]
    data = {"chunk_squares": "partials *fp64", "scale_chunks": "scales *fp32", "zero_chunks": "flags *u8"}
    sources = {}
    for name, argument in data.items():
        for dtype in (tl.float32, tl.bfloat16, tl.float16):
            types = {"addresses": "*i64", "meta": "*i64", "m": "i32", "first_chunk": "i32"}
            types |= dict([argument.split()]) | dict.fromkeys(("DTYPE", "TILE", "TILES"), "constexpr")
            constants = {"DTYPE": dtype, "TILE": triton_jit.TILE, "TILES": triton_jit.TILES}
            sources[name, str(dtype)] = ASTSource(getattr(triton_jit, name), types, constants)
    types = {"meta": "*i64", "m": "i32", "partials": "*fp64", "sums": "*fp64", "LANES": "constexpr"}
    sources["add_chunks", "fp64"] = ASTSource(triton_jit.add_chunks, types, {"LANES": triton_jit.LANES})
    states = {rules.GLOBAL_NORM: ["fp64"] * 3, rules.ADAGC: ["fp32", "fp64", "fp64"]}
    states |= {rules.LOGCLIP: ["fp32", "i32", "i32"], rules.ZCLIP: ["fp64", "fp64", "i64"]}
    parameters: dict[int, tuple[float, ...]] = {rules.GLOBAL_NORM: (1.0,), rules.ADAGC: (1.04, 0.99, 1e-6)}
    parameters |= {
        rules.LOGCLIP: (2.0, 2.0, 0.03, 50),
        rules.ZCLIP: (0.97, 2.5, 25, False, False, 1.0, 1.0, True, 1e-6),
    }
    numbers = {"sums": "*fp64", "index": "*i64", "members": "i32", "t": "*i64", "norms": "*fp32", "exact": "*fp64"}
    numbers |= {"scales": "*fp32", "nonfinite": "*i1", "skip": "*i1"}
    for rule, slots in states.items():
        for one, post in ((False, 0.0), (True, 0.7), (False, 0.7)):
            constants = {"BLOCK": triton_decide.BLOCK} | rules.constants(
                rule, parameters[rule], one=one, post_max_norm=post, skips=True, first=True, last=True
            )
            types = (
                numbers
                | dict(zip("abc", [f"*{slot}" for slot in slots], strict=True))
                | dict.fromkeys(constants, "constexpr")
            )
            types = {p.name: types[p.name] for p in triton_decide.decide.params}
            sources["decide", f"{rule} {one} {post}"] = ASTSource(triton_decide.decide, types, constants)
    types = dict.fromkeys(("level", "peak", "earlier", "drift", "scatter"), "*fp32") | {"sums": "*fp64", "n": "i32"}
    types |= dict.fromkeys(("observations", "moves", "clock", "lows", "spent", "in_a_row"), "*i32") | {"skip": "*i1"}
    constants = {"THRESHOLD": 2.0, "LOG_THRESHOLD": math.log(2), "DEVIATIONS": 5.0, "RATE": 0.02, "WARMUP": 100}
    constants |= {"WINDOW": 128, "MOST": 50, "EDGES": triton_guard.EDGES, "BLOCK": triton_guard.BLOCK}
    types |= dict.fromkeys(constants, "constexpr")
    types = {p.name: types[p.name] for p in triton_guard.median_guard.params}
    sources["median_guard", ""] = ASTSource(triton_guard.median_guard, types, constants)
    for kernel in (
        *(getattr(triton_jit, name) for name in (*data, "add_chunks")),
        triton_decide.decide,
        triton_guard.median_guard,
    ):
        arguments = [p for p in kernel.params if not p.is_constexpr]
        assert arguments
        assert all(p.do_not_specialize for p in arguments), "alignment or size would make it another kernel"
    return {
        (capability, *key): triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options=options.get(key[0], {"num_warps": triton_jit.WARPS}),
        ).asm["ptx"]
        for key, source in sources.items()
        for capability in ((80, 90) if key[1] == "bf16" else (90,))
    }


def test_compiled_code(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real compiler takes the kernels, down to machine code. Aligned tensors are read and written 16 bytes at a time;
    no atomics, no registers spilled, subnormal numbers are not flushed to zero; and there is one kernel for a dtype, so
    that all sums are added in one order and a capture finds what a step before it has compiled."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        code = process.submit(compiled).result()
    assert len(code) == 13 + 12 + 1
    for (capability, name, dtype), ptx in code.items():
        assert not re.search(r"\batom|\bred\.|\.local", ptx), (capability, name, dtype)
        # NVIDIA's exp of a float64 looks at its size in fp32.
        assert name in ("decide", "median_guard") or ".ftz" not in ptx, (capability, name, dtype)
        wide = {"chunk_squares": ["ld"], "scale_chunks": ["ld", "st"], "zero_chunks": ["st"]}.get(name, [])
        for access in wide:
            assert re.search(rf"{access}\.global\.v4\.b32", ptx), (capability, name, dtype)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@gpu
@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "check",
    [check_sizes, check_views, check_outside_of_a_view, check_scales, check_scale_one, check_zeroing, check_same_bits],
)
def test_on_a_gpu(check: Callable[..., None], dtype: torch.dtype) -> None:
    check(torch.device("cuda", 0), dtype)


@gpu
@needs_cuda
@pytest.mark.parametrize("check", [check_constants, check_values, check_addresses])
def test_on_a_gpu_all_dtypes(check: Callable[..., None]) -> None:
    check(torch.device("cuda", 0))


@gpu
@needs_cuda
@pytest.mark.parametrize(("policy", "dtype", "nonfinite"), [*CLIPPERS, ("AdaGC", torch.bfloat16, "zero")], ids=str)
def test_clipper_on_a_gpu(policy: str, dtype: torch.dtype, nonfinite: str) -> None:
    check_clipper(torch.device("cuda", 0), policy, dtype, nonfinite)


@gpu
@needs_cuda
def test_chosen_on_a_gpu() -> None:
    clipper = dist_clip.GradClipper(nn.Linear(3, 2).cuda(), dist_clip.GlobalNorm())
    assert "kernels: triton (the first installed of triton, torch)" in clipper.explain()


@gpu
@needs_cuda
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
def test_clip_grad_norm_on_a_gpu(norm_type: float) -> None:
    """Its kernels are chosen as a clipper's are; bf16, which torch's kernels take one by one."""
    grads = [torch.randn(n, device="cuda").to(torch.bfloat16) for n in (5, 20_000, 70_001)]
    params = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for _ in range(2):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        norm = dist_clip.clip_grad_norm_(params, 0.5, norm_type)
        expected = torch.cat([grad.double() for grad in grads]).norm(norm_type)
        assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
        scale = (0.5 / (expected + 1e-6)).float()
        for param, grad in zip(params, grads, strict=True):
            torch.testing.assert_close(param.grad, (grad.float() * scale).bfloat16(), rtol=2**-7, atol=0.0)


@gpu
@needs_cuda
def test_large_on_a_gpu() -> None:
    """More elements than an int32 counts, beside small ones."""
    tensor = torch.full((2**31 + 70_001,), 0.7, dtype=torch.bfloat16, device="cuda")
    value = tensor[0].double().item()
    kernels = triton_kernels(tensor.device)
    sums = kernels.power_sums([torch.ones(3, device="cuda"), tensor], 2.0, tensor.device)
    assert sums.sqrt().tolist() == pytest.approx([math.sqrt(3), value * math.sqrt(tensor.numel())], rel=TOLERANCE)
    kernels.scale_([None, tensor], torch.tensor([1.0, 0.5], dtype=torch.float64, device="cuda"))
    assert bool((tensor == value / 2).all())


@gpu
@needs_cuda
def test_kernels_launched_on_a_gpu() -> None:
    """As the profiler counts them, the zeroing of the result and such included: as many for 3 tensors as for 300."""
    from torch.profiler import ProfilerActivity, profile

    counts = []
    for n in (1, 100):
        tensors: list[Tensor | None] = [torch.randn(50).to("cuda", dtype) for dtype in DTYPES for _ in range(n)]
        scales = torch.full((3 * n,), 0.5, dtype=torch.float64, device="cuda")
        kernels = triton_kernels(torch.device("cuda"))
        kernels.power_sums(tensors, 2.0, scales.device)
        kernels.scale_(tensors, scales)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            kernels.power_sums(tensors, 2.0, scales.device)
            kernels.scale_(tensors, scales)
            torch.cuda.synchronize()
        names = [e.name for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        counts.append((sum("chunk" in name for name in names), len(names)))
    assert counts[0] == counts[1]
    assert counts[0][0] == 7


@gpu
@needs_cuda
@pytest.mark.parametrize("policy", POLICIES)
def test_no_host_sync_on_a_gpu(policy: str) -> None:
    """Gradients change their addresses on every step."""
    device = torch.device("cuda", 0)
    module = model(device, torch.bfloat16)
    clipper = dist_clip.GradClipper(module, POLICIES[policy](), nonfinite="zero", kernels="triton")
    kept = []
    try:
        for step in range(8):
            for p in module.parameters():
                p.grad = torch.randn_like(p)
                kept.append(p.grad)
            if step == 1:  # the first step may compile, and put the state on the device
                torch.cuda.set_sync_debug_mode("error")
            clipper.clip_()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@needs_cuda
@pytest.mark.parametrize("inside", [False, True], ids=["gradients from before", "gradients made in the graph"])
@pytest.mark.parametrize("policy", ["AdaGC", "GlobalNorm"])
def test_cuda_graph(policy: str, inside: bool) -> None:
    """A captured clip_ clips whatever the gradients hold at a replay, as an eager one of torch's kernels does.

    Between the replays the same clipper also works eagerly on gradients elsewhere, whose tables must not be the graph's.
    """
    device = torch.device("cuda", 0)
    modules = [model(device, torch.float32) for _ in range(3)]
    graphed, plain = (
        dist_clip.GradClipper(m, POLICIES[policy](), kernels=k)
        for m, k in zip(modules, ("triton", "torch"), strict=False)
    )
    sources = [torch.randn_like(p) for p in modules[0].parameters()]

    def fill(step: int) -> None:
        for source, b in zip(sources, modules[1].parameters(), strict=True):
            source.copy_(torch.randn_like(source) * (1 + step % 4))
            b.grad = source.clone()

    def make() -> None:
        for source, a in zip(sources, modules[0].parameters(), strict=True):
            if inside or a.grad is None:
                a.grad = source.clone()
            else:
                a.grad.copy_(source)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in range(5):  # past the warm-up, in which AdaGC's steps are others
            fill(step)
            make()
            graphed.clip_()
            plain.clip_()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        make()
        report = graphed.clip_()
    static = [p.grad for p in modules[0].parameters()]
    kernels = triton_kernels(device)
    clipped = 0
    for step in range(5, 12):
        fill(step)
        graph.replay()
        expected = plain.clip_()
        torch.testing.assert_close(report.tensor_norms, expected.tensor_norms, rtol=1e-6, atol=0.0)
        torch.testing.assert_close(report.scales, expected.scales, rtol=2e-6, atol=0.0)
        for a, b in zip(static, modules[1].parameters(), strict=True):
            torch.testing.assert_close(a, b.grad, rtol=2e-6, atol=0.0)
        clipped += int((expected.scales < 1).sum())
        graphed.kernels.power_sums([torch.randn_like(p) for p in modules[2].parameters()], 2.0, device)
        kernels.power_sums([torch.randn(70_000, device=device) for _ in range(3)], 2.0, device)
    assert clipped > 0


@interpreted
def test_what_does_not_compute_as_torch_does_is_not_chosen() -> None:
    """Tried at construction: a wrong norm, scale or zero is found before the first step."""
    triton_kernels(CPU).try_on(CPU)
    for method in ("power_sums", "scale_", "zero_where_"):
        broken = triton_kernels(CPU)
        right = getattr(broken, method)

        def wrong(shards: Any, *args: Any, right: Any = right, **kwargs: Any) -> Any:
            """Forgets the last tensor."""
            return right([*shards[:-1], None], *args, **kwargs)

        setattr(broken, method, wrong)
        with pytest.raises(ArithmeticError, match="not what torch computes"):
            broken.try_on(CPU)
