"""What of `scaler=` and `detect_desync=` needs no other ranks: arguments, arithmetic, and no host sync on a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import OptState

import dist_clip
from dist_clip.layouts import Layout
from dist_clip.memory import Memory
from dist_clip.reduction.desync import DesyncDetector
from dist_clip.step.grad_scaler import found_inf, share_skip
from tests.unit.test_host_syncs import Copies, fake_cuda


@pytest.mark.parametrize("scaler", [True, object(), 65536.0])
def test_scaler_must_be_one(scaler: Any) -> None:
    with pytest.raises(TypeError, match=r"scaler must be a torch\.amp\.GradScaler"):
        dist_clip.GradClipper(nn.Linear(2, 2), dist_clip.AdaGC(), scaler=scaler)


@pytest.mark.parametrize("nonfinite", ["zero", "raise"])
def test_scaler_skips(nonfinite: Any) -> None:
    with pytest.raises(ValueError, match="does not go with a GradScaler"):
        dist_clip.GradClipper(
            nn.Linear(2, 2), dist_clip.AdaGC(), scaler=torch.amp.GradScaler("cpu"), nonfinite=nonfinite
        )


def test_a_disabled_scaler_asks_for_nothing() -> None:
    net = nn.Linear(2, 2)
    clipper = dist_clip.GradClipper(net, dist_clip.GlobalNorm(), scaler=torch.amp.GradScaler("cpu", enabled=False))
    net(torch.ones(1, 2)).sum().backward()
    assert not bool(clipper.clip_().skip)


def test_detect_desync_must_be_a_bool() -> None:
    with pytest.raises(TypeError, match="detect_desync must be a bool"):
        dist_clip.GradClipper(nn.Linear(2, 2), dist_clip.AdaGC(), detect_desync="yes")  # type: ignore[arg-type]


class Group:
    """Only its size is asked for."""

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size


def detector(device: str = "cpu") -> DesyncDetector:
    rules: Any = [("*", dist_clip.GlobalNorm())]
    return DesyncDetector(Memory(rules, {}, Layout(()), {}, torch.device(device), may_skip=False))


def numbers(calls: int, again: bool, states: Any = (), device: str = "cpu") -> torch.Tensor:
    """What a rank sends that has clipped `calls` times, the last time these very gradients."""
    sender = detector(device)
    sender._memory.calls = calls
    sender._clipped.all_clipped = lambda tensors: again  # type: ignore[method-assign]
    return sender.numbers(states)


def found_out(sent: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each of the ranks that sent `sent` sees from their sum that they differ."""
    found: list[bool] = []
    monkeypatch.setattr(DesyncDetector, "compare", lambda *_: found.append(True))
    total = torch.stack(sent).sum(dim=0)
    seen = []
    for own in sent:
        found.clear()
        detector().check(own, [(Group(len(sent)), total)])  # type: ignore[list-item]
        seen.append(bool(found))
    return seen


@pytest.mark.parametrize("size", [2, 3, 64, 1000])
def test_every_rank_sees_one_that_differs(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.rand(20)
    alike = [numbers(7, False, [state]) for _ in range(size)]
    assert found_out(alike, monkeypatch) == [False] * size
    flipped = state.clone()
    flipped.view(torch.int32)[3] ^= 1
    for other in (
        numbers(8, False, [state]),
        numbers(7, True, [state]),
        numbers(7, False, [flipped]),
    ):
        assert found_out([other, *alike[1:]], monkeypatch) == [True] * size


def test_a_mean_that_equals_a_rank_s_own_number_does_not_deceive_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks at 6, 7 and 8: their mean is 7, their variance is not 0."""
    assert found_out([numbers(calls, False) for calls in (6, 7, 8)], monkeypatch) == [True] * 3


def test_sums_are_exact_at_the_largest_size() -> None:
    """2^18 ranks that all send the largest numbers: no sum on the way needs more than float64's 53 bits."""
    sent = numbers(131_070, True).tolist()
    assert max(sent) * 2**18 < 2**53
    assert sent[0] == 131_070


def test_the_fingerprint_sees_each_bit_and_each_place() -> None:
    state = torch.rand(64)
    own = numbers(0, False, [state])
    for position in range(64):
        for bit in range(31):
            other = state.clone()
            other.view(torch.int32)[position] ^= 1 << bit
            assert not torch.equal(numbers(0, False, [other]), own), (position, bit)
    assert not torch.equal(numbers(0, False, [state.flip(0)]), own)


def test_desync_numbers_have_no_host_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake CUDA. Not the flag's way to the host, which needs a device: pinned, and read one step later."""
    flags: list[torch.Tensor] = []
    monkeypatch.setattr("dist_clip.reduction.desync.HostCopy", lambda flag: flags.append(flag))
    with fake_cuda(strict=False):
        watcher = detector("cuda")
        states = [torch.zeros((), dtype=torch.int64, device="cuda"), torch.empty(5, device="cuda")]
        watcher.numbers(states)  # the weights are made once
        with Copies():
            sent = watcher.numbers(states)
            watcher.check(sent, [(Group(8), sent * 8)])  # type: ignore[list-item]
    assert [flag.device.type for flag in flags] == ["cuda"]


def test_the_scalers_flags_have_no_host_sync() -> None:
    scaler = torch.amp.GradScaler("cpu")
    with fake_cuda():
        flag = torch.zeros((), device="cuda")
        scaler._per_optimizer_states[1] = {"stage": OptState.UNSCALED, "found_inf_per_device": {flag.device: flag}}
        overflow = found_inf(scaler, flag.device)
        assert overflow.device.type == "cuda"
        scaler._scale = torch.ones((), device="cuda")
        share_skip(scaler, overflow, overflow)
