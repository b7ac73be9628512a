"""dist_clip.accelerate against the real Accelerator: the same training as a plain loop, and what the page promises."""

from __future__ import annotations

import importlib
import math
import sys
import types
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin

import dist_clip
import dist_clip.accelerate as adapter
from tests.harness import pool

from . import docs
from . import hugging_face as hf

STEPS = 8


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    hf.forget_accelerate()
    yield
    hf.forget_accelerate()


def batches(number: int = 2 * STEPS, rank: int = 0) -> list[hf.Batch]:
    data = hf.make_data(8 * number)
    return [hf.collate(data[8 * i + 4 * rank : 8 * i + 4 * rank + 4]) for i in range(number)]


def make_accelerator(**settings: Any) -> Accelerator:
    """Accelerate makes no GradScaler on a CPU, where it would have nothing to do; torch has one."""
    accelerator = Accelerator(**settings)
    if settings.get("mixed_precision") == "fp16":
        accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu"), True
    return accelerator


class Run:
    """A script as people write it for Accelerate. `train` goes on with the micro-batches that it is given.

    Args:
        clips: how the script clips: "always" it calls clip_grad_norm_, "synced" as Accelerate's pages show, "never".
    """

    def __init__(
        self,
        clips: str = "synced",
        accumulation: int = 1,
        accelerator: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        settings = {"cpu": True, "gradient_accumulation_steps": accumulation, **(accelerator or {})}
        self.accelerator = make_accelerator(**settings)
        model = hf.make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(model, optimizer, scheduler)
        self.clips = clips
        self.clipper = adapter.attach(self.accelerator, self.model, **{"policy": hf.policy(), **options})
        self.scales: list[Tensor] = []
        self.norms: list[float] = []
        self.parameters: list[list[Tensor]] = []

    def train(self, micro_batches: Sequence[hf.Batch], spoil: Any = lambda step, model: None) -> None:
        accelerator = self.accelerator
        for batch in micro_batches:
            with accelerator.accumulate(self.model):
                loss = self.model(**batch).loss
                accelerator.backward(loss)
                spoil(len(self.scales), self.model)
                if self.clips == "always" or (self.clips == "synced" and accelerator.sync_gradients):
                    norm = accelerator.clip_grad_norm_(self.model.parameters(), math.inf)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            if accelerator.sync_gradients:
                report = self.clipper.last_report
                assert report is not None
                self.scales.append(report.scales.clone())
                self.norms.append(report.global_norm.item() if self.clips == "never" else norm.item())
                self.parameters.append(hf.whole_parameters(self.model))


def by_hand(
    micro_batches: Sequence[hf.Batch], accumulation: int = 1, model: nn.Module | None = None, **options: Any
) -> tuple[list[list[Tensor]], list[Tensor], list[float]]:
    """The plain loop, with the losses as the model gives them: the mean over a micro-batch's labels."""
    model = hf.make_model() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    clipper = dist_clip.GradClipper(model, **{"policy": hf.policy(), **options})
    parameters, scales, norms = [], [], []
    for i, batch in enumerate(micro_batches):
        synced = (i + 1) % accumulation == 0
        hf.synchronise(model, synced)
        (model(**batch).loss / accumulation).backward()
        if synced:
            report = clipper.clip_()
            scales.append(report.scales.clone())
            norms.append(report.global_norm.item())
            if not report.skip:
                optimizer.step()
            optimizer.zero_grad()
            parameters.append(hf.whole_parameters(model))
    return parameters, scales, norms


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("clips", ["synced", "always", "never"])
def test_one_process_trains_as_the_plain_loop_does(clips: str, accumulation: int) -> None:
    """Whether a script clips as the pages show, at each micro-batch, or forgets to."""
    run = Run(clips, accumulation)
    run.train(batches(STEPS * accumulation))
    parameters, scales, norms = by_hand(batches(STEPS * accumulation), accumulation)
    hf.assert_equal(run.parameters[-1], parameters[-1])
    hf.assert_equal(run.scales, scales)
    assert run.norms == norms
    assert run.clipper.steps == STEPS
    assert min(scale.min().item() for scale in scales) < 0.9, "nothing was clipped"


@pytest.mark.parametrize("saved", [2, 6], ids=["within the warm-up", "after it"])
def test_save_state_and_load_state_carry_the_clipper(saved: int, tmp_path: Path) -> None:
    whole = Run(guard=dist_clip.MedianGuard())
    whole.train(batches(STEPS)[:saved])
    whole.accelerator.save_state(str(tmp_path))
    whole.train(batches(STEPS)[saved:])
    hf.forget_accelerate()
    resumed = Run(guard=dist_clip.MedianGuard())
    resumed.accelerator.load_state(str(tmp_path))
    assert resumed.clipper.steps == saved
    resumed.train(batches(STEPS)[saved:])
    hf.assert_equal(resumed.parameters[-1], whole.parameters[-1])
    hf.assert_equal(resumed.scales, whole.scales[saved:])


def inf_at_3(step: int, model: nn.Module) -> None:
    if step == 3:
        next(model.parameters()).grad.view(-1)[0] = math.inf


@pytest.mark.parametrize("clips", ["synced", "never"])
def test_a_skipped_step_is_not_taken(clips: str) -> None:
    run = Run(clips, nonfinite="skip")
    skipped = []
    run.scheduler.scheduler.step = lambda: skipped.append(len(run.scales))  # counts the scheduler's steps
    run.train(batches(5), inf_at_3)
    hf.assert_equal(run.parameters[3], run.parameters[2])
    assert not torch.equal(run.parameters[4][0], run.parameters[3][0])
    assert skipped == [0, 1, 2, 4], "the schedule waits for the step"
    assert run.clipper.steps == 4


def test_an_inf_touches_one_tensor() -> None:
    run = Run(nonfinite="zero")
    run.train(batches(5), inf_at_3)
    assert [int((scales == 0).sum()) for scales in run.scales] == [0, 0, 0, 1, 0]


def test_fp16_unscales_first_and_an_overflow_is_not_remembered() -> None:
    """Accelerate's GradScaler on the CPU; the plain loop has none, and its steps are those that were not skipped."""
    run = Run(accelerator={"mixed_precision": "fp16"}, policy=dist_clip.GlobalNorm(0.5))
    scaler = run.accelerator.scaler
    assert scaler.get_scale() > 1
    run.train(batches(5), inf_at_3)
    assert run.clipper.steps == 4
    hf.assert_equal(run.parameters[3], run.parameters[2])
    _, _, norms = by_hand(batches(5)[:3], policy=dist_clip.GlobalNorm(0.5))
    assert run.norms[:3] == pytest.approx(norms, rel=1e-2)
    assert run.norms[3] == math.inf
    never = Run("never", accelerator={"mixed_precision": "fp16"}, policy=dist_clip.GlobalNorm(0.5))
    never.train(batches(5), inf_at_3)
    hf.assert_equal(never.parameters[-1], run.parameters[-1])


def test_a_guard_sees_the_mean_loss_of_a_step() -> None:
    run = Run(accumulation=2, guard=dist_clip.SkipStep())
    seen = []
    observe = run.clipper.observe_loss
    run.clipper.observe_loss = lambda loss: (seen.append(loss), observe(loss))  # type: ignore[method-assign]
    run.train(batches(4))
    other = hf.make_model()
    assert seen[0] == other(**batches(4)[0]).loss
    assert len(seen) == 4
    assert run.clipper.steps == 2


def test_clip_grad_norm_twice_in_a_step_clips_once() -> None:
    """As scripts do that call it for parts of a model, each on its own."""
    run = Run()
    parameters = list(run.model.parameters())
    run.accelerator.backward(run.model(**batches(1)[0]).loss)
    first = run.accelerator.clip_grad_norm_(parameters[:5], 1.0)
    second = run.accelerator.clip_grad_norm_(iter(parameters[5:]), 1.0)
    assert first == second == run.clipper.last_report.global_norm
    assert run.clipper.steps == 1


def test_tensors_that_are_excluded_are_left_alone_and_are_no_reason_to_clip_again() -> None:
    run = Run(exclude=["*.bias"])
    run.train(batches(2))
    assert run.clipper.steps == 2


def test_a_step_that_the_script_leaves_out_is_no_reason_to_leave_the_next_clip_out() -> None:
    run = Run()
    for batch in batches(2):
        loss = run.model(**batch).loss
        loss.backward()  # past the accelerator
        run.accelerator.clip_grad_norm_(run.model.parameters(), 1.0)
        run.optimizer.zero_grad()
    assert run.clipper.steps == 2


@pytest.mark.parametrize(("past", "steps"), [(True, True), (False, False)])
def test_gradients_that_stay_the_same_tensors_are_clipped_each_time(past: bool, steps: bool) -> None:
    """The order of steps tells them, and where a step was left out ``accelerator.backward``."""
    run = Run()
    for batch in batches(3):
        loss = run.model(**batch).loss
        loss.backward() if past else run.accelerator.backward(loss)
        run.accelerator.clip_grad_norm_(run.model.parameters(), math.inf)
        if steps:
            run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=False)
    assert run.clipper.steps == 3


def test_gradients_that_the_script_changes_after_the_clip_are_not_clipped_again() -> None:
    run = Run()
    run.accelerator.backward(run.model(**batches(1)[0]).loss)
    run.accelerator.clip_grad_norm_(run.model.parameters(), 1.0)
    first = next(run.model.parameters())
    first.grad.fill_(7.0)
    run.optimizer.step()
    assert run.clipper.steps == 1
    assert first.grad.eq(7.0).all()


def test_max_norm_has_no_effect_and_is_warned_of_once() -> None:
    run = Run()
    run.accelerator.backward(run.model(**batches(1)[0]).loss)
    with pytest.warns(UserWarning, match=r"clip_grad_norm_\(max_norm=0.1\) has no effect any more: AdaGC") as caught:
        twice = [run.accelerator.clip_grad_norm_(run.model.parameters(), 0.1) for _ in range(2)]
    assert (len(twice), len(caught)) == (2, 1)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf.forget_accelerate()
        same = Run(policy=dist_clip.GlobalNorm(0.1))
        same.accelerator.clip_grad_norm_(same.model.parameters(), 0.1)


def test_other_models_of_the_same_accelerator_are_clipped_as_before() -> None:
    run = Run()
    other = nn.Linear(2, 2)
    other(torch.full((1, 2), 100.0)).sum().backward()
    norm = run.accelerator.clip_grad_norm_(other.parameters(), 1.0)
    assert norm > 100
    assert torch.nn.utils.get_total_norm([p.grad for p in other.parameters()]) == pytest.approx(1.0, rel=1e-4)
    run.accelerator.clip_grad_value_(other.parameters(), 0.01)
    assert other.weight.grad.max() == pytest.approx(0.01)
    with pytest.raises(ValueError, match=r"parameters of the attached model together with others .*\[2, 2\]"):
        run.accelerator.clip_grad_norm_([*run.model.parameters(), *other.parameters()], 1.0)
    assert run.clipper.steps == 0


def test_what_is_refused_names_itself() -> None:
    run = Run()
    accelerator, model = run.accelerator, run.model
    with pytest.raises(RuntimeError, match="clip_grad_value_ beside dist_clip would clip the gradients twice"):
        accelerator.clip_grad_value_(model.parameters(), 1.0)
    with pytest.raises(ValueError, match="measures L2 norms; clip_grad_norm_ was called with norm_type=inf"):
        accelerator.clip_grad_norm_(model.parameters(), 1.0, norm_type=math.inf)
    with pytest.raises(RuntimeError, match="attached already"):
        adapter.attach(accelerator, model)
    with pytest.raises(RuntimeError, match="no optimizer of this model is prepared yet"):
        adapter.attach(accelerator, nn.Linear(2, 2))
    unprepared = nn.Linear(2, 2)
    accelerator.prepare(torch.optim.SGD(unprepared.parameters()))
    with pytest.raises(RuntimeError, match="the model is prepared only in part, or not at all"):
        adapter.attach(accelerator, unprepared)
    two = nn.ModuleList([nn.Linear(2, 2), nn.Linear(3, 3)])
    prepared, _ = accelerator.prepare(two, torch.optim.SGD(two.parameters()))
    with pytest.raises(
        dist_clip.LayoutError, match=r"SGD holds a parameter of shape \[3, 3\] that is not in the model"
    ):
        adapter.attach(accelerator, prepared[0])
    for kind in ("DEEPSPEED", "MEGATRON_LM", "XLA"):
        with pytest.raises(ValueError, match=f"^{kind}: "):
            adapter.attach(types.SimpleNamespace(distributed_type=hf.DistributedType(kind)), model)


def test_fp16_with_several_optimizers_is_refused() -> None:
    accelerator = make_accelerator(cpu=True, mixed_precision="fp16")
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    prepared = accelerator.prepare(model, *(torch.optim.SGD(part.parameters()) for part in model))
    with pytest.raises(ValueError, match="fp16 with several optimizers of one model"):
        adapter.attach(accelerator, prepared[0])


def test_two_optimizers_share_one_clip_a_round() -> None:
    accelerator = Accelerator(cpu=True)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model, first, second = accelerator.prepare(model, *(torch.optim.SGD(part.parameters()) for part in model))
    clipper = adapter.attach(accelerator, model, dist_clip.GlobalNorm(0.1))
    for _ in range(3):
        accelerator.backward(model(torch.ones(1, 2)).sum())
        first.step()
        second.step()
        first.zero_grad()
        second.zero_grad()
    assert clipper.steps == 3


def test_two_models_that_take_turns_are_clipped_each_at_its_own_step() -> None:
    """As a GAN: the second one's backward leaves gradients in the first."""
    accelerator = Accelerator(cpu=True)
    models = [nn.Linear(2, 2), nn.Linear(2, 2)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    first, second, *optimizers = accelerator.prepare(*models, *optimizers)
    clippers = [adapter.attach(accelerator, model, dist_clip.GlobalNorm(0.1)) for model in (first, second)]
    for _ in range(3):
        for loss, model, optimizer in (
            (lambda: first(torch.ones(1, 2)).sum(), first, optimizers[0]),
            (lambda: first(second(torch.ones(1, 2))).sum(), second, optimizers[1]),
        ):
            optimizer.zero_grad()
            accelerator.backward(loss())
            accelerator.clip_grad_norm_(model.parameters(), 0.1)
            grads = [param.grad for param in model.parameters()]
            assert torch.nn.utils.get_total_norm(grads) == pytest.approx(0.1, rel=1e-4)
            optimizer.step()
    assert [clipper.steps for clipper in clippers] == [3, 3]


def test_remove_gives_the_accelerator_its_own_clip_back() -> None:
    run = Run()
    run.clipper.attachment.remove()
    for name in ("clip_grad_norm_", "clip_grad_value_", "backward"):
        assert name not in vars(run.accelerator)
    run.accelerator.backward(run.model(**batches(1)[0]).loss)
    run.accelerator.clip_grad_norm_(run.model.parameters(), 1e-3)
    grads = [p.grad for p in run.model.parameters()]
    assert torch.nn.utils.get_total_norm(grads) == pytest.approx(1e-3, rel=1e-3)
    run.optimizer.step()
    assert run.clipper.steps == 0
    again = adapter.attach(run.accelerator, run.model)
    assert run.accelerator._custom_objects == [again]


def test_the_lines_on_the_page_run() -> None:
    model = hf.make_model()
    before = hf.whole_parameters(model)
    names: dict[str, Any] = {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2),
        "loader": torch.utils.data.DataLoader(hf.make_data(), batch_size=8, collate_fn=hf.collate),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(docs.first_code_block("accelerate.md"), names)
    assert names["clipper"].steps == 8
    assert names["clipper"].policy == dist_clip.recommended()["policy"]
    assert not torch.equal(hf.whole_parameters(model)[0], before[0])


def test_the_extra_is_named_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate.optimizer", None)
    monkeypatch.delitem(sys.modules, "dist_clip.accelerate")
    with pytest.raises(ImportError, match=r"pip install 'dist-clip\[accelerate\]'"):
        importlib.import_module("dist_clip.accelerate")


# ------------------------------------------------------------------------------------------------- several processes


def trained(path: str, fsdp: bool) -> dict[str, Any]:
    """Train whole, train resumed, and train by hand, all on the same micro-batches."""
    with hf.launched(fsdp):
        own = batches(2 * STEPS, dist.get_rank())
        settings = {}
        if fsdp:
            settings["fsdp_plugin"] = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=["GPT2Block"],
                state_dict_type="SHARDED_STATE_DICT",
            )
        whole = Run(accumulation=2, accelerator=settings)
        whole.train(own[:12])
        whole.accelerator.save_state(path)
        whole.train(own[12:])
        resumed = Run(accumulation=2, accelerator=settings)
        resumed.accelerator.load_state(path)
        loaded = resumed.clipper.steps
        resumed.train(own[12:])
        plain = hf.sharded(hf.make_model()) if fsdp else nn.parallel.DistributedDataParallel(hf.make_model())
        parameters, scales, norms = by_hand(own, 2, plain)
        return {
            "kind": type(whole.model).__name__,
            "found": (whole.parameters[-1], whole.scales, whole.norms),
            "expected": (parameters[-1], scales, norms),
            "resumed": resumed.parameters[-1],
            "steps": (loaded, whole.clipper.steps, resumed.clipper.steps),
        }


@pytest.mark.parametrize("fsdp", [False, True], ids=["DDP", "FSDP2"])
def test_two_processes_train_as_the_plain_loop_does(fsdp: bool, tmp_path: Path) -> None:
    for rank in pool(2, "hugging face").run(trained, str(tmp_path), fsdp):
        assert rank["kind"] == ("FSDPGPT2LMHeadModel" if fsdp else "DistributedDataParallel")
        hf.assert_equal(rank["found"][0], rank["expected"][0])
        hf.assert_equal(rank["found"][1], rank["expected"][1])
        assert rank["found"][2] == rank["expected"][2]
        hf.assert_equal(rank["resumed"], rank["found"][0])
        assert rank["steps"] == (6, STEPS, STEPS)
