"""The optimizers and their schedule: AdamW, Lion, or Muon on the hidden matrices beside AdamW on the rest."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

LR = {"adamw": 3e-3, "lion": 1e-3, "muon": 3e-2}
"""Peak learning rates, found for the default model; docs/stability.md has the sweep."""
BETAS = {"adamw": (0.9, 0.999), "lion": (0.9, 0.99), "muon": (0.9, 0.999)}


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    optimizer: Literal["adamw", "lion", "muon"] = "adamw"
    """muon: Muon on the blocks' matrices, AdamW on embedding, head and norms, as its authors prescribe."""
    steps: int = 300
    """Optimizer steps."""
    batch_size: int = 8
    """Sequences in an optimizer step, all ranks and micro-batches together."""
    accumulate: int = 1
    """Micro-batches that a rank's share of the batch is taken in (gradient accumulation; the pipeline's under pp)."""
    lr: float | None = None
    """Peak learning rate. Default: 3e-3 for adamw, 1e-3 for lion, 3e-2 for muon."""
    lr_warmup_steps: int = 50
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up."""
    min_lr: float = 0.1
    """cosine: where the learning rate ends, as a share of its peak."""
    betas: tuple[float, float] | None = None
    """AdamW's betas (muon: those of its AdamW part), or Lion's. Default: .9 and .999; Lion .9 and .99."""
    weight_decay: float = 0.1
    """On matrices; layer norms have none."""
    bf16: bool = False
    """Forward pass under bf16 autocast; parameters and gradients stay fp32."""
    validate_every: int = 0
    """Steps between validations; 0 for one at the end."""
    validation_batches: int = 16
    """Batches of a validation."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "validation_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def peak_lr(self) -> float:
        return LR[self.optimizer] if self.lr is None else self.lr

    @property
    def used_betas(self) -> tuple[float, float]:
        return BETAS[self.optimizer] if self.betas is None else self.betas


def build_optimizer(module: nn.Module, cfg: OptimConfig) -> torch.optim.Optimizer:
    betas = cfg.used_betas
    named = list(module.named_parameters())
    vectors = {"params": [param for _, param in named if param.ndim < 2], "weight_decay": 0.0}
    if cfg.optimizer != "muon":
        matrices = {"params": [param for _, param in named if param.ndim >= 2], "weight_decay": cfg.weight_decay}
        groups = [group for group in (matrices, vectors) if group["params"]]
        if cfg.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=cfg.peak_lr, betas=betas)
        return _package().Lion(groups, lr=cfg.peak_lr, betas=betas)
    decay = {"weight_decay": cfg.weight_decay}
    hidden = [param for name, param in named if param.ndim >= 2 and "blocks" in name.split(".")]
    outer = [param for name, param in named if param.ndim >= 2 and "blocks" not in name.split(".")]
    adamw = {"use_muon": False, "betas": betas, "eps": 1e-8, "lr": cfg.peak_lr}
    groups = [
        # The adjusted rate gives an update AdamW's size (Moonlight, arXiv 2502.16982): one rate then serves both.
        {"params": hidden, "use_muon": True, "use_adjusted_lr": True, "lr": cfg.peak_lr, **decay},
        {"params": outer, **adamw, **decay},
        {**vectors, **adamw},
    ]
    return _muon()([group for group in groups if group["params"]])


def build_schedule(optimizer: torch.optim.Optimizer, cfg: OptimConfig) -> LambdaLR:
    return LambdaLR(optimizer, functools.partial(lr_share, cfg))


def lr_share(cfg: OptimConfig, done: int) -> float:
    """Learning rate of the step after `done` steps, as a share of its peak."""
    if done < cfg.lr_warmup_steps:
        return (done + 1) / cfg.lr_warmup_steps
    if cfg.schedule == "constant":
        return 1.0
    progress = (done - cfg.lr_warmup_steps) / max(1, cfg.steps - cfg.lr_warmup_steps)
    return cfg.min_lr + (1 - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _package() -> Any:
    import pytorch_optimizer  # most of a second to import, so only where it is used

    return pytorch_optimizer


@functools.cache
def _muon() -> Any:
    from pytorch_optimizer.optimizer.utils.matrix import zero_power_via_newton_schulz_5

    class Muon(_package().Muon):  # type: ignore[misc]
        """Muon whose Newton-Schulz iteration runs in fp32 on a CPU.

        Both this package and torch.optim.Muon run it in bf16, which most CPUs emulate: at 3M parameters a step then takes
        10 s instead of 0.3 s.
        """

        @staticmethod
        def _orthogonalize(group: dict[str, Any], updates: Iterable[Tensor]) -> list[Tensor]:
            return [
                zero_power_via_newton_schulz_5(
                    update,
                    num_steps=group["ns_steps"],
                    weights=group["ns_coeffs"],
                    dtype=torch.float32 if update.device.type == "cpu" else torch.bfloat16,
                )
                for update in updates
            ]

    return Muon
