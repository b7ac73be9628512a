"""launch/: the same training under every parallel layout, every clipping rule, both faults, and what the logs tell.

The parity tests train 8 steps on 1, 2 and 4 gloo ranks, AdaGC's warm-up ending at step 4 and the fault at steps 6 and 7,
and compare losses and gradient norms with a single process. Tolerances: 1e-4 in loss and 1e-4 relative in norms; fp32 sums
are made in another order under each layout, and training carries those differences from step to step (measured: 1e-6 in
loss, 2e-7 in norms).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

pytest.importorskip("tyro")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")

import dist_clip
from dist_clip.kernels import TORCH
from dist_clip.policies import options_of, parse_mode, registered
from launch.clipping import ClipConfig
from launch.compare import load_runs, render, tabulate
from launch.data import DataConfig, load_corpus
from launch.faults import FaultConfig, corrupt_batch, corrupt_gradients, wrong_lr
from launch.metrics import LogConfig, Run, read_run, rule_of
from launch.model import ModelConfig, build_model, stage_of
from launch.optim import OptimConfig, build_optimizer, lr_share
from launch.parallel import ParallelConfig
from launch.snapshot import SnapshotConfig
from launch.train import Config, train
from tests.harness import WorkerError, pool

ROOT = Path(__file__).parents[1]
STEPS = 8
GARBAGE = FaultConfig(fault="grad", fault_step=6, fault_steps=2)

Part = dict[str, Any]


def rule(clip: str, *, max_norm: float = 1.0, **options: Any) -> ClipConfig:
    """A rule with a warm-up of 4 steps and these options; it is not given those that it does not have."""
    wanted = {"warmup_steps": 4, **options}
    known = set() if clip == "none" else {option.name for option in options_of(parse_mode(clip)[0])}
    return ClipConfig(clip, max_norm, {name: value for name, value in wanted.items() if name in known})


def config(out: Path, *, optim: Part | None = None, log: Part | None = None, **parts: Any) -> Config:
    """A short run that writes nothing but its log."""
    optim = {"steps": STEPS, "lr_warmup_steps": 4, "validation_batches": 2, **(optim or {})}
    log = {
        "out": out,
        "log_every": 3,
        "tensors_every": 4,
        "tensorboard": False,
        "plot": False,
        "progress": False,
        **(log or {}),
    }
    parts.setdefault("clip", rule("adagc"))
    return Config(optim=OptimConfig(**optim), log=LogConfig(**log), **parts)


def run(ranks: int, cfg: Config) -> Run:
    pool(ranks).run(train, cfg, torch.device("cpu"))
    return read_run(cfg.log.out)


def assert_same_training(got: Run, want: Run, *, loss: float = 1e-4, norm: float = 1e-4) -> None:
    assert got.series("step") == want.series("step")
    assert got.series("loss") == pytest.approx(want.series("loss"), abs=loss)
    assert got.series("grad_norm") == pytest.approx(want.series("grad_norm"), rel=norm)
    assert got.series("grad_norm_clipped") == pytest.approx(want.series("grad_norm_clipped"), rel=norm)
    assert got.series("clipped_fraction") == pytest.approx(want.series("clipped_fraction"), abs=1e-6)
    assert got.series("smallest_scale") == pytest.approx(want.series("smallest_scale"), rel=norm)
    assert got.validation[-1]["loss"] == pytest.approx(want.validation[-1]["loss"], abs=loss)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(1, config(tmp_path_factory.mktemp("single"), fault=GARBAGE))


LAYOUTS = [
    (2, ParallelConfig("ddp")),
    (2, ParallelConfig("fsdp")),
    (2, ParallelConfig("hsdp", shard_degree=1)),
    (2, ParallelConfig("tp")),
    (2, ParallelConfig("tp-fsdp")),
    (2, ParallelConfig("pp")),
    (2, ParallelConfig("pp-fsdp")),
    (4, ParallelConfig("hsdp")),
    (4, ParallelConfig("tp-fsdp")),
    (4, ParallelConfig("pp-fsdp")),
]


@pytest.mark.parametrize(
    ("ranks", "parallel"), LAYOUTS, ids=lambda v: v.parallel if isinstance(v, ParallelConfig) else str(v)
)
def test_every_layout_trains_as_a_single_process(
    ranks: int, parallel: ParallelConfig, single: Run, tmp_path: Path
) -> None:
    got = run(ranks, config(tmp_path, parallel=parallel, fault=GARBAGE))
    assert_same_training(got, single)
    assert got.header["ranks"] == ranks
    # Every tensor of the model is there, once, with its norm, whichever rank holds it.
    assert got.tensors[0]["norms"].keys() == single.tensors[0]["norms"].keys()
    for record, wanted in zip(got.tensors, single.tensors, strict=True):
        order = [list(record["norms"]).index(name) for name in wanted["norms"]]
        for name, norm in wanted["norms"].items():
            assert record["norms"][name] == pytest.approx(norm, rel=1e-3), name
        for column in ("levels", "peaks"):
            assert [record[column][i] for i in order] == pytest.approx(wanted[column], rel=1e-3), column


def test_the_fault_of_the_parity_runs_shows(single: Run) -> None:
    norms = single.series("grad_norm")
    assert min(norms[5:7]) > 1e5 > 100 > max(norms[:5] + norms[7:])
    assert [record["fault"] for record in single.steps] == [False] * 5 + [True] * 2 + [False]


def test_an_answered_fault_leaves_no_trace(tmp_path: Path) -> None:
    """The two controls: GlobalGC remembers nothing, so what the fault was cannot show in any later step."""

    def losses(name: str, **fault: Any) -> list[float]:
        kind = FaultConfig(fault_step=3, fault_steps=2, **fault)
        got = run(1, config(tmp_path / name, fault=kind, clip=ClipConfig(clip="global")))
        assert [record["fault"] for record in got.steps] == [kind.fault != "none" and i in (2, 3) for i in range(STEPS)]
        return [*got.series("loss"), got.validation[-1]["loss"]]

    clean = losses("clean")
    ends = {}
    for answer in ("zero", "skip"):
        assert losses(f"clean-{answer}", fault_answer=answer) == clean  # there is no fault to answer
        garbage = losses(f"grad-{answer}", fault="grad", fault_answer=answer)
        batch = losses(f"batch-{answer}", fault="batch", fault_answer=answer)
        assert garbage[:3] == clean[:3]
        assert garbage[4:] == batch[4:]
        ends[answer] = garbage[4:]
    # AdamW goes on along its momentum where the gradient is zero; a skipped step goes nowhere.
    assert len({*map(tuple, ends.values()), tuple(clean[4:]), tuple(losses("grad", fault="grad")[4:])}) == 4


@pytest.mark.parametrize(
    ("fault", "parallel"),
    [
        *(("batch", parallel) for parallel in ("ddp", "fsdp", "pp")),
        ("targets", "pp"),
        ("repeat", "fsdp"),
        ("scale", "fsdp"),
        ("lr", "ddp"),
        ("batch-size", "fsdp"),
    ],
)
def test_a_fault_is_the_same_under_every_layout(fault: Any, parallel: Any, tmp_path: Path) -> None:
    faulty = FaultConfig(fault=fault, fault_step=3, fault_steps=2, fault_factor=4.0)
    want = run(1, config(tmp_path / "single", fault=faulty))
    assert_same_training(run(2, config(tmp_path / "got", fault=faulty, parallel=ParallelConfig(parallel))), want)


def test_faults_do_what_they_say() -> None:
    inputs, targets = torch.randint(64, (4, 16)), torch.randint(64, (4, 16))

    def faulty(kind: Any, step: int = 3) -> tuple[Tensor, Tensor]:
        return corrupt_batch(inputs, targets, FaultConfig(fault=kind, fault_step=3, fault_steps=2), step, 0)

    bytes_in, bytes_out = faulty("batch")
    assert bytes_in.min() >= 128
    assert torch.equal(bytes_in[:, 1:], bytes_out[:, :-1])
    same, shuffled = faulty("targets")
    assert torch.equal(same, inputs)
    assert torch.equal(shuffled.sort(dim=1).values, targets.sort(dim=1).values)
    assert not torch.equal(shuffled, targets)
    assert not torch.equal(shuffled, faulty("targets", 4)[1])
    for got, whole in zip(faulty("repeat"), (inputs, targets), strict=True):
        assert torch.equal(got, whole[[0, 0, 0, 0]])
    for kind in ("grad", "scale", "lr", "batch-size"):
        assert all(map(torch.equal, faulty(kind), (inputs, targets)))
    assert all(map(torch.equal, faulty("batch", 5), (inputs, targets)))  # it is over

    repeat, larger = FaultConfig(fault="repeat", fault_step=3), FaultConfig(fault="batch-size", fault_step=3)
    assert [repeat.source(step) for step in (2, 3, 4)] == [2, 3, 3]
    assert [larger.rows(8, step) for step in (2, 3)] == [8, 80]
    with pytest.raises(ValueError, match=r"whole for batch-size, got 2\.5"):
        FaultConfig(fault="batch-size", fault_factor=2.5)

    param = nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    corrupt_gradients([("weight", param)], FaultConfig(fault="scale", fault_step=3, fault_factor=8.0), 3, 0)
    assert param.grad.tolist() == [8.0, 8.0]
    optimizer = torch.optim.SGD([param], lr=0.5)
    with wrong_lr(optimizer, FaultConfig(fault="lr", fault_step=3), 3):
        assert optimizer.param_groups[0]["lr"] == 5.0
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_guards_skips_are_logged(tmp_path: Path) -> None:
    clip = ClipConfig(clip="global", guard=("skipabove",), guard_options={"skipabove_max_norm": 100.0})
    got = run(2, config(tmp_path, parallel=ParallelConfig("fsdp"), fault=GARBAGE, clip=clip))
    assert [record["skipped"] for record in got.steps] == [False] * 5 + [True] * 2 + [False]


def test_one_batch_drawn_anew_leaves_the_others(tmp_path: Path) -> None:
    corpus = load_corpus(DataConfig(), 16)
    steps = [(corpus.batch(step, 2, 16, 0), corpus.batch(step, 2, 16, 0, anew=True)) for step in (3, 4)]
    for usual, anew in steps:
        assert not torch.equal(usual[0], anew[0])
        assert torch.equal(anew[0][:, 1:], anew[1][:, :-1])
    clip = ClipConfig(clip="global")
    usual, other = (run(1, config(tmp_path / str(k), clip=clip, data=DataConfig(other_batch=k))) for k in (0, 3))
    assert [a == b for a, b in zip(usual.series("loss"), other.series("loss"), strict=True)] == [True] * 2 + [False] * 6
    # From then on it is the same batches that another model sees.
    assert other.series("loss")[3:] == pytest.approx(usual.series("loss")[3:], rel=0.05)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "tp", "pp"])
def test_accumulation_changes_nothing(parallel: Any, single: Run, tmp_path: Path) -> None:
    got = run(2, config(tmp_path, parallel=ParallelConfig(parallel), fault=GARBAGE, optim={"accumulate": 4}))
    assert_same_training(got, single)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "tp", "pp"])
def test_bf16_autocast_trains_close_to_fp32(parallel: Any, single: Run, tmp_path: Path) -> None:
    got = run(2, config(tmp_path, parallel=ParallelConfig(parallel), optim={"bf16": True}))
    # Until the fault that `single` has. bf16 has 8 bits; the losses are near 5.
    assert got.series("loss")[:5] == pytest.approx(single.series("loss")[:5], abs=0.03)
    assert got.series("loss")[:5] != single.series("loss")[:5]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "pp"])
@pytest.mark.parametrize("clip", ["none", *registered(), "adagc-shard", "adagc-global"])
def test_every_rule_runs_through_the_fault(clip: Any, parallel: Any, tmp_path: Path) -> None:
    chosen = rule(clip, max_norm=0.5, gamma_init="median")
    got = run(2, config(tmp_path, clip=chosen, parallel=ParallelConfig(parallel), fault=GARBAGE))
    assert all(math.isfinite(loss) for loss in got.series("loss"))
    before, after = got.series("grad_norm"), got.series("grad_norm_clipped")
    assert before[5] > 1e5
    if clip == "none":
        assert after == pytest.approx(before)
        assert set(got.series("smallest_scale")) == {1.0}
    else:
        # AutoClip knows no threshold but the norms so far.
        assert max(after[5:7]) < (max(before[:5]) if clip == "autoclip" else 1.0)
        assert clip == "autoclip" or max(after[:4]) <= 0.5001
    if (clip, parallel) == (
        "adagc-shard",
        "fsdp",
    ):  # each rank's piece is a tensor of its own, whose norms make up the whole
        names, table = set(got.tensors[0]["norms"]), got.tensors[0]
        assert {name.partition("@")[0] for name in names} == {
            name for name, _ in build_model(ModelConfig(), 0).named_parameters()
        }
        assert {name.partition("@")[2] for name in names} == {"", "rank1"}
        assert math.hypot(*table["norms"].values()) == pytest.approx(before[3], rel=1e-5)
    if clip == "adagc":  # one tensor is clipped hard, and the others are let through or nearly so
        scales = got.tensors[-1]["scales"]
        assert set(scales) == {name for name, _ in build_model(ModelConfig(), 0).named_parameters()}


def test_a_step_above_the_threshold_is_not_taken(tmp_path: Path) -> None:
    """As the control that knows the fault: its norms are some 1e5, the others' below 100."""
    clip = ClipConfig(clip="global")
    control = run(1, config(tmp_path / "control", clip=clip, fault=dataclasses.replace(GARBAGE, fault_answer="skip")))
    for ranks, layout in ((1, "ddp"), (2, "fsdp"), (2, "pp")):
        above = dataclasses.replace(clip, guard=("skipabove",), guard_options={"skipabove_max_norm": 1e4})
        got = run(ranks, config(tmp_path / layout, clip=above, fault=GARBAGE, parallel=ParallelConfig(layout)))
        assert got.series("loss") == pytest.approx(control.series("loss"), abs=1e-4)
        assert got.validation[-1]["loss"] == pytest.approx(control.validation[-1]["loss"], abs=1e-4)


def test_nonfinite_skip_leaves_the_weights_alone(tmp_path: Path) -> None:
    fault = dataclasses.replace(GARBAGE, fault_scale=math.inf)
    clip = ClipConfig(clip="global", nonfinite="skip")
    got = run(2, config(tmp_path, clip=clip, fault=fault))
    assert [record["nonfinite"] for record in got.steps] == [False] * 5 + [True] * 2 + [False]
    assert all(math.isfinite(loss) for loss in got.series("loss"))


# ---- what a user may get wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"optim": {"batch_size": 3}}, "--batch-size must be a multiple"),
        ({"optim": {"accumulate": 3}}, "--batch-size must be a multiple"),
        ({"parallel": ParallelConfig("tp-fsdp", tp_degree=3)}, "--tp-degree must divide"),
        ({"parallel": ParallelConfig("hsdp", shard_degree=4)}, "--shard-degree must divide"),
        ({"parallel": ParallelConfig("tp"), "model": ModelConfig(heads=1)}, "multiples of the TP degree 2"),
        ({"parallel": ParallelConfig("pp"), "model": ModelConfig(layers=1)}, "2 pipeline stages need as many layers"),
        ({"fault": FaultConfig(fault="grad", fault_tensor="nowhere")}, "no tensor 'nowhere'; the model has embed.weight"),
        ({"clip": rule("adagc", lambda_rel=-1.0)}, "lambda_rel must be above 0, got -1.0"),
        ({"data": DataConfig(Path("/nonexistent"))}, "does not exist"),
    ],
)  # fmt: skip
def test_mistakes_are_named_on_every_rank(parts: Part, message: str, tmp_path: Path) -> None:
    with pytest.raises(WorkerError) as caught:
        pool(2).run(train, config(tmp_path, **parts), torch.device("cpu"))
    assert not caught.value.timed_out
    assert str(caught.value).count(message) >= 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelConfig(dim=30), "even whole number"),
        (lambda: ModelConfig(layers=0), "layers must be at least 1, got 0"),
        (lambda: OptimConfig(steps=0), "steps must be at least 1, got 0"),
        (lambda: FaultConfig(fault_step=0), "got 0 and 20"),
        (lambda: LogConfig(log_every=0), "--log-every 0"),
    ],
)
def test_bad_values_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---- data, model, schedule -------------------------------------------------------------------------------------------


def test_data_default_is_the_standard_library_split_by_file() -> None:
    corpus = load_corpus(DataConfig(), 128)
    again = load_corpus(DataConfig(), 128)
    assert corpus.digest == again.digest
    assert corpus.files > 100
    share = len(corpus.validation) / (len(corpus.train) + len(corpus.validation))
    assert 0.02 < share < 0.3
    inputs, targets = corpus.batch(7, 8, 128, 0)
    assert inputs.shape == targets.shape == (8, 128)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(inputs, again.batch(7, 8, 128, 0)[0])
    assert not torch.equal(inputs, corpus.batch(8, 8, 128, 0)[0])
    assert not torch.equal(inputs, corpus.batch(7, 8, 128, 1)[0])


def test_data_from_a_file_and_from_a_folder(tmp_path: Path) -> None:
    text = bytes(range(256)) * 20
    (tmp_path / "a.txt").write_bytes(text)
    corpus = load_corpus(DataConfig(tmp_path / "a.txt"), 16)
    assert bytes(torch.cat([corpus.train, corpus.validation]).tolist()) == text  # no file to hold out: the end is
    assert len(corpus.validation) == len(text) // 10
    (tmp_path / "deeper").mkdir()
    for i in range(30):
        (tmp_path / "deeper" / f"{i}.txt").write_bytes(bytes([i]) * 100)
    folder = load_corpus(DataConfig(tmp_path), 16)
    assert folder.files == 31
    assert folder.digest != corpus.digest
    # Each small file, a run of one byte value, is on one side only.
    sides = [
        {i for i in range(30) if bytes([i]) * 50 in bytes(side.tolist())} for side in (folder.train, folder.validation)
    ]
    assert sides[0] | sides[1] == set(range(30))
    assert sides[1]
    assert not sides[0] & sides[1]
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "index").write_bytes(b"no text")
    assert load_corpus(DataConfig(tmp_path), 16).digest == folder.digest
    (tmp_path / "a.txt").write_bytes(b"short")
    with pytest.raises(ValueError, match="holds 5 bytes, too few for sequences of 16"):
        load_corpus(DataConfig(tmp_path / "a.txt"), 16)


def test_pipeline_stages_share_out_the_model_under_its_own_names() -> None:
    cfg = ModelConfig(layers=5, dim=16, heads=2)
    whole = [name for name, _ in build_model(cfg, 0).named_parameters()]
    stages = [[name for name, _ in stage_of(build_model(cfg, 0), s, 3).named_parameters()] for s in range(3)]
    assert [name for names in stages for name in names] == whole


def test_learning_rate_schedule() -> None:
    cfg = OptimConfig(steps=100, lr_warmup_steps=10, min_lr=0.1)
    shares = [lr_share(cfg, done) for done in range(101)]
    assert shares[0] == 0.1
    assert max(shares) == shares[9] == shares[10] == 1.0
    assert shares[10:] == sorted(shares[10:], reverse=True)
    assert shares[100] == pytest.approx(0.1)
    assert lr_share(dataclasses.replace(cfg, schedule="constant"), 90) == 1.0


# ---- logs, plots, comparison -----------------------------------------------------------------------------------------


def test_a_program_ends_with_its_output_and_what_was_registered_for_its_end() -> None:
    code = (
        "import atexit, launch.parallel as p; atexit.register(print, 'registered'); print('printed'); p.end_program()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "printed\nregistered\n"), done.stderr


def test_torchrun_command_line_writes_everything(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "launch.train",
    ]
    options = (
        "--device cpu --bf16 --parallel fsdp --clip zclip --zclip-z-thresh 3 --steps 4 --validate-every 2 --verify"
    )
    done = subprocess.run(
        [*command, *options.split(), "--validation-batches", "1", "--tensors-every", "2", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "step 4: validation loss" in done.stdout + done.stderr
    assert done.stdout.count("tensors and the global norm are right to 1e-05") == 1
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [kinds.count(kind) for kind in ("run", "step", "tensors", "validation", "end")] == [1, 4, 2, 2, 1]
    got = read_run(tmp_path)
    assert got.header["policy"]["z_thresh"] == 3
    assert got.header["versions"]["torch"] == torch.__version__
    assert len(got.header["data"]["digest"]) == 16
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.glob("events.out.tfevents.*"))


def exit_status(cfg: Config) -> tuple[Any, int]:
    """Of a run whose kernels measure every shard of rank 1 by 0.1 % too large, and the number of steps that it took."""

    def off(*args: Any) -> torch.Tensor:
        return TORCH.power_sums(*args) * (1.001**2 if dist.get_rank() == 1 else 1.0)

    def build(parallel: Any, clip: ClipConfig) -> dist_clip.GradClipper:
        kernels = dataclasses.replace(TORCH, power_sums=off)
        clippers.append(dist_clip.GradClipper(parallel.module, clip.policy(), kernels=kernels))
        return clippers[0]

    clippers: list[dist_clip.GradClipper] = []
    try:
        with mock.patch("launch.train.build_clipper", build):
            train(cfg, torch.device("cpu"))
    except SystemExit as stopped:
        return stopped.code, clippers[0].steps
    return 0, clippers[0].steps


def test_verify_exits_with_status_1_on_every_rank(tmp_path: Path) -> None:
    cfg = config(tmp_path, parallel=ParallelConfig("fsdp"), verify=True)
    assert pool(2).run(exit_status, cfg) == [(1, 0), (1, 0)]


def test_a_rule_of_ones_own_trains_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "my_rules.py").write_text(
        "import dataclasses, dist_clip, torch\n"
        "@dist_clip.register('halve')\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Halve(dist_clip.Policy):\n"
        "    strength: float = 0.5\n"
        "    nan_slots = ('last',)\n"
        "    def init_state(self, n, device):  # the last norms, of which there are several a tensor\n"
        "        return {'last': inputs_of(n, device), 'count': inputs_of(n, device)[0] * 0}\n"
        "    def step(self, state, inputs):\n"
        "        return inputs.norms * 0 + self.strength, state\n"
        "def inputs_of(n, device):\n"
        "    return torch.ones(3, n, device=device)\n"
    )
    options = (
        "--policy-module my_rules --clip halve --halve-strength 0.25 --steps 2 --validation-batches 1 --no-tensorboard "
        "--tensors-every 1"
    )
    done = subprocess.run(
        [sys.executable, "-m", "launch.train", *options.split(), "--device", "cpu", "--out", str(tmp_path)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    got = read_run(tmp_path)
    assert got.header["policy"] == {"policy": "Halve", "strength": 0.25}
    assert got.series("mean_scale") == [0.25, 0.25]
    assert set(got.tensors[0]["state"]["embed.weight"]) == {"count"}, "numbers only"
    assert rule_of(got) == "Halve (strength 0.25)"  # also where nobody has imported the module
    assert (tmp_path / "plot.png").exists()


def test_what_a_rule_is_called() -> None:
    def name(policy: dist_clip.Policy) -> str:
        return rule_of(Run({"policy": policy.config()}, [], [], [], None))

    assert name(dist_clip.GlobalNorm()) == "GlobalGC"
    assert name(dist_clip.GlobalNorm(0.5)) == "GlobalGC (max_norm 0.5)"
    assert name(dist_clip.GlobalNorm(math.inf)) == "no clipping"
    assert name(dist_clip.AdaGC(gamma_init="median")) == "AdaGC (gamma_init median)"
    assert name(dist_clip.LogClip(scope="shard", post_max_norm=1.0)) == "LogClip-Shard (post_max_norm 1)"
    assert name(dist_clip.ZClip()) == "ZClip"


def write_run(folder: Path, losses: list[float], *, clip: str, fault: bool, validation: float) -> None:
    policy = {"policy": "GlobalNorm", "max_norm": 1.0} if clip == "global" else {"policy": "AdaGC", "scope": "tensor"}
    policy |= {} if clip == "global" else {"gamma_init": "min", "warmup_steps": 2}
    kind = FaultConfig(fault="grad" if fault else "none", fault_step=5, fault_steps=2)
    settings = {
        "clip": {"clip": clip}, "fault": dataclasses.asdict(kind), "log": {"out": str(folder)},
        "parallel": {"parallel": "ddp"}, "seed": 3,
    }  # fmt: skip
    header = {
        "config": settings,
        "policy": policy,
        "ranks": 2,
        "parameters": 10,
        "data": {"digest": "d"},
        "versions": {},
    }
    records: list[dict[str, Any]] = [{"kind": "run", **header}]
    for step, loss in enumerate(losses, start=1):
        numbers = {"loss": loss, "grad_norm": 1.0, "grad_norm_clipped": 0.5, "clipped_fraction": 0.25}
        records.append(
            {"kind": "step", "step": step, "fault": fault and step in (5, 6), "smallest_scale": 1.0, **numbers}
        )
    records.append({"kind": "validation", "step": len(losses), "loss": validation})
    records.append({"kind": "end", "seconds": 1.0, "error": None})
    folder.mkdir()
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, records)))


def test_comparison_is_computed_from_the_logs(tmp_path: Path) -> None:
    flat = [3.0] * 16
    hit = [3.0] * 5 + [4.0, 3.5] + [3.0] * 9
    write_run(tmp_path / "g", flat, clip="global", fault=False, validation=2.0)
    write_run(tmp_path / "gf", hit, clip="global", fault=True, validation=2.5)
    write_run(tmp_path / "a", [3.1] * 16, clip="adagc", fault=False, validation=2.125)
    write_run(tmp_path / "af", [3.1] * 15 + [3.6], clip="adagc", fault=True, validation=2.0)
    runs = load_runs(tmp_path)
    rows = {row.name: row for row in tabulate(runs)}
    assert rows["g"].over_baseline == 0
    assert rows["gf"].over_baseline == rows["gf"].over_twin == 1.0
    # The mean over 5 steps first exceeds 0.05 at step 6 and last at step 11 (3.5 of step 7): 7 steps after step 5.
    assert rows["gf"].recovery == "7"
    assert rows["a"].over_baseline == pytest.approx(0.1)
    assert rows["af"].over_twin == pytest.approx(0.5)
    assert rows["af"].recovery == "not in 12"
    assert rows["af"].clipped == 0.25
    table = render(list(rows.values()), runs)
    assert "chosen for this demonstration" in table
    assert "Without any fault, AdaGC (warmup_steps 2) ends 0.125 worse than GlobalGC" in table


def test_comparison_refuses_unfinished_runs_and_lone_ones(tmp_path: Path) -> None:
    write_run(tmp_path / "gf", [3.0] * 8, clip="global", fault=True, validation=2.0)
    with pytest.raises(ValueError, match="no fault-free"):
        tabulate(load_runs(tmp_path))
    log = tmp_path / "gf" / "log.jsonl"
    log.write_text("\n".join(log.read_text().splitlines()[:-1]))
    with pytest.raises(ValueError, match="did not finish"):
        load_runs(tmp_path)


# ---- optimizers, snapshots, the second corpus, zero-initialised projections ------------------------------------------

OPTIMIZER_LAYOUTS = [(optimizer, layout) for optimizer in ("lion", "muon") for layout in ("ddp", "fsdp", "tp", "pp")]


@pytest.fixture(scope="module")
def single_with(tmp_path_factory: pytest.TempPathFactory) -> Any:
    runs: dict[str, Run] = {}

    def get(optimizer: str) -> Run:
        if optimizer not in runs:
            out = tmp_path_factory.mktemp(optimizer)
            runs[optimizer] = run(1, config(out, optim={"optimizer": optimizer}))
        return runs[optimizer]

    return get


@pytest.mark.parametrize(("optimizer", "parallel"), OPTIMIZER_LAYOUTS)
def test_every_optimizer_trains_alike_under_every_layout(
    optimizer: str, parallel: Any, single_with: Any, tmp_path: Path
) -> None:
    pytest.importorskip("pytorch_optimizer")
    got = run(2, config(tmp_path, parallel=ParallelConfig(parallel), optim={"optimizer": optimizer}))
    assert_same_training(got, single_with(optimizer))


def test_muon_takes_the_step_of_torch_optim_muon() -> None:
    """Which iterates in bf16: 8 bits, five iterations, updates of 1e-3; measured 2 % of the update's norm."""
    pytest.importorskip("pytorch_optimizer")
    model = build_model(ModelConfig(), 0)
    other = build_model(ModelConfig(), 0)
    hidden = [param for name, param in other.named_parameters() if param.ndim == 2 and "blocks" in name]
    ours = build_optimizer(model, OptimConfig(optimizer="muon", lr=0.01))
    theirs = torch.optim.Muon(hidden, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for mine, param in zip(model.parameters(), other.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            param.grad = mine.grad.clone()
        ours.step()
        theirs.step()
    fresh = dict(build_model(ModelConfig(), 0).named_parameters())
    by_muon = {id(param) for group in ours.param_groups if group["use_muon"] for param in group["params"]}
    for (name, mine), param in zip(model.named_parameters(), other.parameters(), strict=True):
        moved = (mine - fresh[name]).norm()
        assert moved > 0
        assert (id(mine) in by_muon) == name.startswith("blocks") * (mine.ndim == 2)
        if id(mine) in by_muon:
            assert (mine - param).norm() < 0.05 * moved, name


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("optimizer", "clip"), [("adamw", "adagc"), ("adamw", "zclip"), ("lion", "global"), ("muon", "adagc")]
)
def test_a_branch_off_a_snapshot_is_the_run_bit_for_bit(optimizer: str, clip: Any, ranks: int, tmp_path: Path) -> None:
    pytest.importorskip("pytorch_optimizer")
    parts: dict[str, Any] = {
        "clip": rule(clip, gamma_init="median"),
        "optim": {"optimizer": optimizer},
    }
    file = tmp_path / "snapshot.pt"
    twin = run(ranks, config(tmp_path / "twin", snapshot=SnapshotConfig(save_at=5, save_to=file), **parts))
    branch = run(ranks, config(tmp_path / "branch", snapshot=SnapshotConfig(from_snapshot=file), **parts))
    assert branch.steps == twin.steps[5:]
    for mine, theirs in zip(branch.tensors, [r for r in twin.tensors if r["step"] > 5], strict=True):
        # Not "levels", "peaks" and "clipped", which tell of the steps before as well.
        assert all(mine[key] == theirs[key] for key in ("step", "norms", "scales", "state"))
    assert branch.validation == twin.validation
    # With a fault: what the whole run with that fault does from there on.
    whole = run(ranks, config(tmp_path / "whole", fault=GARBAGE, **parts))
    faulty = run(ranks, config(tmp_path / "f", fault=GARBAGE, snapshot=SnapshotConfig(from_snapshot=file), **parts))
    assert faulty.steps == whole.steps[5:]
    assert faulty.validation == whole.validation
    assert faulty.steps != branch.steps


def test_snapshots_refuse_what_they_do_not_hold(tmp_path: Path) -> None:
    file = tmp_path / "snapshot.pt"
    run(1, config(tmp_path / "twin", snapshot=SnapshotConfig(save_at=5, save_to=file)))

    def message(ranks: int = 1, **parts: Any) -> str:
        parts.setdefault("snapshot", SnapshotConfig(from_snapshot=file))
        with pytest.raises(WorkerError) as caught:
            run(ranks, config(tmp_path / "branch", **parts))
        return str(caught.value)

    assert "is of another run (seed: 0 there, 1 here)" in message(seed=1)
    assert "ranks: 1 there, 2 here" in message(2)
    assert "--fault-step 5 is over: the snapshot goes on at step 6" in message(fault=FaultConfig("grad", 5, 2))
    assert "need --parallel ddp, got fsdp" in message(2, parallel=ParallelConfig("fsdp"))
    assert "--save-at must be a step of the run" in message(snapshot=SnapshotConfig(save_at=STEPS + 1))


def test_zero_initialised_projections_stop_the_other_blocks_gradients(tmp_path: Path) -> None:
    got = run(1, config(tmp_path, model=ModelConfig(zero_init=True), log={"tensors_every": 1}))
    first, second = got.tensors[0]["norms"], got.tensors[1]["norms"]
    still = {name for name, norm in first.items() if norm == 0}
    assert still == {n for n in first if n.startswith("blocks") and not n.endswith(("wo.weight", "down.weight"))}
    assert all(norm > 0 for norm in second.values())


def test_the_log_has_scales_and_what_the_rule_remembers(tmp_path: Path) -> None:
    got = run(1, config(tmp_path, log={"tensors_every": 1}))
    for step, tensors in zip(got.steps, got.tensors, strict=True):
        scales = tensors["scales"].values()
        assert step["mean_scale"] == pytest.approx(sum(scales) / len(scales), rel=1e-6)
        assert tensors["state"].keys() == tensors["norms"].keys()
    last = got.tensors[-1]
    for name, norm in last["norms"].items():  # AdaGC follows the clipped norm, so no further than 4 % a step
        assert last["state"][name]["gamma"] <= got.tensors[-2]["state"][name]["gamma"] * 1.0004 * (1 + 1e-6)
        assert last["scales"][name] <= min(1.0, 1.04 * got.tensors[-2]["state"][name]["gamma"] / norm) * (1 + 1e-6)


def test_the_second_corpus_is_torchs_hand_written_headers() -> None:
    data = DataConfig(corpus="torch-headers")
    root, paths = data.paths()
    names = {path.relative_to(root).as_posix() for path in paths}
    assert "c10/util/Exception.h" in names
    assert not any(name.startswith("ATen/ops") for name in names)
    corpus = load_corpus(data, 128)
    assert len(corpus.train) > 2e6
    assert len(corpus.validation) > 1e5
    assert corpus.digest != load_corpus(DataConfig(), 128).digest
