"""Norms and scales by the kernels of `triton_jit`, in a number of launches that does not depend on that of tensors.

Importing this module needs Triton, which CUDA builds of torch install on Linux.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from dist_clip.kernels import torch_kernels, triton_decide, triton_guard, triton_jit
from dist_clip.kernels.tables import Launch, OnDevice, Plan, Shards, Tables

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class TritonKernels:
    """`power_sums`, `scale_` and `zero_where_` of `torch_kernels`, with Triton for the tensors that it can serve.

    Triton serves fp32, bf16 and fp16 tensors of any alignment that fill their memory (contiguous, or a permutation of
    it) on ``device_type``. Torch does everything else: tensors of other devices, float64, other strides, tensor
    subclasses, norms of another order than 2, ``foreach=False``.

    A call launches one kernel for each device and dtype, whatever the number of tensors, and `power_sums` one more for
    each device. There is no host sync, and a CUDA graph can capture a call once a step has run outside of a capture
    (see `tables`). Two calls with the same tensors give the bitwise same result, on any rank with the same kind of GPU
    and the same Triton.
    """

    def __init__(self, device_type: str = "cuda") -> None:
        self._tables = Tables(device_type, triton_jit.CHUNK)

    def try_on(self, device: torch.device) -> None:
        """Launch every kernel on `device` and compare with torch's, so that kernels that do not work fail now. Syncs.

        Raises:
            ArithmeticError: a result differs from torch's.
            Exception: what Triton or the driver raises.
        """
        if device.type == "cuda" and not torch.cuda.is_available():
            return  # a fake device
        # Sizes below, at and above a chunk; every second tensor is at an address that is not a multiple of 16.
        sizes = (1, 1000, triton_jit.CHUNK, 2 * triton_jit.CHUNK + 7)
        generator = torch.Generator().manual_seed(0)
        memory = [torch.randn(size + 1, generator=generator).to(device, dtype) for dtype in _DTYPES for size in sizes]
        mine = [values[i % 2 :] for i, values in enumerate(memory)]
        theirs = [tensor.clone() for tensor in mine]
        scales = torch.linspace(1.0, 0.1, len(mine), dtype=torch.float64).to(device)
        flags = torch.arange(len(mine), device=device) % 5 == 1
        sums, expected = self.power_sums(mine, 2.0, device), torch_kernels.power_sums(theirs, 2.0, device)
        self.scale_(mine, scales)
        torch_kernels.scale_(theirs, scales)
        same = all(map(torch.equal, mine, theirs))
        self.zero_where_(mine, flags)
        torch_kernels.zero_where_(theirs, flags)
        if (
            not same
            or not all(map(torch.equal, mine, theirs))
            or not torch.allclose(sums, expected, rtol=1e-6, atol=0.0)
        ):
            raise ArithmeticError(f"what it computes on {device} is not what torch computes")

    def read(self, shards: Sequence[Tensor | None]) -> Shards:
        """Return the list with what the other functions need to know of it, which they then need not find out again.

        Raises:
            RuntimeError: a CUDA graph is being captured, and no list like this was read outside of a capture.
        """
        return self._tables.read(shards)

    def power_sums(
        self, shards: Sequence[Tensor | None], p: float, device: torch.device, foreach: bool | None = None
    ) -> Tensor:
        """Return the power sums, float64 [n] on ``device``, as `torch_kernels.power_sums` does.

        Squares are added in fp32, eight at a time, then in float64. The result is off by at most 2.4e-7 of the norm,
        also where squares overflow or underflow fp32.
        """
        if p != 2.0 or foreach is False:
            return torch_kernels.power_sums(shards, p, device, foreach)
        shards = self.read(shards)
        if not shards.sent:
            return torch_kernels.power_sums(shards, p, device, foreach)
        parts = []
        for plan, tables in shards.tables:
            partials = torch.empty(plan.chunks, dtype=torch.float64, device=plan.device)
            for launch in plan.launches:
                self._launch_chunks(triton_jit.chunk_squares, launch, plan, tables, partials)
            m = len(plan.positions)
            make = torch.empty if m == len(shards) else torch.zeros
            sums = make(len(shards), dtype=torch.float64, device=plan.device)
            self._launch(triton_jit.add_chunks, m, plan.device, tables.meta, m, partials, sums, LANES=triton_jit.LANES)
            parts.append(sums.to(device, non_blocking=True))
        if shards.reading.rest:
            parts.append(torch_kernels.power_sums(shards.reading.left(shards), p, device, foreach))
        total = parts[0]
        for part in parts[1:]:
            total = total + part  # at each position all parts but one are 0
        return total

    def scale_(
        self, shards: Sequence[Tensor | None], scales: Tensor, *, uniform: bool = False, foreach: bool | None = None
    ) -> None:
        """Multiply each tensor in place by the fp32 value of its scale, in fp32, rounded once; no work where it is 1.

        Other tensors than those that Triton serves are scaled by `torch_kernels.scale_`.
        """
        if foreach is False:
            return torch_kernels.scale_(shards, scales, uniform=uniform, foreach=foreach)
        rest = self._write(triton_jit.scale_chunks, shards, scales, torch.float32)
        if rest is not None:
            torch_kernels.scale_(rest, scales, uniform=uniform, foreach=foreach)
        return None

    def is_whole(self, shards: list[Tensor | None]) -> bool:
        """Whether these kernels, on one device, do all that there is to do with the gradients, which `read` returned."""
        return isinstance(shards, Shards) and len(shards.sent) == 1 and not shards.reading.rest

    def decide(
        self,
        sums: Tensor,
        index: Tensor,
        state: Sequence[Tensor],
        out: tuple[Tensor, ...],
        constants: Mapping[str, float],
    ) -> None:
        """Decide for the tensors of one policy group, in one launch.

        Args:
            sums, index: as in `triton_decide.decide`.
            state: the policy's state, as `dist_clip.kernels.rules` says; updated in place.
            out: t, norms, exact, scales, nonfinite and skip, as there.
            constants: the constants there, as `dist_clip.kernels.rules.constants` returns them.
        """
        self._launch(
            triton_decide.decide,
            1,
            sums.device,
            sums,
            index,
            len(index),
            *state,
            *[sums] * (3 - len(state)),
            *out,
            BLOCK=triton_decide.BLOCK,
            enable_fp_fusion=False,
            **constants,
        )

    def median_guard(
        self, sums: Tensor, state: Sequence[Tensor], parameters: Mapping[str, float], skip: Tensor
    ) -> None:
        """Decide whether the step is skipped, in one launch.

        Args:
            sums, skip: as in `triton_guard.median_guard`.
            state: the guard's state and its skips in a row, in the order there.
            parameters: the constants there, by name.
        """
        self._launch(
            triton_guard.median_guard,
            1,
            sums.device,
            sums,
            len(sums),
            *state,
            skip,
            EDGES=triton_guard.EDGES,
            BLOCK=triton_guard.BLOCK,
            enable_fp_fusion=False,
            **parameters,
        )

    def zero_where_(self, shards: Sequence[Tensor | None], flags: Tensor) -> None:
        """Set each tensor whose flag (bool [n]) is set to exactly 0, as `torch_kernels.zero_where_` does."""
        rest = self._write(triton_jit.zero_chunks, shards, flags, torch.uint8)
        if rest is not None:
            torch_kernels.zero_where_(rest, flags)

    def _write(
        self, kernel: Any, shards: Sequence[Tensor | None], values: Tensor, dtype: torch.dtype
    ) -> list[Tensor | None] | None:
        """Launch a kernel that writes to the tensors, with one value of `dtype` each; return the tensors for torch."""
        shards = self.read(shards)
        for plan, tables in shards.tables:
            local = values.to(plan.device, dtype, non_blocking=True).contiguous()
            for launch in plan.launches:
                self._launch_chunks(kernel, launch, plan, tables, local)
        return shards.reading.left(shards) if shards.reading.rest else None

    def _launch_chunks(self, kernel: Any, launch: Launch, plan: Plan, tables: OnDevice, data: Tensor) -> None:
        self._launch(
            kernel,
            launch.chunks,
            plan.device,
            tables.table,
            tables.meta,
            len(plan.positions),
            launch.first_chunk,
            data,
            DTYPE=_DTYPES[launch.dtype],
            TILE=triton_jit.TILE,
            TILES=triton_jit.TILES,
            num_warps=triton_jit.WARPS,
        )

    def _launch(self, kernel: Any, programs: int, device: torch.device, *args: Any, **constants: Any) -> None:
        # Triton launches on the current device's current stream.
        elsewhere = device.type == "cuda" and torch.cuda.current_device() != device.index
        with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
            kernel[(programs,)](*args, **constants)
