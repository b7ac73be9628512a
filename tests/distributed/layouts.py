"""Owns the parallel layouts under test: each turns the whole model into what one rank holds and how it gets gradients.

A builder runs on every rank and returns a `Setup`. Gradients left behind by `Setup.backward` are those of the mean
loss over the whole batch, so a single process on the whole batch is the oracle of every layout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from .model import Block, Config, Net, batch, clean, loss_of, named_once, spike


@dataclass
class Setup:
    """What one rank trains: modules to clip, arguments for the clipper, and `backward(step)`."""

    modules: list[nn.Module]
    backward: Callable[[int], None]
    pp_group: dist.ProcessGroup | None = None
    groups: set[str] = field(default_factory=set)  # the 1-D groups of more than one rank with a share in some norm

    @property
    def named(self) -> list[tuple[str, nn.Parameter]]:
        return list(named_once(self.modules))


@dataclass(frozen=True)
class Layout:
    build: Callable[[Net, Config], Setup]
    config: Config
    worlds: tuple[int, ...] = (2, 4)
    dtype: torch.dtype | None = None  # None: whatever the test asks for
    trajectory: bool = True  # a single process on the whole batch follows the same path
    same_params: bool = True  # the optimizer sees a whole gradient for every tensor that has one
    partial: bool = False  # some gradients arrive as sums that are still due


@functools.cache
def mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """Meshes are kept: each makes process groups, and a worker lives through many tests."""
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


@functools.cache
def group_of(ranks: tuple[int, ...]) -> Any:
    return dist.new_group(list(ranks))


def shared(device_mesh: DeviceMesh) -> set[str]:
    """Names of the dimensions along which there is more than one rank."""
    names = device_mesh.mesh_dim_names or ()
    return {name for name, size in zip(names, device_mesh.mesh.shape, strict=True) if size > 1}


def share(tensor: Tensor, index: int, count: int) -> Tensor:
    """This data-parallel rank's part of the batch."""
    return tensor.chunk(count)[index]


def data_parallel_backward(model: nn.Module, net: Net, config: Config, index: int, count: int) -> Callable[[int], None]:
    """Forward and backward on part `index` of `count`; whoever reduces the gradients takes their mean."""

    def backward(step: int) -> None:
        tokens, targets = batch(config, step)
        net.step = step
        logits = model(share(tokens, index, count))
        if isinstance(logits, DTensor):
            logits = logits.full_tensor()
        (loss_of(logits, share(targets, index, count)) * spike(step)).backward()

    return backward


def average_grads(params: list[nn.Parameter], group: dist.ProcessGroup | None, *, mean: bool = True) -> None:
    """Data parallelism by hand, for gradients that no wrapper looks after."""
    for param in params:
        if param.grad is not None:
            grad = param.grad.to_local() if isinstance(param.grad, DTensor) else param.grad
            dist.all_reduce(grad, group=group)
            if mean:
                grad /= dist.get_world_size(group)


# ---------------------------------------------------------------- data parallelism


def ddp(net: Net, config: Config, **kwargs: Any) -> Setup:
    model = DistributedDataParallel(net, find_unused_parameters=config.aux)
    rank, world = dist.get_rank(), dist.get_world_size()
    return Setup([model], data_parallel_backward(model, net, config, rank, world))


def shard_blocks(net: Net, device_mesh: DeviceMesh, *, root: bool = True, **kwargs: Any) -> None:
    """fully_shard as one does: each block, whatever is not always used, then the rest.

    Parameters stay gathered between forward and backward: fewer collectives to wait for, and the same gradients.
    """
    kwargs["reshard_after_forward"] = False
    for block in net.blocks.values():
        fully_shard(block, mesh=device_mesh, **kwargs)
    if net.aux is not None:
        fully_shard(net.aux.late, mesh=device_mesh, **kwargs)
        fully_shard(net.aux.alternate, mesh=device_mesh, **kwargs)
    if root:
        fully_shard(net, mesh=device_mesh, **kwargs)


def fsdp(net: Net, config: Config, **kwargs: Any) -> Setup:
    rank, world = dist.get_rank(), dist.get_world_size()
    shard_blocks(net, mesh((world,), ("dp",)), **kwargs)
    return Setup([net], data_parallel_backward(net, net, config, rank, world), groups={"dp"})


def fsdp_dim1(net: Net, config: Config) -> Setup:
    return fsdp(net, config, shard_placement_fn=lambda param: Shard(1) if param.dim() == 2 else Shard(0))


def fsdp_mp(net: Net, config: Config, reduce_dtype: torch.dtype, param_dtype: torch.dtype = torch.bfloat16) -> Setup:
    return fsdp(net, config, mp_policy=MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype))


def fsdp_offload(net: Net, config: Config) -> Setup:
    return fsdp(net, config, offload_policy=CPUOffloadPolicy(pin_memory=False))


def hsdp(net: Net, config: Config) -> Setup:
    rank, world = dist.get_rank(), dist.get_world_size()
    device_mesh = mesh((2, world // 2), ("replicate", "shard"))
    shard_blocks(net, device_mesh)
    return Setup(
        [net], data_parallel_backward(net, net, config, rank, world), groups=shared(device_mesh) - {"replicate"}
    )


def fsdp_mixed(net: Net, config: Config) -> Setup:
    """Blocks are DTensors under FSDP2, the rest stays plain and is reduced by hand."""
    rank, world = dist.get_rank(), dist.get_world_size()
    shard_blocks(net, mesh((world,), ("dp",)), root=False)
    plain = [param for param in net.parameters() if not isinstance(param, DTensor)]
    step_of = data_parallel_backward(net, net, config, rank, world)

    def backward(step: int) -> None:
        step_of(step)
        average_grads(plain, None)

    return Setup([net], backward, groups={"dp"})


def dtensor_dp(net: Net, config: Config) -> Setup:
    """Parameters are DTensors with Replicate, the batch is Shard(0): gradients come out Partial."""
    world = dist.get_world_size()
    device_mesh = mesh((world,), ("dp",))
    distribute_module(net, device_mesh)

    def backward(step: int) -> None:
        tokens, targets = (distribute_tensor(t, device_mesh, [Shard(0)]) for t in batch(config, step))
        log_probs = torch.log_softmax(net(tokens), dim=-1)
        onehot = torch.nn.functional.one_hot(targets.to_local(), config.vocab).to(log_probs.dtype)
        onehot = DTensor.from_local(onehot, device_mesh, [Shard(0)])
        loss = -(log_probs * onehot).sum() / targets.numel()
        (loss.full_tensor() * spike(step)).backward()

    return Setup([net], backward, groups={"dp"})


# ---------------------------------------------------------------- FSDP1


class Piece:
    """This rank's range of one tensor inside a flat parameter, as far as a test reads it: its values and its gradient."""

    def __init__(self, flat: nn.Parameter, position: int) -> None:
        info = flat._shard_param_infos[position]
        self._flat = flat
        start = info.offset_in_shard if info.in_shard else 0
        self._range = slice(start, start + (info.numel_in_shard or 0))

    def detach(self) -> Tensor:
        return self._flat.detach()[self._range]

    @property
    def grad(self) -> Tensor | None:
        return None if self._flat.grad is None else self._flat.grad[self._range]

    @grad.setter
    def grad(self, value: None) -> None:
        self._flat.grad = value


@dataclass
class FlatSetup(Setup):
    """use_orig_params=False: the optimizer has flat parameters, and the tests look at the tensors inside."""

    @property
    def named(self) -> list[tuple[str, Any]]:
        pairs = []
        for name, flat in self.modules[0].named_parameters():
            prefix = name.removesuffix("_flat_param")
            pairs += [(clean(prefix + fqn), Piece(flat, i)) for i, fqn in enumerate(flat._fqns)]
        return pairs


def fsdp1(
    net: Net, config: Config, *, strategy: str = "FULL_SHARD", original: bool = True, nested: bool = True, **kwargs: Any
) -> Setup:
    """Each block wrapped, then the rest; or all in one flat parameter."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if strategy.startswith(("HYBRID", "_HYBRID")):
        kwargs["device_mesh"] = mesh((2, world // 2), ("replicate", "shard"))
    model = FullyShardedDataParallel(
        net,
        sharding_strategy=ShardingStrategy[strategy],
        auto_wrap_policy=ModuleWrapPolicy({Block}) if nested else None,
        use_orig_params=original,
        device_id=torch.device("cpu"),
        **kwargs,
    )
    kind = Setup if original else FlatSetup
    return kind([model], data_parallel_backward(model, net, config, rank, world))


# ---------------------------------------------------------------- tensor parallelism


def tensor_parallel(net: Net, device_mesh: DeviceMesh) -> None:
    """Column- and row-wise linears; embedding, norms and row-wise biases are whole on every rank."""
    # Where the width does not divide evenly, only a DTensor between the two linears knows the true sizes.
    even = net.config.hidden % device_mesh.size() == 0
    plan: dict[str, Any] = {"blocks.*.up": ColwiseParallel(use_local_output=even), "blocks.*.down": RowwiseParallel()}
    if net.head is not None:
        plan["head"] = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(net, device_mesh, plan)


def sequence_parallel(net: Net, device_mesh: DeviceMesh) -> None:
    """As torchtitan does it: between the linears the activations are sharded along the sequence, norms included."""
    plan = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "blocks.*.norm": SequenceParallel(),
        "blocks.*.up": ColwiseParallel(input_layouts=Shard(1)),
        "blocks.*.down": RowwiseParallel(output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    parallelize_module(net, device_mesh, plan)


def tp(net: Net, config: Config) -> Setup:
    tensor_parallel(net, mesh((dist.get_world_size(),), ("tp",)))
    return Setup([net], data_parallel_backward(net, net, config, 0, 1), groups={"tp"})


def tp_sequence(net: Net, config: Config) -> Setup:
    sequence_parallel(net, mesh((dist.get_world_size(),), ("tp",)))
    return Setup([net], data_parallel_backward(net, net, config, 0, 1), groups={"tp"})


def tp_fsdp(net: Net, config: Config, parallelize: Callable[[Net, DeviceMesh], None] = tensor_parallel) -> Setup:
    both = mesh((dist.get_world_size() // 2, 2), ("dp", "tp"))
    parallelize(net, both["tp"])
    shard_blocks(net, both["dp"])
    dp = both["dp"]
    step_of = data_parallel_backward(net, net, config, dp.get_local_rank(), dp.size())
    return Setup([net], step_of, groups=shared(both))


def hsdp_tp(net: Net, config: Config) -> Setup:
    """Three mesh dimensions: copies, shards, and tensor parallelism inside them."""
    three = mesh((2, 2, dist.get_world_size() // 4), ("replicate", "shard", "tp"))
    tensor_parallel(net, three["tp"])
    shard_blocks(net, three["replicate", "shard"])
    index = three["replicate"].get_local_rank() * 2 + three["shard"].get_local_rank()
    return Setup([net], data_parallel_backward(net, net, config, index, 4), groups={"shard", "tp"})


def tp_hsdp_like(net: Net, config: Config) -> Setup:
    """TP inside, and plain DTensor-free data parallelism by hand outside: tensors of both kinds on a 2-D grid."""
    both = mesh((dist.get_world_size() // 2, 2), ("dp", "tp"))
    tensor_parallel(net, both["tp"])
    dp = both["dp"]
    step_of = data_parallel_backward(net, net, config, dp.get_local_rank(), dp.size())

    def backward(step: int) -> None:
        step_of(step)
        average_grads(list(net.parameters()), dp.get_group())

    return Setup([net], backward, groups={"tp"})


# ---------------------------------------------------------------- expert parallelism


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All ranks' `x`, one after the other along dim 0."""
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)


def reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's part along dim 0 of the sum over ranks."""
    total = x.contiguous().clone()
    dist.all_reduce(total, group=group)
    return share(total, dist.get_rank(group), dist.get_world_size(group)).clone()


# torch has both as functional collectives with a gradient, but over gloo those corrupt the heap now and then (torch 2.13:
# "malloc(): unaligned tcache chunk detected" in one of 60 runs of 30 steps on 4 ranks, with no clipping at all).
class AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return gather(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return reduce_scatter(grads[0], ctx.group), None


class ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return gather(grads[0], ctx.group), None


def expert_parallel(net: Net, config: Config, expert_dim: int = 0) -> Setup:
    """Experts on (efsdp, ep), everything else on (fsdp), as torchtitan does it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    dense = mesh((world,), ("fsdp",))
    sparse = mesh((world // 2, 2), ("efsdp", "ep"))
    ep, alone = sparse["ep"], sparse["efsdp"].size() == 1
    ep_group, first = ep.get_group(), ep.get_local_rank() * (config.experts // ep.size())

    for block in net.blocks.values():
        experts = block.experts
        for name, param in list(experts.named_parameters()):
            setattr(experts, name, nn.Parameter(distribute_tensor(param.data, ep, [Shard(0)])))
        fully_shard(experts, mesh=sparse["efsdp"], shard_placement_fn=lambda param: Shard(expert_dim))
        if not alone:
            # An expert's gradient is the sum over all tokens that reached it: the mean is over the whole world.
            experts.set_gradient_divide_factor(world)
            experts.set_force_sum_reduction_for_comms(True)

        def forward(x: Tensor, route: Tensor, experts: nn.Module = experts) -> Tensor:
            """All tokens of the ep group to every rank, its experts on them, and the sum of outputs back."""
            up, down = experts.up.to_local(), experts.down.to_local()
            tokens, routes = AllGather.apply(x, ep_group), gather(route, ep_group)
            out = torch.zeros_like(tokens)
            for local, (u, d) in enumerate(zip(up, down, strict=True)):
                mine = (routes == first + local).unsqueeze(-1).to(x.dtype)
                out = out + mine * (torch.nn.functional.gelu(tokens @ u) @ d)
            return ReduceScatter.apply(out, ep_group)

        experts.forward = forward
    shard_blocks(net, dense)
    step_of = data_parallel_backward(net, net, config, rank, world)

    def backward(step: int) -> None:
        step_of(step)
        if alone:  # over one rank FSDP2 has nothing to reduce, and its divide factor would be applied twice
            for block in net.blocks.values():
                for param in block.experts.parameters():
                    param.grad = param.grad / world

    return Setup([net], backward, groups=shared(dense) | shared(sparse))


# ---------------------------------------------------------------- pipeline parallelism


def pipeline(
    net: Net,
    config: Config,
    *,
    chunks: int = 1,
    inner: Callable[[Net, DeviceMesh], None] | None = None,
    inner_size: int = 1,
    inner_is_data: bool = True,
    schedule: Callable[..., Any] = Schedule1F1B,
) -> Setup:
    """Stages over "pp"; within a stage an inner mesh of `inner_size` ranks that `inner` parallelizes over."""
    world = dist.get_world_size()
    size = world // inner_size
    both = mesh((size, inner_size), ("pp", "inner"))
    pp_group, stage_rank = both["pp"].get_group(), both["pp"].get_local_rank()
    parts, stages = [], []
    for chunk in range(chunks):
        index = chunk * size + stage_rank
        part = net.part(index, chunks * size)
        if inner is not None:
            inner(part, both["inner"])
        parts.append(part)
        stages.append(PipelineStage(part, index, chunks * size, torch.device("cpu"), group=pp_group))

    data_size = inner_size if inner_is_data else 1
    data_index = both["inner"].get_local_rank() if inner_is_data else 0
    microbatches = size  # the fewest that every schedule takes
    factor = [1.0]

    def loss_fn(logits: Tensor, targets: Tensor) -> Tensor:
        return loss_of(logits, targets) * factor[0]

    runner = schedule(stages if chunks > 1 else stages[0], microbatches, loss_fn=loss_fn)
    by_hand = inner is None and inner_size > 1
    # Ranks of the first and the last stage that hold the same piece of the tied embedding, one group for each piece.
    tied_groups = [group_of((k, world - inner_size + k)) for k in range(inner_size)] if config.tied else []

    def backward(step: int) -> None:
        tokens, targets = (share(t, data_index, data_size) for t in batch(config, step))
        factor[0] = spike(step)
        for part in parts:
            part.step = step
        arguments = (tokens,) if parts[0].is_first else ()
        runner.step(*arguments, target=targets if parts[-1].is_last else None)
        if tied_groups and (parts[0].is_first or parts[-1].is_last):
            average_grads([parts[0].embed.weight], tied_groups[both["inner"].get_local_rank()], mean=False)
        if by_hand:
            average_grads([p for part in parts for p in part.parameters()], both["inner"].get_group())

    groups = {"pp"} | ({"inner"} if inner is not None else set())
    return Setup(list(parts), backward, pp_group=pp_group, groups=groups)


def pp_tp_fsdp(net: Net, config: Config) -> Setup:
    """Two stages, each TP + FSDP2 on a two-dimensional mesh."""
    three = mesh((2, dist.get_world_size() // 4, 2), ("pp", "dp", "tp"))
    pp_group, dp = three["pp"].get_group(), three["dp"]
    index = three["pp"].get_local_rank()
    part = net.part(index, 2)
    tensor_parallel(part, three["tp"])
    shard_blocks(part, dp)
    stage = PipelineStage(part, index, 2, torch.device("cpu"), group=pp_group)
    factor = [1.0]

    def loss_fn(logits: Tensor, targets: Tensor) -> Tensor:
        return loss_of(logits, targets) * factor[0]

    runner = Schedule1F1B(stage, 2, loss_fn=loss_fn)

    def backward(step: int) -> None:
        tokens, targets = (share(t, dp.get_local_rank(), dp.size()) for t in batch(config, step))
        factor[0] = spike(step)
        part.step = step
        runner.step(*((tokens,) if part.is_first else ()), target=targets if part.is_last else None)

    return Setup([part], backward, pp_group=pp_group, groups={"pp", "dp", "tp"})


# ---------------------------------------------------------------- gradients that are missing on some ranks


def fsdp_hole(net: Net, config: Config) -> Setup:
    """Every third step, the last rank has no gradient for one tensor: its piece counts as zero, and nothing hangs."""
    setup = fsdp(net, config)
    whole = setup.backward

    def backward(step: int) -> None:
        whole(step)
        if step % 3 == 0 and dist.get_rank() == dist.get_world_size() - 1:
            net.blocks["0"].up.weight.grad = None

    setup.backward = backward
    return setup


def pp_hole(net: Net, config: Config) -> Setup:
    """Every third step, the first stage has no gradients at all."""
    setup = pipeline(net, config)
    whole = setup.backward

    def backward(step: int) -> None:
        whole(step)
        if step % 3 == 0 and dist.get_rank() == 0:
            setup.modules[0].zero_grad(set_to_none=True)

    setup.backward = backward
    return setup


DENSE = Config()
UNEVEN = Config(width=6, hidden=10, vocab=7, odd=True)
FROZEN = Config(frozen=("embed.weight", "blocks.0.up.bias", "blocks.1.norm.weight"))
DEEP = Config(blocks=4)
MOE = Config(experts=4)

LAYOUTS: dict[str, Layout] = {
    "ddp": Layout(ddp, UNEVEN),
    "ddp-tied": Layout(ddp, Config(tied=True)),
    "ddp-frozen": Layout(ddp, FROZEN),
    "ddp-aux": Layout(ddp, Config(aux=True)),
    "fsdp": Layout(fsdp, DENSE),
    "fsdp-uneven": Layout(fsdp, UNEVEN),
    "fsdp-dim1": Layout(fsdp_dim1, DENSE),
    "fsdp-tied": Layout(fsdp, Config(tied=True)),
    "fsdp-frozen": Layout(fsdp, FROZEN),
    "fsdp-aux": Layout(fsdp, Config(aux=True, odd=True)),
    "fsdp-hole": Layout(fsdp_hole, DENSE, trajectory=False, same_params=False),
    "fsdp-mp": Layout(functools.partial(fsdp_mp, reduce_dtype=torch.float32), DENSE, (2, 4), torch.float32, False),
    "fsdp-mp-bf16-reduce": Layout(
        functools.partial(fsdp_mp, reduce_dtype=torch.bfloat16), UNEVEN, (2, 4), torch.float32, False
    ),
    "fsdp-bf16": Layout(fsdp, DENSE, (2, 4), torch.bfloat16, False, False),
    "fsdp-offload": Layout(fsdp_offload, DENSE),
    "fsdp-mixed-plain": Layout(fsdp_mixed, UNEVEN),
    "hsdp": Layout(hsdp, UNEVEN),
    "dtensor-dp": Layout(dtensor_dp, DENSE, partial=True),
    "tp": Layout(tp, DENSE),
    "tp-uneven": Layout(tp, Config(width=6, hidden=10, vocab=7)),
    "tp-sequence": Layout(tp_sequence, DENSE, partial=True),
    "tp-by-hand-dp": Layout(tp_hsdp_like, DENSE, (4,)),
    "tp-fsdp": Layout(tp_fsdp, DENSE),
    "tp-fsdp-uneven": Layout(tp_fsdp, Config(width=6, hidden=10, vocab=7), (4,)),
    "tp-sequence-fsdp": Layout(functools.partial(tp_fsdp, parallelize=sequence_parallel), DENSE),
    "ep": Layout(expert_parallel, MOE),
    "ep-dim1": Layout(functools.partial(expert_parallel, expert_dim=1), MOE),
    "pp": Layout(pipeline, DEEP),
    "pp-gpipe": Layout(functools.partial(pipeline, schedule=ScheduleGPipe), DEEP, (2,)),
    "pp-chunks": Layout(
        functools.partial(pipeline, chunks=2, schedule=ScheduleInterleaved1F1B), Config(blocks=8, width=4, hidden=6)
    ),
    "pp-tied": Layout(pipeline, Config(blocks=4, tied=True)),
    "pp-frozen": Layout(pipeline, Config(blocks=4, frozen=("blocks.0.up.bias", "blocks.1.norm.weight"))),
    "pp-hole": Layout(pp_hole, DEEP, trajectory=False, same_params=False),
    "pp-dp-by-hand": Layout(functools.partial(pipeline, inner_size=2), DEEP, (4,)),
    "pp-fsdp": Layout(functools.partial(pipeline, inner=shard_blocks, inner_size=2), Config(blocks=4, odd=True), (4,)),
    "pp-tp": Layout(functools.partial(pipeline, inner=tensor_parallel, inner_size=2, inner_is_data=False), DEEP, (4,)),
    "pp-tied-fsdp": Layout(
        functools.partial(pipeline, inner=shard_blocks, inner_size=2), Config(blocks=4, tied=True), (4,)
    ),
    "pp-chunks-fsdp": Layout(
        functools.partial(pipeline, chunks=2, inner=shard_blocks, inner_size=2, schedule=ScheduleInterleaved1F1B),
        DEEP,
        (4,),
    ),
}

LAYOUTS["pp-tp-fsdp"] = Layout(pp_tp_fsdp, Config(blocks=4, width=6, hidden=10, vocab=7), worlds=())  # eight, as well
LAYOUTS["hsdp-tp"] = Layout(hsdp_tp, Config(width=6, hidden=10, vocab=7), worlds=())  # eight ranks: tested apart

# fp16 needs a GradScaler: tested apart, in test_mixed_precision.py.
LAYOUTS["fsdp-fp16"] = Layout(
    functools.partial(fsdp_mp, reduce_dtype=torch.float32, param_dtype=torch.float16), DENSE, ()
)

# Old and wrapped in many ways: tested apart, in test_fsdp1.py.
LAYOUTS |= {
    "fsdp1": Layout(fsdp1, UNEVEN, ()),
    "fsdp1-flat": Layout(functools.partial(fsdp1, original=False), UNEVEN, ()),
    "fsdp1-one-flat": Layout(functools.partial(fsdp1, original=False, nested=False), Config(tied=True), ()),
    "fsdp1-frozen": Layout(fsdp1, FROZEN, ()),
    "fsdp1-grad-op": Layout(functools.partial(fsdp1, strategy="SHARD_GRAD_OP"), DENSE, ()),
    "fsdp1-grad-op-flat": Layout(functools.partial(fsdp1, strategy="SHARD_GRAD_OP", original=False), DENSE, ()),
    "fsdp1-hybrid": Layout(functools.partial(fsdp1, strategy="HYBRID_SHARD"), UNEVEN, ()),
    "fsdp1-hybrid-flat": Layout(functools.partial(fsdp1, strategy="HYBRID_SHARD", original=False), UNEVEN, ()),
    "fsdp1-no-shard": Layout(functools.partial(fsdp1, strategy="NO_SHARD"), UNEVEN, ()),
    "fsdp1-no-shard-flat": Layout(functools.partial(fsdp1, strategy="NO_SHARD", original=False), UNEVEN, ()),
}

CASES = [(name, world) for name, layout in LAYOUTS.items() for world in layout.worlds]
