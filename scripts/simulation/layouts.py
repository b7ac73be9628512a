"""The parallel layouts: degrees for a number of ranks, device meshes, and which piece of each tensor a rank holds.

Placements are those that `parallelize_module` followed by `fully_shard` produce, written down rather than produced,
because at 65,536 ranks no module can be built; tests/test_simulate.py compares them with the real ones.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from scripts.simulation.shapes import TensorShape

PP, REPLICATE, FSDP, TP, EFSDP, EP = "pp", "replicate", "fsdp", "tp", "efsdp", "ep"


@dataclasses.dataclass(frozen=True)
class Degrees:
    """How many ranks share what. `fsdp` ranks hold shards of the dense tensors, `efsdp` ranks shards of the experts.

    `dp` copies of everything, without FSDP, are what plain data parallelism has: it puts no mesh dimension under a tensor.
    """

    pp: int = 1
    replicate: int = 1
    dp: int = 1
    fsdp: int = 1
    tp: int = 1
    ep: int = 1

    @property
    def ranks(self) -> int:
        return self.pp * self.replicate * self.dp * self.fsdp * self.tp

    @property
    def efsdp(self) -> int:
        """As torchtitan has it: expert parallelism borrows ranks from FSDP and TP."""
        return self.fsdp * self.tp // self.ep

    def __str__(self) -> str:
        sizes = {"pp": self.pp, "replicate": self.replicate, "dp": self.dp, "fsdp": self.fsdp, "tp": self.tp}
        text = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
        return text if self.ep == 1 else f"{text} (experts: efsdp {self.efsdp} x ep {self.ep})"


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of layout at any number of ranks (a power of 2): every degree it names is above 1 at all of them.

    Attributes:
        name: what is combined.
        model: of `shapes.MODELS`.
        caps: dimension -> largest degree. The degrees start at 2 and double in turn until they reach it.
        rest: the dimension that doubles first, and takes what is left.
        smallest: number of ranks from which all dimensions are above 1.
    """

    name: str
    model: str
    caps: dict[str, int]
    rest: str
    smallest: int = 8

    def degrees(self, ranks: int) -> Degrees:
        """Raises ValueError where `ranks` is not a power of 2 or too few."""
        if ranks < self.smallest or ranks & (ranks - 1):
            raise ValueError(f"{self.name}: ranks must be a power of 2 from {self.smallest} on, got {ranks}")
        dense = {name: 2 for name in self.caps if name != EP}
        sizes = {**dense, self.rest: 2}
        grow = [self.rest, *dense]
        while math.prod(sizes.values()) < ranks:
            # Each dimension doubles in its turn; one at its cap passes its turn on to the next.
            name = grow.pop(0)
            grow.append(name)
            if name == self.rest or sizes[name] < self.caps[name]:
                sizes[name] *= 2
        if EP in self.caps:
            sizes[EP] = min(self.caps[EP], sizes[FSDP] * sizes.get(TP, 1) // 2)
        return Degrees(**sizes)


FAMILIES: tuple[Family, ...] = (
    Family("FSDP", "Llama-2-7B", {}, FSDP),
    Family("HSDP", "Llama-2-7B", {FSDP: 64}, REPLICATE),
    Family("TP + FSDP", "Llama-3-70B", {TP: 8}, FSDP),
    Family("PP + TP + FSDP", "Llama-3-70B", {TP: 8, PP: 8}, FSDP),
    Family("PP + TP + DP", "Llama-3-70B", {TP: 8, PP: 8}, "dp"),
    Family("EP + FSDP", "Mixtral-8x22B", {EP: 8}, FSDP),
    Family("PP + EP + FSDP", "Mixtral-8x22B", {PP: 8, EP: 8}, FSDP),
    Family("PP + EP + FSDP", "MoE-1T", {PP: 16, EP: 64}, FSDP),
    Family("PP + TP + EP + HSDP", "MoE-1T", {TP: 8, PP: 16, REPLICATE: 4, EP: 64}, FSDP, smallest=32),
)


@dataclasses.dataclass(frozen=True)
class Split:
    """How one mesh dimension splits one tensor: its dimension `dim`, of `length` before the split, into `parts` chunks."""

    mesh_dim: str
    dim: int
    length: int
    parts: int

    def chunk(self, index: int) -> int:
        """Length of chunk `index`, as `torch.chunk` cuts: the last ones may be shorter, or empty."""
        size = -(-self.length // self.parts)
        return max(0, min(size, self.length - index * size))


def splits(tensor: TensorShape, degrees: Degrees) -> tuple[Split, ...]:
    """The splits of a tensor, in the order in which they are applied: TP or EP first, then FSDP on what is left."""
    found: list[Split] = []
    shape = list(tensor.shape)

    def cut(mesh_dim: str, dim: int, parts: int) -> None:
        if parts > 1:
            found.append(Split(mesh_dim, dim, shape[dim], parts))
            shape[dim] = -(-shape[dim] // parts)

    inner = EP if tensor.expert and degrees.ep > 1 else TP
    if inner == EP:
        _divides(tensor, 0, degrees.ep, EP)
        cut(EP, 0, degrees.ep)
        # torchtitan shards the experts' hidden dimension where there would be less than one expert for each rank.
        cut(EFSDP, 1 if degrees.ep * degrees.efsdp > tensor.shape[0] else 0, degrees.efsdp)
        return tuple(found)
    if tensor.split != "whole":
        dim = 0 if tensor.split == "columns" else 1
        _divides(tensor, dim, degrees.tp, TP)
        cut(TP, dim, degrees.tp)
    cut(FSDP, 0, degrees.fsdp)
    return tuple(found)


def _divides(tensor: TensorShape, dim: int, parts: int, what: str) -> None:
    # FSDP may leave uneven or empty shards; the inner split may not, so that the pieces' sizes multiply.
    if tensor.shape[dim] % parts:
        raise ValueError(
            f"{tensor.name}: dimension {dim} of {tensor.shape} does not divide by the {what} degree {parts}"
        )


class Meshes:
    """The device meshes of one layout, on this rank: one for the dense tensors and one for the experts, as in torchtitan.

    Collective, as `init_device_mesh` is.
    """

    def __init__(self, degrees: Degrees) -> None:
        self.degrees = degrees
        d = degrees
        self.dense = _mesh({PP: d.pp, REPLICATE: d.replicate, "dp": d.dp, FSDP: d.fsdp, TP: d.tp})
        self.experts = _mesh({PP: d.pp, REPLICATE: d.replicate, EFSDP: d.efsdp, EP: d.ep}) if d.ep > 1 else None
        self._cached: dict[tuple[bool, tuple[str, ...]], DeviceMesh] = {}

    @property
    def all(self) -> list[DeviceMesh]:
        """The experts' first, so that where they share a dimension's name the dense one's comes later, and is kept."""
        return [mesh for mesh in (self.experts, self.dense) if mesh is not None]

    @property
    def pp_group(self) -> Any:
        return self.dense.get_group(PP) if self.degrees.pp > 1 else None

    @property
    def coordinates(self) -> dict[str, int]:
        """This rank's coordinate along each mesh dimension."""
        found: dict[str, int] = {}
        for mesh in self.all:
            found |= dict(zip(mesh.mesh_dim_names or (), mesh.get_coordinate() or (), strict=True))
        return found

    @property
    def groups(self) -> dict[str, str]:
        """Name of a process group -> the mesh dimension it is of."""
        found = {}
        for mesh in self.all:
            for name in mesh.mesh_dim_names or ():
                found[mesh.get_group(name).group_name] = name
        return found

    def under(self, tensor: TensorShape) -> tuple[DeviceMesh, tuple[Placement, ...]] | None:
        """Mesh and placements of a tensor; None where it is a plain tensor, whole on this rank."""
        d = self.degrees
        expert = tensor.expert and d.ep > 1
        sizes = {REPLICATE: d.replicate, EFSDP: d.efsdp, EP: d.ep} if expert else {REPLICATE: d.replicate, FSDP: d.fsdp}
        if not expert:
            sizes[TP] = d.tp
        names = tuple(name for name, size in sizes.items() if size > 1)
        if not names:
            return None
        by_dim = {split.mesh_dim: split for split in splits(tensor, d)}
        inner = by_dim.get(EP if expert else TP)
        placements: list[Placement] = []
        for name in names:
            split = by_dim.get(name)
            if split is None:
                placements.append(Replicate())
            elif inner is not None and split is not inner and split.dim == inner.dim:
                # FSDP cut what the inner split had left, although it comes first in the mesh.
                placements.append(_StridedShard(split.dim, split_factor=inner.parts))
            else:
                placements.append(Shard(split.dim))
        return self._slice(expert, names), tuple(placements)

    def _slice(self, expert: bool, names: tuple[str, ...]) -> DeviceMesh:
        if (expert, names) not in self._cached:
            mesh = self.experts if expert else self.dense
            assert mesh is not None
            self._cached[expert, names] = mesh if mesh.mesh_dim_names == names else mesh[names]
        return self._cached[expert, names]


def _mesh(sizes: dict[str, int]) -> DeviceMesh:
    sizes = {name: size for name, size in sizes.items() if size > 1}
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def local_shape(tensor: TensorShape, degrees: Degrees, coordinates: dict[str, int]) -> tuple[int, ...]:
    """Shape of the piece of `tensor` at these coordinates."""
    shape = list(tensor.shape)
    for split in splits(tensor, degrees):
        shape[split.dim] = split.chunk(coordinates[split.mesh_dim])
    return tuple(shape)


def make_parameters(
    tensors: tuple[TensorShape, ...], meshes: Meshes, *, real: bool = False, device: str = "cpu"
) -> list[tuple[str, nn.Parameter]]:
    """This rank's parameters, each with a gradient of ones.

    Every shard is one element of memory, seen as often as its shape asks (or, on "meta", none at all); with `real` it is a
    tensor like any other.
    """
    one = torch.ones((), device=device)
    coordinates = meshes.coordinates
    made = []
    for tensor in tensors:
        laid_out = meshes.under(tensor)
        local = one.expand(local_shape(tensor, meshes.degrees, coordinates))
        if real:
            local = local.clone(memory_format=torch.contiguous_format)
        data: torch.Tensor = local
        if laid_out is not None:
            mesh, placements = laid_out
            stride = tuple(math.prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape)))
            data = DTensor.from_local(
                local, mesh, placements, run_check=False, shape=torch.Size(tensor.shape), stride=stride
            )
        param = nn.Parameter(data)
        param.grad = data.detach()
        made.append((tensor.name, param))
    return made
