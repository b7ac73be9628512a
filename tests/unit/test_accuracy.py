"""Norms and scales where fp32 is not enough: many elements, squares that overflow or underflow, low-precision gradients.

The oracle sums squares in float64, a block at a time. torch's own fp32 norm on CPU is off by 2.7e-3 at 39 million
elements; a test of the large tensor shows that the others would notice.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dist_clip

MILLION = 1_000_000
BLOCK = 4 * MILLION
NO_LIMIT = 3.4e38  # measures, clips nothing


def oracle(*grads: Tensor) -> float:
    squares = 0.0
    for grad in grads:
        flat = grad.reshape(-1)
        for start in range(0, flat.numel(), BLOCK):
            block = flat[start : start + BLOCK].double()
            squares += torch.dot(block, block).item()
    return math.sqrt(squares)


def holder(grad: Tensor) -> nn.Parameter:
    """A parameter with this gradient, and no storage of its own worth speaking of."""
    p = nn.Parameter(torch.zeros(1, dtype=grad.dtype).expand(grad.shape))
    p.grad = grad
    return p


def measure_with_clipper(*grads: Tensor) -> float:
    clipper = dist_clip.GradClipper([(f"p{i}", holder(g)) for i, g in enumerate(grads)], dist_clip.GlobalNorm(NO_LIMIT))
    report = clipper.clip_()
    for i, g in enumerate(grads):
        assert report.tensor_norms[i].item() == pytest.approx(oracle(g), rel=1e-6)
    assert report.global_norm is not None
    return report.global_norm.item()


def measure_with_function(*grads: Tensor) -> float:
    return dist_clip.clip_grad_norm_([holder(g) for g in grads], NO_LIMIT).item()


MEASURES = {"GradClipper": measure_with_clipper, "clip_grad_norm_": measure_with_function}


@pytest.fixture(scope="module")
def large() -> Tensor:
    # uniform in [0.5, 1.5): all positive, all alike, so fp32 partial sums lose the low bits of every addend
    return torch.rand(100 * MILLION, generator=torch.Generator().manual_seed(0)).add_(0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("measure", MEASURES)
def test_100_million_elements(large: Tensor, measure: str, dtype: torch.dtype) -> None:
    grad = large.to(dtype)
    assert MEASURES[measure](grad) == pytest.approx(oracle(grad), rel=1e-6)


def test_the_oracle_would_notice(large: Tensor) -> None:
    """One running fp32 sum over the same data is wrong by far more than the tolerance."""
    naive = torch._foreach_norm([large])[0].item()
    assert abs(naive / oracle(large) - 1) > 1e-5


@pytest.mark.parametrize("shape", [(100, 1_000_000), (3, 7, 999_983)], ids=str)
def test_large_matrices(large: Tensor, shape: tuple[int, ...]) -> None:
    grad = large[: math.prod(shape)].view(shape)
    assert measure_with_clipper(grad) == pytest.approx(oracle(grad), rel=1e-6)


def test_large_non_contiguous(large: Tensor) -> None:
    grad = large.view(10_000, 10_000)[:3000, :3000].t()
    assert not grad.is_contiguous()
    assert measure_with_clipper(grad) == pytest.approx(oracle(grad), rel=1e-6)


def test_many_small_tensors_beside_a_large_one(large: Tensor) -> None:
    grads = [large[: 20 * MILLION], *large[: 300 * 1000].view(300, 1000).unbind()]
    for measure in MEASURES.values():
        assert measure(*grads) == pytest.approx(oracle(*grads), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
@pytest.mark.parametrize("numel", [1000, 4096, 10_000, MILLION])
@pytest.mark.parametrize("value", [0.1, 0.7, 3.3])
def test_constant_gradients(value: float, numel: int, contiguous: bool, dtype: torch.dtype) -> None:
    """The worst case of fp32 partial sums: every addend rounds the same way, so errors add up instead of averaging out.

    Such gradients are real: the bias of a last layer under a summed loss, a tensor that a broadcast feeds.
    """
    grad = torch.full((numel, 1 if contiguous else 2), value, dtype=dtype)[:, 0]
    assert grad.is_contiguous() == contiguous
    assert measure_with_clipper(grad) == pytest.approx(oracle(grad), rel=1e-6)
    assert measure_with_function(grad) == pytest.approx(oracle(grad), rel=1e-6)


# ---- the range of fp32 -----------------------------------------------------------------------------------------------

EXTREMES: dict[str, Callable[[], list[Tensor]]] = {
    "overflow": lambda: [torch.randn(1000) * 1e30],
    "underflow": lambda: [torch.randn(1000) * 1e-30],
    "both in one list": lambda: [torch.randn(1000) * 1e30, torch.randn(1000) * 1e-30],
    "both in one tensor": lambda: [torch.cat([torch.full((10,), 1e30), torch.full((10,), 1e-30)])],
    "one large": lambda: [torch.cat([torch.zeros(5000), torch.tensor([3e38])])],
    "only subnormal": lambda: [torch.full((64,), 1e-42)],
    "bf16 overflow": lambda: [(torch.randn(1000) * 1e30).bfloat16()],
    "bf16 underflow": lambda: [(torch.randn(1000) * 1e-30).bfloat16()],
    "fp16 overflow": lambda: [torch.full((4096,), 60000.0, dtype=torch.float16)],
    "fp16 underflow": lambda: [torch.full((4096,), 6e-8, dtype=torch.float16)],
}


@pytest.mark.parametrize("case", EXTREMES)
@pytest.mark.parametrize("measure", MEASURES)
def test_squares_outside_the_range(measure: str, case: str) -> None:
    grads = EXTREMES[case]()
    assert MEASURES[measure](*grads) == pytest.approx(oracle(*grads), rel=1e-6)


def test_each_norm_has_its_own_range() -> None:
    """A large neighbour does not cost a small tensor its norm."""
    small, large = torch.randn(100) * 1e-30, torch.randn(100) * 1e30
    clipper = dist_clip.GradClipper(
        [("small", holder(small)), ("large", holder(large))], dist_clip.GlobalNorm(NO_LIMIT)
    )
    norms = clipper.clip_().tensor_norms.tolist()
    assert norms == [pytest.approx(oracle(small), rel=1e-6), pytest.approx(oracle(large), rel=1e-6)]


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_extremes_are_clipped_right(size: float) -> None:
    grad = torch.randn(1000) * size
    limit = oracle(grad) / 4
    p = holder(grad.clone())
    if size > 1:
        dist_clip.GradClipper([("p", p)], dist_clip.GlobalNorm(limit)).clip_()
        torch.testing.assert_close(p.grad, grad / 4, rtol=2e-6, atol=0.0)
    else:  # 1e-6 in the formula dwarfs such a norm: what torch does, in numbers that did not underflow
        dist_clip.GradClipper([("p", p)], dist_clip.GlobalNorm(limit)).clip_()
        s = limit / (oracle(grad) + 1e-6)
        assert p.grad is not None
        torch.testing.assert_close(p.grad.double(), grad.double() * s, rtol=0.0, atol=1e-38)


# ---- layouts of memory -----------------------------------------------------------------------------------------------

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.view(60, 40).t(),
    "every other column": lambda t: t.view(40, 60)[:, ::2],
    "permuted": lambda t: t.view(4, 20, 30).permute(2, 0, 1),
    "channels_last": lambda t: t.view(2, 3, 20, 20).contiguous(memory_format=torch.channels_last),
    "offset slice": lambda t: t[7:1207].view(30, 40),
    "expanded": lambda t: t[:40].view(40, 1).expand(40, 30),
    "empty": lambda t: t[:0],
    "0-dim": lambda t: t[5],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_memory_layouts(view: str, dtype: torch.dtype) -> None:
    base = torch.randn(2400).to(dtype)
    grad = VIEWS[view](base)
    want = grad.double().clone()
    norm = oracle(grad)
    limit = 0.25
    p = nn.Parameter(torch.zeros(grad.shape, dtype=dtype))
    p.grad = grad
    report = dist_clip.GradClipper([("p", p)], dist_clip.GlobalNorm(limit)).clip_()
    assert report.tensor_norms[0].item() == pytest.approx(norm, rel=1e-6)
    s = min(1.0, limit / (norm + 1e-6))
    assert report.scales[0].item() == pytest.approx(s, rel=1e-6)
    if view == "expanded":  # its elements share memory, so that a copy is scaled
        assert torch.equal(grad.double(), want)
    else:
        assert p.grad.data_ptr() == grad.data_ptr(), "scaled in place"
        assert p.grad.stride() == grad.stride()
    rtol = {torch.bfloat16: 2**-8, torch.float16: 2**-10}.get(dtype, 2e-6)
    torch.testing.assert_close(p.grad.double(), want * s, rtol=rtol, atol=1e-7)


# ---- low precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("s", [0.99, 0.5013, 0.97, 0.301])
def test_low_precision_gradients_are_scaled_by_an_fp32_scale(s: float, dtype: torch.dtype) -> None:
    """0.99 in bf16 is 0.98828: rounding the scale first would bias every clipped gradient the same way."""
    grads = [torch.randn(999).to(dtype), torch.randn(64, 33).to(dtype), torch.randn(3).to(dtype)]
    params = [holder(g.clone()) for g in grads]
    clipper = dist_clip.GradClipper(params, dist_clip.GlobalNorm(s * oracle(*grads)))
    scales = clipper.clip_().scales
    for p, g, scale in zip(params, grads, scales, strict=True):
        assert scale.item() == pytest.approx(s, rel=1e-4)
        assert torch.equal(p.grad, (g.float() * scale).to(dtype)), "differs from one rounding of the fp32 product"
    assert not torch.equal(params[0].grad, grads[0] * scales[0].to(dtype)), "the data cannot tell the two apart"


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_clip_grad_norm_scales_low_precision_in_fp32(dtype: torch.dtype, foreach: bool | None) -> None:
    grads = [torch.randn(999).to(dtype), torch.randn(64, 33).to(dtype)]
    params = [holder(g.clone()) for g in grads]
    limit = 0.99 * oracle(*grads)
    total = dist_clip.clip_grad_norm_(params, limit, foreach=foreach)
    assert total.dtype == torch.float32
    scale = torch.tensor(limit / (total.double().item() + 1e-6)).float()
    for p, g in zip(params, grads, strict=True):
        one_ulp_of_scale = [(g.float() * torch.nextafter(scale, torch.tensor(to))).to(dtype) for to in (0.0, 2.0)]
        exact = (g.float() * scale).to(dtype)
        assert p.grad is not None
        assert ((p.grad == exact) | (p.grad == one_ulp_of_scale[0]) | (p.grad == one_ulp_of_scale[1])).all()


def test_fp64_gradients_keep_their_precision() -> None:
    grads = [torch.randn(50, dtype=torch.float64), torch.randn(7, 7, dtype=torch.float64)]
    params = [holder(g.clone()) for g in grads]
    total = dist_clip.clip_grad_norm_(params, 0.125)
    assert total.dtype == torch.float64
    assert total.item() == pytest.approx(oracle(*grads), rel=1e-14)
    for p, g in zip(params, grads, strict=True):
        torch.testing.assert_close(p.grad, g * (0.125 / (oracle(*grads) + 1e-6)), rtol=1e-6, atol=0.0)


def test_scale_one_touches_nothing() -> None:
    """Not even in the last bit: -0.0, subnormals and low precision come through as they were."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        grad = torch.tensor([-0.0, 1e-40, 1e-3, -0.25]).to(dtype)
        p = holder(grad.clone())
        assert dist_clip.GradClipper([p], dist_clip.GlobalNorm(100.0)).clip_().scales[0].item() == 1.0
        assert torch.equal(p.grad, grad)
        assert torch.equal(torch.signbit(p.grad), torch.signbit(grad))
