"""The shard of a gradient in the form that the kernels work on: real numbers, each in a place of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dist_clip.layouts.process_groups import current_rank

REAL = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
"""The types of the numbers that the kernels take."""

_COMPLEX = frozenset({torch.complex64, torch.complex128, torch.complex32})


def usable(name: str, local: Tensor, put: Callable[[Tensor], None]) -> Tensor:
    """Return the shard `local` of a gradient as real numbers that can be written to in place.

    A complex number counts as two real ones, which gives the norm of the complex numbers and scales them.

    Args:
        name: the tensor's name, for errors.
        put: makes a copy the gradient. It is called if torch cannot write to `local`: its elements share memory (an expanded
            tensor), it is negated or conjugated lazily, or inference mode made it.

    Raises:
        RuntimeError: the gradient is sparse, or its numbers are of a type that cannot be clipped.
    """
    if (
        local.dtype in REAL
        and local.layout is torch.strided
        and local.is_contiguous()
        and not local.is_neg()
        and not local.is_inference()
    ):
        return local
    if local.layout is not torch.strided:
        raise RuntimeError(
            f"rank {current_rank()}: the gradient of {name!r} is sparse ({local.layout}), which cannot be clipped: use "
            "dense gradients (sparse=False), or exclude this tensor"
        )
    if local.dtype not in REAL and local.dtype not in _COMPLEX:
        raise RuntimeError(
            f"rank {current_rank()}: the gradient of {name!r} holds {local.dtype}, which cannot be clipped: clip it in the "
            "type that the optimizer steps in (fp32, bf16, fp16), or exclude this tensor"
        )
    fixed = local.is_inference() and not torch.is_inference_mode_enabled()
    if fixed or local.is_neg() or local.is_conj() or _overlaps(local):
        local = local.resolve_conj().resolve_neg().clone()
        put(local)
    return real(local)


def real(values: Tensor) -> Tensor:
    """Return the tensor, or the view of a complex one that has a further dimension for real and imaginary parts."""
    return torch.view_as_real(values) if values.is_complex() else values


def _overlaps(tensor: Tensor) -> bool:
    """Return whether elements may share memory."""
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < extent:
                return True
            extent += stride * (size - 1)
    return False
