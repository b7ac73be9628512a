"""Which kernels are chosen and why; and, as contract tests, how apex and Transformer Engine are called.

Neither library runs on a CPU. The contract tests put a stand-in with the documented signature in the library's place and
check the arguments that it gets; that the libraries keep to their signature is for the tests marked gpu to show.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dist_clip
from dist_clip.frameworks.megatron.attachment import KERNELS as MEGATRONS
from dist_clip.kernels import TORCH, Preference, choose, multi_tensor, torch_kernels
from dist_clip.layout import Layout, LogicalTensor

CUDA = torch.device("cuda", 0)
ORDER = Preference(("transformer_engine", "apex", "torch"))


class L2NormContract:
    """multi_tensor_l2norm(chunk_size, noop_flag, [tensors], per_tensor) -> (norm, per-tensor norms), all fp32."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, list[torch.dtype]]] = []

    def __call__(self, chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool) -> Any:
        assert chunk_size == 2048 * 32
        assert noop_flag.dtype == torch.int32
        assert noop_flag.numel() == 1
        assert noop_flag.item() == 0
        assert per_tensor is True
        (tensors,) = tensor_lists
        assert tensors, "the kernels do not take an empty list"
        assert len({tensor.dtype for tensor in tensors}) == 1, "the kernels dispatch on the first tensor's dtype"
        assert all(tensor.is_contiguous() and tensor.numel() for tensor in tensors)
        self.calls.append((len(tensors), [tensor.dtype for tensor in tensors]))
        norms = torch.stack([tensor.float().norm() for tensor in tensors])
        return norms.norm().view(1), norms


def pretend(monkeypatch: pytest.MonkeyPatch, *libraries: str) -> L2NormContract:
    operator = L2NormContract()
    for library in multi_tensor.LIBRARIES:
        name, attribute = multi_tensor.LIBRARIES[library]
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            module = types.ModuleType(".".join(parts[:i])) if library in libraries else None
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), module)
        if library in libraries:
            setattr(sys.modules[name], attribute, operator)
    return operator


class FakeTriton:
    """In the place of TritonKernels; `broken`: why it cannot run on the device."""

    broken: Exception | None = None

    def try_on(self, device: torch.device) -> None:
        if self.broken is not None:
            raise self.broken

    power_sums = scale_ = zero_where_ = None


def pretend_triton(monkeypatch: pytest.MonkeyPatch, installed: bool, broken: Exception | None = None) -> None:
    module: Any = None
    if installed:
        module = types.ModuleType("dist_clip.kernels.triton_kernels")
        module.TritonKernels = type("Fake", (FakeTriton,), {"broken": broken})
    monkeypatch.setitem(sys.modules, "dist_clip.kernels.triton_kernels", module)


@pytest.mark.parametrize(
    ("installed", "chosen"),
    [
        ((), "torch"),
        (("triton",), "triton"),
        (("apex", "triton"), "apex"),
        (("transformer_engine",), "transformer_engine"),
        (("apex", "transformer_engine", "triton"), "transformer_engine"),
    ],
    ids=str,
)
def test_contract_order_of_megatron(installed: tuple[str, ...], chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine, then apex, then Triton, then torch."""
    pretend(monkeypatch, *installed)
    pretend_triton(monkeypatch, "triton" in installed)
    kernels = choose(MEGATRONS, CUDA)
    assert kernels.name == chosen
    assert "first installed of transformer_engine, apex, triton, torch" in kernels.why
    assert choose(MEGATRONS, torch.device("cpu")).why == "the default"


def test_contract_argument_before_environment_before_order(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "apex", "transformer_engine")
    assert choose("apex", CUDA).name == "apex"
    monkeypatch.setenv("DIST_CLIP_KERNELS", "torch")
    for preference in (None, ORDER):
        for device in (CUDA, torch.device("cpu")):
            assert choose(preference, device).name == "torch"
            assert "DIST_CLIP_KERNELS" in choose(preference, device).why
    assert choose("apex", CUDA).why == "asked for by the argument"


@pytest.mark.parametrize(
    ("installed", "broken", "chosen", "why"),
    [
        (True, None, "triton", "the first installed of triton, torch"),
        (False, None, "torch", "Triton cannot be imported"),
        (True, RuntimeError("Failed to find C compiler"), "torch", "fails on cuda:0 (Failed to find C compiler)"),
    ],
)
def test_triton_is_the_default_on_cuda(
    installed: bool, broken: Exception | None, chosen: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is installed and runs; else torch, and the reason is told. Asked for by name, it is an error."""
    pretend_triton(monkeypatch, installed, broken)
    kernels = choose(device=CUDA)
    assert kernels.name == chosen
    assert "first installed of triton, torch" in kernels.why
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
        tensor = LogicalTensor(
            "w", (2,), param.dtype, param, 2, (), frozenset({0}), frozenset({0}), lambda: None, CUDA, "whole"
        )
        return Layout((tensor,))


def test_a_clipper_chooses_by_its_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the ranks compare names the kernels: one that has them and one that has not is an error at construction."""
    told = []

    def agree(announcement: Any, *groups: Any) -> Any:
        told.append(announcement.config)
        raise InterruptedError

    monkeypatch.setattr("dist_clip.construction.agree", agree)
    for installed in (True, False):
        pretend_triton(monkeypatch, installed)
        with pytest.raises(InterruptedError):
            dist_clip.GradClipper(OnCuda(), dist_clip.GlobalNorm())
    assert "kernels=triton," in told[0]
    assert "kernels=torch," in told[1]
    assert told[0] != told[1]


def test_kernels_that_are_not_installed_or_do_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    with pytest.raises(ImportError, match="amp_C"):
        choose("apex")
    with pytest.raises(ValueError, match="'cuda'"):
        choose("cuda")
    with pytest.raises(TypeError, match="3"):
        choose(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'cuda'"):
        dist_clip.GradClipper(nn.Linear(2, 2), dist_clip.GlobalNorm(), kernels="cuda")


def test_torch_is_the_default_and_explained() -> None:
    clipper = dist_clip.GradClipper(nn.Linear(2, 2), dist_clip.GlobalNorm())
    assert clipper.kernels.name == "torch"
    assert "kernels: torch (the default)" in clipper.explain()
    assert TORCH.power_sums is torch_kernels.power_sums


def test_contract_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of one dtype go to the library; None, empty, float64 and non-contiguous tensors do not; all norms are right."""
    operator = L2NormContract()
    norms = multi_tensor.MultiTensorNorms(operator, device_type="cpu")
    shards = [
        torch.randn(30), None, torch.randn(4, 5), torch.randn(7, dtype=torch.bfloat16), torch.empty(0),
        torch.randn(6, dtype=torch.float64), torch.randn(4, 5).t(), torch.randn(3, dtype=torch.float16), torch.randn(()),
    ]  # fmt: skip
    sums = norms.power_sums(shards, 2.0, torch.device("cpu"))
    expected = torch_kernels.power_sums(shards, 2.0, torch.device("cpu"))
    assert sums.dtype == torch.float64
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=0)
    assert sorted(operator.calls, key=str) == [
        (1, [torch.bfloat16]), (1, [torch.float16]), (3, [torch.float32] * 3),
    ]  # fmt: skip
    assert torch.equal(
        norms.power_sums(shards, 1.0, torch.device("cpu")), torch_kernels.power_sums(shards, 1.0, torch.device("cpu"))
    )
    assert norms.power_sums([None], 2.0, torch.device("cpu")).tolist() == [0.0]
    assert len(operator.calls) == 3, "only the norm of order 2 is the library's"


def test_contract_a_clip_with_library_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPU tensors the library is not asked, whatever is chosen."""
    operator = pretend(monkeypatch, "apex")
    model = nn.Linear(3, 2)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(1.0), kernels="apex")
    assert clipper.clip_().global_norm.item() == pytest.approx(8**0.5, rel=1e-6)
    assert operator.calls == []
    assert "kernels: apex" in clipper.explain()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("library", multi_tensor.LIBRARIES)
def test_the_library_itself(library: str) -> None:
    try:
        operator = multi_tensor.find(library)
    except ImportError as error:
        pytest.skip(str(error))
    shards = [torch.randn(n, device="cuda", dtype=dtype) for n in (1, 1000, 65_537) for dtype in multi_tensor._DTYPES]
    sums = multi_tensor.MultiTensorNorms(operator).power_sums(shards, 2.0, torch.device("cuda"))
    torch.testing.assert_close(sums, torch_kernels.power_sums(shards, 2.0, torch.device("cuda")), rtol=1e-5, atol=0)
