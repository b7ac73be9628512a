"""A tiny Llama on made-up tokens, as config functions for torchtitan's ``--module adapters.torchtitan.tiny``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import cpu  # isort: skip  # before torchtitan
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import DebugConfig, ParallelismConfig, TrainingConfig
from torchtitan.config.override import derive
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3 import (
    _EMBEDDING_INIT,
    _NORM_INIT,
    _build_llama3_layers,
    _output_linear_init,
    parallelize_llama,
)
from torchtitan.models.llama3.model import Llama3Model
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer

from dist_clip.torchtitan import ClipTrainer

__all__ = ["cpu", "plain", "with_trainer"]

VOCABULARY, WIDTH, LENGTH, BATCH = 64, 32, 16, 4
STEPS, SAVED_EVERY, RATE = 12, 4, 1e-2


class NoTokenizer(BaseTokenizer):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, **kwargs: Any) -> None:
        self.eos_id = 0

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        return []

    def decode(self, *args: Any, **kwargs: Any) -> str:
        return ""

    def get_vocab_size(self) -> int:
        return VOCABULARY


class Tokens(BaseDataLoader):
    """Batches drawn from their number and the rank's place, so that a resumed run sees what the first one would have."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(
        self, config: Config, *, dp_world_size: int, dp_rank: int, local_batch_size: int, **kwargs: Any
    ) -> None:
        self.size, self.rank, self.batch, self.at = dp_world_size, dp_rank, local_batch_size, 0

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        while True:
            number, self.at = self.at * self.size + self.rank, self.at + 1
            yield batch_of(number, self.batch)

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.at = state_dict["at"]


def batch_of(number: int, size: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return batch `number`, whose tokens now and then are all alike, so that some gradients are large."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(VOCABULARY, (size, LENGTH + 1), generator=generator)
    if number % 5 == 4:
        tokens = tokens[:1, :1].expand(size, LENGTH + 1).clone()
    positions = torch.arange(LENGTH).expand(size, LENGTH).clone()
    return {"input": tokens[:, :-1].clone(), "positions": positions}, tokens[:, 1:].clone()


def model() -> ModelSpec:
    layers = _build_llama3_layers(
        n_layers=2,
        dim=WIDTH,
        n_heads=4,
        hidden_dim=64,
        rope=ComplexRoPE.Config(dim=WIDTH // 4, max_seq_len=64, theta=10000),
        attn_backend="flex",
        fuse_qkv=True,
    )
    for layer in layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()  # the others need accelerators
    config = Llama3Model.Config(
        dim=WIDTH,
        vocab_size=VOCABULARY,
        tok_embeddings=Embedding.Config(num_embeddings=VOCABULARY, embedding_dim=WIDTH, param_init=_EMBEDDING_INIT),
        norm=RMSNorm.Config(normalized_shape=WIDTH, param_init=_NORM_INIT),
        lm_head=Linear.Config(in_features=WIDTH, out_features=VOCABULARY, param_init=_output_linear_init(WIDTH)),
        layers=layers,
    )
    return ModelSpec(
        name="tiny",
        flavor="tiny",
        model=config,
        parallelize_fn=parallelize_llama,
        pipelining_fn=pipeline_llm,
        post_optimizer_build_fn=None,
        state_dict_adapter=None,
    )


def plain() -> Trainer.Config:
    """torchtitan's own trainer, as it is."""
    return Trainer.Config(
        model_spec=model(),
        loss=CrossEntropyLoss.Config(global_vocab_size=VOCABULARY),
        tokenizer=NoTokenizer.Config(),
        dataloader=Tokens.Config(),
        optimizer=default_adamw(lr=RATE),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=0, min_lr_factor=1.0),  # the same at every step
        training=TrainingConfig(
            local_batch_size=BATCH,
            seq_len=LENGTH,
            steps=STEPS,
            disable_cuda_graphs=True,
            mixed_precision_param="float32",
        ),
        # torchtitan's default needs an FSDP that torch 2.13 does not have.
        parallelism=ParallelismConfig(pipeline_parallel_schedule="1F1B", spmd_backend="partial_dtensor"),
        checkpoint=CheckpointManager.Config(interval=SAVED_EVERY, last_save_model_only=False),
        debug=DebugConfig(seed=1),
        metrics=MetricsProcessor.Config(log_freq=1, disable_color_printing=True),
    )


def with_trainer() -> ClipTrainer.Config:
    """The same with `ClipTrainer`, whose `clip` a test fills in."""
    config: ClipTrainer.Config = derive(plain(), ClipTrainer.Config)
    config.training.max_norm = float("inf")
    return config
