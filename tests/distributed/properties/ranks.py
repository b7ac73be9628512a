"""Runs a random case on one rank: builds the model, gives it gradients step by step, clips, and records what happened."""

from __future__ import annotations

import contextlib
import functools
import io
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

import dist_clip

from .. import layouts
from ..counting import CollectiveLog
from ..model import clean
from ..training import local
from . import cases
from .cases import Case, Hand, Layer, Mesh, Placed, Wrapped

NAMES = {0: ("d0", "d1", "d2", "d3"), 1: ("t0", "t1", "t2", "t3")}


@dataclass
class Held:
    """One logical tensor on this rank: which elements, how to give it a gradient, and how to read it back."""

    index: Tensor  # flat indices, in the shape of the shard
    put: Callable[[Tensor | None], None]  # takes this rank's piece of the gradient
    take: Callable[[], Tensor | None]  # None: no gradient
    param: Tensor


@dataclass
class Model:
    module: nn.Module
    held: dict[str, Held]
    pp_group: Any = None


def run_case(case: Case) -> dict[str, Any]:
    """What happened on this rank, as plain data. An error is told, not raised: if all have it, they are still in step."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch: FSDP1 is old, NO_SHARD is older
            return record(case)
    except Exception:
        return {"error": traceback.format_exc()}


def record(case: Case) -> dict[str, Any]:
    model = by_hand(case, case.model) if isinstance(case.model, Hand) else wrapped(case.model)
    others = elsewhere(case, model)
    logical = case.model.logical()
    numbers = {name: number for number, name in enumerate(logical)}
    clipper = make_clipper(case, model)
    records = []
    for step, spec in enumerate(case.steps, start=1):
        for name, held in model.held.items():
            tensor, number = logical[name], numbers[name]
            held.param.requires_grad_(step > tensor.frozen)
            whole = cases.gradient(case, number, tensor, step)
            without = cases.lacking(case.kind(number, tensor, step))
            lacks = without is not None and others(without, name) == held.index.flatten().tolist()
            held.put(None if whole is None or lacks else whole.flatten()[held.index])
        entry = one_step(clipper, model, logged=case.seed % 4 == 0)
        if spec.reload:
            file = io.BytesIO()
            torch.save(clipper.state_dict(), file)
            file.seek(0)
            clipper = make_clipper(case, model)
            clipper.load_state_dict(torch.load(file, weights_only=True))
        entry["state"] = plain_state(clipper)
        records.append(entry)
    return {
        "index": {name: held.index.flatten().numpy() for name, held in model.held.items()},
        "names": list(clipper.layout.names),
        "pp_ranks": None if model.pp_group is None else tuple(dist.get_process_group_ranks(model.pp_group)),
        "steps": records,
    }


def elsewhere(case: Case, model: Model) -> Callable[[int, str], list[int] | None]:
    """What a function of a rank and a name tells: the flat indices of what that rank holds; None: nothing."""
    made = case.model
    if isinstance(made, Hand):
        logical = made.logical()

        def computed(rank: int, name: str) -> list[int] | None:
            tensor = logical[name]
            if cases.stage_of(made, rank, case.world) not in tensor.stages:
                return None
            return cases.piece(tensor, made, rank, case.world).flatten().tolist()

        return computed
    everyone: list[Any] = [None] * case.world
    dist.all_gather_object(everyone, {name: held.index.flatten().tolist() for name, held in model.held.items()})
    return lambda rank, name: everyone[rank].get(name)


def one_step(clipper: Any, model: Model, *, logged: bool) -> dict[str, Any]:
    """Clips once. `logged`: with a log of the collectives, which doubles a step's cost."""
    entry: dict[str, Any] = {"present": {name: held.take() is not None for name, held in model.held.items()}}
    try:
        with CollectiveLog() if logged else contextlib.nullcontext() as log:
            report = clipper.clip_()
        if log is not None:
            entry["log"] = [(call.name, call.ranks) for call in log.entries]
        fields = ("tensor_norms", "scales", "global_norm", "clipped_global_norm", "clipped_fraction", "min_scale")
        fields += ("nonfinite", "skip", "num_grads", "empty", "names", "has_global_norm")
        values = {field: getattr(report, field) for field in fields}
        entry["report"] = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in values.items()}
    except dist_clip.NonFiniteGradError as error:
        entry["raised"] = str(error)
    after = {name: held.take() for name, held in model.held.items()}
    # One vector: cheap to send. Every dtype's values are exactly float64s.
    entry["after"] = {
        name: None if t is None else t.detach().double().flatten().numpy().copy() for name, t in after.items()
    }
    return entry


def plain_state(clipper: Any) -> dict[str, Any]:
    """The public state, numbers only: {"t": steps, "tensors": {name: slots}, "global": {pattern: slots}}."""
    state = clipper.state_dict()
    tensors = {name: plain(entry) for name, entry in state["tensors"].items()}
    for name, entry in state["shards"].items():
        (mine,) = (slots for key, slots in entry.items() if key != "layout")
        tensors[name] = plain(mine)
    return {
        "t": state["step"],
        "tensors": tensors,
        "global": {pattern: plain(entry) for pattern, entry in state["global"].items()},
    }


def plain(entry: dict[str, Any]) -> dict[str, Any]:
    return {slot: value.tolist() if isinstance(value, Tensor) else value for slot, value in entry.items()}


def make_clipper(case: Case, model: Model) -> Any:
    module = model.module
    targets: dict[str, Callable[[], Any]] = {
        "module": lambda: module,
        "modules": lambda: [module],
        "named": lambda: module.named_parameters(),
        "dict": lambda: dict(module.named_parameters()),
        "optimizer": lambda: torch.optim.SGD(list(module.named_parameters()), lr=0.1),
    }
    return dist_clip.GradClipper(
        # An optimizer refuses to have nothing, as on a pipeline stage without tensors.
        targets[case.target if any(True for _ in module.parameters()) else "module"](),
        case.policy,
        overrides=dict(case.groups),
        exclude=case.exclude,
        nonfinite=case.nonfinite,
        log_global_norm=case.log_global_norm,
        guard=None if case.skip_above is None else dist_clip.SkipAbove(case.skip_above),
        pp_group=model.pp_group,
        # There is nothing to find: half of the cases say so.
        detect_desync=case.seed % 2 == 1,
    )


# ---------------------------------------------------------------- models of hand-made tensors


@functools.cache
def device_mesh(mesh: Mesh, pp: int) -> Any:
    names = NAMES[mesh.twin]
    if pp == 1:
        root = layouts.mesh(mesh.shape, names[: len(mesh.shape)])
        used = mesh.dims
    else:
        root = layouts.mesh((pp, *mesh.shape), names[: len(mesh.shape) + 1])
        used = tuple(dim + 1 for dim in mesh.dims)
    if len(used) == root.ndim:
        return root
    return root[tuple(names[dim] for dim in used)] if len(used) > 1 else root[names[used[0]]]


def by_hand(case: Case, model: Hand) -> Model:
    rank = dist.get_rank()
    root = nn.Module()
    held: dict[str, Held] = {}
    for mesh in model.meshes:  # made by all ranks together, also by those that hold nothing on them
        device_mesh(mesh, model.pp)
    for number, tensor in enumerate(model.tensors):
        if cases.stage_of(model, rank, case.world) not in tensor.stages:
            continue
        made = hand_made(case, model, number, tensor)
        held[tensor.name] = made
        register(root, tensor.name, made.param)
    for number, tensor in enumerate(model.tensors):  # last, so that the first name is the tensor's own
        if tensor.alias and tensor.name in held:
            register(root, f"zz.tied{number}", held[tensor.name].param)
    pp_group = None
    if model.pp > 1:
        pp_group = layouts.mesh((model.pp, case.world // model.pp), ("pp", "inner"))["pp"].get_group()
    return Model(root, held, pp_group)


def register(root: nn.Module, name: str, param: Tensor) -> None:
    *path, leaf = name.split(".")
    module = root
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    module.register_parameter(leaf, param)  # type: ignore[arg-type]


def hand_made(case: Case, model: Hand, number: int, tensor: Placed) -> Held:
    rank = dist.get_rank()
    dtype = getattr(torch, tensor.dtype)
    index = cases.piece(tensor, model, rank, case.world)
    if tensor.mesh is None:
        plain_param = nn.Parameter(torch.zeros(tensor.shape, dtype=dtype))

        def put_plain(grad: Tensor | None) -> None:
            plain_param.grad = turned(grad, tensor)

        return Held(index, put_plain, lambda: plain_param.grad, plain_param)

    mesh = model.meshes[tensor.mesh]
    placements = torch_placements(tensor, mesh)
    strides = torch.empty(tensor.shape, device="meta").stride()
    place = cases.coordinates(rank % (case.world // model.pp), mesh.shape)

    def dtensor(values: Tensor, where: list[Any]) -> DTensor:
        on = device_mesh(mesh, model.pp)
        return DTensor.from_local(values, on, where, run_check=False, shape=torch.Size(tensor.shape), stride=strides)

    param = nn.Parameter(dtensor(torch.zeros(index.shape, dtype=dtype), placements))
    calls = [0]

    def put(grad: Tensor | None) -> None:
        calls[0] += 1
        if grad is None:
            param.grad = None
        elif any(tensor.partial) and (calls[0] + case.seed + number) % 4:  # now and then it is whole already
            grad = cases.addend(grad, tensor, mesh, place)
            where = [Partial() if how else p for how, p in zip(tensor.partial, placements, strict=True)]
            param.grad = dtensor(grad, where)
        else:
            param.grad = dtensor(turned(grad, tensor), placements)  # type: ignore[arg-type]

    def take() -> Tensor | None:
        grad = param.grad
        if grad is None:
            return None
        return grad.to_local()

    return Held(index, put, take, param)


def turned(grad: Tensor | None, tensor: Placed) -> Tensor | None:
    """The same values in memory that is laid out the other way round."""
    if grad is None or not tensor.turned or grad.dim() < 2:
        return grad
    return grad.transpose(0, 1).contiguous().transpose(0, 1)


def torch_placements(tensor: Placed, mesh: Mesh) -> list[Any]:
    out: list[Any] = []
    for position, placement in enumerate(tensor.placements):
        if placement == "R":
            out.append(Replicate())
        elif placement.startswith("S"):
            out.append(Shard(int(placement[1:])))
        else:
            factor = cases.strided_factor(tensor.placements, mesh.sizes, position)
            out.append(_StridedShard(int(placement[1:]), split_factor=factor))
    return out


# ---------------------------------------------------------------- models that torch's wrappers distribute


def index_layer(layer: Layer) -> nn.Module:
    """A layer whose elements' values are their flat indices: the shards tell which elements they are."""
    dtype = getattr(torch, layer.dtype)
    made: nn.Module
    if layer.kind == "linear":
        made = nn.Linear(layer.a, layer.b, dtype=dtype)
    elif layer.kind == "norm":
        made = nn.LayerNorm(layer.a, dtype=dtype)
    else:
        made = nn.Embedding(layer.a, layer.b, dtype=dtype)
    with torch.no_grad():
        for param in made.parameters():
            param.copy_(torch.arange(param.numel()).view_as(param))
            param.requires_grad_(not layer.frozen)
    return made


class Blocks(nn.Module):
    def __init__(self, layers: tuple[Layer, ...]) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({str(i): index_layer(layer) for i, layer in enumerate(layers)})


def wrapped(model: Wrapped) -> Model:
    net = Blocks(model.layers)
    units = [net.blocks[str(i)] for i, layer in enumerate(model.layers) if layer.wrap]
    names = ("m0", "m1", "m2")[: len(model.mesh)]
    if model.framework == "ddp":
        return whole_params(DistributedDataParallel(net))
    if model.framework in ("fsdp", "tp", "tp-fsdp"):
        mesh = layouts.mesh(model.mesh, names)
        outer = mesh
        if model.framework != "fsdp":
            parallelize_module(net, mesh[names[-1]] if len(names) > 1 else mesh, tp_plan(model.layers))
            outer = mesh[names[:-1]] if len(names) > 2 else mesh[names[0]]
        if model.framework != "tp":
            choice = shard_choice(net, model, outer)
            for unit in units:
                fully_shard(unit, mesh=outer, shard_placement_fn=choice)
            if model.root:
                fully_shard(net, mesh=outer, shard_placement_fn=choice)
        return whole_params(net)
    kwargs: dict[str, Any] = {"device_mesh": layouts.mesh(model.mesh, names)} if len(model.mesh) == 2 else {}
    wrapper = FullyShardedDataParallel(
        net,
        sharding_strategy=ShardingStrategy[model.strategy],
        auto_wrap_policy=CustomPolicy(lambda module: any(module is unit for unit in units)),
        use_orig_params=not model.flat,
        device_id=torch.device("cpu"),
        **kwargs,
    )
    return flat_params(wrapper) if model.flat else whole_params(wrapper)


def tp_plan(layers: tuple[Layer, ...]) -> dict[str, Any]:
    styles = {"col": ColwiseParallel, "row": RowwiseParallel, "seq": SequenceParallel}
    return {f"blocks.{i}": styles[layer.style]() for i, layer in enumerate(layers) if layer.style}


def shard_choice(net: Blocks, model: Wrapped, outer: Any) -> Callable[[nn.Parameter], Any]:
    """Which dim FSDP2 shards; except dim 0 only those that divide evenly, which FSDP2 insists on."""
    wanted = {
        id(param): layer.dim
        for layer, block in zip(model.layers, net.blocks.values(), strict=True)
        for param in block.parameters()
    }
    count = outer.size(outer.ndim - 1)

    def choose(param: nn.Parameter) -> Any:
        dim = wanted.get(id(param), 0)
        fits = dim < param.dim() and local(param).shape[dim] % count == 0 and not isinstance(param, DTensor)
        return Shard(dim if fits else 0)

    return choose


def whole_params(module: nn.Module) -> Model:
    """Parameters that are themselves what this rank holds, plain or DTensor."""
    held = {}
    for name, param in module.named_parameters():
        held[clean(name)] = Held(local(param.detach()).long(), putter(param), taker(param), param)
    return Model(module, held)


def putter(param: nn.Parameter) -> Callable[[Tensor | None], None]:
    def put(grad: Tensor | None) -> None:
        if isinstance(param, DTensor):
            if grad is not None:
                grad = DTensor.from_local(
                    grad,
                    param.device_mesh,
                    param.placements,
                    run_check=False,
                    shape=param.shape,
                    stride=param.stride(),
                )
        elif grad is not None and grad.numel() == 0:
            grad = None  # FSDP1 gives none to a rank that holds nothing of a tensor
        param.grad = grad

    return put


def taker(param: nn.Parameter) -> Callable[[], Tensor | None]:
    def take() -> Tensor | None:
        return None if param.grad is None else local(param.grad)

    return take


def flat_params(module: nn.Module) -> Model:
    """FSDP1 with flat parameters: a tensor's gradient is a range of the flat one's."""
    held = {}
    for name, flat in module.named_parameters():
        prefix = name.removesuffix("_flat_param")
        for position, fqn in enumerate(flat._fqns):
            part = layouts.Piece(flat, position)
            held[clean(prefix + fqn)] = Held(
                part.detach().long(), flat_putter(flat, part), lambda part=part: part.grad, flat
            )
    return Model(module, held)


def flat_putter(flat: nn.Parameter, part: layouts.Piece) -> Callable[[Tensor | None], None]:
    def put(grad: Tensor | None) -> None:
        if grad is None:
            flat.grad = None
            return
        if flat.grad is None:
            flat.grad = torch.zeros_like(flat)
        with torch.no_grad():
            view = part.grad
            assert view is not None
            view.copy_(grad)

    return put
