"""Tables from which one launch finds many tensors, sent to the device without a host sync.

A `Plan` holds what follows from the tensors' sizes; it is computed once and stays on the device. The tensors' addresses
may change every step, and are sent only when they are none of the last few lists of addresses.

**The host's time.** A step asks every tensor a few questions, which takes most of the host's time where they are many. For
plain contiguous tensors `map` asks them without Python in between; whatever else is in a list is looked at one by one.

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
import operator
from array import array
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from dist_clip.layouts import UsualGradients

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Number of lists of sizes that are kept: one for each set of gradients that are None.
_READINGS = 32
# Number of captures of one plan in a row, without a step outside of a capture between them.
_RESERVE = 16
# Number of lists of addresses that a stream keeps on the device. torch's allocator often alternates between a few.
_LISTS = 4

_dtype = operator.attrgetter("dtype")

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
        table: the addresses of the m tensors' first elements, int64 [m], on the device.
        buffer: the pinned memory from which ``table`` was sent; replays of a CUDA graph send it again.
    """

    meta: Tensor
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
        in_order: whether the m tensors are the caller's list as it is.
        reserve: pinned int64 [m] tensors for the addresses of captures.
        streams: the last few tables of each stream, by their addresses.
    """

    device: torch.device
    positions: list[int]
    launches: list[Launch]
    chunks: int
    meta: Tensor
    in_order: bool
    reserve: list[Tensor] = dataclasses.field(default_factory=list)
    streams: defaultdict[int, OrderedDict[tuple[int, ...], OnDevice]] = dataclasses.field(
        default_factory=lambda: defaultdict(OrderedDict)
    )


@dataclasses.dataclass(frozen=True)
class Reading:
    """A list of tensors, divided into a plan for each device and the positions, `rest`, of the tensors for torch."""

    plans: list[Plan]
    rest: frozenset[int]

    def left(self, shards: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the list with None for all tensors but those for torch."""
        return [shard if i in self.rest else None for i, shard in enumerate(shards)]


class Shards(list["Tensor | None"]):
    """A list of tensors with what the kernels know of it, so that one step asks and sends once.

    It is for one step: it keeps its tensors, and goes with them. The list must stay as it is.
    """

    def __init__(self, shards: Sequence[Tensor | None], reading: Reading, sent: list[OnDevice]) -> None:
        super().__init__(shards)
        self.reading, self.sent = reading, sent

    @property
    def tables(self) -> zip[tuple[Plan, OnDevice]]:
        """The plans with their tables on the device."""
        return zip(self.reading.plans, self.sent, strict=True)


class Tables:
    """The tables of one `TritonKernels`."""

    # Other subclasses are left to torch, because they may have no memory (a FakeTensor) or no values yet.
    _served: tuple[type, ...] = (Tensor, nn.Parameter)

    def __init__(self, device_type: str, chunk: int) -> None:
        """Make tables for the tensors of ``device_type``, with ``chunk`` elements in a chunk."""
        self._device_type = device_type
        self._chunk = chunk
        self._readings: OrderedDict[tuple[Any, ...], Reading] = OrderedDict()
        self._captured: list[OnDevice] = []

    def read(self, shards: Sequence[Tensor | None]) -> Shards:
        """Divide the tensors between the kernels and torch, and send the addresses of those for the kernels.

        Raises:
            RuntimeError: a CUDA graph is being captured, and the list is of other devices, dtypes or sizes than lists that
                were read before, or too many were captured since the last step outside of a capture.
        """
        if isinstance(shards, Shards):
            return shards
        facts = self._facts(shards)
        reading = self._readings.get(facts)
        if reading is None:
            reading = self._readings[facts] = self._divide(tuple(map(self._kind, shards)))
            if len(self._readings) > _READINGS:
                self._readings.popitem(last=False)
        return Shards(shards, reading, [self._on_device(plan, shards) for plan in reading.plans])

    def _facts(self, shards: Sequence[Any]) -> tuple[Any, ...]:
        """Return what decides how a list is divided; lists of the same facts are divided in the same way."""
        dtypes = None
        if isinstance(shards, UsualGradients):
            dtypes = shards.dtypes
        elif set(map(type, shards)).issubset(self._served) and all(map(Tensor.is_contiguous, shards)):
            dtypes = tuple(map(_dtype, shards))
        if dtypes is not None:
            tensors: Any = shards
            return tuple(map(Tensor.numel, tensors)), dtypes, tuple(map(Tensor.get_device, tensors))
        return tuple(map(self._kind, shards))

    def _on_device(self, plan: Plan, shards: Sequence[Any]) -> OnDevice:
        """Return the plan on its device, with the addresses of these tensors, which are sent unless they are there."""
        here = shards if plan.in_order else [shards[i] for i in plan.positions]
        addresses = self._addresses(here)
        stream, capturing = self._stream(plan.device)
        if capturing:
            if not plan.reserve:
                raise _too_early(plan.positions)
            buffer = plan.reserve.pop()
            buffer.copy_(_int64(addresses))
            # A graph must not rely on what an earlier step, or another graph, has sent.
            sent = OnDevice(self._send(plan.meta, plan.device), self._send(buffer, plan.device), buffer)
            self._captured.append(sent)
            return sent
        if not plan.reserve:
            plan.reserve += self._pinned(addresses * _RESERVE, plan.device).view(_RESERVE, -1).unbind()
        kept = plan.streams[stream]
        known = kept.get(addresses)
        if known is not None:
            kept.move_to_end(addresses)
            return known
        buffer = self._pinned(addresses, plan.device)
        meta = next(iter(kept.values())).meta if kept else self._send(plan.meta, plan.device)
        known = kept[addresses] = OnDevice(meta, self._send(buffer, plan.device), buffer)
        if len(kept) > _LISTS:
            kept.popitem(last=False)
        return known

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
        plans = [self._plan(device, members, len(kinds)) for device, members in by_device.items()]
        return Reading(plans, frozenset(i for i, kind in enumerate(kinds) if kind is False))

    def _plan(self, device: torch.device, members: list[tuple[torch.dtype, int, int]], number: int) -> Plan:
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
        in_order = positions == list(range(number))
        starts = itertools.accumulate(chunks, initial=0)
        owners = (e for e, count in enumerate(chunks) for _ in range(count))
        meta = [*(numel for _, _, numel in members), *starts, *positions, *owners]
        return Plan(device, positions, launches, sum(chunks), self._pinned(tuple(meta), device), in_order)

    # ------------------------------------------------------------------------------------------- what touches a device

    def _addresses(self, shards: Sequence[Tensor]) -> tuple[int, ...]:
        return tuple(map(Tensor.data_ptr, shards))

    def _stream(self, device: torch.device) -> tuple[int, bool]:
        """Return the current stream, and whether a CUDA graph is being captured on it."""
        if device.type != "cuda":
            return 0, False
        with torch.cuda.device(device):
            return torch.cuda.current_stream().cuda_stream, torch.cuda.is_current_stream_capturing()

    def _pinned(self, values: tuple[int, ...], device: torch.device) -> Tensor:
        pinned = torch.empty(len(values), dtype=torch.int64, device="cpu", pin_memory=device.type != "cpu")
        return pinned.copy_(_int64(values))

    def _send(self, buffer: Tensor, device: torch.device) -> Tensor:
        return buffer.to(device, non_blocking=True)


def _int64(values: tuple[int, ...]) -> Tensor:
    """Return int64 [k] on the CPU; five times as fast as torch.tensor."""
    return torch.frombuffer(array("q", values), dtype=torch.int64)


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
