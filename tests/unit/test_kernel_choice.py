"""Which kernels are chosen, and why. A stand-in takes the place of Triton's, which do not run on a CPU."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

import dist_clip
from dist_clip.kernels import TORCH, choose, torch_kernels
from dist_clip.layouts import Layout, LogicalTensor

CUDA = torch.device("cuda", 0)


class FakeTriton:
    """In the place of TritonKernels; `broken`: why it cannot run on the device."""

    broken: Exception | None = None

    def try_on(self, device: torch.device) -> None:
        if self.broken is not None:
            raise self.broken

    power_sums = scale_ = zero_where_ = read = decide = median_guard = is_whole = None


def pretend_triton(monkeypatch: pytest.MonkeyPatch, installed: bool, broken: Exception | None = None) -> None:
    module: Any = None
    if installed:
        module = types.ModuleType("dist_clip.kernels.triton_kernels")
        module.TritonKernels = type("Fake", (FakeTriton,), {"broken": broken})
    monkeypatch.setitem(sys.modules, "dist_clip.kernels.triton_kernels", module)


@pytest.mark.parametrize(
    ("installed", "broken", "chosen", "why"),
    [
        (True, None, "triton", "the default on CUDA"),
        (False, None, "torch", "Triton cannot be imported"),
        (True, RuntimeError("Failed to find C compiler"), "torch", "fails on cuda:0 (Failed to find C compiler)"),
    ],
)
def test_triton_is_the_default_on_cuda(
    installed: bool, broken: Exception | None, chosen: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is installed and runs; else torch, and the reason is sent. Asked for by name, it is an error."""
    pretend_triton(monkeypatch, installed, broken)
    kernels = choose(device=CUDA)
    assert kernels.name == chosen
    assert why in kernels.why
    assert choose().name == "torch", "on a CPU it is not tried"
    if chosen == "torch":
        with pytest.raises(ImportError, match="kernels='triton'"):
            choose("triton", CUDA)
        with pytest.raises(ImportError, match="kernels='triton'"):
            dist_clip.GradClipper(OnCuda(), dist_clip.GlobalNorm(), kernels="triton")
    monkeypatch.setenv("DIST_CLIP_KERNELS", "torch")
    assert choose(device=CUDA).name == "torch"


class OnCuda:
    """A layout of one tensor on a CUDA device, of which nothing is read."""

    def read_layout(self, skip: Any) -> Layout:
        param = nn.Parameter(torch.zeros(2))
        here = frozenset({0})
        tensor = LogicalTensor("w", (2,), param.dtype, param, 2, (), here, here, CUDA, "whole")
        return Layout((tensor,))


def test_a_clipper_chooses_by_its_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the ranks compare names the kernels: one that has them and one that has not is an error at construction."""
    sent = []

    def agree(mine: Any, *groups: Any) -> Any:
        sent.append(mine.options)
        raise InterruptedError

    monkeypatch.setattr("dist_clip.construction.draft.agree", agree)
    for installed in (True, False):
        pretend_triton(monkeypatch, installed)
        with pytest.raises(InterruptedError):
            dist_clip.GradClipper(OnCuda(), dist_clip.GlobalNorm())
    assert "kernels=triton" in sent[0]
    assert "kernels=torch" in sent[1]
    assert sent[0] != sent[1]


def test_kernels_that_are_not_installed_or_do_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_triton(monkeypatch, installed=False)
    with pytest.raises(ImportError, match="Triton cannot be imported"):
        choose("triton")
    for name in ("cuda", "apex"):
        with pytest.raises(ValueError, match=f"'triton' or 'torch', got '{name}'"):
            choose(name)
    with pytest.raises(TypeError, match="3"):
        choose(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'cuda'"):
        dist_clip.GradClipper(nn.Linear(2, 2), dist_clip.GlobalNorm(), kernels="cuda")


def test_torch_is_the_default_and_explained() -> None:
    clipper = dist_clip.GradClipper(nn.Linear(2, 2), dist_clip.GlobalNorm())
    assert "torch kernels" in repr(clipper)
    assert "kernels: torch (the default)" in clipper.explain()
    assert TORCH.power_sums is torch_kernels.power_sums
