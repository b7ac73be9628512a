"""The tables that go to the device: what is in them, and what is sent when. Streams and captures are pretended.

That the copies do what is said of them (do not wait, happen again at a replay) only a GPU shows: test_triton_kernels.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dist_clip.kernels.tables import Launch, OnDevice, Tables


class Pretended(Tables):
    """CPU tensors, a current stream and a capture to set, and copies that are seen."""

    def __init__(self) -> None:
        super().__init__("cpu", chunk=10)
        self.stream, self.capturing = 1, False
        self.sent: list[Tensor] = []
        self.pinned = 0

    def _stream(self, device: torch.device) -> tuple[int, bool]:
        return self.stream, self.capturing

    def _send(self, buffer: Tensor, device: torch.device) -> Tensor:
        self.sent.append(buffer)
        return buffer.clone()

    def _pinned(self, values: tuple[int, ...], device: torch.device) -> Tensor:
        assert not self.capturing, "memory cannot be pinned during a capture"
        self.pinned += 1
        return super()._pinned(values, device)

    def tables(self, shards: list[Any]) -> OnDevice:
        (tables,) = self.read(shards).sent
        return tables


def grads(*sizes: int) -> list[Any]:
    return [torch.zeros(size) for size in sizes]


def test_what_is_in_them() -> None:
    half, none, small, big = torch.zeros(25, dtype=torch.float16), None, torch.zeros(3), torch.zeros(5, 4)
    tables = Pretended()
    (plan,) = tables.read([half, none, small, big]).reading.plans
    assert plan.positions == [2, 3, 0]
    assert plan.launches == [Launch(torch.float32, 0, 3), Launch(torch.float16, 3, 3)]
    assert plan.chunks == 6
    assert plan.meta.tolist() == [*(3, 20, 25), *(0, 1, 3, 6), *(2, 3, 0), *(0, 1, 1, 2, 2, 2)]
    assert tables.tables([half, none, small, big]).table.tolist() == [t.data_ptr() for t in (small, big, half)]


class Subclass(Tensor):
    pass


def test_what_is_served() -> None:
    """Plain dense tensors of three dtypes. The rest is torch's, and nothing is nobody's."""
    with FakeTensorMode():
        fake = torch.empty(4)
    x = torch.zeros(4, 6)
    served = [
        x,
        x.t(),
        nn.Parameter(x),
        x.bfloat16(),
        x.half(),
        x[1:],
        x.view(2, 2, 6).permute(1, 2, 0),
        x[:, :1].t()[:, :1],
    ]
    rest = [fake, x.double(), x[:, ::2], x[:, 1:], x[:1].expand(3, 6), x.as_subclass(Subclass), x.to("meta")]
    nothing = [None, x[:0], torch.empty(0, 3)]
    shards: list[Any] = [*served, *nothing, *rest]
    reading = Pretended().read(shards).reading
    assert sorted(reading.plans[0].positions) == list(range(len(served)))
    assert reading.rest == frozenset(range(len(served) + len(nothing), len(shards)))
    assert [i for i, shard in enumerate(reading.left(shards)) if shard is not None] == sorted(reading.rest)


def test_sent_only_when_addresses_change() -> None:
    tables = Pretended()
    a, b = grads(25, 3), grads(25, 3)
    first = tables.tables(a)
    assert len(tables.sent) == 2
    assert tables.tables(a) is first
    assert len(tables.sent) == 2
    second = tables.tables(b)
    assert len(tables.sent) == 3
    assert second.meta is first.meta
    assert second.table.tolist() == [t.data_ptr() for t in b]
    assert second.buffer is not first.buffer, "its copy may be under way"
    assert first.buffer.tolist() == [t.data_ptr() for t in a]
    assert tables.tables(a) is first, "it is there still"
    others = [grads(25, 3) for _ in range(4)]
    for other in others:
        tables.tables(other)
    assert len(tables.sent) == 7
    assert tables.tables(a) is not first, "four lists are kept"


def test_another_stream_has_its_own() -> None:
    tables = Pretended()
    a = grads(5)
    first = tables.tables(a)
    tables.stream = 2
    other = tables.tables(a)
    assert other is not first
    assert other.meta is not first.meta
    tables.stream = 1
    assert tables.tables(a) is first


def test_a_capture_sends_for_itself_and_keeps_it() -> None:
    tables = Pretended()
    a, b = grads(25, 3), grads(25, 3)
    eager = tables.tables(a)
    (plan,) = tables.read(a).reading.plans
    reserve = plan.reserve[-1]

    tables.capturing = True
    step = tables.read(a)
    (captured,) = step.sent
    assert captured is not eager, "what was sent before the capture may be gone at a replay"
    assert captured.meta is not eager.meta
    assert tables.sent[-2:] == [plan.meta, reserve]
    assert captured.buffer is reserve
    assert captured.table.tolist() == reserve.tolist() == [t.data_ptr() for t in a]
    assert tables.read(step) is step, "the rest of the step uses what it sent"
    assert len(tables.sent) == 4

    tables.capturing = False
    assert tables.tables(a) is eager, "what is captured has not happened"
    later = tables.tables(b)
    assert later.buffer is not reserve
    assert reserve.tolist() == [t.data_ptr() for t in a], "a replay reads it again"

    tables.capturing = True
    again = tables.tables(b)
    assert again.buffer is not reserve
    assert tables.tables(b) is not again, "each graph must do without the others"


def test_a_capture_outlives_what_is_forgotten() -> None:
    tables = Pretended()
    a = grads(25)
    tables.tables(a)
    tables.capturing = True
    captured = tables.tables(a)
    tables.capturing = False
    for size in range(1, 100):
        tables.tables(grads(size + 30))
    assert len(tables._readings) < 50
    assert any(sent is captured for sent in tables._captured)
    assert any(sent.meta.tolist()[0] == 25 for sent in tables._captured), "its metadata is copied again, too"


def test_a_capture_without_a_step_before_it() -> None:
    tables = Pretended()
    tables.capturing = True
    with pytest.raises(RuntimeError, match="these 2 gradients cannot be clipped in a CUDA graph yet"):
        tables.tables(grads(4, 5))


def test_many_captures_in_a_row() -> None:
    tables = Pretended()
    a = grads(4, 5)
    tables.tables(a)
    for _ in range(2):
        tables.capturing = True
        buffers = [tables.tables(a).buffer for _ in range(16)]
        assert len({buffer.data_ptr() for buffer in buffers}) == 16
        with pytest.raises(RuntimeError, match="again after 16 captures"):
            tables.tables(a)
        tables.capturing = False
        tables.tables(a)
