"""How random cases are drawn. What comes first in a list is simpler: a failing case shrinks towards it."""

from __future__ import annotations

import fnmatch
import functools
import itertools
import math
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy, composite

import dist_clip

from .cases import FOREVER, WEIGHTS, Case, Hand, Layer, Mesh, Placed, Step, Wrapped

DTYPES = ["float32"] * 5 + ["bfloat16"] * 2 + ["float64", "float16"]
SHAPES = [
    *[(4,), (3, 2), (1,), (5,), (8,), (), (4, 3), (1, 4), (6, 5), (3, 1, 2), (7, 2), (2, 9), (16,), (2, 2, 3, 2)] * 2,
    *[(0,), (0, 3), (130, 127)],  # nothing at all; too large for one call in float64
]
PREFIXES = ["", "a.", "b.", "a.c.", "blocks.0.", "blocks.10."]


@functools.lru_cache(None, typed=True)
def among(*values: Any) -> SearchStrategy[Any]:
    """st.sampled_from, made once for the same values: making strategies is much of the cost of a case."""
    return st.sampled_from(values)


@functools.cache
def one_in(count: int) -> SearchStrategy[bool]:
    return st.sampled_from([False] * (count - 1) + [True])


# ---------------------------------------------------------------- policies


@functools.cache
def global_norms() -> SearchStrategy[Any]:
    return st.builds(dist_clip.GlobalNorm, st.sampled_from([1.0, 0.1, 5.0, 1000.0, 0.0, math.inf]))


@functools.cache
def adagcs() -> SearchStrategy[Any]:
    return st.builds(
        dist_clip.AdaGC,
        lambda_rel=st.sampled_from([1.04, 0.5, 1.5, 3.0]),
        beta=st.sampled_from([0.99, 0.0, 0.5, 0.9]),
        warmup_steps=st.integers(0, 4),
        max_norm=st.sampled_from([1.0, 0.1, 10.0, 1000.0, math.inf]),
        scope=st.sampled_from(["tensor", "tensor", "shard", "global"]),
        gamma_init=st.sampled_from(["min", "median", "mean", "last"]),
        eps=st.sampled_from([1e-6, 1e-6, 1e-3, 0.0]),
    )


@functools.cache
def logclips() -> SearchStrategy[Any]:
    return st.builds(
        dist_clip.LogClip,
        ratio=st.sampled_from([2.0, 1.1, 8.0]),
        power=st.sampled_from([2.0, 1.0, 0.5]),
        rate=st.sampled_from([0.03, 0.3, 1.0]),
        warmup_steps=st.integers(0, 4),
        max_norm=st.sampled_from([1.0, 0.1, 10.0, 1000.0, math.inf]),
        scope=st.sampled_from(["tensor", "tensor", "shard", "global"]),
        warmup_ratio=st.sampled_from([100.0, 1.5]),
        patience=st.integers(0, 3),
        post_max_norm=st.sampled_from([None, None, 1.0, 0.01, 1000.0]),
    )


@functools.cache
def zclips() -> SearchStrategy[Any]:
    return st.builds(
        dist_clip.ZClip,
        alpha=st.sampled_from([0.97, 0.0, 0.5]),
        z_thresh=st.sampled_from([2.5, 0.5, 1.0]),
        warmup_steps=st.integers(1, 4),
        mode=st.sampled_from(["zscore", "percentile"]),
        clip_option=st.sampled_from(["adaptive_scaling", "mean"]),
        clip_factor=st.sampled_from([1.0, 0.5, 1.2]),
        max_norm=st.sampled_from([1.0, None, 5.0]),
        skip_update_on_spike=st.booleans(),
        eps=st.sampled_from([1e-6, 1e-3]),
        scope=st.sampled_from(["global", "tensor", "shard"]),
    )


@functools.cache
def policies() -> SearchStrategy[Any]:
    return st.one_of(global_norms(), adagcs(), logclips(), zclips())


# ---------------------------------------------------------------- hand-made tensors


def mesh_shapes(ranks: int) -> list[tuple[int, ...]]:
    """All shapes of up to three dims with that many ranks; dims of size 1 where that leaves few."""
    shapes = [(ranks,), (1, ranks), (ranks, 1)]
    for a in range(2, ranks):
        if ranks % a == 0:
            shapes += [(a, ranks // a), (1, a, ranks // a), (a, 1, ranks // a), (a, ranks // a, 1)]
            shapes += [(a, b, ranks // a // b) for b in range(2, ranks // a) if (ranks // a) % b == 0]
    return sorted(set(shapes), key=lambda shape: (len(shape), shape))


@composite
def meshes(draw: Any, ranks: int, shapes: list[tuple[int, ...]] | None = None) -> Mesh:
    shape = draw(among(*(shapes or mesh_shapes(ranks))))
    dims = tuple(range(len(shape)))
    if len(shape) > 1 and draw(one_in(3)):
        dims = draw(among(*(d for n in range(1, len(dims)) for d in itertools.combinations(dims, n))))
    return Mesh(shape, dims, draw(among(0, 1)))


@composite
def placements(draw: Any, shape: tuple[int, ...], mesh: Mesh) -> tuple[str, ...]:
    choices = ["R", *(f"S{dim}" for dim in range(len(shape)) for _ in range(2))]
    chosen = [draw(among(*choices)) for _ in mesh.dims]
    strided = [i for i, p in enumerate(chosen) if p != "R" and p in chosen[i + 1 :]]
    if strided and draw(among(False, True)):
        chosen[strided[0]] = "X" + chosen[strided[0]][1:]
    return tuple(chosen)


@composite
def partials(draw: Any, tensor_placements: tuple[str, ...], mesh: Mesh, dtype: str) -> tuple[str, ...]:
    if not any(p == "R" and size > 1 for p, size in zip(tensor_placements, mesh.sizes, strict=True)):
        return ()
    if draw(among(0, 1, 2)) < 2:
        return ()
    ways = ["first"] if dtype == "float16" else list(WEIGHTS)  # in float16 half of a small number has lost a bit
    return tuple(
        draw(among(*ways, "")) if p == "R" and size > 1 else ""
        for p, size in zip(tensor_placements, mesh.sizes, strict=True)
    )


@composite
def placed(draw: Any, number: int, grid: list[Mesh], pp: int) -> Placed:
    shape, dtype = draw(among(*SHAPES)), draw(among(*DTYPES))
    mesh = draw(among(*range(len(grid)), *range(len(grid)), None))
    where = draw(placements(shape, grid[mesh])) if mesh is not None else ()
    stages: tuple[int, ...] = (0,)
    if pp > 1:
        tied = draw(one_in(6))
        stages = (0, pp - 1) if tied else (draw(among(*range(pp))),)
    return Placed(
        name=f"{draw(among(*PREFIXES))}w{number}",
        shape=shape,
        dtype=dtype,
        mesh=mesh,
        placements=where,
        partial=draw(partials(where, grid[mesh], dtype)) if mesh is not None else (),
        frozen=draw(among(*[0] * 12, 1, 2, 3, FOREVER)),
        alias=draw(one_in(8)),
        stages=stages,
        turned=len(shape) > 1 and draw(one_in(4)),
    )


@composite
def hands(draw: Any, world: int, pp: int, shapes: list[tuple[int, ...]] | None = None) -> Hand:
    grid = [draw(meshes(world // pp, shapes)) for _ in range(draw(among(1, 1, 2)))]
    count = draw(among(1, 2, 3, 3, 4, 5, 6))
    return Hand(tuple(draw(placed(number, grid, pp)) for number in range(count)), tuple(grid), pp)


# ---------------------------------------------------------------- torch's wrappers


@composite
def layers(draw: Any, framework: str, dtype: str | None) -> Layer:
    kind = draw(among("linear", "linear", "norm", "embedding"))
    tensor_parallel = {"linear": ["col", "row", ""], "norm": ["", "seq"], "embedding": ["row", "col", ""]}[kind]
    return Layer(
        kind,
        # At most 256 elements: the values that are indices have to be exact in bfloat16.
        draw(among(*range(1, 13))),
        draw(among(*range(1, 13))),
        dtype=dtype or draw(among(*DTYPES)),
        wrap=draw(among(False, True)),
        style=draw(among(*tensor_parallel)) if framework.startswith("tp") else "",
        dim=draw(among(0, 1)) if framework == "fsdp" else 0,
        frozen=framework != "fsdp1-flat" and draw(one_in(6)),
    )


@composite
def wrappeds(draw: Any, world: int) -> Wrapped:
    framework = draw(among("fsdp", "ddp", "tp-fsdp", "fsdp1", "fsdp1-flat", "tp"))
    mesh: tuple[int, ...] = ()
    strategy = "FULL_SHARD"
    if framework in ("fsdp", "tp-fsdp"):
        meshes_of = {"fsdp": [(world,), (2, world // 2)], "tp-fsdp": [(2, world // 2), (world // 2, 2)]}
        mesh = draw(among(*meshes_of[framework], *([(2, 2, 2)] if world == 8 else [])))
        if framework == "fsdp" and len(mesh) == 3:
            mesh = (4, 2)
    elif framework == "tp":
        mesh = draw(among((world,), (2, world // 2)))
    elif framework.startswith("fsdp1"):
        strategy = draw(among("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "NO_SHARD"))
        mesh = (2, world // 2) if strategy == "HYBRID_SHARD" else ()
    # A flat parameter has one dtype.
    dtype = draw(among(*DTYPES)) if framework.startswith("fsdp1") else None
    chosen = tuple(draw(layers(framework, dtype)) for _ in range(draw(among(1, 2, 3))))
    root = framework != "fsdp" or not any(layer.wrap for layer in chosen) or draw(among(False, True))
    return Wrapped(framework, chosen, mesh, root, strategy)


# ---------------------------------------------------------------- whole cases


@composite
def steps(draw: Any, tensors: int, world: int) -> Step:
    kind = draw(among(*["normal"] * 14, "spike", "zero", "none", "tiny"))
    kinds = ["spike", "zero", "none", "lack", "huge", "tiny", "nan", "inf", "-inf"]
    chosen: dict[int, str] = {}
    for _ in range(draw(among(0, 0, 1, 1, 2, 3))):
        other = draw(among(*kinds))
        if other == "lack":
            other += str(draw(among(*range(world))))
        chosen[draw(among(*range(tensors)))] = other
    return Step(kind, tuple(sorted(chosen.items())), draw(one_in(8)))


@composite
def patterns(draw: Any, names: list[str]) -> str:
    """A pattern that matches some name, and not all of them by being "*"."""
    name = draw(among(*names))
    parts = name.split(".")
    wild = [f"*{parts[-1]}", f"{parts[0]}.*" if len(parts) > 1 else name, f"{name[:-1]}?"]
    return draw(among(name, *wild))


@composite
def cases(draw: Any, world: int, kind: str) -> Case:
    """`kind`: "placements", "frameworks", "pipeline" or "three-dims"."""
    if kind == "frameworks":
        model: Hand | Wrapped = draw(wrappeds(world))
    elif kind == "pipeline":
        model = draw(hands(world, draw(among(2, world))))
    else:
        model = draw(hands(world, 1, [(2, 2, 2)] if kind == "three-dims" else None))
    logical = model.logical()
    trainable = [name for name, tensor in logical.items() if tensor.frozen == 0]
    assume(trainable)  # a model that has nothing to train is refused
    exclude, groups = [], []
    if len(logical) > 1 and draw(one_in(4)):
        exclude.append(draw(patterns(list(logical))))
    kept = [name for name in logical if not any(fnmatch.fnmatchcase(name, p) for p in exclude)]
    if not kept:
        exclude, kept = [], list(logical)
    if isinstance(model, Hand):
        # Stages that all hold the very same tensors are no pipeline: that is refused.
        stages = [frozenset(name for name in kept if stage in logical[name].stages) for stage in range(model.pp)]
        assume(model.pp == 1 or len(set(stages)) > 1)
    for _ in range(draw(among(0, 0, 0, 1, 2))):
        groups.append((draw(patterns(kept)), draw(policies())))
    target = draw(among("module", "module", "modules", "named", "dict", "optimizer"))
    if isinstance(model, Wrapped) and model.framework.startswith("fsdp1"):
        target = "module"  # the parameters alone do not say which part of what they are
    return Case(
        world=world,
        seed=draw(st.integers(0, 10_000)),
        model=model,
        policy=draw(policies()),
        groups=tuple(dict(groups).items()),
        exclude=tuple(exclude),
        nonfinite=draw(among("propagate", "zero", "skip", "raise")),
        log_global_norm=draw(one_in(3)),
        skip_above=draw(among(*[None] * 7, 5.0)),
        target=target,
        steps=tuple(draw(steps(len(logical), world)) for _ in range(draw(among(4, 4, 5, 5, 6, 7, 8)))),
    )
