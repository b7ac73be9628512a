"""What differs between ranks, or is wrong on one of them, is the same clear error on every rank, and never a hang.

Every case runs in a pool whose collectives time out: a rank left alone in one fails the test. After each case the ranks
meet in a barrier, which shows that their collectives are still in step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import dist_clip
from tests.harness import pool

from .layouts import fsdp, mesh, pipeline
from .model import Config, make_net

Named = list[tuple[str, nn.Parameter]]
BAD = 1
"""The rank on which something is different."""


def param(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.ones(*shape, dtype=dtype))


def bad_rank() -> bool:
    return dist.get_rank() == BAD


def outcome(make: Callable[[], Any]) -> tuple[str, str]:
    """Kind and text of what constructing raised; then meet the other ranks."""
    try:
        make()
    except Exception as error:
        result = ("LayoutError" if isinstance(error, dist_clip.LayoutError) else type(error).__name__, str(error))
    else:
        result = ("nothing", "")
    dist.barrier()
    return result


def construct(case: str) -> tuple[str, str]:
    target, kwargs = CASES[case]()
    policy = kwargs.pop("policy", None) or dist_clip.AdaGC()
    return outcome(lambda: dist_clip.GradClipper(target, policy, **kwargs))


# ---------------------------------------------------------------- the cases: target and arguments on this rank


def missing_tensor() -> tuple[Any, dict[str, Any]]:
    named = [("first", param(3)), ("second", param(4))]
    return (named[:1] if bad_rank() else named), {}


def extra_tensor() -> tuple[Any, dict[str, Any]]:
    named = [("first", param(3)), ("second", param(4))]
    return (named if bad_rank() else named[:1]), {}


def other_shape() -> tuple[Any, dict[str, Any]]:
    return [("first", param(3)), ("second", param(5 if bad_rank() else 4))], {}


def other_module_shape() -> tuple[Any, dict[str, Any]]:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 5 if bad_rank() else 4))
    return net, {}


def dtensor(placement: Any, shape: tuple[int, ...] = (8, 8)) -> nn.Parameter:
    device_mesh = mesh((dist.get_world_size(),), ("dp",))
    size = list(shape)
    if isinstance(placement, Shard):
        size[placement.dim] //= dist.get_world_size()
    local = torch.ones(size)
    return nn.Parameter(DTensor.from_local(local, device_mesh, [placement], run_check=False))


def other_placement() -> tuple[Any, dict[str, Any]]:
    return [("first", dtensor(Shard(0))), ("second", dtensor(Shard(1) if bad_rank() else Shard(0)))], {}


def replicated_on_one() -> tuple[Any, dict[str, Any]]:
    return [("first", dtensor(Shard(0))), ("second", dtensor(Replicate() if bad_rank() else Shard(0)))], {}


def plain_on_one() -> tuple[Any, dict[str, Any]]:
    return [("first", dtensor(Shard(0))), ("second", param(8, 8) if bad_rank() else dtensor(Shard(0)))], {}


def other_mesh() -> tuple[Any, dict[str, Any]]:
    """At four ranks: the bad rank thinks that the tensor is sharded over two of them only."""
    world = dist.get_world_size()
    whole, halves = mesh((world,), ("dp",)), mesh((world // 2, 2), ("replicate", "shard"))
    local = torch.ones(2, 8)
    if bad_rank():
        second = DTensor.from_local(local, halves, [Replicate(), Shard(0)], run_check=False)
    else:
        second = DTensor.from_local(local, whole, [Shard(0)], run_check=False)
    return [("first", dtensor(Shard(0))), ("second", nn.Parameter(second))], {}


def sharded_missing() -> tuple[Any, dict[str, Any]]:
    named = [("first", dtensor(Shard(0))), ("second", dtensor(Shard(0)))]
    return (named[:1] if bad_rank() else named), {}


def complex_on_one() -> tuple[Any, dict[str, Any]]:
    return [("first", param(3)), ("second", param(4, dtype=torch.complex64 if bad_rank() else torch.float32))], {}


def duplicate_on_one() -> tuple[Any, dict[str, Any]]:
    return [("first", param(3)), ("first" if bad_rank() else "second", param(4))], {}


def other_policy() -> tuple[Any, dict[str, Any]]:
    return [("first", param(3))], {"policy": dist_clip.ZClip() if bad_rank() else dist_clip.AdaGC()}


def other_option() -> tuple[Any, dict[str, Any]]:
    return [("first", param(3))], {"policy": dist_clip.AdaGC(beta=0.98 if bad_rank() else 0.99)}


def other_nonfinite() -> tuple[Any, dict[str, Any]]:
    return [("first", param(3))], {"nonfinite": "skip" if bad_rank() else "zero"}


def other_groups() -> tuple[Any, dict[str, Any]]:
    rule = {"first": dist_clip.GlobalNorm(2.0 if bad_rank() else 1.0)}
    return [("first", param(3)), ("second", param(3))], {"overrides": rule}


def other_exclude() -> tuple[Any, dict[str, Any]]:
    return [("first", param(3)), ("second", param(3))], {"exclude": ("first",) if bad_rank() else ("second",)}


def exclude_matches_nothing() -> tuple[Any, dict[str, Any]]:
    return [("first", param(3)), ("second", param(3))], {"exclude": ("third.*",)}


def group_matches_nothing() -> tuple[Any, dict[str, Any]]:
    return [("first", param(3)), ("second", param(3))], {"overrides": {"third.*": dist_clip.ZClip()}}


def other_selection() -> tuple[Any, dict[str, Any]]:
    """A function that selects by what differs between ranks."""

    def heavy(name: str, param: torch.Tensor) -> bool:
        return name == "second" or bad_rank()

    return [("first", param(3)), ("second", param(3))], {"overrides": [(heavy, dist_clip.ZClip())]}


def other_selection_of_a_tied_tensor() -> tuple[Any, dict[str, Any]]:
    named, kwargs = stages_disagree_on_policy()
    overrides = [(lambda name, param: name != "embed" or bad_rank(), dist_clip.ZClip())]
    return [("embed", param(4)), *named], {**kwargs, "policy": dist_clip.AdaGC(), "overrides": overrides}


def selector_fails_on_one() -> tuple[Any, dict[str, Any]]:
    def fragile(name: str, param: torch.Tensor) -> bool:
        if bad_rank():
            raise AttributeError("no such mark")
        return name == "second"

    return [("first", param(3)), ("second", param(3))], {"overrides": [(fragile, dist_clip.ZClip())]}


def optimizer_of_other_parameters_on_one() -> tuple[Any, dict[str, Any]]:
    named = [("first", param(3)), ("second", param(3))]
    optimizer = torch.optim.SGD([param(5) if bad_rank() else named[0][1]], lr=0.1)
    return named, {"overrides": [(optimizer, dist_clip.ZClip())]}


def optimizer_on_one() -> tuple[Any, dict[str, Any]]:
    named = [("first", param(3)), ("second", param(3))]
    optimizer = torch.optim.SGD([named[0][1]], lr=0.1)
    return named, {"overrides": [(optimizer if bad_rank() else "first", dist_clip.ZClip())]}


def nothing_on_one() -> tuple[Any, dict[str, Any]]:
    return ([] if bad_rank() else [("first", param(3))]), {}


def frozen_on_one() -> tuple[Any, dict[str, Any]]:
    named = [("first", param(3)), ("second", param(3))]
    for _, p in named:
        p.requires_grad_(not bad_rank())
    return named, {}


def frozen_on_all() -> tuple[Any, dict[str, Any]]:
    named = [("first", param(3))]
    named[0][1].requires_grad_(False)
    return named, {}


def bad_policy_on_one() -> tuple[Any, dict[str, Any]]:
    return [("first", param(3))], {"policy": "AdaGC" if bad_rank() else dist_clip.AdaGC()}


def bad_mode_on_one() -> tuple[Any, dict[str, Any]]:
    return [("first", param(3))], {"nonfinite": "ignore" if bad_rank() else "skip"}


def bad_guard_on_one() -> tuple[Any, dict[str, Any]]:
    return [("first", param(3))], {"guard": -1.0 if bad_rank() else dist_clip.SkipAbove(10.0)}


def process_group_is_none_on_one() -> tuple[Any, dict[str, Any]]:
    """Something that is no group on one rank, and all ranks on the others."""
    return [("first", param(3))], {"process_group": "all of them" if bad_rank() else None}


def breaks_while_read_on_one() -> tuple[Any, dict[str, Any]]:
    """An error of the user's own code, of whatever kind."""

    class Broken(dict):  # type: ignore[type-arg]
        def items(self) -> Any:
            raise AttributeError("the model is not ready")

    return (Broken() if bad_rank() else {"first": param(3)}), {}


def process_group_lacks_ranks_of_the_mesh() -> tuple[Any, dict[str, Any]]:
    """The data-parallel group of a mesh that is tensor-parallel, too: an easy mistake."""
    both = mesh((dist.get_world_size() // 2, 2), ("dp", "tp"))
    weight = DTensor.from_local(torch.ones(4, 4), both, [Shard(0), Shard(1)], run_check=False)
    return [("second", nn.Parameter(weight))], {"process_group": both["dp"].get_group()}


def pp_group_on_one() -> tuple[Any, dict[str, Any]]:
    pp = mesh((dist.get_world_size(),), ("pp",)).get_group()
    return [("first", param(3))], {"pp_group": pp if bad_rank() else None}


def closed_pp_group() -> tuple[Any, dict[str, Any]]:
    group = dist.new_group(list(range(dist.get_world_size())))
    dist.destroy_process_group(group)
    return [("first", param(3))], {"pp_group": group}


def closed_process_group() -> tuple[Any, dict[str, Any]]:
    group = dist.new_group(list(range(dist.get_world_size())))
    dist.destroy_process_group(group)
    return [("first", param(3))], {"process_group": group}


def non_member_pp_group() -> tuple[Any, dict[str, Any]]:
    """A group of rank 0 alone, handed to everybody: what new_group returns to others is no group of theirs."""
    return [("first", param(3))], {"pp_group": dist.new_group([0])}


def pp_group_of_wrong_type() -> tuple[Any, dict[str, Any]]:
    return [("first", param(3))], {"pp_group": "pp"}


def pp_group_is_a_mesh_on_one() -> tuple[Any, dict[str, Any]]:
    device_mesh = mesh((dist.get_world_size(),), ("pp",))
    return [("first", param(3))], {"pp_group": device_mesh if bad_rank() else device_mesh.get_group()}


def closed_mesh_group() -> tuple[Any, dict[str, Any]]:
    """A tensor sharded over a group that has been destroyed."""
    group = dist.new_group(list(range(dist.get_world_size())))  # a mesh's own may be the default group
    device_mesh = DeviceMesh.from_group(group, "cpu")
    tensor = DTensor.from_local(torch.ones(2, 2), device_mesh, [Shard(0)], run_check=False)
    dist.destroy_process_group(group)
    return [("first", param(3)), ("second", nn.Parameter(tensor))], {}


def stage_differs() -> tuple[Any, dict[str, Any]]:
    """Two stages of two ranks each; rank 1 lacks a tensor that rank 0, on the same stage, has."""
    both = mesh((2, 2), ("pp", "inner"))
    stage = both["pp"].get_local_rank()
    named = [(f"layers.{stage}.first", param(3)), (f"layers.{stage}.second", param(4))]
    return (named[:1] if bad_rank() else named), {"pp_group": both["pp"].get_group()}


def wrong_pp_group() -> tuple[Any, dict[str, Any]]:
    """Two stages, but the group handed over is that of the data-parallel ranks: stages then differ from each other."""
    both = mesh((2, 2), ("pp", "inner"))
    stage = both["pp"].get_local_rank()
    return [(f"layers.{stage}.first", param(3 + stage))], {"pp_group": both["inner"].get_group()}


def stages_disagree_on_shape() -> tuple[Any, dict[str, Any]]:
    """A tensor tied across stages under one name must be the same tensor."""
    pp = mesh((dist.get_world_size(),), ("pp",)).get_group()
    named = [("embed.weight", param(5 if bad_rank() else 4)), (f"layers.{dist.get_rank()}", param(3))]
    return named, {"pp_group": pp}


def stages_disagree_on_policy() -> tuple[Any, dict[str, Any]]:
    pp = mesh((dist.get_world_size(),), ("pp",)).get_group()
    policy = dist_clip.AdaGC(warmup_steps=7 if bad_rank() else 8)
    return [(f"layers.{dist.get_rank()}", param(3))], {"pp_group": pp, "policy": policy}


CASES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    function.__name__: function
    for function in (
        bad_policy_on_one,
        bad_mode_on_one,
        bad_guard_on_one,
        process_group_is_none_on_one,
        breaks_while_read_on_one,
        process_group_lacks_ranks_of_the_mesh,
        missing_tensor,
        extra_tensor,
        other_shape,
        other_module_shape,
        other_placement,
        replicated_on_one,
        plain_on_one,
        other_mesh,
        sharded_missing,
        complex_on_one,
        duplicate_on_one,
        other_policy,
        other_option,
        other_nonfinite,
        other_groups,
        other_exclude,
        exclude_matches_nothing,
        group_matches_nothing,
        other_selection,
        other_selection_of_a_tied_tensor,
        selector_fails_on_one,
        optimizer_of_other_parameters_on_one,
        optimizer_on_one,
        nothing_on_one,
        frozen_on_one,
        frozen_on_all,
        pp_group_on_one,
        closed_pp_group,
        closed_process_group,
        non_member_pp_group,
        pp_group_of_wrong_type,
        pp_group_is_a_mesh_on_one,
        closed_mesh_group,
        stage_differs,
        wrong_pp_group,
        stages_disagree_on_shape,
        stages_disagree_on_policy,
    )
}


def run(case: str, world: int, error: str = "LayoutError") -> list[str]:
    """Every rank's message, once it is known that each of them got such an error."""
    results = pool(world).run(construct, case, timeout=25)
    assert {kind for kind, _ in results} == {error}, results
    return [text for _, text in results]


def names_rank(text: str, rank: int = BAD) -> bool:
    return re.search(rf"\branks?\b[^.;\n]*\b{rank}\b", text) is not None


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    ("case", "tensor"),
    [
        ("missing_tensor", "second"),
        ("extra_tensor", "second"),
        ("other_shape", "second"),
        ("other_module_shape", "1.weight"),
        ("other_placement", "second"),
        ("replicated_on_one", "second"),
        ("plain_on_one", "second"),
        ("sharded_missing", "second"),
        ("complex_on_one", "second"),
        ("duplicate_on_one", "first"),
        ("stages_disagree_on_shape", "embed.weight"),
        ("process_group_lacks_ranks_of_the_mesh", "second"),
    ],
)
def test_tensor_and_rank_are_named(case: str, tensor: str, world: int) -> None:
    for text in run(case, world):
        assert tensor in text, text
        assert names_rank(text), text


@pytest.mark.parametrize(("case", "tensor"), [("other_mesh", "second"), ("stage_differs", "layers.0.second")])
def test_tensor_and_rank_are_named_at_four(case: str, tensor: str) -> None:
    for text in run(case, 4):
        assert tensor in text, text
        assert names_rank(text), text


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("other_policy", ["AdaGC", "ZClip"]),
        ("other_option", ["0.98", "0.99"]),
        ("other_nonfinite", ["skip", "zero"]),
        ("other_groups", ["first"]),
        ("other_exclude", ["first"]),
        ("other_selection", ["'first'", "heavy", "'*'", "must select the same tensors on every rank"]),
        ("other_selection_of_a_tied_tensor", ["'embed'", "must select the same tensors"]),
        ("selector_fails_on_one", ["fragile failed on 'first'", "no such mark"]),
        ("optimizer_of_other_parameters_on_one", ["SGD holds a parameter of shape [5]"]),
        ("optimizer_on_one", ["SGD"]),
        ("nothing_on_one", []),
        ("frozen_on_one", []),
        ("pp_group_on_one", ["pp_group"]),
        ("process_group_is_none_on_one", ["process_group", "all of them"]),
        ("breaks_while_read_on_one", ["AttributeError", "not ready"]),
        ("pp_group_is_a_mesh_on_one", ["pp_group"]),
        ("stages_disagree_on_policy", ["warmup_steps"]),
    ],
)
def test_rank_is_named(case: str, words: list[str]) -> None:
    for text in run(case, 2):
        assert names_rank(text), text
        for word in words:
            assert word in text, text


@pytest.mark.parametrize(
    ("case", "error", "words"),
    [
        ("bad_policy_on_one", "TypeError", ["policy", "'AdaGC'"]),
        ("bad_mode_on_one", "ValueError", ["nonfinite", "'ignore'"]),
        ("bad_guard_on_one", "TypeError", ["guard must be a dist_clip guard", "-1.0"]),
    ],
)
def test_a_bad_argument_on_one_rank_is_an_error_on_all(case: str, error: str, words: list[str]) -> None:
    for text in run(case, 2, error):
        assert names_rank(text), text
        for word in words:
            assert word in text, text


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("exclude_matches_nothing", ["third.*"]),
        ("group_matches_nothing", ["third.*"]),
        ("frozen_on_all", ["frozen"]),
        ("closed_pp_group", ["pp_group"]),
        ("closed_process_group", ["process_group"]),
        ("non_member_pp_group", ["pp_group"]),
        ("pp_group_of_wrong_type", ["pp_group", "'pp'"]),
        ("closed_mesh_group", ["second"]),
    ],
)
def test_says_what_is_wrong(case: str, words: list[str]) -> None:
    results = pool(2).run(construct, case, timeout=25)
    for kind, text in results:
        # A bad argument, alike on every rank, may as well be a TypeError or another ValueError.
        assert kind in ("LayoutError", "ValueError", "TypeError"), results
        for word in words:
            assert word in text, text


def test_wrong_pp_group() -> None:
    """Ranks that differ as stages do, within what would be one stage."""
    for text in run("wrong_pp_group", 4):
        assert "layers." in text, text
        assert "rank" in text, text


# ---------------------------------------------------------------- what must not be an error


def fine(case: str) -> tuple[tuple[str, str], list[float]]:
    """Construct, give every parameter a gradient of ones, clip; the outcome and the global norm."""
    target, kwargs = FINE[case]()
    made: list[Any] = []
    result = outcome(lambda: made.append(dist_clip.GradClipper(target, dist_clip.GlobalNorm(1.0), **kwargs)))
    if not made:
        return result, []
    modules = target if isinstance(target, list) and isinstance(target[0], nn.Module) else None
    params: Iterable[nn.Parameter] = modules[0].parameters() if modules else [p for _, p in target]
    for p in params:
        p.grad = torch.ones_like(p)
    return result, [float(made[0].clip_().global_norm)]


def pattern_on_one_stage() -> tuple[Any, dict[str, Any]]:
    pp = mesh((dist.get_world_size(),), ("pp",)).get_group()
    return [(f"layers.{dist.get_rank()}", param(3)), (f"norms.{dist.get_rank()}", param(2))], {
        "pp_group": pp,
        "exclude": ("layers.1",),
    }


def group_on_one_stage() -> tuple[Any, dict[str, Any]]:
    pp = mesh((dist.get_world_size(),), ("pp",)).get_group()
    return [(f"layers.{dist.get_rank()}", param(3)), (f"norms.{dist.get_rank()}", param(2))], {
        "pp_group": pp,
        "overrides": {"layers.1": dist_clip.AdaGC()},
    }


def frozen_stage() -> tuple[Any, dict[str, Any]]:
    """A stage that is frozen altogether is an error only where the whole model is."""
    pp = mesh((dist.get_world_size(),), ("pp",)).get_group()
    named = [(f"layers.{dist.get_rank()}", param(3))]
    return named, {"pp_group": pp}


def same_group_twice() -> tuple[Any, dict[str, Any]]:
    """Two meshes over the same ranks own different groups; the layouts are the same all the same."""
    first = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("a",))
    second = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("b",))
    tensors = [DTensor.from_local(torch.ones(2, 2), m, [Shard(0)], run_check=False) for m in (first, second)]
    return [(f"tensor{i}", nn.Parameter(t)) for i, t in enumerate(tensors)], {}


FINE: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "pattern_on_one_stage": pattern_on_one_stage,
    "group_on_one_stage": group_on_one_stage,
    "frozen_stage": frozen_stage,
    "same_group_twice": same_group_twice,
}


@pytest.mark.parametrize(
    ("case", "squared"),
    [("pattern_on_one_stage", 7), ("frozen_stage", 6), ("same_group_twice", 16)],
)
def test_not_an_error(case: str, squared: int) -> None:
    for (kind, text), norms in pool(2).run(fine, case):
        assert kind == "nothing", text
        assert norms == pytest.approx([squared**0.5], rel=1e-6)


def test_group_on_one_stage_is_not_an_error() -> None:
    for (kind, text), _ in pool(2).run(fine, "group_on_one_stage"):
        assert kind == "nothing", text


def before_sharding() -> tuple[tuple[str, str], tuple[str, str]]:
    """Parameters that were replaced after the clipper was built: the clip must say so, not clip thin air."""
    net = make_net(Config())
    clipper = dist_clip.GradClipper(net, dist_clip.AdaGC())
    setup = fsdp(net, Config())
    setup.backward(1)
    built = outcome(lambda: None)
    try:
        report = clipper.clip_()
    except Exception as error:
        return built, (type(error).__name__, str(error))
    return built, ("report", "empty" if report.empty else "clipped")


def test_stale_parameters_are_an_error() -> None:
    for _, (kind, text) in pool(2).run(before_sharding):
        assert kind == "LayoutError"
        assert "after whatever replaces or adds parameters" in text


def stages_and_no_pp_group() -> tuple[str, str]:
    setup = pipeline(make_net(Config(blocks=4)), Config(blocks=4))
    return outcome(lambda: dist_clip.GradClipper(setup.modules[0], dist_clip.GlobalNorm(1.0)))


def test_forgotten_pp_group() -> None:
    """Pipeline stages without pp_group differ between ranks: an error, and one that says what to pass."""
    for kind, text in pool(2).run(stages_and_no_pp_group):
        assert kind == "LayoutError", text
        assert "pp_group" in text, text
