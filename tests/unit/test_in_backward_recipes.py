"""The recipes of docs/in-backward.md, run as they stand there, train as clipping after backward does, bit for bit.

torchtune, torchao and kohya's sd-scripts are not installed. Their part is written out here as they publish it, which
the tests' names say.
"""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dist_clip
from launch.in_backward import Config, StepInBackward, train
from launch.model import ModelConfig
from launch.optim import OptimConfig
from scripts.in_backward_memory import DATA, with_tables
from tests.unit.test_in_backward import Model, flat

PAGE = Path(__file__).parents[2] / "docs" / "in-backward.md"
STEPS = 12


def recipe(heading: str) -> str:
    """Return the first Python block below a heading of the page that begins so."""
    found = re.search(
        rf"^#+ {re.escape(heading)}.*?^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    assert found, heading
    return found[1]


def batches() -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.randint(12, (2, 5), generator=generator), step) for step in range(STEPS)]


def started(policy: dist_clip.Policy) -> dict[str, Any]:
    """What the recipes begin with. The policy takes the place of LogClip(), whose warm-up is longer than these runs."""
    model = Model()
    short = types.SimpleNamespace(**{**vars(dist_clip), "LogClip": lambda **_: policy})
    torch.manual_seed(7)
    return {"model": model, "loss_of": lambda batch: model(*batch), "torch": torch, "short": short}


def run(parts: dict[str, Any], *headings: str) -> None:
    for heading in headings:
        exec(recipe(heading).replace("import dist_clip", "dist_clip = short"), parts)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


def after_backward(policy: dist_clip.Policy, optimizers_of: Callable[[nn.Module], list[torch.optim.Optimizer]]) -> Any:
    """The same training in the usual order: the model's and the clipper's states."""
    parts = started(policy)
    model, clipper = parts["model"], dist_clip.GradClipper(parts["model"], policy)
    optimizers = optimizers_of(model)
    for batch in batches():
        parts["loss_of"](batch).backward()
        clipper.clip_()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    return flat([model.state_dict(), clipper.state_dict()])


def assert_same(parts: dict[str, Any], want: Any) -> None:
    got = flat([parts["model"].state_dict(), parts["clipper"].state_dict()])
    torch.testing.assert_close(got, want, rtol=0, atol=0)


POLICIES = [dist_clip.LogClip(warmup_steps=4), dist_clip.AdaGC(warmup_steps=4, gamma_init="median"), dist_clip.AGC()]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_torchtune_by_contract(policy: dist_clip.Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    def register_optim_in_bwd_hooks(model: nn.Module, optim_dict: dict[Tensor, torch.optim.Optimizer]) -> None:
        """torchtune 0.6.1, torchtune/training/memory.py."""

        def optim_step(param: Tensor) -> None:
            optim_dict[param].step()
            optim_dict[param].zero_grad()

        for p in model.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(optim_step)

    module = types.SimpleNamespace(register_optim_in_bwd_hooks=register_optim_in_bwd_hooks)
    monkeypatch.setitem(sys.modules, "torchtune.training", module)
    monkeypatch.setitem(sys.modules, "torchtune", types.SimpleNamespace(training=module))
    parts = started(policy)
    run(parts, "The warm-up", "torchtune")
    for batch in batches():
        assert parts["train_step"](batch).num_grads > 0
        assert all(param.grad is None for param in parts["model"].parameters())
    assert_same(
        parts, after_backward(policy, lambda model: [torch.optim.AdamW([p], lr=1e-2) for p in trainable(model)])
    )


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_kohya_by_contract(policy: dist_clip.Policy) -> None:
    class Fused(torch.optim.Adagrad):
        """What sd-scripts patch into Adafactor: a step of one parameter of a group."""

        def step_param(self, p: Tensor, group: dict[str, Any]) -> None:
            if p.grad is None:
                return
            groups, self.param_groups = self.param_groups, [{**group, "params": [p]}]
            self.step()
            self.param_groups = groups

    parts = started(policy)
    parts["optimizer"] = Fused(trainable(parts["model"]), lr=1e-2)
    run(parts, "The warm-up", "kohya")
    for batch in batches():
        parts["train_step"](batch)
        assert all(param.grad is None for param in parts["model"].parameters())
    assert_same(parts, after_backward(policy, lambda model: [torch.optim.Adagrad(trainable(model), lr=1e-2)]))


class CPUOffloadOptimizer:
    """torchao 0.18.0, torchao/optim/cpu_offload.py, without its streams and events, for tensors that are on the CPU."""

    def __init__(
        self,
        params: Any,
        optimizer_class: Any,
        *,
        offload_gradients: bool = False,
        minimal_size: int = 16,
        **kwargs: Any,
    ) -> None:
        self.param_d2h_map: dict[Tensor, Tensor] = {}
        self.optim_dict: dict[Tensor, torch.optim.Optimizer] = {}
        self.queue: dict[Tensor, None] = {}
        retained = []

        def backward_hook(p_device: Tensor) -> None:
            if p_device.grad is not None:
                grad = self.param_d2h_map[p_device].grad
                assert grad is not None
                grad.copy_(p_device.grad)
                self.queue[p_device] = None
                if offload_gradients:
                    p_device.grad = None

        for p_device in params:
            if not p_device.requires_grad:
                continue
            if p_device.numel() < minimal_size:
                retained.append(p_device)
                continue
            p_host = p_device.detach().clone()
            p_host.grad = torch.empty_like(p_host)
            self.param_d2h_map[p_device] = p_host
            p_device.register_post_accumulate_grad_hook(backward_hook)
            self.optim_dict[p_device] = optimizer_class([{"params": p_host}], **kwargs)
        self.d_opt = optimizer_class(retained, **kwargs)

    @torch.no_grad()
    def step(self) -> None:
        self.d_opt.step()
        for p_device in self.queue:
            self.optim_dict[p_device].step()
            p_device.copy_(self.param_d2h_map[p_device])
        self.queue.clear()

    def zero_grad(self) -> None:
        for p_device in self.param_d2h_map:
            p_device.grad = None
        self.d_opt.zero_grad()


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_torchao_by_contract(policy: dist_clip.Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.SimpleNamespace(CPUOffloadOptimizer=CPUOffloadOptimizer)
    monkeypatch.setitem(sys.modules, "torchao.optim", module)
    monkeypatch.setitem(sys.modules, "torchao", types.SimpleNamespace(optim=module))
    parts = started(policy)
    run(parts, "The warm-up", "torchao")
    assert 0 < len(parts["optimizer"].optim_dict) < len(trainable(parts["model"]))
    for batch in batches():
        parts["offloaded_step"](batch)
    assert_same(
        parts, after_backward(policy, lambda model: [torch.optim.AdamW([p], lr=1e-2) for p in trainable(model)])
    )


@pytest.mark.pages
def test_the_page_has_the_tables_of_its_data() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_tables(page, json.loads(DATA.read_text(encoding="utf-8"))) == page


# ---- launch/in_backward.py ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", ["logclip warmup_steps=4", "adagc warmup_steps=4", "global max_norm=0.5"])
def test_the_program_trains_as_in_the_usual_order(clip: str) -> None:
    """Losses, weights, and the report of each step; under bf16 autocast as well."""
    results = []
    for order in ("after", "in-backward"):
        lines: list[str] = []
        cfg = Config(
            model=ModelConfig(dim=32, layers=2, heads=2, seq_len=32, zero_init=True),
            optim=OptimConfig(steps=12, lr_warmup_steps=2, bf16=clip.startswith("adagc")),
            clip=clip,
            order=order,  # type: ignore[arg-type]
            buckets=3,
        )
        result = train(cfg, log=lines.append)
        results.append(
            (result["losses"], flat(result["model"].state_dict()), flat(result["clipper"].state_dict()), lines)
        )
    torch.testing.assert_close(results[1][:3], results[0][:3], rtol=0, atol=0)
    assert results[0][3] == results[1][3]
    assert len(results[0][3]) == 2


def test_no_more_than_a_bucket_of_gradients_is_alive() -> None:
    model = Model()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    stepper = StepInBackward(optimizer, dist_clip.GradClipper(model, dist_clip.GlobalNorm(0.5)), buckets=4)
    alive: list[int] = []
    counting = [
        param.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.numel() for p in trainable(model) if p.grad is not None))
        )
        for param in trainable(model)
    ]
    for batch in batches():
        stepper.step(lambda batch=batch: backward(model, batch))  # type: ignore[misc]
    assert 0 < max(alive) < sum(p.numel() for p in trainable(model)) / 2
    for handle in (stepper, *counting):
        handle.remove()
    assert not any(param._post_accumulate_grad_hooks for param in trainable(model))


def backward(model: Callable[..., Tensor], batch: Any) -> Tensor:
    loss = model(*batch)
    loss.backward()
    return loss.detach()


def test_a_weight_in_two_reentrant_checkpoints_is_found_before_anything_moved() -> None:
    layer = nn.Linear(3, 3)
    before = [param.detach().clone() for param in layer.parameters()]
    clipper = dist_clip.GradClipper(layer, dist_clip.AGC())
    stepper = StepInBackward(torch.optim.SGD(layer.parameters(), lr=1.0), clipper, buckets=2)

    def twice() -> Tensor:
        x = torch.ones(2, 3, requires_grad=True)
        for _ in range(2):
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=True)
        loss = x.sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="was measured already in this step: its gradient came in parts"):
        stepper.step(twice)
    torch.testing.assert_close([param.detach() for param in layer.parameters()], before, rtol=0, atol=0)


def test_an_optimizer_that_writes_to_its_param_groups_is_refused() -> None:
    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                group["k"] = group.get("k", 0) + 1
            super().step()

    layer = nn.Linear(3, 3)
    clipper = dist_clip.GradClipper(layer, dist_clip.AGC())
    stepper = StepInBackward(Counting(layer.parameters(), lr=0.1), clipper)
    with pytest.raises(RuntimeError, match=r"Counting writes \['k'\] to its param_groups"):
        stepper.step(lambda: backward(lambda x: layer(x).sum(), (torch.ones(1, 3),)))


def test_what_the_program_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="--accumulate: the gradient of a micro-batch is not final"):
        Config(optim=OptimConfig(accumulate=2))
    with pytest.raises(ValueError, match="--optimizer lion counts its steps"):
        Config(optim=OptimConfig(optimizer="lion"))
    with pytest.raises(ValueError, match="--buckets must be at least 1"):
        Config(buckets=0)
