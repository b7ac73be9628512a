"""What of `scaler=` and `detect_desync=` needs no other ranks: arguments, arithmetic, and no host sync on a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import OptState

import dist_clip
from dist_clip.desync import DesyncDetector, Standing
from dist_clip.scaling import found_inf, tell
from tests.unit.test_host_syncs import fake_cuda


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
    return DesyncDetector(lambda: Standing(0, False, (), {}), torch.device(device))


def verdict(riders: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What each of the ranks that sent `riders` concludes from their sum."""
    from dist_clip import desync

    found: list[bool] = []
    monkeypatch.setattr(desync, "compare", lambda *_: found.append(True))
    total = torch.stack(riders).sum(dim=0)
    concluded = []
    for sent in riders:
        found.clear()
        detector().judge(sent, [(Group(len(riders)), total)])
        concluded.append(bool(found))
    return concluded


@pytest.mark.parametrize("size", [2, 3, 64, 1000])
def test_every_rank_sees_one_that_differs(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.rand(20)
    alike = [detector().riders(7, False, [state]) for _ in range(size)]
    assert verdict(alike, monkeypatch) == [False] * size
    flipped = state.clone()
    flipped.view(torch.int32)[3] ^= 1
    for other in (
        detector().riders(8, False, [state]),
        detector().riders(7, True, [state]),
        detector().riders(7, False, [flipped]),
    ):
        assert verdict([other, *alike[1:]], monkeypatch) == [True] * size


def test_a_mean_that_equals_a_rank_s_own_number_does_not_deceive_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks at 6, 7 and 8: their mean is 7, their variance is not 0."""
    assert verdict([detector().riders(calls, False) for calls in (6, 7, 8)], monkeypatch) == [True] * 3


def test_sums_are_exact_at_the_largest_size() -> None:
    """2^18 ranks that all send the largest numbers: no sum on the way needs more than float64's 53 bits."""
    sent = detector().riders(131_070, True).tolist()
    assert max(sent) * 2**18 < 2**53
    assert sent[0] == 131_070


def test_the_fingerprint_sees_each_bit_and_each_place() -> None:
    state = torch.rand(64)
    own = detector().riders(0, False, [state])
    for position in range(64):
        for bit in range(31):
            other = state.clone()
            other.view(torch.int32)[position] ^= 1 << bit
            assert not torch.equal(detector().riders(0, False, [other]), own), (position, bit)
    assert not torch.equal(detector().riders(0, False, [state.flip(0)]), own)


def test_desync_numbers_have_no_host_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake CUDA. Not the flag's way to the host, which needs a device: pinned, and read one step later."""
    from dist_clip import desync

    flags = []
    monkeypatch.setattr(desync, "Verdict", lambda group, flag: flags.append(flag))
    with fake_cuda(strict=False):
        watcher = detector("cuda")
        states = [torch.zeros((), dtype=torch.int64, device="cuda"), torch.empty(5, device="cuda")]
        watcher.riders(0, False, states)  # the weights are made once
    with fake_cuda():
        watcher = detector("cuda")
        states = [torch.zeros((), dtype=torch.int64, device="cuda"), torch.empty(5, device="cuda")]
        sent = watcher.riders(3, True, states)
        watcher.judge(sent, [(Group(8), sent * 8)])
    assert [flag.device.type for flag in flags] == ["cuda"]


def test_the_scalers_flags_have_no_host_sync() -> None:
    scaler = torch.amp.GradScaler("cpu")
    with fake_cuda():
        flag = torch.zeros((), device="cuda")
        scaler._per_optimizer_states[1] = {"stage": OptState.UNSCALED, "found_inf_per_device": {flag.device: flag}}
        overflow = found_inf(scaler, flag.device)
        assert overflow.device.type == "cuda"
        tell(scaler, overflow)
