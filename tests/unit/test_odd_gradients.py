"""Gradients that are not plain tensors of real numbers: complex, lazily negated, sharing memory, of other number types."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dist_clip

POLICIES = [dist_clip.GlobalNorm(1.0), dist_clip.AdaGC(warmup_steps=1), dist_clip.LogClip()]


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(len(shape)))


def pair(grad: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    """A parameter with the gradient, and a plain one beside it."""
    odd, plain = nn.Parameter(torch.zeros(grad.shape, dtype=grad.dtype)), nn.Parameter(torch.zeros(3))
    odd.grad, plain.grad = grad, torch.full((3,), 2.0)
    return odd, plain


# ---- complex ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_clip_grad_norm_of_complex_gradients_is_torchs(dtype: torch.dtype, norm_type: float) -> None:
    ours, theirs = pair(randn(5, 3, dtype=dtype)), pair(randn(5, 3, dtype=dtype))
    norm = dist_clip.clip_grad_norm_(ours, 0.5, norm_type)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs, 0.5, norm_type).float())
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def conjugated() -> Tensor:
    return randn(5, 3, dtype=torch.complex64).conj()


def transposed() -> Tensor:
    return randn(3, 5, dtype=torch.complex64).t()


def shared() -> Tensor:
    return randn(1, 3, dtype=torch.complex64).expand(5, 3)


@pytest.mark.parametrize("make", [conjugated, transposed, shared])
def test_views_of_complex_gradients(make: Any) -> None:
    odd, plain = pair(make())
    expected = make().clone()
    norm = math.sqrt(float(expected.abs().square().sum()) + 12)
    report = dist_clip.GradClipper([("odd", odd), ("plain", plain)], dist_clip.GlobalNorm(1.0)).clip_()
    assert report.global_norm is not None
    assert float(report.global_norm) == pytest.approx(norm)
    torch.testing.assert_close(odd.grad, expected / norm)


def test_each_tensor_of_complex_numbers_has_its_own_scale() -> None:
    """AdaGC after its warm-up: a gradient ten times as large is scaled to 1.04 of the first norm; the state is a scalar."""
    odd, plain = pair(randn(5, 3, dtype=torch.complex64))
    clipper = dist_clip.GradClipper([("odd", odd), ("plain", plain)], dist_clip.AdaGC(max_norm=100.0, warmup_steps=1))
    clipper.clip_()
    first = randn(5, 3, dtype=torch.complex64)
    odd.grad = first * 10
    report = clipper.clip_()
    assert report.scales.tolist() == pytest.approx([0.104, 1.0], rel=1e-5)
    torch.testing.assert_close(odd.grad, first * 1.04)
    assert clipper.state_dict()["tensors"]["odd"]["gamma"].dtype == torch.float32


def test_nan_in_an_imaginary_part_is_found() -> None:
    odd, plain = pair(torch.complex(torch.ones(4), torch.tensor([0.0, math.nan, 0.0, 0.0])))
    report = dist_clip.GradClipper([("odd", odd), ("plain", plain)], dist_clip.LogClip(), nonfinite="zero").clip_()
    assert bool(report.nonfinite)
    assert torch.equal(odd.grad, torch.zeros(4, dtype=torch.complex64))  # type: ignore[arg-type]


# ---- views that torch cannot write to --------------------------------------------------------------------------------


def expanded() -> Tensor:
    return torch.tensor([[1.0, 2.0]]).expand(3, 2)


def overlapping() -> Tensor:
    return torch.arange(1.0, 5.0).as_strided((3, 2), (1, 1))


def negated() -> Tensor:
    grad = torch.complex(torch.zeros(3, 2), torch.tensor([[1.0, 2.0]]).repeat(3, 1)).conj().imag
    assert grad.is_neg()
    return grad


def of_inference_mode() -> Tensor:
    with torch.inference_mode():
        return torch.ones(3, 2)


def with_gaps() -> Tensor:
    return torch.arange(12.0).view(3, 4)[:, ::2]


@pytest.mark.parametrize("make", [expanded, overlapping, negated, of_inference_mode, with_gaps])
@pytest.mark.parametrize("by_function", [False, True])
def test_views_are_clipped(make: Any, by_function: bool) -> None:
    """torch's clip raises for most of these, and scales overlapping elements twice."""
    odd, plain = pair(make())
    expected = torch.tensor(make().tolist())
    norm = math.sqrt(float(expected.square().sum()) + 12)
    if by_function:
        found = dist_clip.clip_grad_norm_([odd, plain], 1.0)
    else:
        report = dist_clip.GradClipper([("odd", odd), ("plain", plain)], dist_clip.GlobalNorm(1.0)).clip_()
        assert report.global_norm is not None
        found = report.global_norm
    assert float(found) == pytest.approx(norm)
    torch.testing.assert_close(torch.tensor(odd.grad.tolist()), expected / norm)  # type: ignore[union-attr]
    torch.testing.assert_close(plain.grad, torch.full((3,), 2.0 / norm))


# ---- numbers that cannot be clipped ----------------------------------------------------------------------------------


class Frozen(Tensor):
    """A subclass that torch can measure and not write to."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("mul_", "_foreach_mul_"):
            raise RuntimeError("read-only memory")
        return super().__torch_function__(func, types, args, kwargs or {})


def fp8() -> Tensor:
    return torch.ones(3, 2).to(torch.float8_e4m3fn)


def frozen() -> Tensor:
    return torch.ones(3, 2).as_subclass(Frozen)  # type: ignore[no-any-return]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize(("make", "message"), [(fp8, "float8_e4m3fn"), (frozen, "Frozen.*read-only memory")])
def test_a_gradient_that_cannot_be_clipped_is_named(make: Any, message: str, policy: dist_clip.Policy) -> None:
    odd, plain = pair(make())
    clipper = dist_clip.GradClipper([("odd", odd), ("plain", plain)], policy)
    before = str(clipper.state_dict())
    with pytest.raises(RuntimeError, match=f"rank 0: the gradient of 'odd'.*{message}"):
        clipper.clip_()
    assert str(clipper.state_dict()) == before
    assert torch.equal(plain.grad, torch.full((3,), 2.0))  # type: ignore[arg-type]


def test_clip_grad_norm_names_the_gradient_by_its_place() -> None:
    odd, plain = pair(fp8())
    with pytest.raises(RuntimeError, match=r"the gradient of 'parameters\[1\]' holds torch.float8_e4m3fn"):
        dist_clip.clip_grad_norm_([plain, odd], 1.0)
