"""Owns the parallel configurations under test: each builds a real GPTModel and Megatron optimizer on this rank.

Weights are seeded by a tensor's global name and then cut, and every data-parallel rank sees the same batch, so a single
process that trains the whole model on that batch is the oracle of every configuration.
"""

from __future__ import annotations

import collections
import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import cuts, emerging, kernels, muon

HIDDEN, HEADS, VOCAB, LENGTH = 16, 4, 32, 8
BATCH, MICRO_BATCHES = 4, 2  # sequences of a step, and the parts that a rank takes them in
LR = 3e-3


SWIGLU = {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu, "add_bias_linear": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "sinks": {"softmax_type": "learnable"},
    "sinks-gated": {
        "softmax_type": "learnable",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
    },
    "qk-norm": {"qk_layernorm": True, "num_query_groups": 2, **SWIGLU, "add_qkv_bias": True},
    "one-query-group": {"num_query_groups": 1, "normalization": "RMSNorm"},
    "positions": {},
    "mla": {"q_lora_rank": 8, "qk_layernorm": True},
    "mla-replicated": {"q_lora_rank": 8, "qk_layernorm": True, "normalization": "RMSNorm"},
    "mla-one-query-projection": {"q_lora_rank": None, "normalization": "RMSNorm"},
    "shared-experts": {
        **SWIGLU,
        "moe_router_topk": 2,
        "moe_router_pre_softmax": False,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_shared_expert_intermediate_size": HIDDEN,
        "moe_shared_expert_gate": True,
    },
    "expert-biases": {"add_bias_linear": True},
    "mtp": {"mtp_num_layers": 1},
    "mamba": {"mamba_state_dim": 4, "mamba_head_dim": 8, "mamba_num_groups": 2},
    "delta": {
        "linear_conv_kernel_dim": 3,
        "linear_key_head_dim": 4,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "activation_func": torch.nn.functional.silu,
    },
}
"""TransformerConfig's options of each variant of the model."""
MLA = {"kv_lora_rank": 8, "qk_head_dim": 2, "qk_pos_emb_head_dim": 2, "v_head_dim": 4, "rope_type": "rope"}


@dataclass(frozen=True)
class Config:
    """Sizes of the parallel groups and kind of optimizer."""

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    layers: int = 2
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    instances: int = 1
    experts: int = 0
    sequence_parallel: bool = False
    tied: bool = False
    zero: bool = False
    overlap: bool = False
    layer_wise: bool = False
    muon: str = ""
    """Megatron's Muon: "plain", "layer-wise", or "layer-wise + ZeRO-1"."""
    fsdp: str = ""
    """Megatron-FSDP's sharding strategy; with `instances`, they are its outer dimension."""
    outer: str = "no_shard"
    """How Megatron-FSDP shards over its outer dimension."""
    bf16: bool = False
    fp16: bool = False
    variant: str = ""
    """Which other layers the model has: one of VARIANTS."""
    pieces: int = 1  # what a single process cuts each sequence into, as context parallelism by hand does
    options: tuple[tuple[str, Any], ...] = ()
    """Of OptimizerConfig."""
    blocks: muon.Blocks | None = None
    """A single process steps with Muon, and the parts of a matrix that it orthogonalizes by themselves are so many."""

    @property
    def single(self) -> Config:
        """The same model in one process."""
        blocks = muon.Blocks() if self.muon else None
        if self.muon and dict(self.options).get("muon_tp_mode", "blockwise") == "blockwise":
            blocks = muon.Blocks(self.tp, self.etp or self.tp)
        return Config(
            layers=self.layers,
            tied=self.tied,
            experts=self.experts,
            variant=self.variant,
            pieces=self.cp,
            blocks=blocks,
        )

    @property
    def gated(self) -> bool:
        return bool(VARIANTS[self.variant].get("gated_linear_unit"))


@dataclass
class Setup:
    config: Config
    chunks: list[Any]  # wrapped in DistributedDataParallel
    optimizer: Any

    def backward(self, step: int, factor: float = 1.0) -> float:
        """Forward and backward on the whole batch of a step, and all of Megatron's reductions. The loss, on every rank."""
        return _backward(self, step, factor)

    def named(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, param) for chunk in self.chunks for name, param in chunk.named_parameters()]


@functools.cache
def start() -> None:
    """Once a worker process: CUDA to CPU, then Megatron."""
    from launch import megatron_cpu

    megatron_cpu.install()
    emerging.kind()
    import megatron.core  # noqa: F401

    megatron_cpu.patch_megatron()
    kernels.install()
    dist.new_group = _Groups(dist.new_group)


class _Groups:
    """`torch.distributed.new_group` with a memory: a build's n-th group of the same ranks is the n-th ever made of them.

    Megatron makes dozens of groups a build and keeps them, and its models, alive for good. Every gloo group has three
    threads that wake up a hundred times a second: a few hundred of them leave a small machine no time for the tests.
    """

    def __init__(self, new_group: Callable[..., Any]) -> None:
        self.new_group = new_group
        self.made: dict[Any, list[Any]] = collections.defaultdict(list)
        self.asked: collections.Counter[Any] = collections.Counter()

    def __call__(self, ranks: Any = None, timeout: Any = None, backend: Any = None, *args: Any, **kwargs: Any) -> Any:
        key = (None if ranks is None else tuple(ranks), backend)
        groups = self.made[key]
        if self.asked[key] == len(groups):
            groups.append(self.new_group(ranks, timeout, backend, *args, **kwargs))
        self.asked[key] += 1
        return groups[self.asked[key] - 1]


def fresh() -> None:
    """Megatron as it is before anything is initialized: what an earlier test made is taken down."""
    start()
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    dist.new_group.asked.clear()
    destroy_num_microbatches_calculator()


def build(config: Config, *, seed: int = 0) -> Setup:
    """The model and its optimizer on this rank."""
    fresh()
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        FullyShardedDataParallel,
    )
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tp,
        pipeline_model_parallel_size=config.pp,
        virtual_pipeline_model_parallel_size=config.vpp,
        context_parallel_size=config.cp,
        expert_model_parallel_size=config.ep,
        expert_tensor_parallel_size=config.etp,
        num_distributed_optimizer_instances=config.instances,
    )
    init_num_microbatches_calculator(dist.get_rank(), None, BATCH, BATCH // MICRO_BATCHES, 1)
    model_parallel_cuda_manual_seed(1234)
    transformer = transformer_config(config)
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=bool(config.zero or config.fsdp or config.muon.endswith("ZeRO-1")),
        **(megatron_fsdp_config(config) if config.fsdp else {}),
        overlap_grad_reduce=config.overlap,
        overlap_param_gather=config.overlap,
        num_distributed_optimizer_instances=config.instances,
        grad_reduce_in_fp32="main_grads_dtype" not in dict(config.options),
        bucket_size=500 if config.overlap else None,
    )
    wrapper = FullyShardedDataParallel if config.fsdp else DistributedDataParallel
    if config.fsdp and config.pp > 1:
        mend_meshes()
    chunks = []
    for chunk in range(config.vpp or 1):
        model = gpt(config, transformer, chunk)
        initialise(model, config, seed, chunk)
        wrapped = wrap_precision(model, transformer)
        laid_out = {"full_param_layout": muon.layout(wrapped, ddp_config)} if config.muon.endswith("ZeRO-1") else {}
        chunks.append(wrapper(transformer, ddp_config, wrapped, **laid_out))
    options = {
        "optimizer": "adam",
        "lr": LR,
        "weight_decay": 0.0,
        "adam_eps": 1e-5,  # as the single process: the usual 1e-8 enlarges rounding to steps of full size
        "clip_grad": 1.0,
        "bf16": config.bf16,
        "fp16": config.fp16,
        "params_dtype": transformer.params_dtype,
        "use_distributed_optimizer": bool(config.zero or config.fsdp),
        "overlap_param_gather": config.overlap,
        **({"initial_loss_scale": 2.0**10, "loss_scale_window": 1000, "hysteresis": 1} if config.fp16 else {}),
        **dict(config.options),
    }
    if config.muon:
        return Setup(config, chunks, muon.megatrons(config, options, chunks))
    optimizer_config = OptimizerConfig(**options)
    if config.layer_wise:
        optimizer = layer_wise(optimizer_config, chunks)
    else:
        optimizer = get_megatron_optimizer(optimizer_config, chunks)
    return Setup(config, chunks, optimizer)


def megatron_version() -> tuple[int, ...]:
    """Major and minor version of megatron-core; nothing without it."""
    try:
        return tuple(map(int, version("megatron-core").split(".")[:2]))
    except PackageNotFoundError:
        return ()


def megatron_fsdp_config(config: Config) -> dict[str, Any]:
    """Options of DistributedDataParallelConfig, as Megatron-LM's flags set them, but for what gloo lacks."""
    return {
        "use_megatron_fsdp": True,
        "data_parallel_sharding_strategy": config.fsdp,
        "outer_dp_sharding_strategy": config.outer,
        "gradient_reduce_div_fusion": False,  # gloo has no PREMUL_SUM
    }


def mend_meshes() -> None:
    """Have Megatron-FSDP make the mesh of one pipeline stage, where it takes all ranks for one (0.16.1 to 0.19.2)."""
    from megatron.core.distributed.fsdp import mcore_fsdp_adapter

    def of_stage(dp_group: Any, tp_group: Any, ep_size: int = 1) -> Tensor:
        return torch.tensor(dist.get_process_group_ranks(dp_group)).view(-1, 1)

    mcore_fsdp_adapter._get_dp_tp_mesh = of_stage


def transformer_config(config: Config) -> Any:
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    moe: dict[str, Any] = {}
    if config.experts:
        moe = {
            "num_moe_experts": config.experts,
            "moe_router_topk": 1,
            "moe_router_pre_softmax": True,
            "moe_token_dispatcher_type": "alltoall",
            "moe_router_load_balancing_type": "none",
            "moe_grouped_gemm": False,
            "expert_model_parallel_size": config.ep,
            "expert_tensor_parallel_size": config.etp or config.tp,
            "add_bias_linear": False,
        }
    dtype = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32
    mla = config.variant.startswith("mla")
    options = {**moe, **VARIANTS[config.variant], **(MLA if mla else {})}
    transformer = (MLATransformerConfig if mla else TransformerConfig)(
        num_layers=config.layers,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        ffn_hidden_size=2 * HIDDEN,
        tensor_model_parallel_size=config.tp,
        pipeline_model_parallel_size=config.pp,
        virtual_pipeline_model_parallel_size=config.vpp,
        sequence_parallel=config.sequence_parallel,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=config.bf16,
        fp16=config.fp16,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        attention_softmax_in_fp32=True,
        batch_p2p_comm=False,  # with two stages, gloo mixes up messages to the one peer that both neighbours are
        **options,
    )
    return transformer


def gpt(config: Config, transformer: Any, chunk: int) -> Any:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
    from megatron.core.models.mamba import MambaModel
    from megatron.core.post_training.modelopt.layers import Linear

    vpp = {"vp_stage": chunk} if config.vpp else {}
    stage = {
        "pre_process": parallel_state.is_pipeline_first_stage(ignore_virtual=False, **vpp),
        "post_process": parallel_state.is_pipeline_last_stage(ignore_virtual=False, **vpp),
        "share_embeddings_and_output_weights": config.tied,
    }
    if config.variant == "mamba":
        pattern = "M*-M"[: config.layers]
        return MambaModel(transformer, mamba_spec(), VOCAB, LENGTH, hybrid_override_pattern=pattern, **stage)
    spec = get_gpt_layer_local_spec(
        num_experts=config.experts or None,
        moe_grouped_gemm=False,
        qk_layernorm=transformer.qk_layernorm,
        multi_latent_attention=transformer.multi_latent_attention,
        normalization=transformer.normalization,
    )
    if transformer.multi_latent_attention:
        attention = spec.submodules.self_attention.submodules
        attention.core_attention = kernels.LatentAttention
        if config.variant == "mla-replicated":  # as ModelOpt's layers are, and Transformer Engine's
            attention.linear_q_down_proj = attention.linear_kv_down_proj = Linear
    if config.variant == "delta":
        spec.submodules.self_attention = delta_spec()
    if config.variant == "mtp":
        stage["mtp_block_spec"] = get_gpt_mtp_block_spec(transformer, spec, use_transformer_engine=False, **vpp)
    # Rotary positions would need the whole sequence under context parallelism.
    positions = "learned_absolute" if config.variant == "positions" else "rope"
    model = GPTModel(
        transformer,
        spec,
        vocab_size=VOCAB,
        max_sequence_length=LENGTH,
        position_embedding_type="none" if config.cp * config.pieces > 1 else positions,
        **stage,
        **vpp,
    )
    if config.variant == "expert-biases":
        for name, module in model.named_modules():
            if ".local_experts." in name and hasattr(module, "explicit_expert_comm"):
                # Else a single process adds the bias in place to the output of a custom function, which torch refuses.
                module.explicit_expert_comm = True
    return model


def mamba_spec() -> Any:
    """Megatron's mamba_stack_spec with its local layers for Transformer Engine's."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules
    from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

    local = get_gpt_layer_local_spec().submodules
    attention = TransformerLayerSubmodules(
        input_layernorm=local.input_layernorm,
        self_attention=local.self_attention,
        self_attn_bda=get_bias_dropout_add,
    )
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=local.pre_mlp_layernorm, mlp=local.mlp, mlp_bda=get_bias_dropout_add
    )
    mixer = ModuleSpec(MambaMixer, submodules=MambaMixerSubmodules(ColumnParallelLinear, RowParallelLinear))
    mamba = MambaLayerSubmodules(norm=WrappedTorchNorm, mixer=mixer, mamba_bda=get_bias_dropout_add)
    return ModuleSpec(
        MambaStack,
        submodules=MambaStackSubmodules(
            mamba_layer=ModuleSpec(MambaLayer, submodules=mamba),
            attention_layer=ModuleSpec(get_gpt_layer_local_spec().module, submodules=attention),
            mlp_layer=ModuleSpec(MLPLayer, submodules=mlp),
        ),
    )


def delta_spec() -> Any:
    """Megatron's gated delta net with its local layers for Transformer Engine's."""
    from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    parts = GatedDeltaNetSubmodules(ColumnParallelLinear, WrappedTorchNorm, RowParallelLinear)
    return ModuleSpec(GatedDeltaNet, submodules=parts)


def wrap_precision(model: Any, transformer: Any) -> Any:
    from megatron.core.transformer.module import Float16Module

    return Float16Module(transformer, model) if transformer.bf16 or transformer.fp16 else model


def layer_wise(optimizer_config: Any, chunks: list[Any]) -> Any:
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
    from megatron.core.process_groups_config import ProcessGroupCollection

    # As get_megatron_muon_optimizer does: main parameters are made after the parameters were divided among the ranks.
    bf16, optimizer_config.bf16 = optimizer_config.bf16, False
    made = get_megatron_optimizer(optimizer_config, chunks)
    optimizer_config.bf16 = bf16
    groups = ProcessGroupCollection.use_mpu_process_groups()
    optimizers = list(made.chained_optimizers)
    if bf16 and megatron_version() >= (0, 18):
        optimizers = [wrapped.optimizer for wrapped in optimizers]  # newer versions wrap them themselves
    return LayerWiseDistributedOptimizer(optimizers, optimizer_config, groups)


# ---------------------------------------------------------------- weights and data


def whole_weight(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """A tensor of the whole model, float32: the same under every layout."""
    key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:6], "big"))
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 0.1 * noise + (1.0 if name.endswith("norm.weight") else 0.0)
    return 0.3 * noise


def start_value(name: str, shape: tuple[int, ...], config: Config) -> Tensor:
    """The main parameter before the first step: a model in low precision starts from rounded weights."""
    whole = whole_weight(name, shape, 0)
    return whole.bfloat16().float() if config.bf16 else whole.half().float() if config.fp16 else whole


@torch.no_grad()
def initialise(model: Any, config: Config, seed: int, chunk: int = 0) -> None:
    """Give this rank its parts of the whole model's weights."""
    for name, param in cuts.named_parameters(model, config, chunk):
        whole = whole_weight(name, cuts.whole_shape(name, param.shape, config), seed)
        param.copy_(cuts.cut(name, whole, config))


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Token ids and targets of a step, [BATCH, LENGTH] each."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)
    keep = torch.rand(BATCH, LENGTH, generator=generator) < 0.8
    noise = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)
    return tokens, torch.where(keep, (5 * tokens + 1) % VOCAB, noise)


def spike(step: int) -> float:
    """Factor on the loss: injected spikes, after the warm-up."""
    return 30.0 if step in (9, 14, 15) else 1.0


def _backward(setup: Setup, step: int, factor: float) -> float:
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    config = setup.config
    tokens, targets = batch(step)
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
    if config.cp > 1:  # this rank's part of each sequence; attention stays within it
        part = parallel_state.get_context_parallel_rank()
        tokens, targets, positions = (t.chunk(config.cp, dim=1)[part] for t in (tokens, targets, positions))
    tokens, targets, positions = (t.reshape(BATCH * config.pieces, -1) for t in (tokens, targets, positions))
    rows = len(tokens) // MICRO_BATCHES
    # Megatron multiplies by the size of the context-parallel group, for losses that are sums.
    scale = spike(step) * factor / config.cp
    if config.outer == "optim" and megatron_version() >= (0, 17):
        scale /= dist.get_world_size()  # newer versions add these gradients up instead of averaging them
    for chunk in setup.chunks:
        chunk.zero_grad_buffer()
    setup.optimizer.zero_grad()
    inner = setup.chunks[0].config
    inner.finalize_model_grads_func = finalize_model_grads
    if config.fsdp and setup.chunks[0].ddp_config.overlap_grad_reduce:
        inner.no_sync_func = setup.chunks[0].no_sync  # as Megatron-LM: it tells Megatron-FSDP the last micro-batch
    inner.grad_scale_func = setup.optimizer.scale_loss if config.fp16 else None

    def loss_of(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = output.float().mean()
        return loss * scale, {"loss": loss.detach().clone()}

    def forward_step(iterator: Any, model: Any) -> tuple[Tensor, Any]:
        i = next(iterator)
        part = slice(i * rows, (i + 1) * rows)
        return model(tokens[part], positions[part], None, labels=targets[part]), loss_of

    losses = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(range(MICRO_BATCHES)) for _ in setup.chunks] if config.vpp else iter(range(MICRO_BATCHES)),
        model=setup.chunks if config.vpp else setup.chunks[0],
        num_microbatches=MICRO_BATCHES,
        seq_length=tokens.shape[1],
        micro_batch_size=rows,
        forward_only=False,
    )
    total = torch.stack([entry["loss"] for entry in losses]).mean() if losses else torch.zeros(())
    counted = torch.tensor([float(total), float(bool(losses))])
    dist.all_reduce(counted)
    return float(counted[0] / counted[1])
