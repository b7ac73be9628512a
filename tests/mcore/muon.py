"""Muon in a single process, from its description: momentum, and the polynomial applied to singular values in float64.

It shares nothing with Megatron's Muon but numbers: no Newton-Schulz iteration, no marks of parameters. Which tensors are
Muon's is said by name, and `cuts` says how tensor parallelism cuts them, as in its mode "blockwise" each rank
orthogonalizes its own part.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import dist_clip
from tests import reference

from . import cuts

if TYPE_CHECKING:
    from .setups import Config, Setup

MOMENTUM = 0.95  # Megatron's default
POLYNOMIALS = (  # of the quintic kind, by Jordan and others
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def is_muons(name: str) -> bool:
    """Whether Megatron gives the tensor to Muon: matrices, without embeddings of words and the output layer."""
    vector = name.endswith("bias") or "norm.weight" in name
    return not vector and name not in ("embedding.word_embeddings.weight", "output_layer.weight")


def muons(name: str, param: Tensor) -> bool:
    """A selector by name."""
    return is_muons(name)


# ---- the policies by optimizer -----------------------------------------------------------------------------------------


class Rest:
    """A rule for the tensors that are not Muon's, whose norms are only measured."""

    def __init__(self, rule: reference.Rule) -> None:
        self.rule = rule

    def scales(self, norms: Mapping[Hashable, float]) -> reference.Scales:
        rest = {name: norm for name, norm in norms.items() if not is_muons(str(name))}
        return dict.fromkeys(norms, 1.0) | self.rule.scales(rest)

    def memory(self, name: Hashable) -> dict[str, float]:
        return {} if is_muons(str(name)) else self.rule.memory(name)


def by_function(setup: Setup) -> list[tuple[Any, Any]]:
    return [(muons, dist_clip.MeasureOnly())]


def by_optimizer(setup: Setup) -> list[tuple[Any, Any]]:
    """Muon's torch optimizers. Experts may have one of their own."""
    return [(optimizer, dist_clip.MeasureOnly()) for optimizer in muon_optimizers(setup.optimizer)]


def by_groups(setup: Setup) -> list[tuple[Any, Any]]:
    """The param_groups of the whole chain that have no betas, AdamW's setting."""
    groups = [group for group in setup.optimizer.param_groups if "betas" not in group]
    return [(groups, dist_clip.MeasureOnly())]


def by_part(setup: Setup) -> list[tuple[Any, Any]]:
    """The chain inside the chain in which Muon's matrices are, where the rest is ZeRO-1's."""
    return [(setup.optimizer.chained_optimizers[0], dist_clip.MeasureOnly())]


def muon_optimizers(optimizer: Any) -> Iterator[Any]:
    """The torch optimizers inside that are Muon."""
    for child in getattr(optimizer, "chained_optimizers", ()):
        yield from muon_optimizers(child)
    inner = None if hasattr(optimizer, "chained_optimizers") else getattr(optimizer, "optimizer", optimizer)
    if type(inner).__name__ == "TensorParallelMuon":
        yield inner


# ---- the optimizer ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    """How many parts of a dense and of an expert's matrix Muon orthogonalizes each by itself."""

    dense: int = 1
    expert: int = 1


class Muon:
    """Steps the whole parameters, which have their whole gradients in `.grad`."""

    def __init__(self, params: dict[str, Tensor], lr: float, blocks: Blocks, heads: tuple[int, int, int]) -> None:
        self.params, self.lr, self.blocks, self.heads = params, lr, blocks, heads
        self.average = {name: torch.zeros_like(param, dtype=torch.float64) for name, param in params.items()}

    @torch.no_grad()
    def step(self) -> None:
        for name, param in self.params.items():
            average = self.average[name]
            average += (1 - MOMENTUM) * (param.grad.double() - average)
            param -= (self.lr * self._update(name, average)).float()

    def _update(self, name: str, average: Tensor) -> Tensor:
        cut = cuts.TABLE[cuts.row(name)]
        number = self.blocks.expert if ".experts." in name else self.blocks.dense
        if cut is None or number == 1:
            return self._of_block(name, average)
        assert cut.pieces == (1,)
        return torch.cat([self._of_block(name, block) for block in average.chunk(number, cut.dim)], cut.dim)

    def _of_block(self, name: str, block: Tensor) -> Tensor:
        """Queries, keys and values are orthogonalized each by themselves; they lie together, by groups of heads."""
        if not name.endswith("linear_qkv.weight"):
            return orthogonal(block)
        groups = block.view(-1, sum(self.heads), block.shape[-1]).split(self.heads, 1)
        done = [orthogonal(part.flatten(0, 1)).view(part.shape) for part in groups]
        return torch.cat(done, 1).view(block.shape)


def orthogonal(x: Tensor) -> Tensor:
    """The matrix with each singular value s replaced by what five polynomials make of s / ||x||, times Muon's scale."""
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / s.square().sum().sqrt().clamp_min(1e-15)
    for a, b, c in POLYNOMIALS:
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ v * max(x.shape) ** 0.5


# ---- Megatron's ----------------------------------------------------------------------------------------------------------


def megatrons(config: Config, options: dict[str, Any], chunks: list[Any]) -> Any:
    """Megatron's own Muon: `config.muon` is "plain", "layer-wise" or, from 0.19 on, "layer-wise + ZeRO-1"."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from .setups import megatron_version

    layer_wise = config.muon != "plain"
    options = {"muon_fp32_matmul_prec": "highest", **options}
    options["optimizer"] = dict(config.options).get("optimizer", "muon")
    if megatron_version() < (0, 18):
        from megatron.core.optimizer.muon import get_megatron_muon_optimizer

        return get_megatron_muon_optimizer(
            OptimizerConfig(**options), chunks, layer_wise_distributed_optimizer=layer_wise
        )
    return get_megatron_optimizer(
        OptimizerConfig(**options, use_layer_wise_distributed_optimizer=layer_wise),
        chunks,
        use_gloo_process_groups=True,
    )


def layout(model: Any, ddp_config: Any) -> Any:
    """The layout of buffers in which Muon's matrices stay whole and the rest is ZeRO-1's: newer versions' default."""
    from megatron.core.optimizer.layer_wise_optimizer import (
        LayerWiseDistributedOptimizer,
        tag_params_for_buffer_routing,
    )
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection.use_mpu_process_groups()
    tag_params_for_buffer_routing([model])
    return LayerWiseDistributedOptimizer.compute_full_param_layout(
        [param for param in model.parameters() if param.requires_grad],
        ddp_config.bucket_size,
        groups.intra_dp_cp.size(),
        ddp_config,
        expert_data_parallel_world_size=groups.intra_expt_dp.size(),
    )


def rest(policy: Callable[[], Any], rule: Callable[[], Any]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A policy that clips what is not Muon's, and its reference."""
    return policy, lambda: Rest(rule())
