"""Megatron-core's own names, and all that differs between its versions, for the other modules of this package."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dist_clip.errors import LayoutError
from dist_clip.layouts.dtensor import gradient_attribute

TESTED_FROM = (0, 16, 1)
TESTED_BELOW = (0, 20, 0)


@dataclasses.dataclass(frozen=True)
class Groups:
    """The process groups of this rank. A group of one rank splits nothing; None: Megatron has no such group.

    Attributes:
        tp, expt_tp: tensor parallelism of dense and of expert parameters.
        dp, expt_dp: the ranks over which a sharded optimizer spreads one copy (one instance, context parallelism
            included) of dense and of expert parameters.
        ep: expert parallelism, for the experts' global numbers.
        pp: pipeline stages.
        stage: all ranks of this rank's pipeline stage.
    """

    tp: dist.ProcessGroup | None
    expt_tp: dist.ProcessGroup | None
    dp: dist.ProcessGroup | None
    expt_dp: dist.ProcessGroup | None
    ep: dist.ProcessGroup | None
    pp: dist.ProcessGroup | None
    stage: dist.ProcessGroup | None


@dataclasses.dataclass(frozen=True)
class Piece:
    """This rank's part of a model parameter in an optimizer.

    Attributes:
        param: the model parameter.
        holder: the optimizer's tensor for this part.
        attribute: name of the attribute of `holder` that is the gradient.
        start, stop: the part covers elements [start, stop) of the flattened parameter.
    """

    param: Tensor
    holder: Tensor
    attribute: str
    start: int
    stop: int

    def grad(self) -> Tensor | None:
        """Return the gradient of this part, once the optimizer has prepared it; None without one."""
        return local(getattr(self.holder, self.attribute, None))

    def weight(self) -> Tensor:
        """Return the values of this part, as the optimizer holds them."""
        return local(self.holder.detach())


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An optimizer that does not consist of others. `spread`: its parameters are divided among data-parallel ranks."""

    optimizer: Any
    spread: bool


def local(tensor: Any) -> Any:
    """Return this rank's part of a DTensor; anything else as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def version() -> str:
    try:
        from megatron.core.package_info import __version__
    except ImportError as error:
        raise ImportError(
            "megatron-core is not installed: pip install 'dist-clip[megatron]', or put Megatron-LM on the path"
        ) from error
    return str(__version__)


def warn_if_untested() -> None:
    """Warn if the version of megatron-core is outside of the tested versions, naming both."""
    found = version()
    numbers = tuple(int(part) for part in re.findall(r"\d+", found)[:3])
    if not TESTED_FROM <= numbers < TESTED_BELOW:
        low, high = (".".join(map(str, v)) for v in (TESTED_FROM, TESTED_BELOW))
        warnings.warn(
            f"megatron-core {found} is outside the versions that dist_clip is tested with ({low} to below {high}): compare "
            "the grad norm of the first steps with Megatron's own before you trust it",
            stacklevel=3,
        )


def process_groups(pg_collection: Any) -> Groups:
    """Return the groups of `pg_collection`; None: those of megatron.core.parallel_state.

    Raises:
        LayoutError: parallel_state is not initialized, or generalized tensor parallelism is used.
    """
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    if pg_collection is None:
        if not parallel_state.model_parallel_is_initialized():
            raise LayoutError("megatron.core.parallel_state is not initialized: call initialize_model_parallel first")
        names = ["tp", "expt_tp", "intra_dp_cp", "intra_expt_dp", "dp_cp", "expt_dp", "ep", "pp", "tp_dp_cp"]
        pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=names)

    def find(*names: str) -> dist.ProcessGroup | None:
        return next((g for g in (getattr(pg_collection, name, None) for name in names) if g is not None), None)

    for name in ("gtp_remat", "expt_gtp_remat"):
        group = getattr(pg_collection, name, None)
        if group is not None and group.size() > 1:
            raise LayoutError(
                f"generalized tensor parallelism ({name} over {group.size()} ranks) is not supported: it splits gradients "
                "once more, and needs a Transformer Engine with which dist_clip was never run; set its size to 1"
            )
    return Groups(
        tp=find("tp"),
        expt_tp=find("expt_tp"),
        dp=find("intra_dp_cp", "dp_cp"),
        expt_dp=find("intra_expt_dp", "expt_dp"),
        ep=find("ep"),
        pp=find("pp"),
        stage=find("tp_dp_cp"),
    )


def leaves(optimizer: Any) -> list[Leaf]:
    """Return the optimizers of which `optimizer` consists, without stubs. Layer-wise (Muon) optimizers contain chains.

    Raises:
        LayoutError: an optimizer of an unknown class, or a sharding strategy of Megatron-FSDP that is not known.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
    from megatron.core.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer

    sharding: tuple[Any, ...] = (DistributedOptimizer, *_fully_sharded())
    known = (*sharding, Float16OptimizerWithFloat16Params, FP32Optimizer)

    def walk(node: Any, spread: bool) -> Iterator[Leaf]:
        if isinstance(node, ChainedOptimizer):
            # With one data-parallel rank it divides nothing, whatever copies of experts there are.
            divides = isinstance(node, LayerWiseDistributedOptimizer) and node.dp_cp_params_list is not None
            for child in node.chained_optimizers:
                yield from walk(child, spread or divides)
        elif isinstance(node, torch.optim.Optimizer):
            raise LayoutError(
                f"{type(node).__name__} is a torch optimizer that Megatron has not wrapped, so that Megatron's own step() "
                "fails: it has no prepare_grads. Newer versions' layer-wise optimizer leaves it so without bf16: "
                "train with bf16, or without use_layer_wise_distributed_optimizer"
            )
        elif not isinstance(node, known):
            raise LayoutError(
                f"{type(node).__name__} is not an optimizer that dist_clip knows how to clip (known: DistributedOptimizer, "
                "Float16OptimizerWithFloat16Params, FP32Optimizer, ChainedOptimizer, LayerWiseDistributedOptimizer, "
                "FullyShardedOptimizer): leave Megatron's own clipping on for it"
            )
        elif isinstance(node, sharding):
            fsdp = is_megatron_fsdp(node)
            if fsdp:
                _check_strategies(node.ddp_config)
            yield Leaf(node, not fsdp)  # Megatron-FSDP's parameters are DTensors, which tell by themselves
        else:
            yield Leaf(node, spread)

    return [leaf for leaf in walk(optimizer, False) if not getattr(leaf.optimizer, "is_stub_optimizer", False)]


def _fully_sharded() -> tuple[Any, ...]:
    """Return the class of the optimizer of Megatron-FSDP v2, which newer versions have."""
    try:
        from megatron.core.optimizer.fully_sharded_optimizer import FullyShardedOptimizer
    except ImportError:
        return ()
    return (FullyShardedOptimizer,)


def is_megatron_fsdp(leaf: Any) -> bool:
    """Return whether Megatron-FSDP owns the parameters and gradients of an optimizer."""
    return bool(getattr(getattr(leaf, "ddp_config", None), "use_megatron_fsdp", False))


_STRATEGIES = {
    "data_parallel_sharding_strategy": ("no_shard", "optim", "optim_grads", "optim_grads_params"),
    "outer_dp_sharding_strategy": ("no_shard", "optim"),
}


def _check_strategies(config: Any) -> None:
    for field, known in _STRATEGIES.items():
        found = getattr(config, field, "no_shard")
        if found not in known:
            raise LayoutError(
                f"Megatron-FSDP shards by {field}={found!r}, which dist_clip does not know (known: {', '.join(known)}): "
                "leave Megatron's own clipping on"
            )


def model_param(param: Any) -> nn.Parameter:
    """Return the parameter with Megatron's marks: Megatron-FSDP puts DTensors without some of them into the modules."""
    reference = getattr(param, "_mfsdp_parameter_group", None)  # v2
    if reference is None:
        return getattr(param, "orig_param", param)
    return next(
        each.unsharded for each in reference().fsdp_parameters if param is each.sharded or param is each.unsharded
    )


def is_chained(optimizer: Any) -> bool:
    return hasattr(optimizer, "chained_optimizers")


def inside(optimizer: Any) -> Iterator[Any]:
    """Yield the optimizer and those that it consists of: chains contain chains."""
    yield optimizer
    for child in getattr(optimizer, "chained_optimizers", ()):
        yield from inside(child)


def pieces(leaf: Any) -> Iterator[Piece]:
    """Yield the parts of parameters that `leaf` steps on this rank, whose gradients exist after ``prepare_grads``."""
    config = getattr(leaf, "config", None)
    decoupled = getattr(config, "use_precision_aware_optimizer_no_fp8_or_ds_fp8", False)
    attribute = "decoupled_grad" if decoupled else "grad"
    if is_megatron_fsdp(leaf):
        for param in _megatron_fsdp_params(leaf):
            yield Piece(model_param(param), param, gradient_attribute(param), 0, local(param).numel())
    elif hasattr(leaf, "shard_fp32_groups"):  # DistributedOptimizer
        low = leaf.shard_float16_groups if decoupled else leaf.shard_fp32_from_float16_groups
        for models, shards in ((leaf.model_float16_groups, low), (leaf.model_fp32_groups, leaf.shard_fp32_groups)):
            for param, shard in _pairs(models, shards):
                part = leaf._get_model_param_range_map(param)["param"]
                yield Piece(param, shard, attribute, part.start, part.end)
    elif hasattr(leaf, "fp32_from_float16_groups"):  # Float16OptimizerWithFloat16Params
        for param, main in _pairs(leaf.float16_groups, leaf.fp32_from_float16_groups):
            yield Piece(param, main, attribute, 0, param.numel())
        for group in leaf.fp32_from_fp32_groups:
            for param in group:
                yield Piece(param, param, attribute, 0, param.numel())
    else:  # FP32Optimizer
        for group in leaf.param_groups:
            for param in group["params"]:
                yield Piece(param, param, attribute, 0, param.numel())


def _megatron_fsdp_params(leaf: Any) -> Iterator[Tensor]:
    for group in leaf.optimizer.param_groups:
        yield from group["params"]
    if isinstance(leaf, _fully_sharded()):  # v2 does not step what this rank holds no element of
        for chunk in leaf.model_chunks:
            yield from (p for p in chunk.parameters() if p.requires_grad and not local(p).numel())


def _pairs(models: Sequence[Sequence[Tensor]], mains: Sequence[Sequence[Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    for model_group, main_group in zip(models, mains, strict=True):
        yield from zip(model_group, main_group, strict=True)


# Attributes of parameters that change which elements their norm adds up, in ways that dist_clip does not implement.
_REFUSED = {
    "is_gtp_weight_remat": "generalized tensor parallelism splits its gradient; set its size to 1",
}


def refuse_unknown(name: str, module: nn.Module, param: Tensor, groups: Groups) -> None:
    """Raise LayoutError if dist_clip cannot compute the norm of `param` correctly."""
    for attribute, why in _REFUSED.items():
        if getattr(param, attribute, None):
            raise LayoutError(f"{name!r} has the attribute {attribute}, which dist_clip does not support: {why}")
    if type(module).__name__ == "GroupedMLP":
        raise LayoutError(
            f"{name!r} stacks the experts of one rank in one matrix (the legacy GroupedMLP), so experts have no norm of "
            "their own: use TEGroupedMLP (Transformer Engine) or SequentialMLP"
        )
    if is_routed_expert(name):
        if groups.expt_tp is None or groups.tp is None:
            raise LayoutError(f"{name!r} belongs to an expert, but there is no expert-tensor-parallel group")
        if not is_expert_parallel(param) and groups.expt_tp.size() != groups.tp.size():
            raise LayoutError(
                f"{name!r} is an expert's, with expert tensor parallelism {groups.expt_tp.size()} and tensor parallelism "
                f"{groups.tp.size()}, but Megatron treats it as a dense parameter (expert parallelism 1, before "
                "megatron-core 0.19) and leaves its gradient wrong: set both alike"
            )


def is_routed_expert(name: str) -> bool:
    return ".experts." in name


def is_expert_parallel(param: Tensor) -> bool:
    """Return whether the gradient of `param` is reduced over the expert groups, and not over the dense ones."""
    return not getattr(param, "allreduce", True)


def is_tensor_parallel(param: Tensor) -> bool:
    return bool(getattr(param, "tensor_model_parallel", False))


def partition_dim(param: Tensor) -> int:
    """Return the dimension along which tensor parallelism splits `param`; 0 if Megatron sets none."""
    dim = getattr(param, "partition_dim", 0)
    return dim if dim is not None and dim >= 0 else 0


def grad_norm_group(param: Tensor | None) -> str | None:
    """Return the name of the group, apart from the other tensors, whose norm is to clip `param` (newer versions)."""
    return getattr(param, "grad_norm_group", None)


def is_tied_copy(param: Tensor) -> bool:
    """Return whether `param` is the last pipeline stage's copy of the word embedding, its output layer's weight."""
    return bool(getattr(param, "shared", False) and getattr(param, "shared_embedding", False))


def skip_threshold(config: Any) -> float | None:
    """Return the grad norm above which Megatron (newer versions) skips a step; None if it never does."""
    threshold = float(getattr(config, "grad_norm_skip_threshold", math.inf))
    return threshold if threshold < math.inf else None
