"""Stands in for the package `emerging_optimizers`, from which Megatron takes what its Muon is made of.

The package is installed from its repository, so CI does not have it. Here are the few names that megatron-core 0.16.1 and
0.19 import, written from Muon's description: momentum as a moving average, five steps of Newton and Schulz. Which matrices
Muon steps, how it cuts queries, keys and values, and its parallel modes are Megatron's own code, which runs on either.
"""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


class OrthogonalizedOptimizer(torch.optim.Optimizer):
    """A step of fixed length along the orthogonalized momentum. Version 0.1 names its arguments differently from 0.2."""

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float,
        *,
        weight_decay: float,
        scaled_orthogonalize_fn: Any,
        nesterov: bool = False,
        use_nesterov: bool = False,
        **_: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.scaled_orthogonalize_fn = scaled_orthogonalize_fn
        self.nesterov = nesterov or use_nesterov

    @torch.no_grad()
    def _init_group(self, group: dict[str, Any], skip_non_grad_params: bool = True) -> None:
        for param in group["params"]:
            if not self.state[param] and not (skip_non_grad_params and param.grad is None):
                self.state[param]["momentum_buffer"] = torch.zeros_like(param)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            self._init_group(group)
            for param in group["params"]:
                if param.grad is None:
                    continue
                average = self.state[param]["momentum_buffer"]
                average.lerp_(param.grad, 1 - group["momentum"])
                direction = param.grad.lerp(average, group["momentum"]) if self.nesterov else average
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.add_(self.orthogonalize(param, direction), alpha=-group["lr"])

    def orthogonalize(self, param: Tensor, direction: Tensor, **_: Any) -> Tensor:
        raise NotImplementedError  # Megatron's


class AdaptiveMuon(OrthogonalizedOptimizer):
    """There to be inherited from."""


def newton_schulz(x: Tensor, steps: int, rows: bool, group: Any = None) -> Tensor:
    """All singular values of `x` brought near 1. `rows`: its short side is that of the rows. `group`: holds the columns."""
    x = x if rows else x.mT
    square = x.square().sum()
    if group is not None:
        dist.all_reduce(square, group=group)
    x = x / square.sqrt().clamp_min(1e-15)
    for step in range(steps):
        a, b, c = COEFFICIENTS[step % len(COEFFICIENTS)]
        gram = x @ x.mT
        if group is not None:
            dist.all_reduce(gram, group=group)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if rows else x.mT


def newton_schulz_tp(
    x: Tensor,
    steps: int,
    coefficient_type: str,
    tp_group: Any,
    partition_dim: int | None = None,
    mode: str = "duplicated",
    tp_mode: str | None = None,
) -> Tensor:
    assert coefficient_type == "quintic"
    if partition_dim is None:
        return newton_schulz(x, steps, x.shape[0] <= x.shape[1])
    if (tp_mode or mode) == "distributed":
        return newton_schulz(x, steps, partition_dim == 1, tp_group)
    parts = [torch.empty_like(x) for _ in range(tp_group.size())]
    dist.all_gather(parts, x.contiguous(), group=tp_group)
    whole = torch.cat(parts, partition_dim)
    done = newton_schulz(whole, steps, whole.shape[0] <= whole.shape[1])
    return done.chunk(tp_group.size(), partition_dim)[tp_group.rank()]


def get_muon_scale_factor(size_out: int, size_in: int, mode: str = "spectral") -> float:
    assert mode == "spectral"
    return max(size_out, size_in) ** 0.5


_NAMES: dict[str, dict[str, Any]] = {
    "emerging_optimizers": {},
    "emerging_optimizers.registry": {"get_optimizer_name_list": list, "get_optimizer_cls": None},
    "emerging_optimizers.orthogonalized_optimizers": {
        "AdaptiveMuon": AdaptiveMuon,
        "OrthogonalizedOptimizer": OrthogonalizedOptimizer,
        "get_muon_scale_factor": get_muon_scale_factor,
    },
    "emerging_optimizers.orthogonalized_optimizers.muon_utils": {
        "NSCoeffT": Literal["quintic"],
        "newton_schulz_tp": newton_schulz_tp,
    },
    "emerging_optimizers.scalar_optimizers": {"Lion": None},
    "emerging_optimizers.soap": {"SOAP": None},
}


@functools.cache
def kind() -> str:
    """What Muon is made of: "real", where the package has all that this Megatron imports, or this "stand-in", put there."""
    try:
        for name, values in _NAMES.items():
            if name.count(".") and (newer() or "orthogonalized" in name):
                module = importlib.import_module(name)
                for value in values if newer() else set(values) - {"AdaptiveMuon", "NSCoeffT"}:
                    getattr(module, value)
        return "real"
    except (ImportError, AttributeError):
        pass
    for name in [name for name in sys.modules if name.split(".")[0] == "emerging_optimizers"]:
        del sys.modules[name]
    for name, values in _NAMES.items():
        made = ModuleType(name)
        made.__path__ = []  # a package
        vars(made).update(values)
        sys.modules[name] = made
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, made)
    return "stand-in"


def newer() -> bool:
    """Whether Megatron takes Muon from version 0.2 or a later one of the package, which needs Python 3.12."""
    from .setups import megatron_version

    return megatron_version() >= (0, 18)
