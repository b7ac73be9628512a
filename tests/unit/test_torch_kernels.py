"""The CPU path of the torch kernels: its ways through (stacked, in place, streamed, widened) meet at their borders.

Tolerance 1e-6, as everywhere for norms; constant tensors are the worst case of fp32 rows (test_accuracy.py).
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dist_clip.kernels import torch_kernels
from dist_clip.kernels.torch_kernels import power_sums, scale_

CPU = torch.device("cpu")
BLOCK, SMALL, LARGE = torch_kernels._BLOCK, torch_kernels._SMALL, torch_kernels._LARGE
CHUNK = torch_kernels._CHUNK
SIZES = [1, BLOCK - 1, BLOCK, BLOCK + 1, SMALL, SMALL + 1, CHUNK + 1, LARGE - 1, LARGE, LARGE + 4 * BLOCK, LARGE + 1023]


def values(numel: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(numel)
    return torch.rand(numel, generator=generator).add_(0.5).to(dtype)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("numel", SIZES)
def test_every_way_through(numel: int, dtype: torch.dtype, p: float) -> None:
    x = values(numel, dtype)
    wide = x.double()
    want = wide.max() if math.isinf(p) else wide.pow(p).sum()
    got = power_sums([x], p, CPU)
    assert got.dtype == torch.float64
    assert got.item() == pytest.approx(want.item(), rel=p * 1e-6 if p < math.inf else 1e-7)


@pytest.mark.parametrize("numel", SIZES)
def test_constant(numel: int) -> None:
    for value in (0.1, 0.7, 3.3):
        x = torch.full((numel,), value)
        want = x[0].double().item() ** 2 * numel
        assert power_sums([x], 2.0, CPU).item() == pytest.approx(want, rel=2e-6)


def test_more_than_a_chunk() -> None:
    x = values(torch_kernels._CHUNK_IN_PLACE + 777, torch.float32)
    assert power_sums([x], 2.0, CPU).item() == pytest.approx(x.double().square().sum().item(), rel=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_other_tensors_do_not_change_a_norms_bits(dtype: torch.dtype) -> None:
    """Copies of one tensor lie beside other shards on other ranks, and must get the same scale to the bit."""
    tensors = [values(n, dtype) for n in SIZES] + [values(64 * 96, dtype).view(64, 96).t(), values(7, dtype)]
    alone = torch.cat([power_sums([x], 2.0, CPU) for x in tensors])
    together = power_sums(tensors, 2.0, CPU)
    assert torch.equal(alone, together)
    crowd: list[Tensor | None] = []
    for x in tensors:
        crowd += [torch.randn(x.shape).to(dtype), x, None, torch.randn(x.shape).to(dtype)]
    assert torch.equal(power_sums(crowd, 2.0, CPU)[1::4], alone)


def test_many_small_tensors_take_several_stacks() -> None:
    tensors = [values(1000, torch.float32) * i for i in range(3 * CHUNK // 1000)]
    want = torch.stack([x.double().square().sum() for x in tensors])
    torch.testing.assert_close(power_sums(tensors, 2.0, CPU), want, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("uniform", [True, False])
def test_scales_of_several_dtypes(uniform: bool) -> None:
    """float64 gradients get the scale as it is, others its fp32 value, rounded once."""
    tensors: list[Tensor | None] = [torch.randn(50).to(d) for d in (torch.float64, torch.float32, torch.bfloat16)]
    tensors.insert(1, None)
    scales = torch.full((4,), 0.99, dtype=torch.float64)
    if not uniform:
        scales[3] = 1.0
    before = [None if t is None else t.clone() for t in tensors]
    scale_(tensors, scales, uniform=uniform)
    for now, was, scale in zip(tensors, before, scales, strict=True):
        if now is None or was is None:
            continue
        exact = was * scale if was.dtype == torch.float64 else (was.float() * scale.float()).to(was.dtype)
        assert torch.equal(now, exact)
