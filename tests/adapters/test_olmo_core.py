"""dist_clip.olmo_core against the real OLMo-core: the Trainer's runs equal plain loops on the same batches.

The oracle is a loop of plain torch, with OLMo-core's model and `GradClipper.clip_` before `optimizer.step()`. In a single
process weights, moments and scales are the same bit for bit; so are they under DDP and FSDP2 beside a plain DDP or FSDP2
loop. A resumed run is compared with an uninterrupted one, bit for bit, from before the end of the warm-up and after it.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import dist_clip
from tests.adapters.comparing import assert_same, snapshot
from tests.adapters.docs import first_code_block
from tests.harness import pool

pytest.importorskip("olmo_core")
from olmo_core.data.data_loader import TextDataLoaderBase
from olmo_core.distributed import parallel
from olmo_core.distributed.parallel import DataParallelType
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.optim import AdamWConfig, SkipStepAdamWConfig
from olmo_core.train import Duration, TrainerConfig
from olmo_core.train.callbacks import (
    Callback,
    CheckpointerCallback,
    GarbageCollectorCallback,
    StabilityMonitorCallback,
)
from olmo_core.train.common import LoadStrategy
from olmo_core.train.train_module import (
    TransformerDataParallelConfig,
    TransformerTrainModuleConfig,
)

from dist_clip.olmo_core import ClipCallback

WARMUP, STEPS, LENGTH, ROWS, VOCABULARY = 4, 10, 8, 4, 32
"""`ROWS` sequences of `LENGTH` tokens a rank and step."""


def policy() -> dist_clip.Policy:
    return dist_clip.AdaGC(gamma_init="median", warmup_steps=WARMUP)


def tokens(step: int, ranks: int, rank: int) -> Tensor:
    """The batch of one step, counted from 1; few tokens in some of them, so that gradients differ in size."""
    generator = torch.Generator().manual_seed(step)
    high = (VOCABULARY, 2, 8)[step % 3]
    return torch.randint(0, high, (ROWS * ranks, LENGTH), generator=generator)[ROWS * rank : ROWS * (rank + 1)]


class Loader(TextDataLoaderBase):
    """Deterministic batches, which remembers how many it gave."""

    def __init__(self, work_dir: str, ranks: int, rank: int) -> None:
        super().__init__(
            collator=None,  # type: ignore[arg-type]
            work_dir=work_dir,
            global_batch_size=ROWS * LENGTH * ranks,
            dp_world_size=ranks,
            dp_rank=rank,
            fs_local_rank=rank,
        )

    @property
    def total_batches(self) -> int:
        return 1000

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches_processed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches_processed = state_dict["batches"]

    def reshuffle(self, epoch: int | None = None, **_: Any) -> None:
        self._epoch = epoch or 1

    def _iter_batches(self) -> Iterable[dict[str, Any]]:
        for step in range(self.batches_processed + 1, 1001):
            yield {"input_ids": tokens(step, self.dp_world_size, self.dp_rank)}

    def get_mock_batch(self) -> dict[str, Any]:
        return {"input_ids": tokens(0, self.dp_world_size, self.dp_rank)}


class Record(Callback):
    """What was clipped and recorded, and the state after each step."""

    priority = -1  # after the callback under test

    def __init__(self) -> None:
        self.scales: list[Tensor] = []
        self.seen: list[dict[str, Tensor]] = []
        self.metrics: dict[int, dict[str, float]] = {}

    def pre_optim_step(self) -> None:
        if "dist_clip" in self.trainer.callbacks:
            self.scales.append(self.trainer.callbacks["dist_clip"].clipper.last_report.scales.clone())

    def post_train_batch(self) -> None:
        if not dist.is_initialized() or self.step == self.trainer.max_steps:
            self.seen.append(snapshot(self.trainer.train_module.model, self.trainer.train_module.optim))

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        self.metrics.setdefault(step, {}).update(metrics)


def model_config() -> TransformerConfig:
    return TransformerConfig.llama_like(d_model=16, vocab_size=VOCABULARY, n_layers=1, n_heads=2)


def prepare(
    folder: Path | str,
    *,
    steps: int = STEPS,
    micro_batches: int = 1,
    optim: Any = None,
    kind: DataParallelType | None = None,
    save_at: list[int] | None = None,
    load: str | None = None,
    others: dict[str, Callback] | None = None,
    **module_options: Any,
) -> tuple[TrainerConfig, Any, Loader]:
    """What a script of OLMo-core's has before it builds the trainer."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    os.environ["FS_LOCAL_RANK"] = str(rank)
    parallel._WORLD_MESH = None  # it allows one training a process
    module = TransformerTrainModuleConfig(
        rank_microbatch_size=ROWS * LENGTH // micro_batches,
        max_sequence_length=LENGTH,
        optim=optim or AdamWConfig(lr=1e-2),
        dp_config=None if kind is None else TransformerDataParallelConfig(name=kind),
        **module_options,
    ).build(model_config().build(init_device="cpu"), device=torch.device("cpu"))
    initialise(module.model)
    saving = CheckpointerCallback(
        save_interval=10**6, fixed_steps=save_at, pre_train_checkpoint=False, save_async=False, enabled=bool(save_at)
    )
    config = TrainerConfig(
        save_folder=str(folder),
        save_overwrite=True,
        load_path=load,
        load_strategy=LoadStrategy.never if load is None else LoadStrategy.always,
        max_duration=Duration.steps(steps),
        metrics_collect_interval=1,
        no_evals=True,
        callbacks={
            "record": Record(),
            "checkpointer": saving,
            "garbage_collector": GarbageCollectorCallback(enabled=False),
            **(others or {}),
        },
    )
    return config, module, Loader(str(folder), ranks, rank)


def train(folder: Path | str, callback: ClipCallback | None, poison: int = 0, **options: Any) -> tuple[Any, Record]:
    """Run OLMo-core's Trainer; `poison`: the step whose gradient of the head is multiplied by 1e6."""
    config, module, loader = prepare(folder, **options)
    if callback is not None:
        config = config.with_callback("dist_clip", callback)
    trainer = config.build(module, loader)
    if poison:
        count = [0]

        def hook(grad: Tensor) -> Tensor:
            count[0] += 1
            return grad * 1e6 if count[0] == poison + 1 else grad  # the Trainer begins with a dry run

        module.model.lm_head.w_out.weight.register_hook(hook)
    trainer.fit()
    return trainer, trainer.callbacks["record"]  # the configuration copies its callbacks


def initialise(model: nn.Module) -> None:
    """The same weights under every layout."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, param in sorted(model.named_parameters()):
            whole = torch.randn(param.shape, generator=generator) * 0.1
            if isinstance(param, torch.distributed.tensor.DTensor):
                whole = torch.distributed.tensor.distribute_tensor(whole, param.device_mesh, param.placements)
            param.copy_(whole)


def plain(steps: int = STEPS, micro_batches: int = 1, kind: DataParallelType | None = None) -> Any:
    """The same training by hand: the last snapshot, scales, and the clipper."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    model: Any = model_config().build(init_device="cpu")
    if kind is not None:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
        if kind == DataParallelType.ddp:
            model.apply_ddp(mesh)
        else:
            model.apply_fsdp(mesh)
    initialise(model)
    optimizer = AdamWConfig(lr=1e-2).build(model)
    clipper, scales = dist_clip.GradClipper(model, policy()), []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        for rows in tokens(step, ranks, rank).chunk(micro_batches):
            logits, labels = model(rows)[:, :-1], rows[:, 1:]
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
            (loss / (ROWS * (LENGTH - 1))).backward()
        scales.append(clipper.clip_().scales.clone())
        optimizer.step()
    return snapshot(model, optimizer), scales, clipper


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_equals_a_plain_loop(micro_batches: int, tmp_path: Path) -> None:
    trainer, record = train(tmp_path, ClipCallback(policy()), micro_batches=micro_batches)
    params, scales, clipper = plain(micro_batches=micro_batches)
    assert_same(record.seen[-1], params)
    assert_same(record.scales, scales)
    assert any(bool((each < 1).any()) for each in scales), "nothing was clipped"
    assert_same(trainer.callbacks["dist_clip"].state_dict(), clipper.state_dict())


@pytest.mark.parametrize("guard", [None, dist_clip.MedianGuard()], ids=["no guard", "guard"])
def test_resume_equals_the_uninterrupted_run(tmp_path: Path, guard: Any) -> None:
    """Within the warm-up (step 2) and after it (step 6)."""
    trainer, record = train(tmp_path / "whole", ClipCallback(policy(), guard), save_at=[2, 6])
    for step in (2, 6):
        path = str(tmp_path / "whole" / f"step{step}")
        again, later = train(tmp_path / f"from{step}", ClipCallback(policy(), guard), load=path)
        assert_same(later.seen, record.seen[step:])
        assert_same(later.scales, record.scales[step:])
        assert_same(again.callbacks["dist_clip"].state_dict(), trainer.callbacks["dist_clip"].state_dict())


def test_a_checkpoint_without_the_clipper_s_state_is_warned_of(tmp_path: Path) -> None:
    train(tmp_path / "before", None, steps=3, save_at=[2])
    with pytest.warns(UserWarning, match=r"has taken 2 steps.*no state of the callback 'dist_clip'"):
        train(tmp_path / "after", ClipCallback(policy()), load=str(tmp_path / "before" / "step2"), steps=3)


def test_what_is_recorded(tmp_path: Path) -> None:
    """The same norms as OLMo-core's own clip, beside which the parameters are the same up to rounding."""
    _, ours = train(tmp_path / "ours", ClipCallback(dist_clip.GlobalNorm(0.1)), steps=4)
    _, theirs = train(tmp_path / "theirs", None, steps=4, max_grad_norm=0.1)
    for step in range(1, 5):
        logged, norm = ours.metrics[step], theirs.metrics[step]["optim/total grad norm"]
        assert logged["optim/total grad norm"] == pytest.approx(norm, rel=1e-4)
        assert logged["clip/grad_norm"] == logged["optim/total grad norm"]
        assert logged["clip/grad_norm_after"] == pytest.approx(0.1, rel=1e-3)
        assert logged["clip/min_scale"] == pytest.approx(0.1 / norm, rel=1e-3)
        assert logged["clip/fraction"] == 1
        assert logged["clip/skipped"] == logged["clip/nonfinite"] == 0


def test_the_norm_reaches_skip_step_optimizers_and_the_stability_monitor(tmp_path: Path) -> None:
    """OLMo-core's SkipStepAdamW sees the norm of its own step, as it does where OLMo-core clips."""
    monitor = StabilityMonitorCallback(window_size=4)
    trainer, record = train(
        tmp_path,
        ClipCallback(dist_clip.GlobalNorm(0.1)),
        optim=SkipStepAdamWConfig(lr=1e-2, rolling_interval_length=4),
        others={"stability": monitor},
        steps=6,
    )
    norms = [record.metrics[step]["optim/total grad norm"] for step in range(1, 7)]
    assert [float(norm) for norm in trainer.train_module.optim._grad_norms] == pytest.approx(norms[-5:])
    assert trainer.callbacks["stability"]._grad_norm_history == pytest.approx(norms[-4:])


@pytest.mark.parametrize("optim", [AdamWConfig(lr=1e-2), SkipStepAdamWConfig(lr=1e-2)], ids=["AdamW", "SkipStepAdamW"])
def test_a_skipped_step_is_not_taken(tmp_path: Path, optim: Any) -> None:
    callback = ClipCallback(dist_clip.GlobalNorm(1.0), dist_clip.SkipAbove(100.0))
    trainer, record = train(tmp_path, callback, poison=3, steps=5, optim=optim)
    seen = record.seen
    assert_same(seen[2], seen[1])
    steps = [snapshot["lm_head.w_out.weight.step"].item() for snapshot in seen]
    assert steps == [1, 2, 2, 3, 4]
    assert not torch.equal(seen[3]["lm_head.w_out.weight"], seen[2]["lm_head.w_out.weight"])
    assert [record.metrics[step]["clip/skipped"] for step in range(1, 6)] == [0, 0, 1, 0, 0]
    assert trainer.callbacks["dist_clip"].clipper.steps == 4
    if isinstance(optim, SkipStepAdamWConfig):
        assert [record.metrics[step]["optim/step skipped"] for step in range(1, 6)] == [0, 0, 1, 0, 0]
        assert all(norm < 100 for norm in trainer.train_module.optim._grad_norms)


def test_the_loss_that_a_guard_sees(tmp_path: Path) -> None:
    losses: list[float] = []

    class Spy(Callback):
        def pre_train(self) -> None:
            clipper = self.trainer.callbacks["dist_clip"].clipper
            clipper.observe_loss = lambda loss: losses.append(float(loss))

        def pre_optim_step(self) -> None:
            pass

    with pytest.raises(ValueError, match="loss"):  # the spy keeps it from the guard
        train(tmp_path, ClipCallback(dist_clip.GlobalNorm(1.0), dist_clip.SkipStep()), steps=1, others={"spy": Spy()})
    assert losses == pytest.approx([torch.tensor(float(VOCABULARY)).log().item()], rel=0.05)


def test_olmo_core_s_own_clip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_grad_norm"):
        train(tmp_path, ClipCallback(policy()), max_grad_norm=1.0)


def test_the_extra_is_named_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("olmo_core", "olmo_core.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "dist_clip.olmo_core")
    with pytest.raises(ImportError, match=r"pip install 'dist-clip\[olmo-core\]'"):
        importlib.import_module("dist_clip.olmo_core")


def test_olmo_ddp_is_refused_by_name() -> None:
    """By contract: OLMoDDP's optimizer runs on GPUs only."""

    class OLMoDDPOptimizer:
        param_groups: tuple[()] = ()

    class Module:
        optim = OLMoDDPOptimizer()
        max_grad_norm = None

    callback = ClipCallback()
    callback.trainer = type("Trainer", (), {"train_module": Module()})()
    with pytest.raises(TypeError, match="OLMoDDPOptimizer keeps gradients in buffers of its own"):
        callback.post_attach()


def test_the_policy_can_be_set_on_olmo_core_s_command_line() -> None:
    config = TrainerConfig(save_folder="none").with_callback("dist_clip", ClipCallback("logclip"))
    config = config.merge(["callbacks.dist_clip.policy=logclip ratio=3"])
    assert config.callbacks["dist_clip"].policy == "logclip ratio=3"
    config.as_config_dict()


def test_the_page_s_five_lines(tmp_path: Path) -> None:
    names: dict[str, Any] = dict(
        zip(("trainer_config", "train_module", "data_loader"), prepare(tmp_path, steps=3, save_at=[2]), strict=True)
    )
    exec(first_code_block("olmo_core.md"), names)
    assert {"optim/total grad norm", "clip/fraction"} <= set(names["trainer"].callbacks["record"].metrics[3])
    saved = torch.load(tmp_path / "step2" / "train" / "rank0.pt", weights_only=False)["callbacks"]["dist_clip"]
    assert saved["step"] == 2


# ------------------------------------------------------------------------------------------------------------- two ranks


def train_parallel(name: str, folder: str) -> dict[str, Any]:
    """On a rank: the Trainer's run, the plain one, and runs that were resumed within and after the warm-up."""
    os.environ["OLMO_SHARED_FS"] = "1"
    kind = DataParallelType(name)

    def found_in(trainer: Any, record: Record) -> Any:
        return record.seen[-1], record.scales, trainer.callbacks["dist_clip"].state_dict()

    found = {"whole": found_in(*train(f"{folder}/whole", ClipCallback(policy()), kind=kind, save_at=[2, 6]))}
    found["plain"] = plain(kind=kind)[:2]
    for step in (2, 6):
        path = f"{folder}/whole/step{step}"
        found[f"from {step}"] = found_in(*train(f"{folder}/{step}", ClipCallback(policy()), kind=kind, load=path))
    return found


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_equal_a_plain_loop_and_resume_exactly(kind: str, tmp_path: Path) -> None:
    for found in pool(2).run(train_parallel, kind, str(tmp_path)):
        params, scales, state = found["whole"]
        plain_params, plain_scales = found["plain"]
        assert_same(params, plain_params)
        assert_same(scales, plain_scales)
        assert any(bool((each < 1).any()) for each in scales), "nothing was clipped"
        for step in (2, 6):
            again, later, resumed = found[f"from {step}"]
            assert_same(again, params)
            assert_same(later, scales[step:])
            assert_same(resumed, state)


def clip_a_pipeline() -> dict[str, Any]:
    """On a rank: the callback's hooks, called as the Trainer does, with two stages of four; the second step is skipped."""
    rank, recorded = dist.get_rank(), []
    parts = [nn.ModuleDict({f"block{stage}": nn.Linear(3, 3, bias=False)}) for stage in (rank, rank + 2)]
    for part in parts:
        nn.init.constant_(next(part.parameters()), 0.5)
    optimizers = [SkipStepAdamWConfig(lr=1e-2).build(part) for part in parts]
    module = SimpleNamespace(model_parts=parts, optimizers=optimizers, pp_group=dist.group.WORLD, max_grad_norm=None)
    trainer: Any = SimpleNamespace(
        train_module=module,
        get_metric=lambda name: torch.tensor(2.0) if rank == 1 else None,
        record_metric=lambda name, value, **_: recorded.append((name, float(value))),
    )
    guards = [dist_clip.SkipAbove(1e3), dist_clip.SkipStep()]
    callback = ClipCallback(dist_clip.AdaGC(warmup_steps=2), guards)
    callback.trainer = trainer
    callback.post_attach()
    weights = []
    for gradient in (1.0, 1e6):
        for part in parts:
            weight = next(part.parameters())
            weight.grad = torch.full_like(weight, gradient)
        callback.pre_optim_step()
        for optimizer in optimizers:
            optimizer.step()
        callback.post_train_batch()
        weights.append([next(part.parameters()).detach().clone() for part in parts])
    norms = [[float(norm) for norm in optimizer._grad_norms] for optimizer in optimizers]
    return {"recorded": recorded, "weights": weights, "norms": norms}


def test_pipelines_by_contract() -> None:
    """OLMo-core's pipelines run on GPUs only: the hooks with a train module of that form."""
    for found in pool(2).run(clip_a_pipeline):
        whole = (4 * 9) ** 0.5
        assert [value for key, value in found["recorded"] if key == "optim/total grad norm"] == [whole, whole * 1e6]
        assert [value for key, value in found["recorded"] if key == "clip/skipped"] == [0, 1]
        assert found["recorded"][-1] == ("optim/step skipped", 1.0)
        assert found["norms"] == [[whole], [whole]]
        first, second = found["weights"]
        assert_same(second, first)
        assert not torch.equal(first[0], torch.full((3, 3), 0.5))
