"""Marks of tensor parallelism that are wrong: the norm is one process's all the same, or a user says it by hand.

The oracle reads no mark: a single process has the whole model, and this file says how its tensors are cut.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dist_clip
from dist_clip.megatron import compat, marks
from dist_clip.megatron.reader import MegatronReader
from tests.harness import pool

from . import cuts, setups
from .setups import HEADS, Config, Setup, build
from .training import leaves

SINK = "self_attention.core_attention.softmax_offset"
FC1 = re.compile(r"\.linear_fc1\.(weight|bias)$")
RTOL = 1e-6

LAYOUTS = {
    "FP32Optimizer": (2, Config(tp=2)),
    "FP32Optimizer, PP": (4, Config(tp=2, pp=2)),
    "Float16Optimizer": (2, Config(tp=2, bf16=True)),
    "Float16Optimizer, PP": (4, Config(tp=2, pp=2, bf16=True)),
    "DistributedOptimizer": (4, Config(tp=2, zero=True)),
    "DistributedOptimizer, PP": (4, Config(tp=2, pp=2, zero=True)),
    "LayerWiseDistributedOptimizer": (4, Config(tp=2, layer_wise=True)),
    "LayerWiseDistributedOptimizer, PP": (4, Config(tp=2, pp=2, layer_wise=True)),
    "ChainedOptimizer": (4, Config(tp=2, ep=2, etp=1, experts=4, sequence_parallel=True)),
    "ChainedOptimizer, expert TP": (4, Config(tp=2, ep=2, etp=2, experts=4, sequence_parallel=True)),
    "ChainedOptimizer, PP": (4, Config(tp=2, pp=2, ep=2, etp=1, experts=4, sequence_parallel=True)),
}


# ---------------------------------------------------------------- on every rank


def with_sinks(config: Config, *, gated: bool = False) -> Setup:
    """The model with learnable attention sinks, whose start values are those of the whole model, cut by heads."""
    original = setups.transformer_config

    def transformer_config(config: Config) -> Any:
        transformer = original(config)
        transformer.softmax_type = "learnable"
        if gated:
            transformer.gated_linear_unit, transformer.activation_func = True, nn.functional.silu
        return transformer

    setups.transformer_config = transformer_config
    try:
        setup = build(config)
    finally:
        setups.transformer_config = original
    for name, param in global_params(setup).items():
        if name.endswith(SINK):
            whole = setups.whole_weight(name, (HEADS,), 0)
            param.data.copy_(whole.chunk(config.tp)[groups().tp.rank()])
        elif gated and config.tp == 1 and FC1.search(name):
            # A rank's part is its gate and its linear half: of the whole, all gates come first.
            gate0, up0, gate1, up1 = param.data.chunk(4)
            param.data.copy_(torch.cat([gate0, gate1, up0, up1]))
    setup.optimizer.reload_model_params()
    return setup


def groups() -> Any:
    return compat.process_groups(None)


def global_params(setup: Setup) -> dict[str, nn.Parameter]:
    out = {}
    for number, chunk in enumerate(setup.chunks):
        inner = chunk.module.module if hasattr(chunk.module, "module") else chunk.module
        out.update(cuts.named_parameters(inner, setup.config, number))
    return out


def grad_of(param: nn.Parameter) -> Tensor:
    return param.main_grad.detach().double().clone()


def one_process(config: Config, gated: bool) -> dict[str, float]:
    """Norms of the whole model's gradients."""
    setup = with_sinks(config, gated=gated)
    setup.backward(1)
    return {name: grad_of(param).norm().item() for name, param in global_params(setup).items()}


def step(
    config: Config, spoil: str = "", by_hand: str = "", gated: bool = False, check_replicas: bool = True
) -> dict[str, Any]:
    """One step of a model that is spoilt before the clipper comes: what the clipper found, and what the step returned."""
    setup = with_sinks(config, gated=gated)
    if spoil:
        SPOIL[spoil](setup)
    sharded = BY_HAND[by_hand]() if by_hand else None
    reader = MegatronReader(setup.optimizer, setup.chunks, groups(), sharded)
    layout = reader.read_layout(lambda name: False)
    setup.backward(1)
    sinks = {name: grad_of(param) for name, param in global_params(setup).items() if name.endswith(SINK)}
    clipper = dist_clip.megatron.attach(
        setup.optimizer, dist_clip.GlobalNorm(0.1), model=setup.chunks, sharded=sharded, check_replicas=check_replicas
    )
    _, returned, _ = setup.optimizer.step()
    report = clipper.last_report
    return {
        "optimizers": {type(leaf).__name__ for leaf in leaves(setup.optimizer)} | {type(setup.optimizer).__name__},
        "norms": dict(zip(report.names, report.tensor_norms.tolist(), strict=True)),
        "scales": dict(zip(report.names, report.scales.tolist(), strict=True)),
        "norm": float(report.global_norm),
        "returned": None if returned is None else float(returned),
        "placements": {tensor.name: tensor.placement for tensor in layout},
        "marked": {tensor.name for tensor in layout if tensor.marked_groups},
        "sinks": sinks,
        "text": clipper.explain(),
    }


def matching(setup: Setup, ending: str) -> list[nn.Parameter]:
    return [param for name, param in global_params(setup).items() if name.endswith(ending)]


def mark(param: nn.Parameter, dim: int | None) -> None:
    param.tensor_model_parallel = dim is not None
    param.partition_dim = -1 if dim is None else dim


def wrong_marks(setup: Setup) -> None:
    """Of both kinds, and of the wrong dimension."""
    for param in matching(setup, "linear_proj.weight") + matching(setup, "experts.0.linear_fc2.weight"):
        mark(param, None)
    for param in matching(setup, "input_layernorm.weight") + matching(setup, "linear_proj.bias"):
        mark(param, 0)
    for param in matching(setup, "linear_qkv.weight"):
        mark(param, 1)


class OwnNorm(nn.LayerNorm):
    """A user's class: that Megatron describes it as replicated says nothing."""


def own_norms(setup: Setup) -> None:
    for chunk in setup.chunks:
        for module in list(chunk.modules()):
            if type(module) is nn.LayerNorm:
                module.__class__ = OwnNorm


def own_norms_marked(setup: Setup) -> None:
    own_norms(setup)
    for param in matching(setup, "input_layernorm.weight"):
        mark(param, 0)


def undescribed(setup: Setup) -> None:
    """Modules that fail to describe themselves, as those do that hold a wrapper that Megatron does not know."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AttributeError("'LoRA' object has no attribute 'sharded_state_dict'")

    for chunk in setup.chunks:
        for module in chunk.modules():
            if hasattr(module, "sharded_state_dict"):
                module.sharded_state_dict = fail


def undescribed_unmarked(setup: Setup) -> None:
    undescribed(setup)
    for param in matching(setup, "linear_proj.weight"):
        mark(param, None)


SPOIL: dict[str, Callable[[Setup], None]] = {
    "wrong marks": wrong_marks,
    "own norms, marked": own_norms_marked,
    "undescribed": undescribed,
    "undescribed, unmarked": undescribed_unmarked,
}

# What says that the sinks are split by heads, in all the ways that there are; and some of what else can be said.
BY_HAND: dict[str, Callable[[], dict[str, Any]]] = {
    "a dimension": lambda: {"*.softmax_offset": 0},
    "a negative dimension": lambda: {"*.softmax_offset": -1, "*.softmax*": None},
    "a group": lambda: {"*.softmax_offset": groups().tp},
    "a dimension and a group": lambda: {"*.softmax_offset": (0, groups().tp)},
    "replicated": lambda: {"*.input_layernorm.weight": None},
    "experts": lambda: {"*.linear_fc1.weight": 0, "*.experts.*.linear_fc2.weight": 1},
}


# ---------------------------------------------------------------- in the test's process


@functools.cache
def expected(config: Config, gated: bool = False) -> Mapping[str, float]:
    return pool(1, "megatron").run(one_process, config, gated)[0]


def check(ranks: list[dict[str, Any]], config: Config, *, gated: bool = False) -> None:
    """Each rank has one process's norms, and one scale for each tensor."""
    right = expected(config.single, gated)
    rtol = 0.05 if config.bf16 else RTOL  # of gradients that are rounded to 8 bits on their way
    total = math.sqrt(sum(norm**2 for norm in right.values()))
    scales: dict[str, float] = {}
    for rank, found in enumerate(ranks):
        for name, norm in found["norms"].items():
            assert math.isclose(norm, right[name], rel_tol=rtol), f"rank {rank}, {name}: {norm}, not {right[name]}"
            scale = found["scales"][name]
            assert scales.setdefault(name, scale) == scale, f"rank {rank}, {name}: copies are scaled differently"
        assert math.isclose(found["norm"], total, rel_tol=rtol), f"rank {rank}: {found['norm']}, not {total}"
        if found["returned"] is not None:
            assert found["returned"] == found["norm"]
    assert set(scales) == set(right)
    assert max(scales.values()) < 1, "the test is to blame: nothing was clipped"


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.report(
    "NVIDIA/Megatron-LM#7452",
    "NVIDIA/Megatron-LM#7530",
    situation="attention sinks are split by heads, but not marked as tensor-parallel: heads are missing from the norm",
    right="2.358802 on all ranks, as in one process",
)
def test_sinks(name: str) -> None:
    world, config = LAYOUTS[name]
    ranks = pool(world, "megatron").run(step, config)
    check(ranks, config)
    for rank in ranks:
        assert any(name.split(",")[0] in kind for kind in rank["optimizers"])
        assert not rank["marked"], "a mark that agrees with the state dict is taken for the only witness"
        for tensor, placement in rank["placements"].items():
            overruled = "along dim 0 (by sharded_state_dict; its mark says replicated)" in placement
            assert overruled == tensor.endswith(SINK), (tensor, placement)
        assert "its mark says replicated" in rank["text"]
    if config.bf16:  # what is rounded is far from one process's, so the two halves are put together
        for name, norm in ranks[0]["norms"].items():
            if name.endswith(SINK):
                whole = torch.cat([rank["sinks"][name] for rank in ranks[:2]])
                assert math.isclose(norm, whole.norm().item(), rel_tol=RTOL)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.report(
    "ROCm/TransformerEngine#715",
    situation="replicated weights are marked as tensor-parallel, and counted once for each rank",
    right="each once: too large by 1.36 and 1.52 otherwise",
)
def test_wrong_marks(name: str) -> None:
    world, config = LAYOUTS[name]
    ranks = pool(world, "megatron").run(step, config, "wrong marks")
    check(ranks, config)
    words = {
        "linear_proj.weight": "tensor parallel over 2 along dim 1 (by sharded_state_dict; its mark says replicated)",
        "input_layernorm.weight": "dense, replicated (by sharded_state_dict; its mark says along dim 0)",
        "linear_proj.bias": "dense, replicated (by sharded_state_dict; its mark says along dim 0)",
        "linear_qkv.weight": "tensor parallel over 2 along dim 0 (by sharded_state_dict; its mark says along dim 1)",
    }
    for rank in ranks:
        assert not rank["marked"]
        for tensor, placement in rank["placements"].items():
            for ending, text in words.items():
                assert text in placement or not tensor.endswith(ending), (tensor, placement)


def test_gated_projections() -> None:
    """SwiGLU's first projection is two tensors in a checkpoint and one here."""
    config = Config(tp=2)
    ranks = pool(2, "megatron").run(step, config, "", gated=True)
    check(ranks, config, gated=True)
    for rank in ranks:
        assert not rank["marked"]


def test_a_mark_that_nothing_else_vouches_for() -> None:
    """It is in force, but not where what it calls parts are copies."""
    for rank in pool(2, "megatron").run(step, Config(tp=2), "own norms, marked", check_replicas=False):
        assert rank["marked"] == {name for name in rank["norms"] if name.endswith("input_layernorm.weight")}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.report("ROCm/TransformerEngine#715")
def test_wrong_marks_that_nothing_describes(layout: str) -> None:
    """Of both kinds: parts without a mark, and copies with one. In each optimizer they are an error on every rank."""
    world, config = LAYOUTS[layout]
    for spoil, words in (
        ("own norms, marked", "is marked as split over the tensor-parallel ranks, but its weights and its gradient"),
        ("undescribed, unmarked", "should be one tensor with copies on ranks"),
    ):
        texts = pool(world, "megatron").run(refused_at_the_step, config, spoil)
        assert len(set(texts)) == 1
        assert words in texts[0]


def refused_at_the_step(config: Config, spoil: str) -> str:
    try:
        step(config, spoil)
    except dist_clip.LayoutError as error:
        return str(error)
    return "nothing"


def test_modules_that_describe_nothing() -> None:
    """Their marks are in force."""
    for rank in pool(2, "megatron").run(step, Config(tp=2), "undescribed", check_replicas=False):
        split = {name for name, placement in rank["placements"].items() if "tensor parallel" in placement}
        assert rank["marked"] == split
        assert "by sharded_state_dict" not in rank["text"]
        assert any(name.endswith("linear_qkv.weight") for name in split)


@pytest.mark.parametrize("by_hand", ["a dimension", "a negative dimension", "a group", "a dimension and a group"])
@pytest.mark.report("NVIDIA/Megatron-LM#7452")
def test_sinks_by_hand(by_hand: str) -> None:
    for name in ("FP32Optimizer", "DistributedOptimizer, PP"):
        world, config = LAYOUTS[name]
        ranks = pool(world, "megatron").run(step, config, "undescribed", by_hand)
        check(ranks, config)
        for rank in ranks:
            assert not any(name.endswith(SINK) for name in rank["marked"])
            assert "(by sharded=)" in rank["text"]


@pytest.mark.parametrize(
    ("by_hand", "spoil", "name"),
    [
        ("replicated", "own norms, marked", "LayerWiseDistributedOptimizer"),
        ("experts", "wrong marks", "ChainedOptimizer"),
        ("experts", "wrong marks", "ChainedOptimizer, expert TP"),
    ],
)
def test_by_hand(by_hand: str, spoil: str, name: str) -> None:
    world, config = LAYOUTS[name]
    ranks = pool(world, "megatron").run(step, config, spoil, by_hand)
    check(ranks, config)


# ---- how the description is read -------------------------------------------------------------------------------------


class _Ops(TorchDispatchMode):
    """The names of all operations on tensors, collectives among them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(f"{func.namespace}.{func._opname}")
        return func(*args, **(kwargs or {}))


def look(config: Config, gated: bool) -> dict[str, Any]:
    setup = with_sinks(config, gated=gated)
    params = global_params(setup)
    before = {name: (param.data_ptr(), param._version, dict(vars(param))) for name, param in params.items()}
    seeds = torch.get_rng_state()
    with _Ops() as ops:
        found = marks.describe(setup.chunks, groups().dp)
    after = {name: (param.data_ptr(), param._version, dict(vars(param))) for name, param in params.items()}
    assert str(before) == str(after)
    assert torch.equal(seeds, torch.get_rng_state())
    return {
        "ops": ops.names,
        "found": {name: found.get(id(param)) for name, param in params.items()},
        "marks": {name: compat.is_tensor_parallel(param) for name, param in params.items()},
        "index": (groups().tp.rank(), groups().expt_tp.rank()),
    }


@pytest.mark.parametrize(
    ("world", "config", "gated"),
    [
        (2, Config(tp=2), True),
        (4, Config(tp=2, ep=2, etp=2, experts=4, sequence_parallel=True), True),
        (4, Config(tp=2, pp=2, vpp=2, layers=4, tied=True, bf16=True), False),
    ],
)
def test_reading_the_state_dict_copies_nothing_and_communicates_nothing(
    world: int, config: Config, gated: bool
) -> None:
    for rank in pool(world, "megatron").run(look, config, gated):
        # Views only: SwiGLU's projection is looked at in two halves.
        assert rank["ops"] <= {"aten.detach", "aten.split", "aten.alias", "aten.view"}
        for name, found in rank["found"].items():
            split = rank["marks"][name] or name.endswith(SINK)
            dim = 1 if re.search(r"linear_(proj|fc2)\.weight$", name) else 0
            index = rank["index"]["experts" in name]
            assert found == marks.Described(dim if split else None, 2 if split else 1, index * split, True), name


def descriptions() -> dict[str, Any]:
    """Of modules that Megatron does not come with."""
    setup = with_sinks(Config(tp=2))
    from megatron.core.ssm.mamba_mixer import _split_tensor_factory
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

    transformer = setup.chunks[0].config
    tp, dp = groups().tp, groups().dp

    class Default(MegatronModule):
        def __init__(self) -> None:
            super().__init__(transformer)
            self.scale = nn.Parameter(torch.ones(4))
            self.linear = nn.Linear(4, 4)

    class Mixer(Default):
        """As Mamba's: one parameter whose parts are cut one by one, and a child that it describes."""

        def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
            if broken:
                raise RuntimeError("no")
            state = make_sharded_tensors_for_checkpoint(
                self.state_dict(),  # detached: views of the parameters
                prefix,
                {"scale": 0, "linear.weight": 0},
                ((0, 3, 8),),
                tp_group=tp,
                dp_cp_group=metadata["dp_cp_group"],
            )
            state["linear.weight"] = _split_tensor_factory(state["linear.weight"], [1, 3], ["x", "z"], 0)
            state["again"] = [state["scale"]]
            return state

    class Child(Mixer):
        """Says nothing of its own parameter."""

        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.ones(4))

    class Plain(nn.Module):
        """As a LoRA wrapper: Megatron takes what it holds for replicated."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.lora = inner, nn.Linear(4, 4, bias=False)

    def say(module: nn.Module) -> dict[str, Any]:
        found = marks.describe([module], dp)
        return {name: found.get(id(param)) for name, param in module.named_parameters()}

    broken = False
    out = {"default": say(Default()), "mixer": say(Mixer()), "child": say(Child()), "plain": say(nn.Linear(2, 2))}
    outer = Default()
    outer.linear = Plain(Mixer())
    out["wrapped"] = say(outer)
    broken = True
    out["broken"] = say(outer)
    return {"rank": tp.rank(), **out}


def test_descriptions_of_other_modules() -> None:
    for found in pool(2, "megatron").run(descriptions):
        weak = marks.Described(None, 1, 0, deliberate=False)
        split = marks.Described(0, 2, found["rank"], deliberate=True)
        assert found["default"] == {"scale": weak, "linear.weight": weak, "linear.bias": weak}
        # The bias of a torch module, described by a user's: nothing is sure of it.
        assert found["mixer"] == {"scale": split, "linear.weight": split, "linear.bias": weak}
        assert found["child"] == {**found["mixer"], "gate": weak}
        assert found["plain"] == {"weight": None, "bias": None}
        inner = {f"linear.inner.{name}": said for name, said in found["mixer"].items()}
        assert found["wrapped"] == {"scale": weak, **inner, "linear.lora.weight": weak}
        assert found["broken"] == {**found["wrapped"], **dict.fromkeys(inner)}


def judged(size: int, rank: int, mark_dim: int | None, described: marks.Described | None) -> marks.Verdict:
    class Group:
        def size(self) -> int:
            return size

        def rank(self) -> int:
            return rank

    param = torch.zeros(4, 4)
    mark(param, mark_dim)
    return marks.judge(param, described, Group())


def test_whose_word_counts() -> None:
    split, sure, weak = (
        marks.Described(0, 2, 1, True),
        marks.Described(None, 1, 0, True),
        marks.Described(None, 1, 0, False),
    )
    Verdict = marks.Verdict
    assert judged(1, 0, 0, None) == Verdict(None)
    assert judged(2, 1, None, None) == Verdict(None)
    assert judged(2, 1, 1, None) == Verdict(1, only_marked=True)
    assert judged(2, 1, 0, split) == Verdict(0)
    assert judged(2, 1, 1, split) == Verdict(0, "by sharded_state_dict; its mark says along dim 1")
    assert judged(2, 1, None, split) == Verdict(0, "by sharded_state_dict; its mark says replicated")
    assert judged(2, 1, None, sure) == judged(2, 1, None, weak) == Verdict(None)
    assert judged(2, 1, 1, sure) == Verdict(None, "by sharded_state_dict; its mark says along dim 1")
    assert judged(2, 1, 1, weak) == Verdict(1, only_marked=True)
    # Cut over ranks of other groups, which is none of this group's business.
    assert judged(2, 0, 1, split) == Verdict(1, only_marked=True)
    assert judged(4, 1, 1, split) == Verdict(1, only_marked=True)
    assert judged(4, 1, None, split) == Verdict(None)


# ---- bad input -------------------------------------------------------------------------------------------------------


def alone() -> Any:
    """A group of rank 0, which other ranks get no handle of."""
    return dist.new_group([0])


BAD: dict[str, tuple[Callable[[], Any], str, list[str]]] = {
    "no mapping": (
        lambda: ["*.softmax_offset"],
        "TypeError",
        ["sharded must be a mapping {pattern: dim or process group}"],
    ),
    "no value": (lambda: {"*.softmax_offset": "tp"}, "TypeError", ["None for a replicated tensor, got 'tp'"]),
    "a bool": (lambda: {"*.softmax_offset": True}, "TypeError", ["got True"]),
    "three things": (lambda: {"*.softmax_offset": (0, None, 1)}, "TypeError", ["a pair (dimension, group)"]),
    "no group": (lambda: {"*.softmax_offset": (0, None)}, "TypeError", ["a pair (dimension, group)"]),
    "out of range": (
        lambda: {"*.softmax_offset": 1},
        "LayoutError",
        ["softmax_offset' is cut along dim 1, but its shape is [2]"],
    ),
    "below the range": (lambda: {"*.linear_qkv.weight": -3}, "LayoutError", ["along dim -3"]),
    "no member": (lambda: {"*.linear_qkv.weight": alone()}, "LayoutError", ["not a member of the group"]),
    "across stages": (
        lambda: {"decoder.*": dist.group.WORLD},
        "LayoutError",
        ["over ranks [0, 1, 2, 3]", "in another pipeline stage"],
    ),
    "the optimizer's": (
        lambda: {"decoder.*.weight": groups().dp},
        "LayoutError",
        ["but the optimizer already divides it among ranks"],
    ),
    "on one rank": (
        lambda: {"*.softmax_offset": 1 if dist.get_rank() == 1 else 0},
        "LayoutError",
        ["rank 1", "along dim 1"],
    ),
    "other things on one rank": (
        lambda: {"*.softmax_offset": None if dist.get_rank() == 1 else 0},
        "LayoutError",
        [
            "rank 1: sharded= says of",
            "softmax_offset': replicated. But the model's sharded_state_dict says",
            "along dim 0",
        ],
    ),
    "replicated against the state dict": (
        lambda: {"*.linear_proj.weight": None},
        "LayoutError",
        ["linear_proj.weight': replicated. But the model's sharded_state_dict says that it is cut along dim 1"],
    ),
    "against the state dict": (
        lambda: {"*.linear_qkv.weight": 1},
        "LayoutError",
        ["linear_qkv.weight': dim 1. But the model's sharded_state_dict says that it is cut along dim 0"],
    ),
    "no tensor": (lambda: {"*.sinks": 0}, "LayoutError", ["no tensor on any rank matches ['*.sinks']"]),
}


def refused(case: str, config: Config) -> tuple[str, str]:
    setup = with_sinks(config)
    sharded = BAD[case][0]()
    try:
        dist_clip.megatron.attach(setup.optimizer, dist_clip.GlobalNorm(), model=setup.chunks, sharded=sharded)
    except Exception as error:
        result = (type(error).__name__, str(error))
    else:
        result = ("nothing", "")
    dist.barrier()  # no rank was left behind
    return result


@pytest.mark.parametrize("case", BAD)
def test_refused_alike_on_every_rank(case: str) -> None:
    _, kind, words = BAD[case]
    layouts = {
        "across stages": "FP32Optimizer, PP",
        "the optimizer's": "DistributedOptimizer",
    }
    world, config = LAYOUTS[layouts.get(case, "FP32Optimizer")]
    results = pool(world, "megatron").run(refused, case, config)
    for found, text in results:
        assert found == kind, text
        for word in words:
            assert word in text, text
    assert len({text for _, text in results}) == 1


def differing_marks() -> str:
    setup = with_sinks(Config(tp=2))
    undescribed(setup)
    if dist.get_rank() == 1:
        for param in matching(setup, "layers.1.mlp.linear_fc1.weight"):
            mark(param, None)
    with pytest.raises(dist_clip.LayoutError) as error:
        dist_clip.megatron.attach(setup.optimizer, dist_clip.GlobalNorm(0.1), model=setup.chunks)
    return str(error.value)


def test_ranks_whose_marks_differ() -> None:
    """They would meet in different collectives."""
    (text, other) = pool(2, "megatron").run(differing_marks)
    assert text == other
    assert "rank 1 has 'decoder.layers.1.mlp.linear_fc1.weight' [16, 16] as dense, but rank 0" in text
