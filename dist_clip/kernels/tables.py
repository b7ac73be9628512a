"""Tables from which one launch finds many tensors, sent to the device without a host sync.

A `Plan` holds what follows from the tensors' sizes; it is computed once and stays on the device. The tensors' addresses
may change every step, and are sent only when they have changed.

**Sending.** A copy from pageable memory waits for the stream. A copy from pinned memory does not, but the memory must
not change until the copy has happened. Each list of addresses therefore gets its own buffer from torch's caching host
allocator, which reuses a block only when the stream has passed the copy. The rest of a plan never changes.

**CUDA graphs.** A captured copy happens again at every replay, from the same pinned memory. Each capture therefore gets
its own tables and buffer. They are kept for good, because nothing signals the end of a graph: 8 bytes a tensor and a
chunk for each capture. Pinning memory is not allowed during a capture, so a plan holds some buffers in reserve, made at
a step outside of a capture (where a kernel must run before it can be captured anyway).

**Streams.** Each stream has its own tables, because one stream does not wait for what another one sends.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Number of lists of sizes that are kept: one for each set of gradients that are None.
_READINGS = 32
# Number of captures of one plan in a row, without a step outside of a capture between them.
_RESERVE = 16

Kind: TypeAlias = "tuple[torch.device, torch.dtype, int] | bool | None"
"""Device, dtype and number of elements of a tensor for the kernels; False: a tensor for torch; None: nothing to do."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """The chunks of all tensors of one dtype."""

    dtype: torch.dtype
    first_chunk: int
    chunks: int


@dataclasses.dataclass
class OnDevice:
    """A plan on its device.

    Attributes:
        meta: the plan's ``meta``, int64 [3m + 1 + chunks], on the device.
        addresses: the addresses of the m tensors' first elements.
        table: the same, int64 [m], on the device.
        buffer: the pinned memory from which ``table`` was sent; replays of a CUDA graph send it again.
    """

    meta: Tensor
    addresses: list[int]
    table: Tensor
    buffer: Tensor


@dataclasses.dataclass(eq=False)
class Plan:
    """The tensors of one device that the kernels serve, sorted by dtype.

    Attributes:
        device: where they are.
        positions: the m tensors' positions in the caller's list.
        launches: one for each dtype that occurs.
        chunks: number of chunks of all tensors.
        meta: pinned int64 [3m + 1 + chunks], the table that `triton_jit` describes.
        reserve: pinned int64 [m] tensors for the addresses of captures.
        streams: the tables of each stream.
    """

    device: torch.device
    positions: list[int]
    launches: list[Launch]
    chunks: int
    meta: Tensor
    reserve: list[Tensor] = dataclasses.field(default_factory=list)
    streams: dict[int, OnDevice] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Reading:
    """A list of tensors, divided into a plan for each device and the positions, `rest`, of the tensors for torch."""

    plans: list[Plan]
    rest: frozenset[int]

    def left(self, shards: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the list with None for all tensors but those for torch."""
        return [shard if i in self.rest else None for i, shard in enumerate(shards)]


class Tables:
    """The tables of one `TritonKernels`."""

    # Other subclasses are left to torch, because they may have no memory (a FakeTensor) or no values yet.
    _served: tuple[type, ...] = (Tensor, nn.Parameter)

    def __init__(self, device_type: str, chunk: int) -> None:
        """Make tables for the tensors of ``device_type``, with ``chunk`` elements in a chunk."""
        self._device_type = device_type
        self._chunk = chunk
        self._readings: OrderedDict[tuple[Kind, ...], Reading] = OrderedDict()
        self._captured: list[tuple[Plan, int, OnDevice]] = []

    def read(self, shards: Sequence[Tensor | None]) -> Reading:
        """Divide the tensors between the kernels and torch. Done once for a list of devices, dtypes and sizes.

        Raises:
            RuntimeError: the list is new, and a CUDA graph is being captured.
        """
        kinds = tuple([self._kind(shard) for shard in shards])
        reading = self._readings.get(kinds)
        if reading is None:
            reading = self._readings[kinds] = self._divide(kinds)
            if len(self._readings) > _READINGS:
                self._readings.popitem(last=False)
        return reading

    def on_device(self, plan: Plan, shards: Sequence[Tensor | None], *, first: bool) -> OnDevice:
        """Return the plan on its device, with the addresses of these tensors, which are sent if they have changed.

        Args:
            first: whether this is the first call of a step. In a capture the first call always sends, and the other
                calls of the step use what it sent, because a graph must not rely on what another graph sends.

        Raises:
            RuntimeError: too many captures since the last step outside of a capture.
        """
        addresses = [self._address(shards[i]) for i in plan.positions]
        stream, capturing = self._stream(plan.device)
        if capturing:
            return self._capture(plan, addresses, stream, first)
        if not plan.reserve:
            plan.reserve += self._pinned(addresses * _RESERVE, plan.device).view(_RESERVE, -1).unbind()
        known = plan.streams.get(stream)
        if known is not None and known.addresses == addresses:
            return known
        buffer = self._pinned(addresses, plan.device)
        meta = self._send(plan.meta, plan.device) if known is None else known.meta
        sent = plan.streams[stream] = OnDevice(meta, addresses, self._send(buffer, plan.device), buffer)
        return sent

    def _capture(self, plan: Plan, addresses: list[int], stream: int, first: bool) -> OnDevice:
        for its_plan, its_stream, sent in [] if first else self._captured[::-1]:
            if its_plan is plan and its_stream == stream and sent.addresses == addresses:
                return sent
        if not plan.reserve:
            raise _too_early(plan.positions)
        buffer = plan.reserve.pop()
        buffer.copy_(torch.tensor(addresses, dtype=torch.int64, device="cpu"))
        sent = OnDevice(self._send(plan.meta, plan.device), addresses, self._send(buffer, plan.device), buffer)
        self._captured.append((plan, stream, sent))
        return sent

    # ------------------------------------------------------------------------------------------------- worked out once

    def _kind(self, shard: Tensor | None) -> Kind:
        if shard is None or shard.numel() == 0:
            return None
        if type(shard) not in self._served or shard.device.type != self._device_type:
            return False
        if shard.dtype not in DTYPES or not (shard.is_contiguous() or _fills_its_memory(shard)):
            return False
        return shard.device, shard.dtype, shard.numel()

    def _divide(self, kinds: tuple[Kind, ...]) -> Reading:
        by_device: dict[torch.device, list[tuple[torch.dtype, int, int]]] = defaultdict(list)
        for i, kind in enumerate(kinds):
            if isinstance(kind, tuple):
                device, dtype, numel = kind
                by_device[device].append((dtype, i, numel))
        plans = [self._plan(device, members) for device, members in by_device.items()]
        return Reading(plans, frozenset(i for i, kind in enumerate(kinds) if kind is False))

    def _plan(self, device: torch.device, members: list[tuple[torch.dtype, int, int]]) -> Plan:
        if self._stream(device)[1]:
            raise _too_early(members)
        members.sort(key=lambda member: DTYPES.index(member[0]))
        chunks = [-(-numel // self._chunk) for _, _, numel in members]
        launches, first = [], 0
        for dtype, group in itertools.groupby(zip(members, chunks, strict=True), key=lambda pair: pair[0][0]):
            count = sum(n for _, n in group)
            launches.append(Launch(dtype, first, count))
            first += count
        positions = [i for _, i, _ in members]
        starts = itertools.accumulate(chunks, initial=0)
        owners = (e for e, count in enumerate(chunks) for _ in range(count))
        meta = [*(numel for _, _, numel in members), *starts, *positions, *owners]
        return Plan(device, positions, launches, sum(chunks), self._pinned(meta, device))

    # ------------------------------------------------------------------------------------------- what touches a device

    def _address(self, shard: Tensor | None) -> int:
        assert shard is not None
        return shard.data_ptr()

    def _stream(self, device: torch.device) -> tuple[int, bool]:
        """Return the current stream, and whether a CUDA graph is being captured on it."""
        if device.type != "cuda":
            return 0, False
        with torch.cuda.device(device):
            return torch.cuda.current_stream().cuda_stream, torch.cuda.is_current_stream_capturing()

    def _pinned(self, values: list[int], device: torch.device) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device="cpu", pin_memory=device.type != "cpu")

    def _send(self, buffer: Tensor, device: torch.device) -> Tensor:
        return buffer.to(device, non_blocking=True)


def _too_early(tensors: Sequence[object]) -> RuntimeError:
    return RuntimeError(
        f"these {len(tensors)} gradients cannot be clipped in a CUDA graph yet: clip as many of the same sizes once outside "
        f"of a capture, and again after {_RESERVE} captures"
    )


def _fills_its_memory(tensor: Tensor) -> bool:
    """Return whether the elements, in some order, are contiguous and do not overlap."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
