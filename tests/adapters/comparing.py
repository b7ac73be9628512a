"""What training made of a model and its optimizer, to be compared bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def snapshot(net: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Weights, moments and step counts, whole: clones, by name."""
    found = {}
    for name, param in net.named_parameters():
        found[name] = param.detach()
        found |= {f"{name}.{key}": value for key, value in optimizer.state[param].items()}
    return {key: getattr(value, "full_tensor", lambda v=value: v)().clone() for key, value in found.items()}


def assert_same(one: Any, other: Any) -> None:
    """Bit for bit: tensors, and dicts and lists of them and of plain values."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    else:
        assert one == other or (one != one and other != other)
