"""Norms by the multi-tensor kernels of apex and Transformer Engine, which Megatron users have: one launch for many tensors.

Both libraries have the same operator: ``multi_tensor_l2norm(chunk_size, noop_flag, [tensors], per_tensor)``, tensors
contiguous and of one dtype (fp32, fp16, bf16), accumulation in fp32; it returns the norm of all and, with ``per_tensor``,
that of each, fp32 [n]. A norm whose square leaves fp32's range comes out as Inf or 0, as in Megatron itself.
"""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_clip.kernels import torch_kernels

L2Norm = Callable[[int, Tensor, list[list[Tensor]], bool], tuple[Tensor, Tensor]]

CHUNK_SIZE = 2048 * 32
"""Elements a thread block works on: what both libraries' own callers use."""

# Name -> the module with the operator, and the operator. apex is not the package of that name on PyPI.
LIBRARIES = {
    "transformer_engine": ("transformer_engine.pytorch.optimizers", "multi_tensor_l2norm"),
    "apex": ("amp_C", "multi_tensor_l2norm"),
}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def find(name: str) -> L2Norm:
    """The library's operator.

    Raises:
        ImportError: it is not installed, or has no such operator.
    """
    module, attribute = LIBRARIES[name]
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ImportError(f"kernels={name!r}: {module}.{attribute} cannot be imported ({error})") from error


class MultiTensorNorms:
    """`power_sums` with a library's operator where it serves, and torch's where it does not."""

    def __init__(self, l2norm: L2Norm, device_type: str = "cuda") -> None:
        self._l2norm = l2norm
        self._device_type = device_type

    def power_sums(
        self, shards: Sequence[Tensor | None], p: float, device: torch.device, foreach: bool | None = None
    ) -> Tensor:
        """As `torch_kernels.power_sums`: float64 [n] on `device`. CPU tensors, other dtypes and other norms go to torch."""
        lists: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = defaultdict(list)
        for i, shard in enumerate(shards):
            if p == 2.0 and foreach is not False and shard is not None and self._serves(shard):
                lists[shard.device, shard.dtype].append((i, shard))
        served = {i for members in lists.values() for i, _ in members}
        rest = [None if i in served else shard for i, shard in enumerate(shards)]
        sums = torch_kernels.power_sums(rest, p, device, foreach)
        if not served:
            return sums
        entries: list[Any] = list(sums.unbind())
        for (where, _), members in lists.items():
            # Both libraries leave a non-finite norm as it is; the flag is theirs to write to.
            noop = torch.zeros(1, dtype=torch.int32, device=where)
            _, norms = self._l2norm(CHUNK_SIZE, noop, [[shard for _, shard in members]], True)
            for (i, _), square in zip(members, norms.double().square().to(device).unbind(), strict=True):
                entries[i] = square
        return torch.stack(entries)

    def _serves(self, shard: Tensor) -> bool:
        return (
            shard.device.type == self._device_type
            and shard.dtype in _DTYPES
            and shard.numel() > 0
            and shard.is_contiguous()
        )
