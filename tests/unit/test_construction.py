"""What a clipper is built from: when it is refused, what replaced parameters lead to, and what may be done with it."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import dist_clip


def set_grads(model: nn.Module, value: float) -> None:
    for param in model.parameters():
        param.grad = torch.full_like(param, value)


def test_a_head_that_was_replaced_is_an_error() -> None:
    """Its gradient would not be clipped, and the others would be clipped by the wrong norm."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm())
    model[1] = nn.Linear(3, 5)
    set_grads(model, 10.0)
    with pytest.raises(dist_clip.LayoutError, match=r"1\.weight"):
        clipper.clip_()
    assert model[0].weight.grad.eq(10.0).all()


def test_parameters_that_were_replaced_during_training_are_an_error_at_the_next_empty_clip() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm())
    set_grads(model, 10.0)
    clipper.clip_()
    model.zero_grad()
    assert clipper.clip_().empty  # nothing was replaced: only nothing to do
    model[0] = nn.Linear(3, 3)
    set_grads(model, 10.0)
    with pytest.raises(dist_clip.LayoutError, match=r"0\.weight"):
        clipper.clip_()


def test_a_model_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    with pytest.raises(dist_clip.LayoutError, match=r"(?s)weight.*meta"):
        dist_clip.GradClipper(model, dist_clip.GlobalNorm())


def test_constructed_under_inference_mode() -> None:
    model = nn.Linear(3, 2)
    with torch.inference_mode():
        clipper = dist_clip.GradClipper(model, dist_clip.AdaGC(warmup_steps=1))
    for _ in range(3):
        set_grads(model, 1.0)
        clipper.clip_()
    assert clipper.steps == 3


def test_a_default_device_does_not_matter() -> None:
    model = nn.Linear(300, 200)
    set_grads(model, 1.0)
    clipper = dist_clip.GradClipper(model, dist_clip.AdaGC(warmup_steps=1, gamma_init="median"))
    with torch.device("meta"):
        report = clipper.clip_()
    assert report.global_norm is not None
    assert report.global_norm.item() == pytest.approx(math.sqrt(300 * 200 + 200), rel=1e-6)


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, pickle.dumps], ids=lambda c: c.__name__)
def test_a_clipper_is_neither_copied_nor_pickled(copier: Any) -> None:
    """A copy would clip the gradients of the original's parameters."""
    clipper = dist_clip.GradClipper(nn.Linear(3, 2), dist_clip.GlobalNorm())
    with pytest.raises(TypeError, match="state_dict"):
        copier(clipper)


def test_a_frozen_complex_tensor_is_no_obstacle() -> None:
    model = nn.ModuleDict(
        {"odd": nn.Linear(2, 2, dtype=torch.complex64).requires_grad_(False), "head": nn.Linear(2, 2)}
    )
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm())
    set_grads(model["head"], 10.0)
    assert clipper.clip_().num_grads == 2


def test_a_group_for_everything_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'\*'"):
        dist_clip.GradClipper(nn.Linear(2, 2), dist_clip.AdaGC(), overrides={"*": dist_clip.GlobalNorm()})


@pytest.mark.parametrize("value", [10.0, "median", dist_clip.MedianGuard, [dist_clip.SkipAbove(1.0), None]], ids=str)
def test_a_guard_of_another_type(value: Any) -> None:
    with pytest.raises(TypeError, match="guard must be a dist_clip guard such as") as error:
        dist_clip.GradClipper(nn.Linear(2, 2), dist_clip.GlobalNorm(), guard=value)
    assert str(value[-1] if isinstance(value, list) else value) in str(error.value)


@pytest.mark.parametrize(
    "policy", [dist_clip.GlobalNorm(), dist_clip.AdaGC(warmup_steps=2), dist_clip.ZClip()], ids=str
)
def test_a_step_above_the_threshold_is_left_to_be_skipped(policy: Any) -> None:
    model = nn.Linear(3, 2)
    clipper = dist_clip.GradClipper(model, policy, guard=dist_clip.SkipAbove(20.0))
    before = clipper.state_dict()
    for value, skipped in ((5.0, False), (10.0, True), (math.nan, False), (5.0, False), (-1e4, True)):
        set_grads(model, value)
        if skipped:
            before = clipper.state_dict()
        report = clipper.clip_()
        assert bool(report.skip) is skipped, value
        assert bool(report.nonfinite) is math.isnan(value)
        assert report.global_norm is not None
        if skipped:
            assert report.global_norm.item() == pytest.approx(abs(value) * math.sqrt(8), rel=1e-6)
            assert model.weight.grad.eq(value).all()
            assert str(clipper.state_dict()) == str(before)
            assert "to be skipped" in str(report)


# ---- process groups and meshes -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("world_of_one")
def test_groups_may_be_meshes_of_one_dimension() -> None:
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("pp", "dp"))
    model = nn.Linear(3, 2)
    set_grads(model, 1.0)
    clipper = dist_clip.GradClipper(model, dist_clip.GlobalNorm(), pp_group=mesh["pp"], process_group=mesh["dp"])
    assert float(clipper.clip_().global_norm) == pytest.approx(8**0.5)  # type: ignore[arg-type]
    assert float(dist_clip.clip_grad_norm_(model.parameters(), 1.0, pp_group=mesh["pp"])) == pytest.approx(1.0)
    for argument in ("pp_group", "process_group"):
        with pytest.raises(
            dist_clip.LayoutError, match=rf"{argument}= must be .* a mesh of 2 \(pp, dp\).*mesh\['pp'\]"
        ):
            dist_clip.GradClipper(model, dist_clip.GlobalNorm(), **{argument: mesh})  # type: ignore[arg-type]


def test_repr_says_what_it_clips_and_how_without_reading_the_device() -> None:
    clipper = dist_clip.GradClipper(nn.Linear(2, 2), dist_clip.GlobalNorm(), overrides={"b*": dist_clip.ZClip()})
    shown = repr(clipper)
    assert shown.startswith("GradClipper({'b*': ZClip(alpha=0.97")
    assert shown.endswith(
        "'*': GlobalNorm(max_norm=1.0)}, 2 tensors, 0 clips, 0 collectives for tensor norms, torch kernels)"
    )
