"""What a random case is: plain values with a repr that can be pasted into a test, and the gradients that follow from them.

Everything here is computed alike in the test's process and in the workers. How a tensor is cut into shards is worked
out once more, from the definition of the placements, and not asked of DTensor.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FOREVER = 99
"""Frozen for so many steps: in every step."""


@dataclass(frozen=True)
class Mesh:
    """A device mesh over all ranks (of a pipeline stage), and the dims of it that tensors are laid out over."""

    shape: tuple[int, ...]
    dims: tuple[int, ...]
    twin: int = 0  # equal meshes of another number have process groups of their own

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self.shape[dim] for dim in self.dims)


@dataclass(frozen=True)
class Placed:
    """One tensor, plain or a hand-made DTensor.

    placements: one for each dim of its mesh: "R", "S0" (Shard(0)), "X0" (_StridedShard(0): cut after the Shard(0) to its
    right, as FSDP2 cuts what tensor parallelism has cut before).
    partial: for each mesh dim, how a gradient that is still a sum is spread over it, a key of WEIGHTS; "" where it is not.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    mesh: int | None = None
    placements: tuple[str, ...] = ()
    partial: tuple[str, ...] = ()
    frozen: int = 0  # steps for which it does not require gradients
    alias: bool = False  # the same parameter under a second name
    stages: tuple[int, ...] = (0,)  # pipeline stages that hold it
    turned: bool = False  # the gradient's memory is transposed


@dataclass(frozen=True)
class Hand:
    """A model of hand-made tensors, over `pp` pipeline stages."""

    tensors: tuple[Placed, ...]
    meshes: tuple[Mesh, ...] = ()
    pp: int = 1

    def logical(self) -> dict[str, Placed]:
        return {tensor.name: tensor for tensor in self.tensors}


@dataclass(frozen=True)
class Layer:
    """A module of torch.nn: kind "linear" (a -> b), "norm" (a) or "embedding" (a x b)."""

    kind: str
    a: int
    b: int
    dtype: str = "float32"
    wrap: bool = False  # an FSDP unit of its own
    style: str = ""  # how it is tensor-parallel: "col", "row", "seq"
    dim: int = 0  # along which FSDP2 shards it, where it divides evenly
    frozen: bool = False

    def shapes(self) -> dict[str, tuple[int, ...]]:
        if self.kind == "linear":
            return {"weight": (self.b, self.a), "bias": (self.b,)}
        if self.kind == "norm":
            return {"weight": (self.a,), "bias": (self.a,)}
        return {"weight": (self.a, self.b)}


@dataclass(frozen=True)
class Wrapped:
    """A model that torch's own wrappers have distributed. `mesh`: shape of the device mesh, where the wrapper takes one."""

    framework: str
    layers: tuple[Layer, ...]
    mesh: tuple[int, ...] = ()
    root: bool = True  # the wrapper also takes what is not a unit of its own; else that stays plain
    strategy: str = "FULL_SHARD"  # of FSDP1
    pp = 1

    def logical(self) -> dict[str, Placed]:
        return {
            f"blocks.{i}.{name}": Placed(
                f"blocks.{i}.{name}", shape, layer.dtype, frozen=FOREVER if layer.frozen else 0
            )
            for i, layer in enumerate(self.layers)
            for name, shape in layer.shapes().items()
        }

    @property
    def flat(self) -> bool:
        """Gradients are parts of one flat gradient: all of them are there or none."""
        return self.framework == "fsdp1-flat"


@dataclass(frozen=True)
class Step:
    """The kind of all gradients of a step, and those that differ: (number of the tensor, kind).

    Kinds: "normal", "zero", "none" (no gradient), "lack2" (rank 2's piece, and so every copy of it, has none), "spike",
    "huge", "tiny", and "nan", "inf", "-inf" in one element.
    """

    kind: str = "normal"
    kinds: tuple[tuple[int, str], ...] = ()
    reload: bool = False  # afterwards the clipper is replaced by a new one with its state

    def of(self, number: int) -> str:
        return next((kind for i, kind in self.kinds if i == number), self.kind)


@dataclass(frozen=True)
class Case:
    world: int
    seed: int
    model: Hand | Wrapped
    policy: Any
    groups: tuple[tuple[str, Any], ...] = ()
    exclude: tuple[str, ...] = ()
    nonfinite: str = "propagate"
    log_global_norm: bool = False
    skip_above: float | None = None
    target: str = "module"  # what the clipper is given: "module", "modules", "named", "dict", "optimizer"
    steps: tuple[Step, ...] = field(default_factory=tuple)

    @property
    def rules(self) -> tuple[tuple[str, Any], ...]:
        return (*self.groups, ("*", self.policy))

    def kind(self, number: int, tensor: Placed, step: int) -> str:
        """The kind of a tensor's gradient at a step, from 1."""
        if step <= tensor.frozen:
            return "none"
        chosen = self.steps[step - 1]
        kind = chosen.of(number)
        if isinstance(self.model, Wrapped) and self.model.flat and (kind == "none" or kind.startswith("lack")):
            return "none" if chosen.kind == "none" and not chosen.kinds else "zero"
        return kind


# ---------------------------------------------------------------- shards


def coordinates(rank: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A rank's place in a mesh over all ranks, in row-major order."""
    out = []
    for size in reversed(shape):
        out.append(rank % size)
        rank //= size
    return tuple(reversed(out))


def stage_of(model: Hand, rank: int, world: int) -> int:
    return rank // (world // model.pp)


def piece(tensor: Placed, model: Hand, rank: int, world: int) -> Tensor:
    """Flat indices, in the shape of the shard, of the elements of `tensor` that `rank` holds."""
    held = torch.arange(math.prod(tensor.shape)).view(tensor.shape)
    if tensor.mesh is None:
        return held
    mesh = model.meshes[tensor.mesh]
    place = coordinates(rank % (world // model.pp), mesh.shape)
    cuts = [(placement, dim) for placement, dim in zip(tensor.placements, mesh.dims, strict=True) if placement != "R"]
    for placement, dim in sorted(cuts, key=lambda cut: cut[0].startswith("X")):  # stable: else left to right
        held = chunk(held, int(placement[1:]), place[dim], mesh.shape[dim])
    return held


def chunk(tensor: Tensor, dim: int, index: int, count: int) -> Tensor:
    """Part `index` of torch.chunk(tensor, count, dim), which makes fewer parts when they run out: then an empty one."""
    size = -(-tensor.shape[dim] // count)
    start = min(index * size, tensor.shape[dim])
    return tensor.narrow(dim, start, min(size, tensor.shape[dim] - start))


def strided_factor(placements: tuple[str, ...], sizes: tuple[int, ...], position: int) -> int:
    """split_factor of the _StridedShard at `position`: into how many parts the dims to its right have cut before."""
    shard = "S" + placements[position][1:]
    after = zip(placements[position + 1 :], sizes[position + 1 :], strict=True)
    return math.prod(size for placement, size in after if placement == shard)


WEIGHTS = {
    "half": (0.5, 0.5),
    "first": (1.0, 0.0),
    "double": (2.0, -1.0),
    "back": (-1.0, 2.0),
}
"""Weights of two ranks' addends, by which a gradient is a sum. Partial sums in any order are multiples of the gradient by
a power of two (or 0), so they are exact in every dtype."""


def addend(whole: Tensor, tensor: Placed, mesh: Mesh, place: tuple[int, ...]) -> Tensor:
    """What a rank at `place` in the mesh adds to the gradient. One rank alone adds NaN and Inf: Inf - Inf is no Inf."""
    weight = 1.0
    for how, dim in zip(tensor.partial, mesh.dims, strict=True):
        if how:
            weights = (*WEIGHTS[how], *itertools.repeat(0.0, mesh.shape[dim]))
            weight *= weights[place[dim]]
    scaled = torch.where(whole.isfinite(), whole * weight, 0.0).to(whole.dtype)
    holder = all(
        WEIGHTS[how].index(max(WEIGHTS[how])) == place[dim]
        for how, dim in zip(tensor.partial, mesh.dims, strict=True)
        if how
    )
    return torch.where(whole.isfinite(), scaled, whole) if holder else scaled


# ---------------------------------------------------------------- gradients


def gradient(case: Case, number: int, tensor: Placed, step: int) -> Tensor | None:
    """The whole gradient of tensor `number` at a step, without regard to pieces that some ranks lack."""
    kind = case.kind(number, tensor, step)
    if kind == "none":
        return None
    dtype = getattr(torch, tensor.dtype)
    if kind == "zero":
        return torch.zeros(tensor.shape, dtype=dtype)
    half = dtype == torch.float16
    usual = 10.0 ** _uniform(case.seed, number) ** 3  # norms of one model differ, mostly by little
    generator = torch.Generator().manual_seed((case.seed * 1009 + step) * 1009 + number)
    values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    draw, sign = torch.rand(3, generator=generator, dtype=torch.float64).tolist()[:2]
    values *= usual * math.exp(1.6 * (draw - 0.5))
    if kind == "spike":
        values *= 50.0 if half else 1e3
    elif kind == "tiny":
        values *= 1e-6 if half else 1e-25
    elif kind in ("huge", "nan", "inf", "-inf") and values.numel():
        position = int(draw * values.numel())
        magnitude = 3e4 if half else 1e30 if sign < 0.5 else 1e20
        values.view(-1)[position] = magnitude * (0.5 + draw) if kind == "huge" else float(kind)
    if half:
        values = values.clamp(-6e4, 6e4) if kind not in ("inf", "-inf") else values
    return values.to(dtype)


def _uniform(seed: int, number: int) -> float:
    """Between -1 and 1."""
    generator = torch.Generator().manual_seed(seed * 1009 + number)
    return 2 * float(torch.rand(1, generator=generator)) - 1


def lacking(kind: str) -> int | None:
    """The rank whose piece has no gradient."""
    return int(kind.removeprefix("lack")) if kind.startswith("lack") else None
