"""What is refused, when, and what the error says: the offending value for an argument, the tensor's name for a tensor.

Arguments raise ValueError or TypeError; a layout that cannot be clipped raises dist_clip.LayoutError, which is a
ValueError, when the clipper is made, or at clip_ where only the gradient shows it.
"""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import dist_clip

NAN, INF = math.nan, math.inf
BAD_ARGUMENT = (ValueError, TypeError)


def shown(value: Any) -> str:
    return re.escape(str(value))


# ---- policies --------------------------------------------------------------------------------------------------------

POSITIVE = [0.0, -1.5, NAN, "1.0"]
NOT_NEGATIVE = [-1e-6, NAN, "tiny"]
FRACTION = [-0.25, 1.5, NAN, "0.9"]
COUNT = [-1, 2.5, "ten", NAN]
FLAG = ["yes", 2, None]

POLICY_ARGUMENTS: dict[str, dict[str, list[Any]]] = {
    "GlobalNorm": {"max_norm": [-1.5, NAN, "1.0", None]},  # 0 is torch's way to zero all gradients
    "AdaGC": {
        "lambda_rel": [*POSITIVE, INF],
        "beta": FRACTION,
        "warmup_steps": [*COUNT, None],
        "max_norm": [*POSITIVE, None],
        "scope": ["tensors", "Tensor", None, 1],
        "gamma_init": ["max", None, 0.5],
        "eps": [*NOT_NEGATIVE, INF],
    },
    "ZClip": {
        "alpha": FRACTION,
        "z_thresh": POSITIVE,
        "warmup_steps": [*COUNT, None],
        "mode": ["z-score", None, 3],
        "clip_option": ["adaptive", None, 3],
        "clip_factor": POSITIVE,
        "max_norm": POSITIVE,
        "skip_update_on_spike": FLAG,
        "eps": [*NOT_NEGATIVE, INF],
        "scope": ["tensors", "Global", None, 1],
    },
    "LogClip": {
        "ratio": [1.0, 0.5, NAN, INF, "2"],
        "power": [*POSITIVE, INF],
        "rate": [0.0, 1.5, NAN, "0.03"],
        "warmup_steps": [*COUNT, None],
        "max_norm": [*POSITIVE, None],
        "scope": ["tensors", "Tensor", None, 1],
        "warmup_ratio": [1.0, 0.5, NAN, INF, "100"],
        "patience": [*COUNT, None],
        "post_max_norm": POSITIVE,
    },
    "AutoClip": {
        "percentile": [-1.0, 100.5, NAN, "10", None],
        "history": [0, -1, 10.0, True, None],
        "scope": ["tensors", "Global", None, 1],
    },
    "AGC": {
        "lam": [*POSITIVE, INF, None],
        "eps": [*POSITIVE, INF, None],
        "scope": ["tensors", "Tensor", None, 1],
    },
    "MeasureOnly": {"guarded": [1, None, "no"]},
}
POLICY_CASES = [(p, a, v) for p, args in POLICY_ARGUMENTS.items() for a, values in args.items() for v in values]


@pytest.mark.parametrize(("policy", "argument", "value"), POLICY_CASES, ids=str)
def test_policy_arguments(policy: str, argument: str, value: Any) -> None:
    with pytest.raises(BAD_ARGUMENT, match=shown(value)) as error:
        getattr(dist_clip, policy)(**{argument: value})
    assert argument in str(error.value)


def test_every_policy_argument_is_covered() -> None:
    for policy, arguments in POLICY_ARGUMENTS.items():
        assert set(inspect.signature(getattr(dist_clip, policy)).parameters) == set(arguments)


@pytest.mark.parametrize("policy", POLICY_ARGUMENTS)
def test_unknown_policy_arguments(policy: str) -> None:
    with pytest.raises(TypeError, match="maxnorm"):
        getattr(dist_clip, policy)(maxnorm=1.0)


def test_integers_are_numbers() -> None:
    dist_clip.GlobalNorm(max_norm=1)
    dist_clip.AdaGC(lambda_rel=2, max_norm=1, eps=0)
    dist_clip.ZClip(z_thresh=2, clip_factor=1, max_norm=None, mode="percentile")
    dist_clip.LogClip(ratio=2, power=2, rate=1, max_norm=1, warmup_ratio=100, patience=0, post_max_norm=1)


# ---- GradClipper -----------------------------------------------------------------------------------------------------


def linear() -> nn.Linear:
    return nn.Linear(2, 3)


CLIPPER_ARGUMENTS: dict[str, list[Any]] = {
    "nonfinite": ["ignore", "Propagate", None, 0],
    "overrides": ["weight", ["weight"], 3],
    "exclude": ["bias", 3, [3], [None]],
    "log_global_norm": ["always", 2, None],
}


@pytest.mark.parametrize(
    ("argument", "value"), [(a, v) for a, values in CLIPPER_ARGUMENTS.items() for v in values], ids=str
)
def test_clipper_arguments(argument: str, value: Any) -> None:
    """Note exclude="bias": a string is a sequence of one-letter patterns, and never what was meant."""
    with pytest.raises(BAD_ARGUMENT, match=shown(value if not isinstance(value, list) else value[0])) as error:
        dist_clip.GradClipper(linear(), dist_clip.GlobalNorm(), **{argument: value})
    assert argument in str(error.value)


@pytest.mark.parametrize("policy", [1.0, "AdaGC", None, dist_clip.AdaGC, nn.Linear(1, 1)], ids=str)
def test_policy_must_be_a_policy(policy: Any) -> None:
    with pytest.raises(BAD_ARGUMENT, match=r"(?i)policy"):
        dist_clip.GradClipper(linear(), policy)
    with pytest.raises(BAD_ARGUMENT, match=r"(?i)policy"):
        dist_clip.GradClipper(linear(), dist_clip.GlobalNorm(), overrides={"weight": policy})


def test_arguments_after_the_policy_are_keyword_only() -> None:
    with pytest.raises(TypeError):
        dist_clip.GradClipper(linear(), dist_clip.GlobalNorm(), None)  # type: ignore[misc]


def test_group_patterns_must_be_strings() -> None:
    with pytest.raises(BAD_ARGUMENT, match="7"):
        dist_clip.GradClipper(linear(), dist_clip.GlobalNorm(), overrides={7: dist_clip.GlobalNorm()})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "target",
    [3, None, "model", [1, 2], ["weight"], [("weight", 3)], [linear(), 3], object()],
    ids=lambda target: type(target).__name__,
)
def test_targets_that_are_none(target: Any) -> None:
    with pytest.raises(BAD_ARGUMENT):
        dist_clip.GradClipper(target, dist_clip.GlobalNorm())


# ---- tensors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [[], iter([]), nn.ReLU(), nn.ModuleList(), [nn.ReLU(), nn.GELU()]],
    ids=lambda target: type(target).__name__,
)
def test_no_parameters(target: Any) -> None:
    with pytest.raises(dist_clip.LayoutError, match=r"(?i)no .*param"):
        dist_clip.GradClipper(target, dist_clip.GlobalNorm())


def test_an_exhausted_generator_has_no_parameters() -> None:
    generator = linear().parameters()
    list(generator)
    with pytest.raises(dist_clip.LayoutError, match=r"(?i)no .*param"):
        dist_clip.GradClipper(generator, dist_clip.GlobalNorm())


def test_all_parameters_frozen() -> None:
    model = linear().requires_grad_(False)
    for target in (model, list(model.parameters()), list(model.named_parameters())):
        with pytest.raises(dist_clip.LayoutError, match=r"(?i)frozen|requires_grad"):
            dist_clip.GradClipper(target, dist_clip.GlobalNorm())


def test_duplicate_names() -> None:
    p, q = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    with pytest.raises(dist_clip.LayoutError, match=r"twin\.weight"):
        dist_clip.GradClipper([("twin.weight", p), ("twin.weight", q)], dist_clip.GlobalNorm())


def test_duplicate_names_over_pipeline_chunks() -> None:
    """Two stages that both number their layers from 0."""
    with pytest.raises(dist_clip.LayoutError, match=r"0\.weight"):
        dist_clip.GradClipper([nn.Sequential(linear()), nn.Sequential(linear())], dist_clip.GlobalNorm())


def test_layout_error_is_a_value_error() -> None:
    assert issubclass(dist_clip.LayoutError, ValueError)


def test_sparse_embedding_in_a_module() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3, sparse=True), "head": linear()})
    for target in (model, [model], nn.ModuleDict({"outer": model})):
        with pytest.raises(dist_clip.LayoutError, match=r"(?is)embed\.weight.*sparse|sparse.*embed\.weight"):
            dist_clip.GradClipper(target, dist_clip.GlobalNorm())
    bag = nn.ModuleDict({"bag": nn.EmbeddingBag(5, 3, sparse=True), "head": linear()})
    with pytest.raises(dist_clip.LayoutError, match=r"(?is)bag\.weight.*sparse|sparse.*bag\.weight"):
        dist_clip.GradClipper(bag, dist_clip.GlobalNorm())


def test_a_sparse_embedding_that_is_excluded() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3, sparse=True), "head": linear()})
    dist_clip.GradClipper(model, dist_clip.GlobalNorm(), exclude=["embed.*"])


@pytest.mark.parametrize(
    "policy",
    [dist_clip.GlobalNorm(), dist_clip.AdaGC(warmup_steps=1), dist_clip.LogClip(), dist_clip.ZClip()],
    ids=repr,
)
def test_sparse_gradients_at_clip(policy: Any) -> None:
    """Given parameters alone, nobody can know before the first gradient. Nothing is touched then."""
    embed, head = nn.Embedding(5, 3, sparse=True), linear()
    clipper = dist_clip.GradClipper([("embed.weight", embed.weight), ("head.weight", head.weight)], policy)
    embed(torch.tensor([1, 1, 2])).sum().backward()
    head.weight.grad = torch.full((3, 2), 5.0)
    assert embed.weight.grad.is_sparse
    with pytest.raises(
        (ValueError, RuntimeError, TypeError), match=r"(?is)embed\.weight.*sparse|sparse.*embed\.weight"
    ):
        clipper.clip_()
    assert torch.equal(head.weight.grad, torch.full((3, 2), 5.0))
    assert clipper.state_dict()["step"] == 0


def test_sparse_gradients_in_clip_grad_norm() -> None:
    embed = nn.Embedding(5, 3, sparse=True)
    embed(torch.tensor([1, 1, 2])).sum().backward()
    with pytest.raises((ValueError, RuntimeError, TypeError), match=r"(?i)sparse"):
        dist_clip.clip_grad_norm_(embed.parameters(), 1.0)


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_parameters_of_fsdp1_without_their_module_are_refused(use_orig_params: bool) -> None:
    model = nn.Sequential(
        FullyShardedDataParallel(linear(), device_id=torch.device("cpu"), use_orig_params=use_orig_params),
        nn.Linear(3, 1),
    )
    for target in (model, [model], model[0]):
        names = dist_clip.GradClipper(target, dist_clip.GlobalNorm()).layout.names
        assert "0.weight" in names or "weight" in names
    for parameters in (model.parameters(), model.named_parameters(), torch.optim.SGD(model.parameters())):
        with pytest.raises(dist_clip.LayoutError, match=r"FSDP1.*pass the wrapped module"):
            dist_clip.GradClipper(parameters, dist_clip.GlobalNorm())


# ---- process groups --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["process_group", "pp_group"])
def test_a_process_group_before_torch_distributed_is_initialised(argument: str) -> None:
    with pytest.raises(BAD_ARGUMENT, match=argument):
        dist_clip.GradClipper(linear(), dist_clip.GlobalNorm(), **{argument: "ranks"})


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("value", ["ranks", 31, [0]], ids=str)
@pytest.mark.parametrize("argument", ["process_group", "pp_group"])
def test_something_that_is_no_process_group(argument: str, value: Any) -> None:
    with pytest.raises(BAD_ARGUMENT, match=shown(value)) as error:
        dist_clip.GradClipper(linear(), dist_clip.GlobalNorm(), **{argument: value})
    assert argument in str(error.value)
    if argument == "pp_group":
        with pytest.raises(BAD_ARGUMENT, match=shown(value)):
            dist_clip.clip_grad_norm_(linear().parameters(), 1.0, pp_group=value)


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("argument", ["process_group", "pp_group"])
def test_a_closed_process_group(argument: str) -> None:
    group = dist.new_group([0])
    dist.destroy_process_group(group)
    with pytest.raises(BAD_ARGUMENT, match=argument):
        dist_clip.GradClipper(linear(), dist_clip.GlobalNorm(), **{argument: group})


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("argument", ["process_group", "pp_group"])
def test_a_group_this_rank_is_no_member_of(argument: str) -> None:
    with pytest.raises(BAD_ARGUMENT, match=argument):
        dist_clip.GradClipper(linear(), dist_clip.GlobalNorm(), **{argument: dist.GroupMember.NON_GROUP_MEMBER})


@pytest.mark.usefixtures("world_of_one")
def test_a_group_of_one_changes_nothing() -> None:
    model = linear()
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(0.5), pp_group=dist.new_group([0]))
    model(torch.ones(4, 2)).sum().backward()
    want = math.hypot(*(p.grad.double().norm().item() for p in model.parameters()))  # type: ignore[union-attr]
    report = clipper.clip_()
    assert report.global_norm is not None
    assert report.global_norm.item() == pytest.approx(want, rel=1e-6)


@pytest.mark.usefixtures("world_of_one")
def test_a_closed_pp_group_in_clip_grad_norm() -> None:
    model = linear()
    model(torch.ones(4, 2)).sum().backward()
    group = dist.new_group([0])
    dist.destroy_process_group(group)
    with pytest.raises(BAD_ARGUMENT, match="pp_group"):
        dist_clip.clip_grad_norm_(model.parameters(), 1.0, pp_group=group)


# ---- clip_grad_norm_ -------------------------------------------------------------------------------------------------

FUNCTION_ARGUMENTS: dict[str, list[Any]] = {
    "max_norm": [-1.5, NAN, "large", None],
    "norm_type": [-1.0, NAN, "two", None],
    "error_if_nonfinite": ["yes", 2],
    "foreach": ["yes", 2],
}


@pytest.mark.parametrize(
    ("argument", "value"), [(a, v) for a, values in FUNCTION_ARGUMENTS.items() for v in values], ids=str
)
def test_clip_grad_norm_arguments(argument: str, value: Any) -> None:
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    with pytest.raises(BAD_ARGUMENT, match=shown(value)) as error:
        dist_clip.clip_grad_norm_([p], **{"max_norm": 1.0, argument: value})
    assert argument in str(error.value)
    assert torch.equal(p.grad, torch.ones(3))


@pytest.mark.parametrize("parameters", [3, None, "params", [3], ["weight"], linear()], ids=str)
def test_clip_grad_norm_of_something_else(parameters: Any) -> None:
    """A module is a likely mistake: torch fails on it, and so does this, rather than clip nothing."""
    with pytest.raises(BAD_ARGUMENT):
        dist_clip.clip_grad_norm_(parameters, 1.0)


def test_bad_arguments_are_seen_without_gradients_too() -> None:
    with pytest.raises(BAD_ARGUMENT, match="-2"):
        dist_clip.clip_grad_norm_([nn.Parameter(torch.zeros(3))], -2.0)


# ---- errors leave nothing half done ----------------------------------------------------------------------------------


def test_a_gradient_of_another_dtype_or_shape_is_measured_as_it_is() -> None:
    """torch itself refuses a gradient of another shape; a model may be cast after the clipper was made."""
    p = nn.Parameter(torch.zeros(3))
    with pytest.raises(RuntimeError):
        p.grad = torch.ones(4)
    clipper = dist_clip.GradClipper([p], dist_clip.GlobalNorm(1.0))
    p.data = p.data.double()
    p.grad = torch.ones(3, dtype=torch.float64)
    assert clipper.clip_().global_norm.item() == pytest.approx(math.sqrt(3), rel=1e-6)
