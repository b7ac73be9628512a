"""dist_clip.transformers against the real Trainer: the same training as a plain loop, and what the page promises."""

from __future__ import annotations

import functools
import importlib
import json
import math
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import transformers
from transformers import TrainerCallback

import dist_clip
import dist_clip.transformers as adapter
from tests.harness import pool

from . import docs
from . import hugging_face as hf

WAYS = ("attach", "mixin", "callback")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    hf.forget_accelerate()


class Recorder(TrainerCallback):
    """The batches that Trainer trained on, and what the clipper reported after each step."""

    def __init__(self, spoil: Callable[[int, nn.Module], None] | None = None) -> None:
        self.batches: list[hf.Batch] = []
        self.scales: list[Tensor] = []
        self.reports: list[dist_clip.ClipReport] = []
        self.clipper: Callable[[], Any] = lambda: None

    def collate(self, examples: Any) -> hf.Batch:
        batch = hf.collate(examples)
        self.batches.append(batch)
        return batch

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        clipper = self.clipper()
        if clipper is not None:
            self.reports.append(clipper.last_report)
            self.scales.append(clipper.last_report.scales.clone())

    def steps(self, number: int, accumulation: int = 1) -> list[list[hf.Batch]]:
        return [self.batches[i * accumulation : (i + 1) * accumulation] for i in range(number)]


class MixedTrainer(adapter.ClipMixin, transformers.Trainer):
    pass


def make_trainer(
    path: Path | str,
    way: str = "attach",
    *,
    trainer_class: Any = transformers.Trainer,
    model: nn.Module | None = None,
    policy: Any = None,
    clip: dict[str, Any] | None = None,
    callbacks: Any = (),
    **arguments: Any,
) -> tuple[Any, Recorder]:
    """A trainer that clips in that way, not yet trained."""
    recorder = Recorder()
    settings = {
        "output_dir": str(path),
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **arguments,
    }
    rule = {"policy": hf.policy() if policy is None else policy, **(clip or {})}
    given = {
        "model": hf.make_model() if model is None else model,
        "args": transformers.TrainingArguments(**settings),
        "train_dataset": hf.make_data(),
        "data_collator": recorder.collate,
        "callbacks": [recorder, *callbacks],
    }
    if way == "callback":
        callback = adapter.ClipCallback(**rule)
        given["callbacks"].append(callback)
    if way == "mixin":
        trainer = MixedTrainer(
            **given, clip_policy=rule.pop("policy"), clip_guard=rule.pop("guard", None), clip_options=rule
        )
        callback = trainer.clip_callback
    else:
        trainer = trainer_class(**given)
    if way == "attach":
        callback = adapter.attach(trainer, **rule)
    trainer.clip_callback = callback
    trainer.remove_callback(transformers.PrinterCallback)
    recorder.clipper = lambda: callback.clipper
    return trainer, recorder


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("way", WAYS)
def test_one_process_trains_as_the_plain_loop_does(way: str, tmp_path: Path) -> None:
    trainer, recorder = make_trainer(tmp_path, way)
    trainer.train()
    parameters, scales, norms = hf.plain_loop(hf.make_model(), recorder.steps(8))
    hf.assert_equal(hf.whole_parameters(trainer.model), parameters)
    hf.assert_equal(recorder.scales, scales)
    assert min(scale.min().item() for scale in scales) < 0.9, "nothing was clipped"
    # Trainer computes the norm by itself where only a callback clips.
    assert logged(trainer, "grad_norm") == (pytest.approx(norms, rel=1e-6) if way == "callback" else norms)


@pytest.mark.parametrize("way", ["attach", "callback"])
def test_accumulation(way: str, tmp_path: Path) -> None:
    trainer, recorder = make_trainer(tmp_path, way, gradient_accumulation_steps=3, max_steps=7)
    trainer.train()
    # 16 batches an epoch: the sixth step has one micro-batch only.
    batches = recorder.batches
    steps = [*recorder.steps(5, 3), batches[15:16], batches[16:19]]
    parameters, scales, _ = hf.plain_loop(hf.make_model(), steps)
    hf.assert_equal(hf.whole_parameters(trainer.model), parameters)
    hf.assert_equal(recorder.scales, scales)
    assert trainer.clip_callback.clipper.steps == 7


@pytest.mark.parametrize("saved", [2, 6], ids=["within the warm-up", "after it"])
@pytest.mark.parametrize("way", ["attach", "callback"])
def test_resume_is_bitwise_the_uninterrupted_run(way: str, saved: int, tmp_path: Path) -> None:
    clip = {"guard": dist_clip.MedianGuard()}
    whole, _ = make_trainer(tmp_path, way, clip=clip, save_strategy="steps", save_steps=saved)
    whole.train()
    resumed, recorder = make_trainer(tmp_path, way, clip=clip, model=hf.make_model())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved}"))
    assert len(recorder.scales) == 8 - saved
    hf.assert_equal(hf.whole_parameters(resumed.model), hf.whole_parameters(whole.model))
    ours, theirs = resumed.clip_callback.clipper, whole.clip_callback.clipper
    assert ours.steps == theirs.steps == 8
    assert adapter.to_json(ours.state_dict()) == adapter.to_json(theirs.state_dict())


def test_a_checkpoint_from_before_dist_clip_resumes_with_a_warning_and_can_be_saved(tmp_path: Path) -> None:
    """Trainer looks the callback's name up in the checkpoint that it resumed from: a KeyError if nobody puts it there."""
    before = transformers.Trainer(
        model=hf.make_model(),
        args=transformers.TrainingArguments(str(tmp_path), max_steps=2, save_steps=2, use_cpu=True, report_to=[]),
        train_dataset=hf.make_data(),
        data_collator=hf.collate,
    )
    before.remove_callback(transformers.trainer_callback.ProgressCallback)
    before.train()
    trainer, _ = make_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=4)
    with pytest.warns(UserWarning, match="the checkpoint of step 2 has no state of dist_clip"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["ClipCallback"]["attributes"]["clipper"]["step"] == 2


def test_train_called_again_goes_on_with_the_optimizer_s_state_and_clips_once(tmp_path: Path) -> None:
    trainer, recorder = make_trainer(tmp_path, max_steps=3)
    trainer.train()
    trainer.train()
    assert trainer.clip_callback.clipper.steps == 6
    assert len(recorder.scales) == 6
    trainer.optimizer = None  # as hyperparameter_search does
    trainer.train()
    assert trainer.clip_callback.clipper.steps == 3


def spoil(step: int, model: nn.Module) -> None:
    """At step 5 one element of one gradient is Inf."""
    if step == 5:
        next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[3] = math.inf


class SpoilingTrainer(transformers.Trainer):
    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, *args, **kwargs)
        spoil(self.state.global_step, model)
        return loss


@pytest.mark.parametrize(("way", "zeroed"), [("attach", 1), ("callback", 28)])
def test_an_inf_touches_one_tensor_but_all_where_only_a_callback_clips(way: str, zeroed: int, tmp_path: Path) -> None:
    trainer, recorder = make_trainer(tmp_path, way, trainer_class=SpoilingTrainer, clip={"nonfinite": "zero"})
    trainer.train()
    assert [int((scales == 0).sum()) for scales in recorder.scales] == [0] * 5 + [zeroed] + [0] * 2
    if way == "attach":
        parameters, scales, _ = hf.plain_loop(hf.make_model(), recorder.steps(8), spoil=spoil, nonfinite="zero")
        hf.assert_equal(hf.whole_parameters(trainer.model), parameters)
        hf.assert_equal(recorder.scales, scales)


@pytest.mark.parametrize("way", ["attach", "callback"])
def test_a_skipped_step_is_not_taken(way: str, tmp_path: Path) -> None:
    """Neither parameters nor the learning rate move; the metric says so."""
    trainer, _ = make_trainer(
        tmp_path,
        way,
        trainer_class=SpoilingTrainer,
        clip={"nonfinite": "skip"},
        lr_scheduler_type="linear",
    )
    seen: list[list[Tensor]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(hf.whole_parameters(kwargs["model"]))

    trainer.add_callback(Watch())
    trainer.train()
    hf.assert_equal(seen[5], seen[4])
    assert not torch.equal(seen[6][0], seen[5][0])
    rates = logged(trainer, "learning_rate")
    assert logged(trainer, "clip/skipped") == [0, 0, 0, 0, 0, 1, 0, 0]
    assert rates[5] == rates[6] > rates[7]
    assert trainer.clip_callback.clipper.steps == 7


class Tracker(TrainerCallback):
    """Stands for TensorBoard's and W&B's callbacks, which are in the list before the user's."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(dict(logs))


def test_trackers_get_the_metrics_beside_the_norm(tmp_path: Path) -> None:
    tracker = Tracker()
    trainer, recorder = make_trainer(tmp_path, callbacks=[tracker], max_steps=3)
    trainer.train()
    assert len(recorder.reports) == 3
    for entries in (tracker.seen, trainer.state.log_history):
        for entry, report in zip(entries, recorder.reports, strict=False):
            assert entry["grad_norm"] == report.global_norm.item()
            assert entry["clip/grad_norm_after"] == report.clipped_global_norm.item()
            assert entry["clip/fraction"] == report.clipped_fraction.item()
            assert entry["clip/min_scale"] == report.min_scale.item()
            assert entry["clip/skipped"] == 0
    assert "clip/fraction" not in trainer.state.log_history[-1], "the summary of the run is no step"


def test_a_guard_sees_the_loss_that_trainer_logs(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path, clip={"guard": dist_clip.SkipStep()}, gradient_accumulation_steps=2)
    seen: list[float] = []
    begin = functools.partial(trainer.clip_callback.on_train_begin)

    def on_train_begin(*args: Any, **kwargs: Any) -> None:
        begin(*args, **kwargs)
        clipper = trainer.clip_callback.clipper
        observe = clipper.observe_loss
        clipper.observe_loss = lambda loss: (seen.append(float(loss)), observe(loss))

    trainer.clip_callback.on_train_begin = on_train_begin
    trainer.train()
    assert seen == pytest.approx(logged(trainer, "loss"))


def test_max_grad_norm_has_no_effect_and_a_value_of_one_s_own_is_warned_of(tmp_path: Path) -> None:
    trainer, recorder = make_trainer(tmp_path, max_grad_norm=0.01)
    with pytest.warns(UserWarning, match=r"TrainingArguments\(max_grad_norm=0.01\) has no effect any more: AdaGC"):
        trainer.train()
    parameters, _, norms = hf.plain_loop(hf.make_model(), recorder.steps(8))
    hf.assert_equal(hf.whole_parameters(trainer.model), parameters)
    assert logged(trainer, "grad_norm") == norms
    other, _ = make_trainer(tmp_path, max_grad_norm=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.train()
    hf.assert_equal(hf.whole_parameters(other.model), parameters)


def test_the_callback_switches_trainer_s_clip_off(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path, "callback", max_steps=1, max_grad_norm=0.01)
    with pytest.warns(UserWarning, match="has no effect any more"):
        trainer.train()
    assert trainer.args.max_grad_norm == 0


def test_what_is_refused_names_itself(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path)
    with pytest.raises(RuntimeError, match="this trainer clips with dist_clip already"):
        adapter.attach(trainer)
    twice, _ = make_trainer(tmp_path, "callback", callbacks=[adapter.ClipCallback()])
    with pytest.raises(RuntimeError, match="this optimizer is attached already"):
        twice.train()
    with pytest.raises(ValueError, match="restore_callback_states_from_checkpoint=True makes callbacks anew"):
        make_trainer(tmp_path, restore_callback_states_from_checkpoint=True)
    late, _ = make_trainer(tmp_path, "callback", restore_callback_states_from_checkpoint=True)
    with pytest.raises(ValueError, match="restore_callback_states_from_checkpoint=True makes callbacks anew"):
        late.train()
    with pytest.raises(ValueError, match="restore_callback_states_from_checkpoint=True makes callbacks anew"):
        adapter.ClipCallback.from_state(adapter.ClipCallback().state())
    deepspeed = types.SimpleNamespace(
        accelerator=types.SimpleNamespace(distributed_type=hf.DistributedType.DEEPSPEED),
        callback_handler=types.SimpleNamespace(callbacks=[]),
    )
    with pytest.raises(ValueError, match="DEEPSPEED: DeepSpeed clips inside its engine"):
        adapter.attach(deepspeed)
    with pytest.raises(ValueError, match="clipp"):
        adapter.ClipCallback("clipp")


def test_the_lines_on_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"model": hf.make_model(), "data": hf.make_data()}
    before = hf.whole_parameters(names["model"])
    exec(docs.first_code_block("transformers.md"), names)
    trainer = names["trainer"]
    assert trainer.callback_handler.callbacks[0].clipper.steps == trainer.state.global_step == 24
    assert not torch.equal(hf.whole_parameters(trainer.model)[0], before[0])


def test_the_extra_is_named_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.trainer_callback", None)
    monkeypatch.delitem(sys.modules, "dist_clip.transformers")
    with pytest.raises(ImportError, match=r"pip install 'dist-clip\[transformers\]'"):
        importlib.import_module("dist_clip.transformers")


# ------------------------------------------------------------------------------------------------- several processes


def trained(path: str, fsdp: bool, saved: int) -> dict[str, Any]:
    """Train whole and resumed, and by hand on the same batches; every rank its own part of the data."""
    with hf.launched(fsdp):
        arguments: dict[str, Any] = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": saved}
        if fsdp:
            wrap = {
                "transformer_layer_cls_to_wrap": ["GPT2Block"],
                "version": 2,
                "state_dict_type": "SHARDED_STATE_DICT",
            }
            arguments |= {"fsdp": True, "fsdp_config": wrap}
        trainer, recorder = make_trainer(path, **arguments)
        trainer.train()
        kind = type(trainer.model_wrapped).__name__
        clipper = trainer.clip_callback.clipper
        again, _ = make_trainer(path, **arguments)
        again.train(resume_from_checkpoint=f"{path}/checkpoint-{saved}")
        plain = hf.sharded(hf.make_model()) if fsdp else nn.parallel.DistributedDataParallel(hf.make_model())
        parameters, scales, norms = hf.plain_loop(plain, recorder.steps(8, 2))
        return {
            "kind": kind,
            "placement": clipper.explain(),
            "found": (hf.whole_parameters(trainer.model), recorder.scales, logged(trainer, "grad_norm")),
            "expected": (parameters, scales, norms),
            "resumed": hf.whole_parameters(again.model),
            "steps": (clipper.steps, again.clip_callback.clipper.steps),
            "batch": recorder.batches[0]["input_ids"],
        }


@pytest.mark.parametrize("fsdp", [False, True], ids=["DDP", "FSDP2"])
def test_two_processes_train_as_the_plain_loop_does(fsdp: bool, tmp_path: Path) -> None:
    ranks = pool(2, "hugging face").run(trained, str(tmp_path), fsdp, 6)
    assert not torch.equal(ranks[0]["batch"], ranks[1]["batch"]), "both ranks had the same data"
    for rank in ranks:
        assert rank["kind"] == ("FSDPGPT2LMHeadModel" if fsdp else "DistributedDataParallel")
        assert ("reduce over 0[0,1]: 28 tensors" in rank["placement"]) == fsdp
        for found, expected in zip(rank["found"][:2], rank["expected"][:2], strict=True):
            hf.assert_equal(found, expected)
        assert rank["found"][2] == rank["expected"][2]
        hf.assert_equal(rank["resumed"], rank["found"][0])
        assert rank["steps"] == (8, 8)


# ---------------------------------------------------------------------------------------------------------------- TRL


def make_sft_trainer(path: Path, way: str) -> Any:
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    tokenizers = pytest.importorskip("tokenizers")
    words = {str(i): i for i in range(hf.VOCABULARY)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0")),
        pad_token="0",
        eos_token="1",
    )
    arguments = trl.SFTConfig(
        str(path),
        per_device_train_batch_size=4,
        max_steps=8,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    data = datasets.Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in hf.make_data()])
    given = {"model": hf.make_model(), "args": arguments, "train_dataset": data, "processing_class": tokenizer}

    class MixedSFTTrainer(adapter.ClipMixin, trl.SFTTrainer):
        clip_policy = hf.policy()

    if way == "mixin":
        return MixedSFTTrainer(**given)
    trainer = trl.SFTTrainer(**given, callbacks=[adapter.ClipCallback(hf.policy())] if way == "callback" else None)
    if way == "attach":
        adapter.attach(trainer, hf.policy())
    return trainer


@pytest.mark.parametrize("way", WAYS)
def test_trl_s_sft_trainer_trains_as_the_plain_loop_does(way: str, tmp_path: Path) -> None:
    trainer = make_sft_trainer(tmp_path, way)
    batches: list[hf.Batch] = []
    collate = trainer.data_collator

    def recorded(examples: Any) -> hf.Batch:
        batches.append(dict(collate(examples)))
        return dict(batches[-1])

    trainer.data_collator = recorded
    trainer.train()
    other = make_sft_trainer(tmp_path, "none")  # for TRL's loss, which is not the model's to the last bit
    parameters, _, norms = hf.plain_loop(
        other.model.train(),
        [[batch] for batch in batches[:8]],
        loss_of=lambda model, batch, labels: other.compute_loss(model, dict(batch), num_items_in_batch=labels),
    )
    hf.assert_equal(hf.whole_parameters(trainer.model), parameters)
    assert logged(trainer, "grad_norm") == pytest.approx(norms, rel=1e-6)
    assert len(logged(trainer, "clip/fraction")) == len(logged(trainer, "mean_token_accuracy")) == 8
