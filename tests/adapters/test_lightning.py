"""dist_clip.lightning against the real Lightning: the Trainer's runs equal plain loops on the same batches.

The oracle is a loop of plain torch with `GradClipper.clip_` before `optimizer.step()`. In a single process weights,
moments and scales are the same bit for bit; so are they under DDP and FSDP2 beside a plain DDP or FSDP2 loop. A resumed
run is compared with an uninterrupted one, bit for bit, from before the end of the warm-up and from after it.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import dist_clip
from tests.adapters.comparing import assert_same, snapshot
from tests.adapters.docs import first_code_block
from tests.harness import pool

pl = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import BaseFinetuning  # noqa: E402
from lightning.pytorch.plugins.environments import ClusterEnvironment  # noqa: E402
from lightning.pytorch.plugins.precision import MixedPrecision  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy  # noqa: E402

from dist_clip.lightning import ClipCallback, ZClipLightningCallback  # noqa: E402

WARMUP = 4
EPOCH = 3
"""Steps an epoch: checkpoints are made at the ends of epochs, where Lightning's replay of a DataLoader does not matter."""


def policy() -> dist_clip.Policy:
    return dist_clip.AdaGC(gamma_init="median", warmup_steps=WARMUP)


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


def batches(steps: int, ranks: int = 1) -> list[tuple[Tensor, Tensor]]:
    """`steps` batches of 4 rows a rank, whose scale differs, so that some are clipped."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(steps, 4 * ranks, 4, generator=generator) * torch.rand(steps, 1, 1, generator=generator) * 4
    return [(each, each[:, :2].cos() * each[:, 2:]) for each in rows]


def loss_of(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (net(batch[0]) - batch[1]).square().mean()


def lay_out(kind: str, net: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the network by FSDP2, or by tensor parallelism."""
    if kind == "fsdp2":
        for layer in (net[0], net[2], net):  # type: ignore[index]
            fully_shard(layer, mesh=mesh)
    elif kind == "tp":
        parallelize_module(net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
    """The network as a LightningModule; `kind` says how `configure_model` lays it out, if it does."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.net, self._kind = make_net(), kind

    def configure_model(self) -> None:
        if self._kind in ("fsdp2", "tp") and not isinstance(self.net[0].weight, DTensor):
            lay_out(
                self._kind, self.net, self.device_mesh["data_parallel" if self._kind == "fsdp2" else "tensor_parallel"]
            )

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return loss_of(self.net, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Record(pl.Callback):  # type: ignore[misc, name-defined]
    """What the callback before it did in each step, and what was logged."""

    def __init__(self, clip: ClipCallback) -> None:
        self.clip = clip
        self.scales: list[Tensor] = []
        self.logged: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.scales.append(self.clip.clippers[0].last_report.scales.clone())

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.logged.append({key: float(value) for key, value in trainer.logged_metrics.items()})


def trainer_of(callbacks: list[Any], epochs: int = 1, **options: Any) -> Any:
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "use_distributed_sampler": False,
    }
    return pl.Trainer(max_epochs=epochs, callbacks=callbacks, **{**settings, **options})


def loader_of(data: list[tuple[Tensor, Tensor]], rank: int = 0) -> DataLoader[Any]:
    rows = slice(4 * rank, 4 * rank + 4)
    xs, ys = torch.cat([x[rows] for x, _ in data]), torch.cat([y[rows] for _, y in data])
    return DataLoader(TensorDataset(xs, ys), batch_size=4)


def fit(module: Any, callback: ClipCallback, data: Any, **options: Any) -> tuple[dict[str, Tensor], Record, Any]:
    record = Record(callback)
    trainer = trainer_of([callback, record], **options)
    trainer.fit(module, loader_of(data))
    return snapshot(module.net, module.optimizers().optimizer), record, trainer


def plain(data: Any, clip: Callable[[nn.Module], dist_clip.GradClipper], accumulate: int = 1) -> Any:
    """The same training by hand: what `fit` returns, and the clipper."""
    net = make_net()
    optimizer, clipper = torch.optim.AdamW(net.parameters(), lr=1e-2), clip(net)
    scales = []
    for first in range(0, len(data), accumulate):
        optimizer.zero_grad()
        for batch in data[first : first + accumulate]:
            (loss_of(net, batch) / accumulate).backward()
        report = clipper.clip_()
        scales.append(report.scales.clone())
        if not bool(report.skip):
            optimizer.step()
    return snapshot(net, optimizer), scales, clipper


# ------------------------------------------------------------------------------------------------------ a single process


@pytest.mark.parametrize("accumulate", [1, 3])
def test_equals_a_plain_loop(accumulate: int) -> None:
    data = batches(12)
    ours, record, _ = fit(Module(), ClipCallback(policy()), data, accumulate_grad_batches=accumulate)
    theirs, scales, clipper = plain(data, lambda net: dist_clip.GradClipper(net, policy()), accumulate)
    assert_same(ours, theirs)
    assert_same(record.scales, scales)
    assert len(scales) == 12 // accumulate
    assert record.clip.clippers[0].steps == clipper.steps == 12 // accumulate
    assert accumulate > 1 or any(bool((each < 1).any()) for each in scales), "nothing was clipped"


def test_a_policy_and_guard_by_name_and_none_at_all() -> None:
    data = batches(2)
    _, record, _ = fit(Module(), ClipCallback("logclip ratio=3", {"name": "skipabove", "max_norm": 1e9}), data)
    clipper = record.clip.clippers[0]
    assert clipper.policy == dist_clip.LogClip(ratio=3.0)
    assert clipper.may_skip
    _, record, _ = fit(Module(), ClipCallback(), data)
    assert record.clip.clippers[0].policy == dist_clip.recommended()["policy"]


def test_what_is_logged() -> None:
    data = batches(3)
    _, record, _ = fit(Module(), ClipCallback(dist_clip.GlobalNorm(0.1)), data)
    net, norms = make_net(), []
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for batch in data:
        optimizer.zero_grad()
        loss_of(net, batch).backward()
        norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), 0.1)))
        optimizer.step()
    for logged, norm in zip(record.logged, norms, strict=True):
        assert logged["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert logged["clip/grad_norm"] == logged["grad_norm"]
        assert logged["clip/grad_norm_after"] == pytest.approx(0.1, rel=1e-4)
        assert logged["clip/fraction"] == 1
        assert logged["clip/min_scale"] == pytest.approx(0.1 / norm, rel=1e-4)
        assert logged["clip/skipped"] == logged["clip/nonfinite"] == 0
    _, record, _ = fit(Module(), ClipCallback(dist_clip.GlobalNorm(0.1), log=False), data)
    assert record.logged == [{}, {}, {}]


@pytest.mark.parametrize("saved_at", [3, 6], ids=["in the warm-up", "after it"])
@pytest.mark.parametrize("guard", [None, dist_clip.MedianGuard()], ids=["no guard", "guard"])
def test_resume_equals_the_uninterrupted_run(tmp_path: Path, saved_at: int, guard: Any) -> None:
    data = batches(EPOCH)
    whole, _, trainer = fit(Module(), ClipCallback(policy(), guard), data, epochs=4)
    final = trainer.callbacks[0].state_dict()
    *_, trainer = fit(Module(), ClipCallback(policy(), guard), data, epochs=saved_at // EPOCH)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    module, callback = Module(), ClipCallback(policy(), guard)
    trainer = trainer_of([callback], epochs=4)
    trainer.fit(module, loader_of(data), ckpt_path=tmp_path / "saved.ckpt", weights_only=True)
    assert_same(snapshot(module.net, module.optimizers().optimizer), whole)
    assert_same(callback.state_dict(), final)
    assert callback.clippers[0].steps == 4 * EPOCH


def test_a_checkpoint_without_the_clippers_state_is_warned_of(tmp_path: Path) -> None:
    data = batches(EPOCH)
    trainer = trainer_of([])
    trainer.fit(Module(), loader_of(data))
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    trainer = trainer_of([ClipCallback(policy())], epochs=2)
    with pytest.warns(UserWarning, match=r"has taken 3 steps.*no callbacks\['dist_clip'\]"):
        trainer.fit(Module(), loader_of(data), ckpt_path=tmp_path / "saved.ckpt")


def test_state_that_waits_is_saved_again() -> None:
    """A checkpoint that is loaded and saved without training keeps the state."""
    callback = ClipCallback(policy())
    assert callback.state_dict() == {}
    fit(Module(), callback, batches(3))
    other = ClipCallback(policy())
    other.load_state_dict(callback.state_dict())
    assert_same(other.state_dict(), callback.state_dict())


@contextlib.contextmanager
def gradients_at(module: Any, step: int, value: float) -> Iterator[None]:
    """Multiply the first layer's gradient by `value` in that step."""
    count = [0]

    def hook(grad: Tensor) -> Tensor:
        count[0] += 1
        return grad * value if count[0] == step else grad

    handle = module.net[0].weight.register_hook(hook)
    yield
    handle.remove()


class Steps(pl.Callback):  # type: ignore[misc, name-defined]
    """Snapshots after each batch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen.append(snapshot(pl_module.net, pl_module.optimizers().optimizer))


@pytest.mark.parametrize("value", [1e6, float("nan")])
@pytest.mark.parametrize("own_step", [False, True], ids=["torch's AdamW", "an optimizer that steps without gradients"])
def test_a_skipped_step_is_not_taken(value: float, own_step: bool) -> None:
    class Counting(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            result = super().step(closure)
            for group in self.param_groups:
                for param in group["params"]:
                    param.data.mul_(0.99)  # as schedule-free optimizers and weight averages move weights
            return result

    class Own(Module):
        def configure_optimizers(self) -> Any:
            optimizer = (Counting if own_step else torch.optim.AdamW)(self.parameters(), lr=1e-2)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    module, steps = Own(), Steps()
    callback = ClipCallback(dist_clip.GlobalNorm(1.0), dist_clip.SkipAbove(1e4), nonfinite="skip")
    record = Record(callback)
    trainer = trainer_of([callback, record, steps])
    with gradients_at(module, 3, value):
        trainer.fit(module, loader_of(batches(5)))
    assert_same(steps.seen[2], steps.seen[1])
    assert steps.seen[2]["0.weight.step"] == 2
    assert steps.seen[4]["0.weight.step"] == 4
    assert not torch.equal(steps.seen[3]["0.weight"], steps.seen[2]["0.weight"])
    assert [logged["clip/skipped"] for logged in record.logged] == [0, 0, 1, 0, 0]
    assert callback.clippers[0].steps == 4
    assert len(record.scales) == 5, "other callbacks' hooks must run at a skipped step too"
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 5, "schedulers go on, as the page says"


@pytest.mark.parametrize("scaled", [False, True], ids=["fp32", "16-mixed by contract"])
def test_the_loss_that_a_guard_sees(scaled: bool) -> None:
    """Not what Lightning divides by the number of micro-batches, nor what a GradScaler multiplies."""
    data = batches(6)
    seen: list[float] = []
    callback = ClipCallback(dist_clip.GlobalNorm(1.0), dist_clip.SkipStep())

    class Spy(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_start(self, *_: Any) -> None:
            observe = callback.clippers[0].observe_loss

            def spy(loss: Tensor) -> None:
                seen.append(loss.item())
                observe(loss)

            callback.clippers[0].observe_loss = spy  # type: ignore[method-assign]

    plugins = [Bf16Autocast()] if scaled else None
    trainer_of([callback, Spy()], accumulate_grad_batches=2, plugins=plugins).fit(Module(), loader_of(data))
    expected = [loss_of(make_net(), batch).item() for batch in data[:2]]
    assert seen[:2] == pytest.approx(expected, rel=0.02 if scaled else 1e-6)
    assert len(seen) == 6


# ----------------------------------------------------------------------------------------------------- several optimizers


class Gan(pl.LightningModule):  # type: ignore[misc, name-defined]
    """A generator and a discriminator, whose backward also leaves gradients in the other's parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.gen, self.dis = nn.Linear(4, 4), nn.Linear(4, 1)

    def losses(self, x: Tensor) -> list[Callable[[], Tensor]]:
        return [
            lambda: -self.dis(self.gen(x)).mean(),
            lambda: self.dis(self.gen(x)).square().mean() - self.dis(x).mean(),
        ]

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        for optimizer, loss in zip(self.optimizers(), self.losses(batch[0]), strict=True):
            optimizer.zero_grad()
            self.manual_backward(loss())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(each.parameters(), lr=1e-2) for each in (self.gen, self.dis)]


def test_the_optimizers_of_a_gan_have_a_clipper_each() -> None:
    data, ours, theirs = batches(8), Gan(), Gan()
    callback = ClipCallback(policy())
    trainer = trainer_of([callback])
    trainer.fit(ours, loader_of(data))
    optimizers = theirs.configure_optimizers()
    clippers = [dist_clip.GradClipper(each, policy()) for each in (theirs.gen, theirs.dis)]
    for x, _ in data:
        for optimizer, clipper, loss in zip(optimizers, clippers, theirs.losses(x), strict=True):
            optimizer.zero_grad()
            loss().backward()
            clipper.clip_()
            optimizer.step()
    assert_same(dict(ours.named_parameters()), dict(theirs.named_parameters()))
    assert [clipper.steps for clipper in callback.clippers] == [8, 8]
    assert callback.clippers[0].layout.names == ("gen.weight", "gen.bias")
    assert {"grad_norm/0", "clip/fraction/1"} <= set(trainer.logged_metrics)
    one = ClipCallback(policy())
    one.load_state_dict(callback.state_dict())
    with pytest.raises(ValueError, match="the state of 2 clippers, and here are 1"):
        trainer_of([one]).fit(Module(), loader_of(data))


class Two(Module):
    """Two optimizers that step after one backward, as Muon and AdamW do."""

    order = (0, 1)

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:  # type: ignore[override]
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss_of(self.net, batch))
        for i in self.order:
            optimizers[i].step()

    def configure_optimizers(self) -> Any:
        weights = [param for param in self.net.parameters() if param.ndim > 1]
        biases = [param for param in self.net.parameters() if param.ndim == 1]
        return [torch.optim.SGD(weights, lr=1e-2, momentum=0.9), torch.optim.AdamW(biases, lr=1e-2)]


def test_optimizers_that_step_together_share_one_clip() -> None:
    data, ours, theirs = batches(6), Two(), Two()
    callback = ClipCallback(dist_clip.GlobalNorm(0.5), dist_clip.SkipAbove(1e4), together=True)
    trainer = trainer_of([callback])
    with gradients_at(ours, 3, 1e9):
        trainer.fit(ours, loader_of(data))
    optimizers = theirs.configure_optimizers()
    for step, batch in enumerate(data, 1):
        theirs.zero_grad()
        loss_of(theirs.net, batch).backward()
        if step != 3:
            nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
            for optimizer in optimizers:
                optimizer.step()
    torch.testing.assert_close(dict(ours.named_parameters()), dict(theirs.named_parameters()))
    assert callback.clippers[0].steps == 5
    assert "grad_norm" in trainer.logged_metrics


def test_together_needs_one_backward() -> None:
    with pytest.raises(RuntimeError, match="together=True clips the gradients of all optimizers before the first"):
        trainer_of([ClipCallback(dist_clip.GlobalNorm(0.5), together=True)]).fit(Gan(), loader_of(batches(2)))


# ------------------------------------------------------------------------------------------------------ zclip's callback


@pytest.mark.parametrize("settings", [{}, {"mode": "percentile", "z_thresh": 1.5, "max_grad_norm": None}])
def test_a_drop_in_for_zclip_s_callback(settings: dict[str, Any]) -> None:
    """The zclip 1.0.0 package measures the norm in fp32 on the host: equal up to rounding."""
    zclip = pytest.importorskip("zclip")
    settings = {"warmup_steps": 5, **settings}
    data, trained = batches(30), []
    for kind in (zclip.ZClipLightningCallback, ZClipLightningCallback):
        module = Module()
        trainer_of([kind(**settings)]).fit(module, loader_of(data))
        trained.append(dict(module.named_parameters()))
    unclipped = Module()
    trainer_of([]).fit(unclipped, loader_of(data))
    theirs, ours = trained
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(ours, dict(unclipped.named_parameters()), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------- refusals, and odd situations


def test_the_trainer_s_own_clip_is_refused() -> None:
    with pytest.raises(ValueError, match="gradient_clip_val"):
        trainer_of([ClipCallback(policy())], gradient_clip_val=1.0).fit(Module(), loader_of(batches(2)))
    trainer_of([ClipCallback(policy())], gradient_clip_val=0).fit(Module(), loader_of(batches(2)))  # off


def test_the_extra_is_named_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "dist_clip.lightning")
    with pytest.raises(ImportError, match=r"pip install 'dist-clip\[lightning\]'"):
        importlib.import_module("dist_clip.lightning")


def test_a_hook_that_may_clip_is_warned_of() -> None:
    class Own(Module):
        def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
            pass

    with pytest.warns(UserWarning, match=r"Own.configure_gradient_clipping runs after ClipCallback has clipped"):
        trainer_of([ClipCallback(policy())]).fit(Own(), loader_of(batches(2)))


def test_deepspeed_is_refused_by_name() -> None:
    """By contract: DeepSpeed is not installed here."""

    class DeepSpeedStrategy(SingleDeviceStrategy):
        pass

    with pytest.raises(TypeError, match="DeepSpeedStrategy keeps gradients in buffers of its own"):
        trainer_of([ClipCallback(policy())], strategy=DeepSpeedStrategy("cpu"), devices="auto").fit(
            Module(), loader_of(batches(2))
        )


def test_lbfgs_is_refused() -> None:
    class Own(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(RuntimeError, match="LBFGS evaluates its closure several times in a step"):
        trainer_of([ClipCallback(policy())]).fit(Own(), loader_of(batches(2)))


def test_a_parameter_outside_of_the_module_is_refused() -> None:
    class Own(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([*self.parameters(), nn.Parameter(torch.zeros(3))])

    with pytest.raises(dist_clip.LayoutError, match="AdamW holds a parameter of shape"):
        trainer_of([ClipCallback(policy())]).fit(Own(), loader_of(batches(2)))


@pytest.mark.parametrize("by_hand", [False, True], ids=["BaseFinetuning", "by hand"])
def test_layers_that_are_unfrozen_later_are_clipped(by_hand: bool) -> None:
    """Lightning's BaseFinetuning adds a parameter group in the middle of the training; others set requires_grad."""

    class Unfreeze(BaseFinetuning):  # type: ignore[misc]
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.net[0])

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1 and by_hand:
                pl_module.net[0].requires_grad_(True)
            elif epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, train_bn=False)

    class Own(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([param for param in self.parameters() if by_hand or param.requires_grad], lr=1e-2)

    callback, levels = ClipCallback(dist_clip.AdaGC(gamma_init="median", warmup_steps=10)), []

    class Levels(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_epoch_end(self, *_: Any) -> None:
            levels.append(callback.clippers[0].state_dict()["tensors"])

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(tensor|state).*", category=UserWarning)  # the library's own
        trainer_of([callback, Unfreeze(), Levels()], epochs=2).fit(Own(), loader_of(batches(EPOCH)))
    assert callback.clippers[0].steps == 2 * EPOCH
    assert by_hand or "net.0.weight" not in levels[0]
    assert levels[1]["net.0.weight"]["gamma"] > 0
    before, after = (each["net.2.weight"]["history"] for each in levels)
    assert after[:EPOCH] == before[:EPOCH], "the state of the other tensors must stay"
    assert all(norm > 0 for norm in after[: 2 * EPOCH])


def test_a_second_fit_starts_afresh_as_its_optimizer_does() -> None:
    data, module, callback = batches(EPOCH), Module(), ClipCallback(policy())
    fit(module, callback, data)
    optimizer = module.optimizers().optimizer
    fit(module, callback, data)
    assert callback.clippers[0].steps == EPOCH
    assert "step" not in vars(optimizer), "the first fit's optimizer has its own step back"


class Bf16Autocast(MixedPrecision):  # type: ignore[misc]
    """Lightning's plugin of 16-mixed, but for the autocast, which CPUs have in bf16 only."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))

    def autocast_context_manager(self) -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16)


def test_16_mixed_by_contract_with_a_gradscaler_on_the_cpu() -> None:
    """Lightning turns 16-mixed into bf16-mixed on CPUs; its plugin with a CPU GradScaler has the same order of calls."""
    module, steps, plugin = Module(), Steps(), Bf16Autocast()
    callback = ClipCallback(dist_clip.GlobalNorm(0.5), [dist_clip.SkipAbove(1e4), dist_clip.SkipStep()])
    record = Record(callback)
    trainer = trainer_of([callback, record, steps], plugins=[plugin])
    with gradients_at(module, 3, float("inf")):
        trainer.fit(module, loader_of(batches(5)))
    assert_same(steps.seen[2], steps.seen[1])
    assert [logged["clip/skipped"] for logged in record.logged] == [0, 0, 1, 0, 0]
    assert plugin.scaler.get_scale() == 512.0
    assert steps.seen[4]["0.weight.step"] == 4
    assert all(logged["grad_norm"] < 100 for i, logged in enumerate(record.logged) if i != 2), "a scaled norm"


def test_fused_optimizers_in_16_mixed_are_an_error_by_contract() -> None:
    class Own(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), fused=True)

    with pytest.raises(RuntimeError, match="still multiplied by the GradScaler's scale"):
        trainer_of([ClipCallback(policy())], plugins=[Bf16Autocast()]).fit(Own(), loader_of(batches(2)))


def test_the_page_s_five_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"module": Module(), "loader": loader_of(batches(EPOCH))}
    exec(first_code_block("lightning.md"), names)
    trainer = names["trainer"]
    assert {"grad_norm", "clip/fraction"} <= set(trainer.logged_metrics)
    (saved,) = tmp_path.rglob("*.ckpt")
    state = torch.load(saved, weights_only=True)["callbacks"]["dist_clip"]["clippers"][0]
    assert state["step"] == 2 * EPOCH


# ------------------------------------------------------------------------------------------------------------- two ranks


class Here(ClusterEnvironment):  # type: ignore[misc]
    """The process group that the test's pool has started."""

    creates_processes_externally = True
    main_address = "127.0.0.1"
    main_port = 0

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return dist.get_world_size()

    def global_rank(self) -> int:
        return dist.get_rank()

    def local_rank(self) -> int:
        return dist.get_rank()

    def node_rank(self) -> int:
        return 0

    def set_world_size(self, size: int) -> None:
        pass

    def set_global_rank(self, rank: int) -> None:
        pass


def parallel_trainer(kind: str, callbacks: list[Any], epochs: int) -> Any:
    if kind == "ddp":
        strategy: Any = DDPStrategy(cluster_environment=Here())
    else:
        sizes = (2, 1) if kind == "fsdp2" else (1, 2)
        strategy = ModelParallelStrategy(data_parallel_size=sizes[0], tensor_parallel_size=sizes[1])
    plugins = None if kind == "ddp" else [Here()]
    return trainer_of(callbacks, epochs, devices=2, strategy=strategy, plugins=plugins)


def plain_parallel(kind: str, data: Any, epochs: int) -> Any:
    """A plain loop under DDP, FSDP2 or tensor parallelism: snapshot and scales."""
    net = make_net()
    lay_out(kind, net, init_device_mesh("cpu", (2,)))
    model = DistributedDataParallel(net) if kind == "ddp" else net
    optimizer, clipper = torch.optim.AdamW(net.parameters(), lr=1e-2), dist_clip.GradClipper(model, policy())
    scales = []
    for _ in range(epochs):
        for batch in loader_of(data, dist.get_rank() if kind != "tp" else 0):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            scales.append(clipper.clip_().scales.clone())
            optimizer.step()
    return snapshot(net, optimizer), scales


def train_parallel(kind: str, folder: str) -> dict[str, Any]:
    """On a rank: the Trainer's run, the plain one, and runs that were resumed within and after the warm-up."""
    data, rank = batches(EPOCH, ranks=2), dist.get_rank() if kind != "tp" else 0

    def run(epochs: int, resume: str | None = None, save: str | None = None) -> Any:
        module, callback = Module(kind), ClipCallback(policy())
        record = Record(callback)
        trainer = parallel_trainer(kind, [callback, record], epochs)
        trainer.fit(module, loader_of(data, rank), ckpt_path=resume, weights_only=True if resume else None)
        if save is not None:
            trainer.save_checkpoint(save)
        return snapshot(module.net, module.optimizers().optimizer), record.scales, callback.state_dict()

    def run_poisoned() -> list[dict[str, Tensor]]:
        """The second batch of rank 1 (of both under tensor parallelism) is NaN; a snapshot after each step."""
        module, callback, steps = Module(kind), ClipCallback(policy(), nonfinite="skip"), Steps()
        poisoned = [(x.clone(), y) for x, y in data]
        if rank == 1 or kind == "tp":
            poisoned[1][0].fill_(float("nan"))
        parallel_trainer(kind, [callback, steps], 1).fit(module, loader_of(poisoned, rank))
        assert callback.clippers[0].steps == EPOCH - 1
        return steps.seen

    found = {"whole": run(4), "plain": plain_parallel(kind, data, 4)}
    for epochs in (1, 2):
        path = f"{folder}/{epochs}.ckpt"
        run(epochs, save=path)
        dist.barrier()
        found[f"resumed after {epochs}"] = run(4, resume=path)
    return {**found, "poisoned": run_poisoned()}


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "tp"])
def test_two_ranks_equal_a_plain_loop_and_resume_exactly(kind: str, tmp_path: Path) -> None:
    for found in pool(2).run(train_parallel, kind, str(tmp_path)):
        params, scales, state = found["whole"]
        plain_params, plain_scales = found["plain"]
        assert_same(params, plain_params)
        assert_same(scales, plain_scales)
        assert any(bool((each < 1).any()) for each in scales), "nothing was clipped"
        for epochs in (1, 2):
            again, later, resumed = found[f"resumed after {epochs}"]
            assert_same(again, params)
            assert_same(later, scales[EPOCH * epochs :])
            assert_same(resumed, state)
        first, second, third = found["poisoned"]
        assert_same(second, first)
        assert not torch.equal(third["0.weight"], second["0.weight"])
        assert third["0.weight.step"] == 2


def step_fsdp1(several: bool) -> dict[str, Any]:
    """On a rank: the callback's hooks, called as Lightning does, beside `clip_grad_norm_` of FSDP1's own."""
    model, same = (
        FullyShardedDataParallel(make_net(), use_orig_params=True, device_id=torch.device("cpu")) for _ in range(2)
    )
    params = list(model.parameters())
    parts = (params[:2], params[2:]) if several else (params,)
    optimizers = [torch.optim.SGD(part, lr=0.1) for part in parts]
    strategy = SimpleNamespace(model=model, optimizers=optimizers)
    trainer: Any = SimpleNamespace(strategy=strategy, precision_plugin=object(), gradient_clip_val=None)
    callback, norms = ClipCallback(dist_clip.GlobalNorm(0.1), log=False), []
    callback.on_train_start(trainer, None)
    batch = batches(1, ranks=2)[0]
    rows = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    for each in (model, same):
        loss_of(each, (batch[0][rows], batch[1][rows])).backward()
    for optimizer, clipper in zip(optimizers, callback.clippers, strict=True):
        callback.on_before_optimizer_step(trainer, None, optimizer)
        optimizer.step(closure=lambda: None)
        norms.append(float(clipper.last_report.global_norm))
    whole = float(same.clip_grad_norm_(0.1))
    return {"norms": norms, "whole": whole, "names": [clipper.layout.names for clipper in callback.clippers]}


@pytest.mark.parametrize("several", [False, True], ids=["one optimizer", "two optimizers"])
def test_fsdp_strategy_by_contract(several: bool) -> None:
    """FSDPStrategy refuses CPUs: the hooks with a model that FSDP1 wrapped."""
    for found in pool(2).run(step_fsdp1, several):
        assert sum(norm**2 for norm in found["norms"]) ** 0.5 == pytest.approx(found["whole"], rel=1e-5)
        assert found["names"][0][:2] == ("0.weight", "0.bias")
        assert [len(names) for names in found["names"]] == ([2, 4] if several else [6])


# --------------------------------------------------------------------------------------------------------------- Fabric


def fabric_loop(data: Any, saved_at: int | None, folder: Path, resume: bool = False) -> Any:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    net = make_net()
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=1e-2))
    clipper = dist_clip.GradClipper(model, policy())
    clipper.attach(optimizer)
    state = {"model": model, "optimizer": optimizer, "clip": clipper}
    if resume:
        fabric.load(folder / "fabric.ckpt", state)
    for step, batch in enumerate(data):
        if resume and step < saved_at:
            continue
        if step == saved_at and not resume:
            fabric.save(folder / "fabric.ckpt", state)
        optimizer.zero_grad()
        fabric.backward(loss_of(model, batch))
        optimizer.step()
    return snapshot(net, optimizer.optimizer), clipper


@pytest.mark.parametrize("saved_at", [2, 6])
def test_fabric(tmp_path: Path, saved_at: int) -> None:
    data = batches(8)
    whole, clipper = fabric_loop(data, saved_at, tmp_path)
    theirs, _, plain_clipper = plain(data, lambda net: dist_clip.GradClipper(net, policy()))
    assert_same(whole, theirs)
    resumed, other = fabric_loop(data, saved_at, tmp_path, resume=True)
    assert_same(resumed, whole)
    assert_same(other.state_dict(), clipper.state_dict())
    assert_same(clipper.layout.names, plain_clipper.layout.names)
