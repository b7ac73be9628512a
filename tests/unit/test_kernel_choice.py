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
from dist_clip.kernels import TORCH, choose, multi_tensor, torch_kernels

ORDER = ("transformer_engine", "apex", "torch")


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


@pytest.mark.parametrize(
    ("installed", "chosen"),
    [
        ((), "torch"),
        (("apex",), "apex"),
        (("transformer_engine",), "transformer_engine"),
        (("apex", "transformer_engine"), "transformer_engine"),
    ],
    ids=str,
)
def test_contract_order_of_megatron(installed: tuple[str, ...], chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine, then apex, then torch."""
    pretend(monkeypatch, *installed)
    kernels = choose(order=ORDER)
    assert kernels.name == chosen
    assert "first installed of transformer_engine, apex, torch" in kernels.why


def test_contract_argument_before_environment_before_order(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "apex", "transformer_engine")
    assert choose("apex", order=ORDER).name == "apex"
    monkeypatch.setenv("DIST_CLIP_KERNELS", "torch")
    assert choose(order=ORDER).name == "torch"
    assert "DIST_CLIP_KERNELS" in choose(order=ORDER).why
    assert choose("apex", order=ORDER).why == "asked for by the argument"


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
