"""dist_clip.torchtitan against stand-ins for the parts of torchtitan 0.3 that it uses, for CI, which has no torchtitan.

The stand-ins have torchtitan's names, signatures and order of calls, and nothing of its work. scripts/test_torchtitan.sh
runs the adapter in torchtitan itself.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dist_clip

INF = math.inf
SPIKES = {3, 6}
RATE = 0.1


@dataclass(kw_only=True, slots=True)
class OptimizersConfig:
    lr: float = RATE


class OptimizersContainer(torch.optim.Optimizer):
    Config = OptimizersConfig

    def __init__(self, config: OptimizersConfig, *, model_parts: list[nn.Module]) -> None:
        self.optimizers = [torch.optim.AdamW(part.parameters(), lr=config.lr) for part in model_parts]
        super().__init__([param for part in model_parts for param in part.parameters()], {})

    def step(self, closure: Any = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """As torchtitan's, with a step of zero gradients and no learning rate if there is no state yet."""
        for optimizer in self.optimizers:
            if not optimizer.state:
                for param in optimizer.param_groups[0]["params"]:
                    param.grad = torch.zeros_like(param)
                rate, optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"], 0.0
                optimizer.step(closure=None)
                optimizer.param_groups[0]["lr"] = rate
                optimizer.zero_grad()
        return {f"state.{i}": optimizer.state_dict() for i, optimizer in enumerate(self.optimizers)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state_dict()
        assert set(state_dict) == {f"state.{i}" for i in range(len(self.optimizers))}
        for i, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict(state_dict[f"state.{i}"])


@dataclass(kw_only=True, slots=True)
class MetricsConfig:
    log_freq: int = 1


class MetricsProcessor:
    Config = MetricsConfig

    def __init__(self, config: MetricsConfig) -> None:
        self.rows: list[dict[str, float]] = []
        self.optimizers: Any = None

    def log(
        self, step: int, loss: float, max_loss: float, grad_norm: float, extra_metrics: dict[str, Any] | None = None
    ) -> None:
        self.rows.append({"grad_norm": grad_norm, **(extra_metrics or {})})


def derive(source: Any, target: Any, **deltas: Any) -> Any:
    names = {name for cls in type(source).__mro__ for name in getattr(cls, "__slots__", ())}
    return target(**{name: getattr(source, name) for name in names}, **deltas)


def clip_grad_norm_(parameters: Any, max_norm: float, **kwargs: Any) -> Tensor:
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm)


@dataclass(kw_only=True, slots=True)
class TrainerConfig:
    optimizer: Any = field(default_factory=OptimizersConfig)
    metrics: Any = field(default_factory=MetricsConfig)
    max_norm: float = INF
    checkpoint: bool = True
    optimizers_cls: type[Any] = OptimizersContainer
    metrics_cls: type[Any] = MetricsProcessor

    @property
    def training(self) -> Any:
        return types.SimpleNamespace(max_norm=self.max_norm)

    def to_dict(self) -> dict[str, Any]:
        return {"max_norm": self.max_norm}


class Trainer:
    Config = TrainerConfig

    def __init__(self, config: Any) -> None:
        torch.manual_seed(0)
        self.config = config
        config.checkpoint = types.SimpleNamespace(enable=config.checkpoint)
        self.parallel_dims = types.SimpleNamespace(pp_enabled=False, get_optional_mesh=lambda name: None)
        self.gradient_accumulation_steps = 1
        self.model_parts = [nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))]
        self.optimizers = config.optimizers_cls(config.optimizer, model_parts=self.model_parts)
        self.metrics_processor = config.metrics_cls(config.metrics)
        self.metrics_processor.optimizers = self.optimizers
        self.checkpointer = types.SimpleNamespace()
        if config.checkpoint.enable:
            self.checkpointer.states = {"optimizer": self.optimizers}

    def forward_backward_step(self, *, input_dict: Any) -> Tensor:
        loss = self.model_parts[0](input_dict).square().mean()
        loss.backward()
        return loss

    def train_step(self, step: int) -> None:
        utils = sys.modules["torchtitan.distributed"].utils
        self.optimizers.zero_grad()
        loss = self.forward_backward_step(input_dict=batch(step))
        params = [param for part in self.model_parts for param in part.parameters()]
        grad_norm = utils.clip_grad_norm_(params, self.config.max_norm, foreach=True, pp_mesh=None, ep_enabled=False)
        self.optimizers.step()
        self.metrics_processor.log(step, loss.item(), loss.item(), float(grad_norm.item()), extra_metrics={"lr": RATE})


def batch(step: int) -> Tensor:
    scale = 30.0 if step in SPIKES else 1.0
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(step)) * scale


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`dist_clip.torchtitan`, imported afresh on the stand-ins."""
    modules = {
        "torchtitan": {},
        "torchtitan.components": {},
        "torchtitan.components.metrics": {"MetricsProcessor": MetricsProcessor},
        "torchtitan.components.optimizer": {"OptimizersContainer": OptimizersContainer},
        "torchtitan.config": {},
        "torchtitan.config.override": {"derive": derive, "override": lambda **kwargs: lambda function: function},
        "torchtitan.distributed": {"utils": types.SimpleNamespace(clip_grad_norm_=clip_grad_norm_)},
        "torchtitan.trainer": {"Trainer": Trainer},
    }
    for name, contents in modules.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "dist_clip.torchtitan", raising=False)
    yield importlib.import_module("dist_clip.torchtitan")
    sys.modules.pop("dist_clip.torchtitan", None)


def trainer_of(adapter: Any, way: str, clip: dict[str, Any], **options: Any) -> Any:
    if way == "trainer":
        return adapter.ClipTrainer(adapter.ClipTrainer.Config(clip=clip, **options))
    config = TrainerConfig(optimizers_cls=adapter.ClippingOptimizers, metrics_cls=adapter.ClipMetrics, **options)
    config.optimizer, config.metrics = adapter.clip(config.optimizer, **clip), adapter.metrics(config.metrics)
    return Trainer(config)


def clipper_of(trainer: Any) -> dist_clip.GradClipper:
    return getattr(trainer, "clipper", None) or trainer.optimizers.clipper


def plain_loop(policy: dist_clip.Policy, guard: dist_clip.Guard | None, steps: int) -> tuple[nn.Module, list[float]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    clipper, norms = dist_clip.GradClipper(model, policy, guard=guard), []
    for step in range(steps):
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        norms.append(float(torch.nn.utils.get_total_norm([param.grad for param in model.parameters()])))
        if not bool(clipper.clip_().skip):
            optimizer.step()
    return model, norms


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, one.parameters(), other.parameters()))


@pytest.mark.parametrize("way", ["override", "trainer"])
@pytest.mark.parametrize("guard", [None, "skipabove max_norm=2"])
def test_it_trains_as_a_plain_loop(adapter: Any, way: str, guard: str | None) -> None:
    trainer = trainer_of(adapter, way, {"policy": "logclip max_norm=0.3", "guard": guard})
    for step in range(8):
        trainer.train_step(step)
    made = None if guard is None else dist_clip.SkipAbove(2.0)
    model, norms = plain_loop(dist_clip.LogClip(max_norm=0.3), made, 8)
    assert same(trainer.model_parts[0], model)
    rows = trainer.metrics_processor.rows
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms)
    assert [row["clip/grad_norm"] for row in rows] == [row["grad_norm"] for row in rows]
    assert [row["clip/skipped"] for row in rows] == [float(bool(guard) and norm > 2) for norm in norms]
    assert any(row["clip/min_scale"] < 1 for row in rows)
    assert all(row["lr"] == RATE for row in rows)
    assert not guard or 0 < sum(row["clip/skipped"] for row in rows) < 8


@pytest.mark.parametrize("way", ["override", "trainer"])
def test_the_native_clip_is_refused(adapter: Any, way: str) -> None:
    def first_step() -> None:
        trainer_of(adapter, way, {"policy": "logclip"}, max_norm=1.0).train_step(0)

    with pytest.raises(
        ValueError, match=r"torchtitan clips too, with --training.max_norm=1.0: .* Set --training.max_n"
    ):
        first_step()


@pytest.mark.parametrize("way", ["override", "trainer"])
def test_a_loop_without_torchtitans_clip_is_clipped_in_the_step(adapter: Any, way: str) -> None:
    trainer = trainer_of(adapter, way, {"policy": "global max_norm=0.1"})
    trainer.forward_backward_step(input_dict=batch(SPIKES.copy().pop()))
    trainer.optimizers.step()
    assert clipper_of(trainer).steps == 1
    assert float(torch.nn.utils.get_total_norm([p.grad for p in trainer.model_parts[0].parameters()])) <= 0.1 + 1e-6


def test_another_models_gradients_are_torchtitans(adapter: Any) -> None:
    trainer_of(adapter, "trainer", {"policy": "logclip"})
    other = nn.Linear(2, 2)
    other(torch.ones(1, 2) * 100).sum().backward()
    norm = sys.modules["torchtitan.distributed"].utils.clip_grad_norm_(other.parameters(), 1.0)
    assert norm > 1
    assert float(torch.nn.utils.get_total_norm([p.grad for p in other.parameters()])) == pytest.approx(1, abs=1e-5)


def test_the_state_lies_in_the_optimizers(adapter: Any) -> None:
    """The step by which torchtitan makes an optimizer's state is not counted."""
    clip = {"policy": {"name": "adagc", "warmup_steps": 4}}
    old, new = trainer_of(adapter, "override", clip), trainer_of(adapter, "override", clip)
    assert old.optimizers.state_dict()["dist_clip"]["step"] == 0
    for step in range(5):
        old.train_step(step)
    new.optimizers.load_state_dict(old.optimizers.state_dict())
    assert clipper_of(new).steps == 5
    assert repr(clipper_of(new).state_dict()) == repr(clipper_of(old).state_dict())


def test_the_state_lies_beside_the_optimizers(adapter: Any) -> None:
    trainer = trainer_of(adapter, "trainer", {"policy": "logclip"})
    assert trainer.checkpointer.states["dist_clip"] is trainer.clipper
    assert "dist_clip" not in trainer.optimizers.state_dict()
    trainer_of(adapter, "trainer", {"policy": "logclip"}, checkpoint=False)  # has no states


def test_a_state_may_be_missing_in_the_first_run(adapter: Any) -> None:
    old = trainer_of(adapter, "override", {"policy": "logclip"})
    without = {key: value for key, value in old.optimizers.state_dict().items() if key != "dist_clip"}
    new = trainer_of(adapter, "override", {"policy": "logclip", "fresh": True})
    assert "dist_clip" not in new.optimizers.state_dict()
    new.optimizers.load_state_dict(without)
    new.train_step(0)
    assert new.optimizers.state_dict()["dist_clip"]["step"] == 1


@pytest.mark.parametrize("which", ["clip", "metrics"])
def test_other_components_are_refused(adapter: Any, which: str) -> None:
    own = {"clip": OptimizersConfig, "metrics": MetricsConfig}[which]
    theirs = type("TheirConfig", (own,), {})
    with pytest.raises(TypeError, match=r"here is a TheirConfig: use dist_clip\.torchtitan\.ClipTrainer"):
        getattr(adapter, which)(theirs())


def test_one_clip_and_not_two(adapter: Any) -> None:
    optimizer = adapter.clip(OptimizersConfig(), policy="logclip")
    with pytest.raises(ValueError, match="ClipTrainer clips already"):
        trainer_of(adapter, "trainer", {}, optimizer=optimizer, optimizers_cls=adapter.ClippingOptimizers)


def test_guards_get_the_loss(adapter: Any) -> None:
    trainer = trainer_of(adapter, "trainer", {"policy": "logclip", "guard": "skipstep window=4"})
    for step in range(2):
        trainer.train_step(step)
    losses = trainer.clipper.state_dict()["guards"]["0"]["model"]["losses"]
    assert (losses[-2:] > 0).all()


def test_the_configuration_is_json(adapter: Any) -> None:
    config = adapter.ClipTrainer.Config(clip={"policy": dist_clip.LogClip()})
    assert "LogClip" in json.dumps(config.to_dict())


def test_without_torchtitan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchtitan.trainer", None)
    monkeypatch.setitem(sys.modules, "torchtitan.components.metrics", None)
    monkeypatch.delitem(sys.modules, "dist_clip.torchtitan", raising=False)
    with pytest.raises(ImportError, match=r"needs torchtitan: pip install 'dist-clip\[torchtitan\]'"):
        importlib.import_module("dist_clip.torchtitan")
