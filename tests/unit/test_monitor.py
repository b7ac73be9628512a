"""ClipMonitor against series made by hand, its writers, and the reading of its log."""

from __future__ import annotations

import json
import math
import random
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dist_clip
from dist_clip.monitor import (
    Group,
    JSONLWriter,
    MLflowWriter,
    Record,
    SpikeDetector,
    TensorBoardWriter,
    WandbWriter,
    groups_of,
    read_run,
    spikes,
)
from dist_clip.monitor.record import Culprit, Spike, Tensors


class Kept:
    """A writer that keeps what it gets."""

    def __init__(self) -> None:
        self.header: dict[str, Any] | None = None
        self.records: list[Record] = []
        self.closed = 0

    def start(self, header: Any) -> None:
        self.header = dict(header)

    def write(self, record: Record) -> None:
        self.records.append(record)

    def close(self) -> None:
        self.closed += 1


NAMES = ("embed.weight", "blocks.0.up.weight", "blocks.1.up.weight")


def model() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "embed": nn.Linear(4, 1, bias=False),
            "blocks": nn.ModuleList([nn.ModuleDict({"up": nn.Linear(9, 1, bias=False)}) for _ in range(2)]),
        }
    )


def set_norms(module: nn.Module, norms: tuple[float, ...]) -> None:
    """Give each parameter a gradient of that norm; 0 for none."""
    for param, norm in zip(module.parameters(), norms, strict=True):
        param.grad = torch.full_like(param, norm / math.sqrt(param.numel())) if norm else None


def watch(
    policy: dist_clip.Policy, series: list[tuple[float, ...]], losses: list[float] | None = None, **options: Any
) -> list[Record]:
    """The records of a run whose gradients have these norms."""
    module, kept = model(), Kept()
    guard = options.pop("guard", None)
    nonfinite = options.pop("nonfinite", "propagate")
    clipper = dist_clip.GradClipper(module, policy, guard=guard, nonfinite=nonfinite)
    with dist_clip.ClipMonitor(clipper, kept, **options) as monitor:
        for step, norms in enumerate(series, start=1):
            set_norms(module, norms)
            clipper.clip_()
            monitor.step(step, losses[step - 1] if losses else None)
    return kept.records


def test_records_come_every_k_steps_and_say_what_happened() -> None:
    usual = (1.0, 2.0, 4.0)
    module, kept = model(), Kept()
    clipper = dist_clip.GradClipper(module, dist_clip.GlobalNorm(2.0))
    monitor = dist_clip.ClipMonitor(clipper, kept, every=10, top=2, warmup=5)
    arrived = []
    for step in range(1, 26):
        set_norms(module, (1.0, 100.0, 4.0) if step == 15 else (0.0, 0.1, 0.2) if step == 16 else usual)
        clipper.clip_()
        monitor.step(step, loss=step / 10, scalars={"lr": 0.5, "twice": torch.tensor(2.0 * step)})
        arrived.append(len(kept.records))
    assert arrived == [0] * 9 + [10] * 10 + [20] * 6
    monitor.close()
    assert [record.step for record in kept.records] == list(range(1, 26))
    assert kept.closed == 1
    assert kept.header is not None
    assert kept.header["policy"] == {"policy": "GlobalNorm", "max_norm": 2.0}
    assert kept.header["tensors"] == 3

    total = math.sqrt(1 + 4 + 16)
    scalars = kept.records[0].scalars
    assert scalars["loss"] == pytest.approx(0.1)
    assert (scalars["lr"], scalars["twice"]) == (0.5, 2.0)
    assert scalars["clip/grad_norm"] == pytest.approx(total)
    assert scalars["clip/grad_norm_after"] == pytest.approx(2.0, rel=1e-5)
    assert scalars["clip/fraction"] == 1.0
    assert scalars["clip/min_scale"] == scalars["clip/mean_scale"] == pytest.approx(2 / total, rel=1e-5)
    assert (scalars["clip/skipped"], scalars["clip/nonfinite"]) == (0.0, 0.0)
    quiet = kept.records[15].scalars  # a tensor without a gradient counts neither as clipped nor as unclipped
    assert (quiet["clip/fraction"], quiet["clip/mean_scale"]) == (0.0, 1.0)

    assert [record.step for record in kept.records if record.tensors] == [10, 20]
    first, second = (record.tensors for record in kept.records if record.tensors)
    assert first is not None
    assert second is not None
    assert first.names == NAMES
    assert first.groups == (Group(None, "embed"), Group(0, "up"), Group(1, "up"))
    assert first.norms == pytest.approx(usual)
    assert first.levels == pytest.approx(usual)  # where nothing changes, the usual norm is the norm
    assert first.peaks == pytest.approx([1.0, 1.0, 1.0])
    assert (first.steps, first.clipped) == (10, [10, 10, 10])
    assert second.peaks == pytest.approx([1.0, 50.0, 1.0], rel=0.05)  # step 16 has moved the levels a little
    assert (second.steps, second.clipped) == (10, [9, 9, 9])

    assert [record.step for record in kept.records if record.spike] == [15]
    spike = kept.records[14].spike
    assert spike is not None
    assert spike.reasons == ("tensor",)
    (culprit,) = spike.culprits  # the others are not above their levels
    assert culprit.name == "blocks.0.up.weight"
    numbers = (culprit.norm, culprit.level, culprit.ratio, culprit.scale)
    assert numbers == pytest.approx((100.0, 2.0, 50.0, 2 / math.sqrt(1 + 1e4 + 16)), rel=1e-4)


def test_the_level_is_the_policy_s_own_after_its_warm_up() -> None:
    """LogClip by hand: the first norm is the level, and the second moves it by half of its log, bounded by the ratio."""
    policy = dist_clip.LogClip(ratio=2.0, rate=0.03, warmup_steps=0)
    records = watch(policy, [(1.0, 1.0, 1.0), (1.5, 1.0, 8.0), (1.0, 1.0, 1.0)], every=1)
    levels = [record.tensors.levels for record in records if record.tensors]
    assert all(map(math.isnan, levels[0]))
    assert levels[1] == pytest.approx([1.0, 1.0, 1.0])
    assert levels[2] == pytest.approx([math.sqrt(1.5), 1.0, math.sqrt(2.0)], rel=1e-5)
    assert records[2].tensors is not None
    assert records[2].tensors.states["count"] == [3.0, 3.0, 3.0]
    # In a warm-up that clips globally to a hundredth, the policy's levels are of clipped norms, and are not shown.
    warm = watch(dist_clip.LogClip(max_norm=0.01, warmup_steps=3), [(1.0, 2.0, 2.0)] * 5, every=5, tensors_every=1)
    shown = [record.tensors.levels for record in warm if record.tensors]
    assert shown[1] == shown[2] == pytest.approx([1.0, 2.0, 2.0])
    assert shown[3] == pytest.approx([0.01 / 3, 0.02 / 3, 0.02 / 3], rel=1e-4)


def test_skipped_steps_and_nan_name_their_culprits() -> None:
    usual = (1.0, 1.0, 1.0)
    series = [usual] * 4 + [(1.0, 30.0, 50.0), usual, (math.inf, 1.0, 1.0), usual]
    guarded = watch(
        dist_clip.GlobalNorm(1.0), series, every=3, top=1, warmup=4, guard=dist_clip.SkipAbove(10.0), nonfinite="skip"
    )
    found = {record.step: record.spike for record in guarded if record.spike}
    assert sorted(found) == [5, 7]
    assert found[5].reasons == ("tensor", "skipped")
    assert [culprit.name for culprit in found[5].culprits] == [NAMES[2]]
    assert found[7].reasons == ("tensor", "non-finite", "skipped")
    assert [(culprit.name, culprit.ratio) for culprit in found[7].culprits] == [(NAMES[0], math.inf)]
    assert [record.scalars["clip/skipped"] for record in guarded] == [0, 0, 0, 0, 1, 0, 1, 0]
    # Skipped norms enter no level.
    assert guarded[7].spike is None
    assert guarded[5].tensors is not None
    assert guarded[5].tensors.levels == pytest.approx(usual)


def test_spikes_of_loss_and_norm_and_their_score() -> None:
    losses = [2.0 + 0.1 * (-1) ** step for step in range(12)]
    losses[9] = 3.0
    series = [(1.0 + 0.01 * (-1) ** step, 1.0, 1.0) for step in range(12)]
    series[11] = (2.0, 1.0, 1.0)
    records = watch(dist_clip.GlobalNorm(5.0), series, losses, window=8)
    assert {record.step: record.spike.reasons for record in records if record.spike} == {
        10: ("loss",),
        12: ("grad norm",),
    }
    scores = [record.scalars.get("clip/spike_score") for record in records]
    assert scores == [None] * 7 + [0.0, 0.0, 0.1, 1 / 11, 2 / 12]


def test_spikes_are_those_of_olmo_core() -> None:
    """OLMo-core's callback, which appends the metric after it has looked at it, step by step."""
    stability = pytest.importorskip("olmo_core.train.callbacks.stability_monitor")
    rng = random.Random(0)
    loss = [2 + rng.gauss(0, 0.1) + (rng.random() < 0.05) * rng.uniform(0, 2) for _ in range(400)]
    norm = [1 + rng.gauss(0, 0.2) ** 2 + (rng.random() < 0.05) * 3 for _ in range(400)]
    theirs = stability.StabilityMonitorCallback(window_size=32, threshold_std=4.0)
    score = []
    for step, (a, b) in enumerate(zip(loss, norm, strict=True)):
        metrics = {theirs.loss_metric_name: a, theirs.grad_norm_metric_name: b}
        theirs.pre_log_metrics(step, metrics)
        score.append(metrics.get("spike/SpikeScore (total)"))
    found = [set(spikes(series, 32, 4.0)) for series in (loss, norm)]
    assert min(map(len, found)) > 3
    assert len(found[0] | found[1]) == theirs._total_spike_count
    both = [SpikeDetector(32, 4.0), SpikeDetector(32, 4.0)]
    count = 0
    for i, pair in enumerate(zip(loss, norm, strict=True)):
        found_now = [detector.add(value) for detector, value in zip(both, pair, strict=True)]
        count += any(found_now)
        assert score[i] == (count / (i + 1) if i + 1 >= 32 else None)


def test_spikes_by_hand() -> None:
    flat = [1.0, 3.0] * 4  # mean 2, standard deviation 1
    assert spikes([*flat, 7.9], 8) == []
    assert spikes([*flat, 8.1], 8) == [8]
    assert spikes([*flat, -4.1], 8) == []
    assert spikes([*flat, -4.1], 8, two_sided=True) == [8]
    assert spikes([*flat, math.nan, 2.0, math.inf], 8) == [8, 10]
    assert spikes([2.0] * 8 + [2.1], 8) == []  # nothing is known of the spread
    assert spikes([9.0], 8) == []
    with pytest.raises(ValueError, match="a spike needs window >= 1 and sigmas > 0, got 0 and 6"):
        SpikeDetector(0)


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["embed.weight", "head.bias"], [(None, "embed"), (None, "head.bias")]),
        (["model.layers.10.self_attn.q_proj.weight"], [(10, "self_attn.q_proj")]),
        (["transformer.h.2.ln_1.bias"], [(2, "ln_1.bias")]),
        (["layers.1.mlp.experts.7.w1.weight"], [(1, "mlp.experts.*.w1")]),
        (["encoder.layers.0.up.weight", "decoder.layers.0.up.weight"], [(0, "encoder.layers.up"), (0, "decoder.layers.up")]),
        (["0.weight", "1.weight"], [(0, "weight"), (1, "weight")]),
        (["blocks.3.attn.wq.weight@rank1"], [(3, "attn.wq")]),
    ],
)  # fmt: skip
def test_layer_and_kind(names: list[str], groups: list[tuple[int | None, str]]) -> None:
    assert list(groups_of(names).values()) == [Group(*group) for group in groups]


def test_tables_are_summed_up_by_layer_and_kind() -> None:
    names = ("embed.weight", "blocks.0.up.weight", "blocks.0.down.weight", "blocks.1.up.weight")
    rest: dict[str, Any] = {"scales": [1.0] * 4, "clipped": [0] * 4, "steps": 1, "states": {}}
    table = Tensors(
        names,
        tuple(groups_of(names).values()),
        norms=[1.0, 3.0, 4.0, 12.0],
        levels=[1.0, 1.0, 2.0, math.nan],
        peaks=[1.0, 3.5, 2.0, math.nan],
        **rest,
    )
    assert table.by_layer() == {"embed": (1.0, 1.0), "layer 0": (5.0, 3.5), "layer 1": (12.0, 0.0)}
    assert table.by_kind() == {"embed": (1.0, 1.0), "up": (math.sqrt(153), 3.5), "down": (4.0, 2.0)}
    assert table.ratios == pytest.approx([1.0, 3.0, 2.0, math.nan], nan_ok=True)


def test_an_attached_clipper_is_watched_and_steps_without_a_clip_say_so() -> None:
    module, kept = model(), Kept()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    clipper = dist_clip.GradClipper(module, dist_clip.GlobalNorm(1.0))
    clipper.attach(optimizer)
    with dist_clip.ClipMonitor(clipper, [kept], every=2) as monitor:
        for step in range(1, 4):
            if step != 2:  # a scaler has skipped the optimizer's step
                set_norms(module, (1.0, 2.0, 2.0))
                optimizer.step()
            monitor.step(step, 1.0)
    assert [record.scalars.get("clip/grad_norm") for record in kept.records] == [
        pytest.approx(3.0),
        None,
        pytest.approx(3.0),
    ]
    assert [record.tensors is None for record in kept.records] == [True, True, True]  # step 2 had none to show
    assert kept.records[1].scalars == {"loss": 1.0}


def test_a_model_that_has_grown_is_watched_on() -> None:
    module, kept = nn.Sequential(nn.Linear(2, 2, bias=False)), Kept()
    clipper = dist_clip.GradClipper(module, dist_clip.LogClip(warmup_steps=1))
    monitor = dist_clip.ClipMonitor(clipper, kept, every=4, tensors_every=1)
    for step in range(1, 7):
        if step == 3:
            module.append(nn.Linear(2, 1, bias=False))
            clipper.refresh()
        set_norms(module, (1.0, 2.0)[: len(module)])
        clipper.clip_()
        monitor.step(step)
    monitor.close()
    names = [record.tensors.names for record in kept.records if record.tensors]
    assert names == [("0.weight",)] * 2 + [("0.weight", "1.weight")] * 4


def test_without_a_clipper_the_loss_and_more_are_recorded() -> None:
    kept = Kept()
    with dist_clip.ClipMonitor(None, kept, every=2) as monitor:
        for step in range(1, 4):
            monitor.step(step, torch.tensor(float(step)), scalars={"clip/grad_norm": 2.0})
    assert [record.scalars for record in kept.records] == [
        {"loss": float(step), "clip/grad_norm": 2.0} for step in (1, 2, 3)
    ]


def test_an_error_leaves_what_had_arrived() -> None:
    kept = Kept()
    clipper = dist_clip.GradClipper(model(), dist_clip.GlobalNorm(1.0))
    monitor = dist_clip.ClipMonitor(clipper, kept, every=2)
    for step in range(1, 4):
        monitor.step(step, 1.0)
    monitor.__exit__(KeyError, KeyError(), None)
    assert [record.step for record in kept.records] == [1, 2]
    assert kept.closed == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"clipper": "model"}, TypeError, "ClipMonitor needs a GradClipper or None, got str"),
        ({"every": 0}, ValueError, "every must be a whole number >= 1, got 0"),
        ({"top": -1}, ValueError, "top must be a whole number >= 0, got -1"),
        ({"tensors_every": 0.5}, ValueError, "tensors_every must be a whole number >= 0, got 0.5"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dist_clip.ClipMonitor(options.pop("clipper", None), [], **options)


def test_a_closed_monitor_and_a_loss_that_is_none_are_errors() -> None:
    monitor = dist_clip.ClipMonitor(None, [])
    with pytest.raises(ValueError, match="loss must be a number or a tensor of one element"):
        monitor.step(1, torch.ones(2))
    monitor.close()
    monitor.close()
    with pytest.raises(RuntimeError, match="this ClipMonitor is closed"):
        monitor.step(1)


# ---- writers ---------------------------------------------------------------------------------------------------------

CULPRIT = Culprit("blocks.0.up.weight", 100.0, 2.0, 50.0, 0.02)
TABLE = Tensors(
    NAMES,
    tuple(groups_of(NAMES).values()),
    norms=[1.0, 2.0, 4.0],
    levels=[1.0, 2.0, math.nan],
    scales=[0.5, 1.0, 1.0],
    peaks=[1.0, 50.0, math.nan],
    clipped=[3, 2, 0],
    steps=5,
    states={"count": [7.0, 7.0, math.nan]},
)
RECORDS = [
    Record(1, {"loss": 2.5, "lr": 0.1}),
    Record(
        2,
        {"loss": 2.0, "clip/grad_norm": 5.0, "clip/fraction": 0.5, "clip/min_scale": 0.5, "clip/skipped": 1.0},
        TABLE,
        Spike(("tensor", "skipped"), (CULPRIT,)),
    ),
]


def feed(writer: Any, records: list[Record] = RECORDS) -> None:
    writer.start({"policy": {"policy": "GlobalNorm", "max_norm": 1.0}})
    for record in records:
        writer.write(record)
    writer.close()


def test_json_lines_are_read_back(tmp_path: Path) -> None:
    feed(JSONLWriter(tmp_path / "run" / "log.jsonl"))
    for run in (read_run(tmp_path / "run"), read_run(str(tmp_path / "run" / "log.jsonl"))):
        assert run.header["policy"]["policy"] == "GlobalNorm"
        assert run.series("loss") == [2.5, 2.0]
        assert run.series("grad_norm") == pytest.approx([math.nan, 5.0], nan_ok=True)
        assert run.series("clipped_fraction") == [0.0, 0.5]
        assert run.series("smallest_scale") == [1.0, 0.5]
        assert [step["skipped"] for step in run.steps] == [False, True]
        (table,) = run.tensors
        assert table["norms"] == dict(zip(NAMES, (1.0, 2.0, 4.0), strict=True))
        assert table["scales"][NAMES[0]] == 0.5
        assert table["state"] == {name: {"count": 7.0} for name in NAMES[:2]}
        assert (table["levels"], table["peaks"]) == ([1.0, 2.0, None], [1.0, 50.0, None])
        assert (table["clipped"], table["steps"]) == ([3, 2, 0], 5)
        (spike,) = run.spikes
        assert spike["reasons"] == ["tensor", "skipped"]
        assert spike["culprits"] == [vars(CULPRIT)]
    # A restart from step 1 goes on in the same file; what it wrote again counts.
    feed(
        JSONLWriter(tmp_path / "run" / "log.jsonl", append=True), [Record(2, {"loss": 1.5}), Record(3, {"loss": 1.25})]
    )
    assert read_run(tmp_path / "run").series("loss") == [2.5, 1.5, 1.25]
    (tmp_path / "other.jsonl").write_text('{"kind": "step", "step": 1}\n')
    with pytest.raises(ValueError, match=r"other\.jsonl is no log of a run: it has no line of the kind 'run'"):
        read_run(tmp_path / "other.jsonl")


def test_tensorboard_gets_scalars_groups_and_spikes(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    feed(TensorBoardWriter(tmp_path, per_tensor=True))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    values = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert values["loss"] == [(1, 2.5), (2, 2.0)]
    assert values["clip/grad_norm"] == [(2, 5.0)]
    assert values["norm/layer 0"] == [(2, 2.0)]
    assert values["peak/up"] == [(2, 50.0)]
    assert values["norm/blocks.1.up.weight"] == [(2, 4.0)]
    assert "spike/text_summary" in events.Tags()["tensors"]


class FakeWandbRun:
    def __init__(self) -> None:
        self.metrics: list[tuple[Any, ...]] = []
        self.logged: list[dict[str, Any]] = []

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, data: dict[str, Any]) -> None:
        self.logged.append(data)


def test_wandb_by_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    """By contract: wandb itself is not run. What is called is `Run.define_metric` and `Run.log`."""
    run = FakeWandbRun()
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(run=run))
    feed(WandbWriter())
    assert run.metrics[0] == ("clip/step", None)
    assert ("clip/*", "clip/step") in run.metrics
    assert run.logged[0] == {"clip/step": 1, "clip/loss": 2.5, "clip/lr": 0.1}
    assert run.logged[1]["clip/step"] == 2
    assert run.logged[1]["norm/layer 1"] == 4.0
    assert run.logged[1]["clip/spike"] == "tensor, skipped: blocks.0.up.weight (50 x its level)"
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(run=None))
    with pytest.raises(RuntimeError, match=r"WandbWriter found no active run: call wandb\.init first"):
        WandbWriter().start({})


def test_mlflow_by_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    """By contract: MLflow itself is not run. What is called is `log_metrics` and `set_tag`."""
    logged: list[tuple[dict[str, float], int]] = []
    tags: dict[str, str] = {}
    fake = types.SimpleNamespace(
        log_metrics=lambda metrics, step: logged.append((metrics, step)),
        set_tag=lambda key, value: tags.update({key: value}),
    )
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    feed(MLflowWriter(per_tensor=True))
    assert logged[0] == ({"loss": 2.5, "lr": 0.1}, 1)
    assert logged[1][0]["peak/blocks.0.up.weight"] == 50.0
    assert "peak/blocks.1.up.weight" not in logged[1][0]  # nothing is known
    assert tags == {"spike.2": "tensor, skipped: blocks.0.up.weight (50 x its level)"}


@pytest.mark.parametrize(
    ("module", "make"),
    [
        ("wandb", WandbWriter),
        ("mlflow", MLflowWriter),
        ("torch.utils.tensorboard", lambda: TensorBoardWriter("/nonexistent")),
    ],
)
def test_a_package_that_is_missing_is_named(module: str, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    package = module.rpartition(".")[2]
    with pytest.raises(ImportError, match=f"needs the package {package}: pip install {package}"):
        make().start({})


def test_a_log_is_plain_json_where_numbers_are_missing(tmp_path: Path) -> None:
    feed(JSONLWriter(tmp_path / "log.jsonl"), [Record(1, {"loss": 1.0, "clip/grad_norm": math.nan})])
    line = (tmp_path / "log.jsonl").read_text().splitlines()[1]
    assert "NaN" not in line
    assert json.loads(line)["grad_norm"] is None
