"""The gathering of whole gradients, piece by piece, by means that the norm reduction has no part in.

Ranks exchange fixed-size records of their pieces. One rank of each copy then receives the other ranks' pieces one
after the other, in chunks, and adds up plain squares. Neither norm groups nor the reduction plan take part.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dist_clip.layouts import LogicalTensor
from dist_clip.layouts.process_groups import current_rank, device_of
from dist_clip.reduction.plan import all_gather

CHUNK = 1 << 20
"""Elements that are sent and measured at once. They bound the memory, whatever the size of a tensor.

Only a shard that is not contiguous is copied as a whole.
"""


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a rank tells the others of its piece of one tensor.

    Attributes:
        listed: whether the tensor is in the rank's layout.
        holds: whether the rank is among the holders of a copy.
        has_grad: whether it has a gradient.
        wide: whether the gradient is float64.
        varied: whether the piece's weights, or its gradients, are not all the same number.
        numel: number of real numbers, two for a complex element.
        copy: identifies the ranks that together hold the rank's copy, as its layout says.
        weights: fingerprint of the bits of the piece's weights; 0 where the piece is a whole copy.
        found: norm of the whole tensor, as the clipper finds it on this rank.
        found_here: norm of the piece, as the clipper finds it.
        norm: norm of the piece's gradient, measured.
        projection: sum of the gradient's elements, each times a factor that its position decides.
    """

    listed: bool = False
    holds: bool = False
    has_grad: bool = False
    wide: bool = False
    varied: bool = False
    numel: int = 0
    copy: int = 0
    weights: int = 0
    found: float = 0.0
    found_here: float = 0.0
    norm: float = 0.0
    projection: float = 0.0

    FORMAT = struct.Struct("=5?3q4d")

    def pack(self) -> bytes:
        return self.FORMAT.pack(*dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Copy:
    """One copy, as the rank that put it together found it.

    Attributes:
        owner: whether the sender put a copy together.
        agrees: whether the ranks that told the sender of its copy are those that its layout says.
        norm: norm of the copy's gradient; 0 unless `owner`.
    """

    owner: bool = False
    agrees: bool = True
    norm: float = 0.0

    FORMAT = struct.Struct("=2?d")

    def pack(self) -> bytes:
        return self.FORMAT.pack(*dataclasses.astuple(self))


_Record = TypeVar("_Record", Piece, Copy)


def per_element(dtype: torch.dtype) -> int:
    """Return of how many real numbers an element consists."""
    return 2 if dtype.is_complex else 1


class Gatherer:
    """Exchanges records and pieces over `group`; None: a single process.

    Args:
        group: all ranks that train the model.
        device: where the clipper's norms are reduced.
        measure_on: where chunks are measured; None: where they are.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device, measure_on: torch.device | None) -> None:
        self._group = group
        self._rank = current_rank()
        self._ranks = [self._rank] if group is None else dist.get_process_group_ranks(group)
        self._device = _sends_from(group, device)
        self._measure_on = measure_on

    def exchange(self, records: Sequence[_Record]) -> list[dict[int, _Record]]:
        """Return, for each record, what each rank passed in its place, by global rank. Collective."""
        kind = type(records[0])
        payload = torch.frombuffer(bytearray(b"".join(record.pack() for record in records)), dtype=torch.uint8)
        if self._group is None:
            everything = payload
        else:
            everything = torch.empty(len(self._ranks) * len(payload), dtype=torch.uint8, device=self._device)
            all_gather(everything, payload.to(self._device), group=self._group)
        raw = everything.cpu().numpy().tobytes()
        told = [kind(*fields) for fields in kind.FORMAT.iter_unpack(raw)]  # rank by rank
        return [dict(zip(self._ranks, told[i :: len(records)], strict=True)) for i in range(len(records))]

    def describe(self, tensor: LogicalTensor | None, grad: Tensor | None, found: float, found_here: float) -> Piece:
        """Return what this rank tells the others of its piece; `tensor` is None if it is not in this rank's layout."""
        if tensor is None:
            return Piece()
        holds = bool(tensor.replica_ranks)
        divided = len(tensor.replica_ranks) > 1
        squares = projection = 0.0
        varied, weights = False, 0
        if grad is not None:
            squares, projection, varied = self._measure(grad)
        if divided and tensor.shard_numel:
            weight = tensor.weight()
            if weight is not None:
                weights, weight_varied = _fingerprint(weight)
                varied = varied or weight_varied
        return Piece(
            listed=True,
            holds=holds,
            has_grad=grad is not None,
            wide=grad is not None and grad.dtype == torch.float64,
            varied=varied,
            numel=tensor.shard_numel * per_element(tensor.dtype) if grad is None else grad.numel(),
            copy=_identify(tensor.replica_ranks),
            weights=weights,
            found=found,
            found_here=found_here,
            norm=squares**0.5,
            projection=projection,
        )

    def assemble(self, index: int, tensor: LogicalTensor | None, grad: Tensor | None, pieces: dict[int, Piece]) -> Copy:
        """Send this rank's piece to the rank that puts its copy together, or put the copy together.

        Args:
            index: the tensor's number; the ranks of a copy take turns with it.
            pieces: what each rank told of the tensor.
        """
        if tensor is None or not pieces[self._rank].holds:
            return Copy()
        mine = pieces[self._rank].copy
        members = [rank for rank, piece in pieces.items() if piece.holds and piece.copy == mine]
        agrees = frozenset(members) == tensor.replica_ranks
        owner = members[index % len(members)]
        if owner != self._rank:
            if grad is not None:
                for chunk in chunks(grad):
                    self._pass(dist.isend, chunk.to(self._device, self._dtype(pieces[self._rank])).contiguous(), owner)
            return Copy(agrees=agrees)
        squares = 0.0
        for rank in members:
            if rank == self._rank:
                squares += 0.0 if grad is None else sum(self._squares(chunk) for chunk in chunks(grad))
            elif pieces[rank].has_grad:
                for start in range(0, pieces[rank].numel, CHUNK):
                    count = min(CHUNK, pieces[rank].numel - start)
                    chunk = torch.empty(count, dtype=self._dtype(pieces[rank]), device=self._device)
                    self._pass(dist.irecv, chunk, rank)
                    squares += self._squares(chunk)
        return Copy(True, agrees, squares**0.5)

    def _pass(self, operation: Callable[..., dist.Work | None], chunk: Tensor, peer: int) -> None:
        # As a batch, because a lone send makes NCCL open a communicator for each pair of ranks.
        for work in dist.batch_isend_irecv([dist.P2POp(operation, chunk, peer, self._group)]):
            work.wait()

    def _dtype(self, piece: Piece) -> torch.dtype:
        return torch.float64 if piece.wide else torch.float32

    def _squares(self, chunk: Tensor) -> float:
        return float(chunk.to(self._measure_on or chunk.device).double().square().sum())

    def _measure(self, grad: Tensor) -> tuple[float, float, bool]:
        """Return the gradient's sum of squares, its projection, and whether its elements are not all the same."""
        squares = projection = 0.0
        low: float | None = None
        high: float | None = None
        start = 0
        for chunk in chunks(grad):
            values = chunk.to(self._measure_on or chunk.device).double()
            positions = torch.arange(start, start + len(values), dtype=torch.float64, device=values.device)
            squares += float(values.square().sum())
            projection += float((values * positions.cos()).sum())
            least, most = float(values.min()), float(values.max())
            low, high = least if low is None else min(low, least), most if high is None else max(high, most)
            start += len(values)
        return squares, projection, low is not None and high is not None and low < high


def _sends_from(group: dist.ProcessGroup | None, device: torch.device) -> torch.device:
    """Return `device` if `group` can send from it, else a device from which it can."""
    if group is None or dist.get_backend(group) == "gloo":  # gloo reduces CUDA tensors, but does not send them
        return torch.device("cpu")
    return device if device.type in {each.type for each in group._device_types} else device_of(group)


def chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the elements of `tensor` in order, flat, at most `CHUNK` at once."""
    flat = tensor.detach().reshape(-1)
    for start in range(0, len(flat), CHUNK):
        yield flat[start : start + CHUNK]


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _fingerprint(tensor: Tensor) -> tuple[int, bool]:
    """Return a number that tells tensors of other bits or lengths apart, and whether not all elements are the same."""
    total, start = len(tensor.reshape(-1)), 0
    first: Tensor | None = None
    varied = False
    for chunk in chunks(tensor):
        bits = chunk.contiguous().view(_INTEGERS[chunk.element_size()]).to(torch.int64)
        # Integers add up to the same number in any order; they wrap around.
        factors = torch.arange(start, start + len(bits), device=bits.device) * 0x9E3779B97F4A7C1 + 0x5851F42D4C957F2D
        total = (total * 31 + int((bits * (factors | 1)).sum())) & 0x7FFFFFFFFFFFFFFF
        first = bits[:1] if first is None else first
        varied = varied or bool((bits != first).any())
        start += len(bits)
    return total, varied


def _identify(ranks: frozenset[int]) -> int:
    digest = hashlib.blake2b(repr(sorted(ranks)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
