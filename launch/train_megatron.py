"""Train a real megatron-core GPT on real text, clipped by any rule, on GPUs or on CPU.

    torchrun --nproc-per-node 4 -m launch.train_megatron --cpu \
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --grad-clip-mode logclip

Flags are Megatron-LM's, where it has them. What dist_clip needs in a Megatron training script is three lines: the flags
(`add_clip_args`), the clipper (`attach_from_args`, once the optimizer exists and before a checkpoint is loaded), and
nothing else: the loop and the checkpoints are Megatron's own.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import dist_clip
from dist_clip import megatron as clipping
from launch.data import Corpus, DataConfig, load_corpus
from launch.metrics import LogConfig, RunLog
from launch.model import VOCAB_SIZE
from launch.parallel import end_program


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("model")
    model.add_argument("--num-layers", type=int, default=4)
    model.add_argument("--hidden-size", type=int, default=64)
    model.add_argument("--ffn-hidden-size", type=int, help="default: 4 x hidden size")
    model.add_argument("--num-attention-heads", type=int, default=4)
    model.add_argument("--seq-length", type=int, default=128)
    model.add_argument("--num-experts", type=int, help="routed experts in each layer; default: a dense model")
    model.add_argument("--moe-router-topk", type=int, default=1)
    model.add_argument("--untie-embeddings-and-output-weights", action="store_true")
    parallel = parser.add_argument_group("parallelism")
    parallel.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parallel.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    parallel.add_argument("--virtual-pipeline-model-parallel-size", type=int, help="model chunks a rank (interleaved)")
    parallel.add_argument("--context-parallel-size", type=int, default=1, help="needs Transformer Engine")
    parallel.add_argument("--expert-model-parallel-size", type=int, default=1)
    parallel.add_argument("--expert-tensor-parallel-size", type=int)
    parallel.add_argument("--sequence-parallel", action="store_true")
    parallel.add_argument("--use-distributed-optimizer", action="store_true", help="ZeRO-1")
    parallel.add_argument("--num-distributed-optimizer-instances", type=int, default=1)
    parallel.add_argument("--overlap-grad-reduce", action="store_true")
    parallel.add_argument("--overlap-param-gather", action="store_true")
    training = parser.add_argument_group("training")
    training.add_argument("--micro-batch-size", type=int, default=1)
    training.add_argument("--global-batch-size", type=int, default=8)
    training.add_argument("--train-iters", type=int, default=200)
    training.add_argument("--lr", type=float, default=3e-3)
    training.add_argument("--min-lr", type=float, default=3e-4)
    training.add_argument("--lr-warmup-iters", type=int, default=20)
    training.add_argument("--weight-decay", type=float, default=0.1)
    training.add_argument("--adam-beta1", type=float, default=0.9)
    training.add_argument("--adam-beta2", type=float, default=0.95)
    training.add_argument("--clip-grad", type=float, default=1.0)
    precision = training.add_mutually_exclusive_group()
    precision.add_argument("--bf16", action="store_true")
    precision.add_argument("--fp16", action="store_true")
    training.add_argument("--eval-iters", type=int, default=4, help="validation batches at the end")
    training.add_argument("--data", type=Path, help="a text file or a folder; default: Python's own standard library")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--cpu", action="store_true", help="gloo, on CPU")
    files = parser.add_argument_group("files")
    files.add_argument(
        "--out", type=Path, default=Path("runs/megatron"), help="log.jsonl, TensorBoard events, plot.png"
    )
    files.add_argument("--save", type=Path, help="folder for checkpoints")
    files.add_argument("--save-interval", type=int, default=0, help="iterations between them; 0: one at the end")
    files.add_argument("--load", type=Path, help="folder to resume from, whatever layout saved it")
    files.add_argument("--log-every", type=int, default=10)
    training.add_argument(
        "--verify", action="store_true", help="as --grad-clip-verify: at the first step, exit with 1 if a norm differs"
    )
    clipping.add_clip_args(parser)
    args = parser.parse_args()
    if args.verify:
        if args.grad_clip_mode is None:
            parser.error("--verify needs --grad-clip-mode: it compares what dist_clip finds")
        args.grad_clip_verify = True
    if args.global_batch_size % args.micro_batch_size:
        parser.error(f"--global-batch-size {args.global_batch_size} must be a multiple of {args.micro_batch_size}")
    return args


def main() -> None:
    args = parse()
    if args.cpu:
        from launch import megatron_cpu

        megatron_cpu.install()
    import megatron.core  # noqa: F401

    if args.cpu:
        megatron_cpu.patch_megatron()
    else:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("gloo" if args.cpu else "nccl")
    train(args)
    dist.barrier()
    dist.destroy_process_group()
    end_program()


def train(args: argparse.Namespace) -> None:
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    initialize(args)
    corpus = load_corpus(DataConfig(args.data), args.seq_length)
    chunks = build_model(args)
    optimizer, scheduler = build_optimizer(args, chunks)
    clipper = clipping.attach_from_args(optimizer, args, model=chunks)
    if clipper is not None and dist.get_rank() == 0:
        print(clipper.explain())
    done = load(args, chunks, optimizer, scheduler) if args.load is not None else 0

    device = torch.device("cpu") if args.cpu else torch.device("cuda", torch.cuda.current_device())
    log_config = LogConfig(out=args.out, log_every=args.log_every)
    forward_backward = get_forward_backward_func()
    replicas = parallel_state.get_data_parallel_world_size()
    micro_batches = args.global_batch_size // args.micro_batch_size // replicas
    common = {
        "model": chunks if len(chunks) > 1 else chunks[0],
        "seq_length": args.seq_length,
        "micro_batch_size": args.micro_batch_size,
    }
    with RunLog(log_config, args.train_iters - done, describe(args, corpus, clipper, chunks), clipper) as log:
        for iteration in range(done + 1, args.train_iters + 1):
            for chunk in chunks:
                chunk.zero_grad_buffer()
            optimizer.zero_grad()
            losses = forward_backward(
                forward_step_func=forward_step,
                data_iterator=iterators(
                    corpus.batch(iteration, args.global_batch_size, args.seq_length, args.seed), args
                ),
                num_microbatches=micro_batches,
                forward_only=False,
                **common,
            )
            successful, norm, _ = optimizer.step()  # clips
            scheduler.step(increment=args.global_batch_size if successful else 0)

            # The last stage has the losses, of this replica's share of the batch.
            loss = torch.stack([entry["loss"] for entry in losses]).mean() if losses else None
            theirs = norm if clipper is None else None
            log.step(iteration, loss, optimizer.param_groups[0]["lr"], False, grad_norm=theirs)
            if args.save is not None and args.save_interval and iteration % args.save_interval == 0:
                save(args, iteration, chunks, optimizer, scheduler)
        if args.save is not None and not (args.save_interval and args.train_iters % args.save_interval == 0):
            save(args, args.train_iters, chunks, optimizer, scheduler)
        log.validation(args.train_iters, validate(args, corpus, forward_backward, common, micro_batches, device))


def initialize(args: argparse.Namespace) -> None:
    """Megatron's process groups, numbers of micro-batches and random states."""
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        num_distributed_optimizer_instances=args.num_distributed_optimizer_instances,
    )
    replicas = parallel_state.get_data_parallel_world_size()
    if args.global_batch_size % (args.micro_batch_size * replicas):
        raise ValueError(
            f"--global-batch-size {args.global_batch_size} must be a multiple of --micro-batch-size x data-parallel ranks = "
            f"{args.micro_batch_size} x {replicas}"
        )
    init_num_microbatches_calculator(dist.get_rank(), None, args.global_batch_size, args.micro_batch_size, replicas)
    model_parallel_cuda_manual_seed(1234 + args.seed)


def build_model(args: argparse.Namespace) -> list[Any]:
    """This rank's model chunks, each in Megatron's DistributedDataParallel."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    with_te = not args.cpu and importlib.util.find_spec("transformer_engine") is not None
    moe: dict[str, Any] = {}
    if args.num_experts:
        moe = {
            "num_moe_experts": args.num_experts,
            "moe_router_topk": args.moe_router_topk,
            "moe_router_pre_softmax": args.moe_router_topk == 1,
            "moe_token_dispatcher_type": "alltoall",
            "moe_grouped_gemm": with_te,
            "expert_model_parallel_size": args.expert_model_parallel_size,
            "expert_tensor_parallel_size": args.expert_tensor_parallel_size or args.tensor_model_parallel_size,
        }
    plain: dict[str, Any] = {}
    if not with_te:  # none of Megatron's fused CUDA kernels, which are in extensions of their own
        plain = {
            "masked_softmax_fusion": False,
            "bias_activation_fusion": False,
            "bias_dropout_fusion": False,
            "persist_layer_norm": False,
        }
    if args.cpu:
        plain["batch_p2p_comm"] = False
    torch.manual_seed(args.seed)  # initial weights: the whole tensor is made on each rank, then cut
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        sequence_parallel=args.sequence_parallel,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=args.bf16,
        fp16=args.fp16,
        use_cpu_initialization=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        **moe,
        **plain,
    )
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=args.use_distributed_optimizer,
        num_distributed_optimizer_instances=args.num_distributed_optimizer_instances,
        overlap_grad_reduce=args.overlap_grad_reduce,
        overlap_param_gather=args.overlap_param_gather,
        grad_reduce_in_fp32=True,
    )
    make_spec = get_gpt_layer_with_transformer_engine_spec if with_te else get_gpt_layer_local_spec
    spec = make_spec(num_experts=args.num_experts, moe_grouped_gemm=bool(args.num_experts) and with_te)
    chunks = []
    for number in range(args.virtual_pipeline_model_parallel_size or 1):
        stage = {"vp_stage": number} if args.virtual_pipeline_model_parallel_size else {}
        model: Any = GPTModel(
            config,
            spec,
            vocab_size=VOCAB_SIZE,
            max_sequence_length=args.seq_length,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, **stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, **stage),
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            position_embedding_type="rope",
            **stage,
        )
        if not args.cpu:
            model.cuda(torch.cuda.current_device())
        if args.bf16 or args.fp16:
            model = Float16Module(config, model)
        chunks.append(DistributedDataParallel(config, ddp, model, disable_bucketing=number > 0))
    for chunk in chunks:
        chunk.broadcast_params()
    return chunks


def build_optimizer(args: argparse.Namespace, chunks: list[Any]) -> tuple[Any, Any]:
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=args.lr,
            min_lr=args.min_lr,
            weight_decay=args.weight_decay,
            adam_beta1=args.adam_beta1,
            adam_beta2=args.adam_beta2,
            clip_grad=args.clip_grad,
            bf16=args.bf16,
            fp16=args.fp16,
            params_dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32,
            use_distributed_optimizer=args.use_distributed_optimizer,
            overlap_param_gather=args.overlap_param_gather,
        ),
        chunks,
    )
    samples = args.global_batch_size
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=min(args.lr_warmup_iters, args.train_iters - 1) * samples,  # a trial run may be shorter
        lr_decay_steps=args.train_iters * samples,
        lr_decay_style="cosine",
        start_wd=args.weight_decay,
        end_wd=args.weight_decay,
        wd_incr_steps=args.train_iters * samples,
        wd_incr_style="constant",
    )
    config = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    if args.overlap_grad_reduce:
        config.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
    return optimizer, scheduler


def iterators(batch: tuple[Tensor, Tensor], args: argparse.Namespace) -> Any:
    """Micro-batches of this replica's rows of a global batch: an iterator, or one for each model chunk."""
    from megatron.core import parallel_state

    replicas, replica = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    device = "cpu" if args.cpu else "cuda"
    inputs, targets = (rows.chunk(replicas)[replica].to(device) for rows in batch)

    def micro_batches() -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(inputs.split(args.micro_batch_size), targets.split(args.micro_batch_size), strict=True)

    chunks = args.virtual_pipeline_model_parallel_size
    return [micro_batches() for _ in range(chunks)] if chunks else micro_batches()


def forward_step(iterator: Iterator[tuple[Tensor, Tensor]], model: Any) -> tuple[Tensor, Any]:
    """One micro-batch; Megatron's schedules call it on every stage."""
    inputs, targets = next(iterator)
    positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    return model(inputs, positions, None, labels=targets), mean_loss


def mean_loss(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = losses.float().mean()
    return loss, {
        "loss": loss.detach().clone()
    }  # Megatron divides the first one by the number of micro-batches, in place


def validate(
    args: argparse.Namespace,
    corpus: Corpus,
    forward_backward: Any,
    common: dict[str, Any],
    micro_batches: int,
    device: torch.device,
) -> Tensor:
    """Mean validation loss over all replicas, 0-dim, on every rank."""
    total = torch.zeros(2, device=device)
    for batch in corpus.validation_batches(args.global_batch_size, args.eval_iters, args.seq_length):
        with torch.no_grad():
            losses = forward_backward(
                forward_step_func=forward_step,
                data_iterator=iterators(batch, args),
                num_microbatches=micro_batches,
                forward_only=True,
                **common,
            )
        for entry in losses:
            total += torch.stack([entry["loss"], torch.ones_like(entry["loss"])])
    dist.all_reduce(total)
    return total[0] / total[1]


# ---- checkpoints -----------------------------------------------------------------------------------------------------

# The only sharding of a distributed optimizer that loads under another layout.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
LATEST = "latest_checkpointed_iteration.txt"


def whole_state(chunks: list[Any], optimizer: Any, *, loading: bool) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for i, chunk in enumerate(chunks):
        state["model" if len(chunks) == 1 else f"model{i}"] = unwrap(chunk).sharded_state_dict()
    # The clipping state is in here.
    state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=loading, metadata=METADATA)
    return state


def save(args: argparse.Namespace, iteration: int, chunks: list[Any], optimizer: Any, scheduler: Any) -> None:
    from megatron.core import dist_checkpointing

    folder = args.save / f"iter_{iteration:07d}"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    state = whole_state(chunks, optimizer, loading=False)
    state |= {"iteration": iteration, "scheduler": scheduler.state_dict()}
    dist_checkpointing.save(state, str(folder))
    dist.barrier()
    if dist.get_rank() == 0:  # last: a run that is killed while it saves resumes from the one before
        (args.save / LATEST).write_text(str(iteration))


def load(args: argparse.Namespace, chunks: list[Any], optimizer: Any, scheduler: Any) -> int:
    """Resume; the number of iterations done. 0 where there is no checkpoint yet."""
    from megatron.core import dist_checkpointing

    latest = args.load / LATEST
    if not latest.is_file():
        if dist.get_rank() == 0:
            print(f"no checkpoint in {args.load}: starting from the beginning")
        return 0
    folder = args.load / f"iter_{int(latest.read_text()):07d}"
    state = dist_checkpointing.load(whole_state(chunks, optimizer, loading=True), str(folder))
    for i, chunk in enumerate(chunks):
        unwrap(chunk).load_state_dict(state["model" if len(chunks) == 1 else f"model{i}"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    if dist.get_rank() == 0:
        print(f"resumed from {folder}")
    return int(state["iteration"])


def unwrap(chunk: Any) -> Any:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def describe(
    args: argparse.Namespace, corpus: Corpus, clipper: dist_clip.GradClipper | None, chunks: list[Any]
) -> dict[str, Any]:
    """What somebody needs to know to repeat the run."""
    import megatron.core

    sizes = {
        "tp": args.tensor_model_parallel_size,
        "pp": args.pipeline_model_parallel_size,
        "cp": args.context_parallel_size,
        "ep": args.expert_model_parallel_size,
    }
    layout = " x ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "dp"
    policy = {"policy": "Megatron's own", "max_norm": args.clip_grad} if clipper is None else clipper.policy.config()
    options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    return {
        "config": {
            **options,
            "clip": {"clip": args.grad_clip_mode or "megatron"} | policy,
            "parallel": {"parallel": layout},
        },
        "policy": policy,
        "ranks": dist.get_world_size(),
        "device": "cpu" if args.cpu else torch.cuda.get_device_name(),
        "parameters": sum(functools.reduce(lambda n, p: n + p.numel(), chunk.parameters(), 0) for chunk in chunks),
        "data": {"digest": corpus.digest, "files": corpus.files},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "megatron-core": megatron.core.__version__,
            "dist_clip": dist_clip.__version__,
        },
    }


if __name__ == "__main__":
    main()
