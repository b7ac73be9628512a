"""A small training script in Megatron-LM's style, which knows nothing of dist_clip: its own flags, its own loop."""

import argparse
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[3]))
from launch import megatron_cpu

megatron_cpu.install()

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

megatron_cpu.patch_megatron()


def add_extra_args(parser):
    group = parser.add_argument_group("my experiment")
    group.add_argument("--zipf", type=float, default=1.0)  # a prefix of none of the flags that are added
    return parser


def parse_args(extra_args_provider):
    parser = argparse.ArgumentParser()
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--train-iters", type=int, default=6)
    parser.add_argument("--clip-grad", type=float, default=1.0)
    parser.add_argument("--use-distributed-optimizer", action="store_true")
    parser.add_argument("--save")
    return extra_args_provider(parser).parse_args()


def main():
    args = parse_args(add_extra_args)
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(args.tensor_model_parallel_size)
    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)
    config = TransformerConfig(
        num_layers=2, hidden_size=16, num_attention_heads=4, use_cpu_initialization=True,
        tensor_model_parallel_size=args.tensor_model_parallel_size, hidden_dropout=0.0, attention_dropout=0.0,
        masked_softmax_fusion=False, bias_activation_fusion=False, bias_dropout_fusion=False,
        gradient_accumulation_fusion=False, persist_layer_norm=False,
    )  # fmt: skip
    model = GPTModel(
        config, get_gpt_layer_local_spec(), vocab_size=32, max_sequence_length=8, position_embedding_type="rope"
    )
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=args.use_distributed_optimizer)
    model = DistributedDataParallel(config, ddp, model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            lr=1e-2,
            clip_grad=args.clip_grad,
            use_distributed_optimizer=args.use_distributed_optimizer,
            weight_decay=0.0,
        ),
        [model],
    )
    tokens = torch.arange(16).view(2, 8) % 32
    positions = torch.arange(8).expand(2, 8)
    for iteration in range(args.train_iters):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        loss = model(tokens, positions, None, labels=tokens).mean()
        (loss * (100.0 if iteration == args.train_iters - 1 else 1.0)).backward()
        finalize_model_grads([model])
        _, grad_norm, _ = optimizer.step()
        if torch.distributed.get_rank() == 0:
            print(f"iteration {iteration}: loss {loss.item():.6f} | grad norm: {float(grad_norm):.3f} | {args.zipf}")
    if args.save:
        os.makedirs(args.save, exist_ok=True)
        torch.save(optimizer.state_dict(), os.path.join(args.save, f"rank{torch.distributed.get_rank()}.pt"))
    torch.distributed.barrier()
    os._exit(0)  # gloo


if __name__ == "__main__":
    main()
