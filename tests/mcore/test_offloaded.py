"""Optimizers that step on the CPU, with the gradient in .decoupled_grad or in .grad, against a single process.

Megatron's HybridDeviceOptimizer takes ``use_precision_aware_optimizer`` without Transformer Engine. It divides parameters
between a GPU and the host by ``is_cuda``: here those that Megatron hands it count as on a GPU. Models are bf16 and the
optimizer is sharded: Megatron itself fails with fp32 ("can't optimize a non-leaf Tensor") and without ZeRO-1.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from tests import reference
from tests.harness import pool

from . import training
from .setups import Config, start

OFFLOADED = (
    ("optimizer_cpu_offload", True),
    ("optimizer_offload_fraction", 0.5),
    ("use_torch_optimizer_for_cpu_offload", True),
    ("overlap_cpu_optimizer_d2h_h2d", True),
    ("decoupled_weight_decay", True),
)
PRECISION_AWARE = (*OFFLOADED, ("use_precision_aware_optimizer", True))
CONFIGS: dict[str, Config] = {
    "grad": Config(zero=True, bf16=True, options=OFFLOADED),
    "decoupled_grad": Config(zero=True, bf16=True, options=PRECISION_AWARE),
}


class OnHost(torch.Tensor):
    """A tensor that counts as on the host, and so does what is computed from it; all others count as on a GPU."""

    is_cuda = False


@functools.cache
def divide_over_two_devices() -> dict[Any, tuple[int, int]]:
    """Once a worker process. Returns how many parameters each optimizer has on the host and on the GPU."""
    start()
    from megatron.core.optimizer import optimizer_config
    from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer

    optimizer_config.is_te_min_version = lambda *args: False  # 0.16.1 asks without looking whether there is one
    divide = HybridDeviceOptimizer._get_sub_optimizer_param_groups
    counts = {}

    def divided(self: Any, fraction: float) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", True)
            patch.setattr(torch.Tensor, "cpu", lambda tensor: tensor.as_subclass(OnHost))
            patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
            on_host, on_gpu, *rest = divide(self, fraction)
        counts[self] = tuple(sum(len(group["params"]) for group in groups) for groups in (on_host, on_gpu))
        return on_host, on_gpu, *rest

    HybridDeviceOptimizer._get_sub_optimizer_param_groups = divided
    return counts


def train(config: Config, policies: tuple[str, ...]) -> tuple[list[tuple[int, int]], dict[str, Any]]:
    counts = divide_over_two_devices()
    counts.clear()
    record = training.train(config, policies)
    return list(counts.values()), record


@pytest.mark.parametrize("name", CONFIGS)
def test_training(name: str) -> None:
    policies = ("adagc-median",)
    ranks = pool(2, "megatron").run(train, CONFIGS[name], policies, timeout=240)
    for counts, _ in ranks:
        assert counts, "the test is to blame: no optimizer was offloaded"
        assert all(map(all, counts)), f"the test is to blame: one device only {counts}"
    training.check(CONFIGS[name], [rank for _, rank in ranks], policies)


def measure(config: Config) -> dict[str, Any]:
    divide_over_two_devices()
    return training.measure(config)


def test_gradients_in_bf16() -> None:
    config = Config(zero=True, bf16=True, options=(*PRECISION_AWARE, ("main_grads_dtype", torch.bfloat16)))
    ranks = pool(2, "megatron").run(measure, config, timeout=240)
    shapes = {name: param.shape for name, param in training.alone(config.single, None, 1)["params"].items()}
    whole = training.Run(ranks, shapes).at(1, "before")
    assert all(torch.equal(grad, grad.bfloat16().double()) for grad in whole.values())
    expected = reference.clip(reference.GlobalGC(1.0), whole)
    for (record,) in (rank["records"] for rank in ranks):
        assert record["error"] is None
        assert record["norm"] == pytest.approx(expected.global_norm, rel=1e-6)
        assert dict(zip(record["names"], record["norms"], strict=True)) == pytest.approx(expected.norms, rel=1e-6)
        assert dict(zip(record["names"], record["scales"], strict=True)) == pytest.approx(expected.scales, rel=1e-6)
