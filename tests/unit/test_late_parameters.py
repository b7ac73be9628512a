"""Parameters that come, go or change after construction: an error at the first clip that would miss one, or refresh()."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import dist_clip
from dist_clip.layouts import ParameterWatch


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "head": nn.Linear(4, 2)})


def set_grads(model: nn.Module, value: float = 1.0) -> None:
    for param in model.parameters():
        param.grad = torch.full_like(param, value)


def new_head(model: nn.Module) -> None:
    model["head"] = nn.Linear(4, 2)  # type: ignore[operator]


def new_module(model: nn.Module) -> None:
    model["adapter"] = nn.Linear(4, 4)  # type: ignore[operator]


def new_parameter(model: nn.Module) -> None:
    model["body"][0].register_parameter("lora", nn.Parameter(torch.zeros(4, 2)))  # type: ignore[index]


def recreated_weight(model: nn.Module) -> None:
    model["body"][1].weight = nn.Parameter(torch.zeros(4, 4))  # type: ignore[index]


def resized_weight(model: nn.Module) -> None:
    model["head"].weight = nn.Parameter(torch.zeros(6, 4))  # type: ignore[index]


def assigned(model: nn.Module) -> None:
    state = copy.deepcopy(model.state_dict())
    model.load_state_dict(state, assign=True)


def longer_sequence(model: nn.Module) -> None:
    model["body"].append(nn.Linear(4, 4))  # type: ignore[index]


def weight_norm(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model["head"])  # type: ignore[index]


def wrapped_body(model: nn.Module) -> None:
    model["body"] = nn.Sequential(model["body"], nn.Linear(4, 4))  # type: ignore[index, operator]


def overwritten_by_a_cast(model: nn.Module) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def another_dictionary(model: nn.Module) -> None:
    vars(model["head"]).update(vars(nn.Linear(4, 2)))  # type: ignore[index]


def a_parameter_in_place_of_none(model: nn.Module) -> None:
    model["head"].bias = None  # type: ignore[index]
    model["head"].bias = nn.Parameter(torch.zeros(2))  # type: ignore[index]


def untied(model: nn.Module) -> None:
    model["body"][1].weight = nn.Parameter(model["body"][0].weight.detach().clone())  # type: ignore[index]


CHANGES: list[Callable[[nn.Module], None]] = [
    new_head,
    new_module,
    new_parameter,
    recreated_weight,
    resized_weight,
    assigned,
    longer_sequence,
    weight_norm,
    wrapped_body,
    overwritten_by_a_cast,
    another_dictionary,
    a_parameter_in_place_of_none,
]


def reordered(model: nn.Module) -> None:
    model["body"] = nn.Sequential(*reversed(model["body"]))  # type: ignore[index, operator, arg-type]


def renamed(model: nn.Module) -> None:
    model["tail"] = model.pop("head")  # type: ignore[operator]


def parametrized(model: nn.Module) -> None:
    """The parameter goes on as `original`, and another module has it."""
    nn.utils.parametrize.register_parametrization(model["head"], "weight", nn.Identity())  # type: ignore[index]


def tied_to_a_newcomer(model: nn.Module) -> None:
    model["twin"] = nn.Linear(4, 4)  # type: ignore[operator]
    model["twin"].weight, model["twin"].bias = model["body"][0].weight, model["body"][0].bias  # type: ignore[index]


def taken_away(model: nn.Module) -> None:
    del model["head"]  # type: ignore[attr-defined]


def moved_to_another_shape(model: nn.Module) -> None:
    model["head"].weight.data = torch.zeros(6, 4)  # type: ignore[index]


HARMLESS: list[Callable[[nn.Module], None]] = [
    reordered,
    renamed,
    parametrized,
    tied_to_a_newcomer,
    taken_away,
    moved_to_another_shape,
]


@pytest.mark.parametrize("change", HARMLESS, ids=lambda change: change.__name__)
def test_a_change_that_brings_no_parameter_goes_on(change: Callable[[nn.Module], None]) -> None:
    model = model_of()
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(0.1))
    set_grads(model)
    clipper.clip_()
    for param in model.parameters():
        param.grad = None
    change(model)
    set_grads(model)
    clipper.clip_()
    norms = torch.stack([param.grad.norm() for param in model.parameters()])  # type: ignore[union-attr]
    assert float(norms.norm()) == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["head", "body"])
def test_a_parameter_that_went_with_its_gradient_does_not_count(name: str) -> None:
    """Nobody zeroes it any more: it would count in every norm from now on."""
    model = model_of()
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(0.1))
    set_grads(model)
    clipper.clip_()
    del model[name]  # type: ignore[attr-defined]
    set_grads(model)
    with pytest.raises(
        dist_clip.LayoutError, match=rf"'{name}\.[\w.]*' is no longer a parameter .*clipper\.refresh\(\)"
    ):
        clipper.clip_()
    clipper.refresh()
    due = sum(param.numel() for param in model.parameters()) ** 0.5
    assert float(clipper.clip_().global_norm) == pytest.approx(due)  # type: ignore[arg-type]


@pytest.mark.report(
    "gke-labs/open-rl#80",
    situation="the norm of the adapter that is active now, where another one steps",
    right="each adapter's own norm, with a clipper for each",
)
def test_adapters_that_take_turns_have_a_norm_each() -> None:
    """Both have gradients when one steps, and which of them requires gradients says nothing about that."""
    adapters = {name: nn.Linear(4, 4, bias=False) for name in "ab"}
    clippers = {name: dist_clip.GradClipper(adapter, dist_clip.GlobalNorm(0.1)) for name, adapter in adapters.items()}
    optimizers = {name: torch.optim.SGD(adapter.parameters(), lr=1.0) for name, adapter in adapters.items()}
    for name, optimizer in optimizers.items():
        clippers[name].attach(optimizer)
    for step in range(1, 4):
        set_grads(adapters["a"], 1.0)
        set_grads(adapters["b"], 100.0)
        adapters["a"].requires_grad_(False)  # b is active
        for name, norm in (("a", 4.0), ("b", 400.0)):
            before = adapters[name].weight.detach().clone()
            optimizers[name].step()
            assert float(clippers[name].last_report.global_norm) == pytest.approx(norm)  # type: ignore[arg-type, union-attr]
            assert float((adapters[name].weight.detach() - before).norm()) == pytest.approx(0.1)
            assert clippers[name].steps == step


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.report(
    "huggingface/peft#1303",
    "huggingface/peft#2759",
    "huggingface/transformers#3532",
    situation="adapters, heads and weights that come after the optimizer or the clipper was made",
    right="clipped, or an error at the first clip that would miss one",
    here="error by name",
)
def test_the_first_clip_that_would_miss_one_says_so(change: Callable[[nn.Module], None], attached: bool) -> None:
    model = model_of()
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = optimizer.step if not attached else lambda: optimizer.step()
    if attached:
        clipper.attach(optimizer)
    clip = step if attached else clipper.clip_
    for _ in range(3):
        set_grads(model)
        clip()
    change(model)
    optimizer.zero_grad()
    for param in model.parameters():
        param.grad = None
    set_grads(model)
    before = clipper.steps
    with pytest.raises(dist_clip.LayoutError, match=r"is another parameter .*clipper\.refresh\(\)"):
        clip()
    assert clipper.steps == before


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.report("huggingface/peft#1303")
def test_refresh_takes_them_in_and_keeps_the_rest(change: Callable[[nn.Module], None]) -> None:
    model = model_of()
    clipper = dist_clip.GradClipper(model, dist_clip.AdaGC(warmup_steps=1))
    for value in (0.01, 0.02, 0.03):
        set_grads(model, value)
        clipper.clip_()
    before = clipper.state_dict()
    shapes = {name: param.shape for name, param in model.named_parameters()}
    change(model)
    clipper.refresh()
    after = clipper.state_dict()
    assert after["step"] == 3
    assert list(clipper.layout.names) == [name for name, _ in model.named_parameters()]
    for name, param in model.named_parameters():
        known = shapes.get(name) == param.shape
        assert after["tensors"][name]["gamma"] == (before["tensors"][name]["gamma"] if known else 0.0)
    set_grads(model, 1.0)
    report = clipper.clip_()
    assert report.num_grads == len(list(model.parameters()))


def test_a_parameter_without_a_gradient_is_not_missed() -> None:
    """A module that is there but not trained: what it has is nobody's yet."""
    model = model_of()
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(0.1))
    set_grads(model)
    clipper.clip_()
    new_module(model)
    for param in model["adapter"].parameters():  # type: ignore[index]
        param.requires_grad_(False)
    clipper.clip_()
    assert clipper.steps == 2


def test_untied_after_construction() -> None:
    model = model_of()
    body = model["body"]  # type: ignore[index]
    body[1].weight = body[0].weight
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(0.1))
    set_grads(model)
    clipper.clip_()
    untied(model)
    set_grads(model)
    with pytest.raises(dist_clip.LayoutError, match=r"'body\.1\.weight'"):
        clipper.clip_()


def test_refresh_with_an_attached_optimizer() -> None:
    model = model_of()
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    clipper.attach(optimizer)
    set_grads(model)
    optimizer.step()
    new_module(model)
    clipper.refresh()
    optimizer.add_param_group({"params": list(model["adapter"].parameters())})  # type: ignore[index]
    before = [param.detach().clone() for param in model.parameters()]
    set_grads(model)
    optimizer.step()
    moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(model.parameters(), before, strict=True)])
    assert float(moved.norm()) == pytest.approx(0.1)
    assert clipper.steps == 2


def test_a_replaced_entry_of_an_attached_optimizers_group() -> None:
    """The same number of parameters, one of them another one."""
    weight, other = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    clipper = dist_clip.GradClipper([("w", weight)], dist_clip.GlobalNorm(0.1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    clipper.attach(optimizer)
    weight.grad = torch.ones(4)
    optimizer.step()
    optimizer.param_groups[0]["params"][0] = other
    other.grad = torch.ones(4)
    with pytest.raises(dist_clip.LayoutError, match="holds a parameter the clipper does not know"):
        optimizer.step()


def test_refresh_needs_modules_and_fails_without_a_change() -> None:
    model = model_of()
    with pytest.raises(TypeError, match="constructed from parameters"):
        dist_clip.GradClipper(model.named_parameters(), dist_clip.GlobalNorm()).refresh()
    clipper = dist_clip.GradClipper(model, dist_clip.AdaGC(warmup_steps=1), exclude=["head.*"])
    set_grads(model)
    clipper.clip_()
    before, layout = str(clipper.state_dict()), clipper.layout
    del model["head"]  # type: ignore[attr-defined]
    with pytest.raises(dist_clip.LayoutError, match="no tensor on any rank matches"):
        clipper.refresh()
    assert clipper.layout is layout
    assert str(clipper.state_dict()) == before


def test_the_watch_sees_no_change_where_there_is_none() -> None:
    model = model_of()
    watch = ParameterWatch(model)
    set_grads(model)
    torch.optim.AdamW(model.parameters()).step()
    model.train().requires_grad_(False).double()
    assert not watch.changed()
