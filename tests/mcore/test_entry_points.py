"""What a user starts: the launcher with an unmodified script, the flags, and the training entry point on real text."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dist_clip
from dist_clip import megatron as clipping
from dist_clip.megatron import launcher
from dist_clip.policies import modes, registered
from launch.metrics import read_run
from tests.harness import pool

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "scripts" / "pretrain_small.py"


def torchrun(
    ranks: int, *arguments: Any, timeout: float = 240, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, *arguments]
    return subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


# ---- python -m dist_clip.megatron ------------------------------------------------------------------------------------


def iterations(*arguments: Any) -> list[str]:
    done = torchrun(2, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("and the global norm are right to 1e-05") == arguments.count("--grad-clip-verify")
    return re.findall(r"iteration.*", done.stdout)


SPLIT = ["--tensor-model-parallel-size", 2]


@pytest.fixture(scope="module")
def plain() -> list[str]:
    """What the script prints when nobody has heard of dist_clip."""
    return iterations(SCRIPT, *SPLIT)


@pytest.mark.parametrize("extra", [[], ["--use-distributed-optimizer"]], ids=["fp32", "zero"])
def test_an_unmodified_script(extra: list[str], plain: list[str], tmp_path: Path) -> None:
    flags = ["--grad-clip-mode", "adagc", "--adagc-warmup-steps", 3, "--adagc-lambda-rel", 1.1, "--zipf", 2.5]
    flags += ["--grad-clip-verify"]
    ours = iterations("-m", "dist_clip.megatron", SCRIPT, *SPLIT, *extra, *flags, "--save", tmp_path)
    assert len(plain) == len(ours) == 6
    # The warm-up clips as Megatron does, so the first steps are the same, those of ZeRO-1 too; what the script makes of
    # its own flags, as well.
    assert [line.rsplit(" | ", 1)[0] for line in ours[:4]] == [line.rsplit(" | ", 1)[0] for line in plain[:4]]
    assert all(line.endswith("| 2.5") for line in ours)
    state = torch.load(tmp_path / "rank0.pt", weights_only=False)["dist_clip"]
    assert state["step"] == 6
    policy = json.loads(state["policies"][0])
    assert policy["lambda_rel"] == 1.1
    assert policy["warmup_steps"] == 3
    assert all(entry["gamma"] > 0 for entry in state["tensors"].values())


def test_without_the_mode_nothing_is_changed(plain: list[str]) -> None:
    assert iterations("-m", "dist_clip.megatron", SCRIPT, *SPLIT) == plain != []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "SCRIPT"),
        (["nowhere.py"], "no script 'nowhere.py'"),
        ([str(SCRIPT), "--grad-clip-mode", "adagc", "--zclip-alpha", "0.9"], "--zclip-alpha does not go with"),
        ([str(SCRIPT), "--adagc-beta", "0.9"], "--adagc-beta without --grad-clip-mode"),
        ([str(SCRIPT), "--grad-clip-verify"], "--grad-clip-verify without --grad-clip-mode"),
        ([str(SCRIPT), "--grad-clip-mode", "adagc", "--adagc-beta", "1.5"], "beta must be .* got 1.5"),
        ([str(SCRIPT), "--grad-clip-mode", "median"], "invalid choice: 'median'"),
        ([str(SCRIPT), "--grad-clip-module", "nowhere"], "--grad-clip-module nowhere: cannot be imported"),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        launcher.main(arguments)
    assert stopped.value.code != 0
    out, err = capsys.readouterr()
    assert re.search(message, f"{stopped.value.code} {out} {err}")


def test_a_script_that_makes_no_optimizer_is_an_error(tmp_path: Path) -> None:
    script = tmp_path / "idle.py"
    script.write_text("import sys; print('argv', sys.argv[1:])")
    done = subprocess.run(
        [sys.executable, "-m", "dist_clip.megatron", str(script), "--mine", "1", "--grad-clip-mode", "zclip"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "argv ['--mine', '1']" in done.stdout
    assert done.returncode != 0
    assert "made no optimizer" in done.stderr


def test_megatron_lms_own_parser_gets_the_flags(tmp_path: Path) -> None:
    """megatron.training is no part of the package: a stand-in with the names that Megatron-LM has from core_r0.12 on."""
    training = tmp_path / "megatron" / "training"
    training.mkdir(parents=True)
    (training / "__init__.py").write_text("")
    (training / "arguments.py").write_text(
        "import argparse\n"
        "def add_megatron_arguments(parser):\n"
        "    parser.add_argument('--clip-grad', type=float, default=1.0)\n    return parser\n"
        "def parse_args():\n    return add_megatron_arguments(argparse.ArgumentParser()).parse_args()\n"
    )
    (training / "training.py").write_text(
        "def get_megatron_optimizer(config, model, **kwargs):\n    return 'optimizer'\n"
    )
    script = tmp_path / "pretrain.py"
    script.write_text(
        "from megatron.training.arguments import parse_args\nimport megatron.training.training as t\n"
        "args = parse_args()\nprint(args.clip_grad, args.grad_clip_mode, args.adagc_beta)\n"
        "print(hasattr(t.get_megatron_optimizer, '__dist_clip__'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c",
         "import sys; from dist_clip.megatron.launcher import main; main(sys.argv[1:])",
         str(script), "--clip-grad", "0.5", "--grad-clip-mode", "adagc", "--adagc-beta", "0.98"],
        cwd=tmp_path, capture_output=True, text=True, check=False, env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": ""},
    )  # fmt: skip
    assert done.stdout.split() == ["0.5", "adagc", "0.98", "True"], done.stderr


OWN = """
import dataclasses, dist_clip
@dist_clip.register("halve")
@dataclasses.dataclass(frozen=True)
class Halve(dist_clip.Policy):
    \"\"\"Scale by a half.

    Args:
        strength: how hard.
    \"\"\"
    strength: float = 0.5

    def step(self, state, inputs):
        return inputs.norms * 0 + self.strength, state
"""


def test_a_policy_of_ones_own_beside_the_script(tmp_path: Path) -> None:
    """The module is found beside the script, its flags are taken off, and what is left is the script's."""
    (tmp_path / "my_rules.py").write_text(OWN)
    script = tmp_path / "idle.py"
    script.write_text("import sys; print('argv', sys.argv[1:])")
    command = [sys.executable, "-m", "dist_clip.megatron", str(script), "--grad-clip-module", "my_rules"]

    def launched(*flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True, check=False)

    done = launched("--grad-clip-mode", "halve", "--mine", "1", "--halve-strength", "0.25")
    assert "argv ['--mine', '1']" in done.stdout
    assert "made no optimizer" in done.stderr  # so far it came
    assert "--halve-strength does not go with --grad-clip-mode adagc" in launched(
        "--grad-clip-mode", "adagc", "--halve-strength", "1"
    ).stderr  # fmt: skip


def test_a_policy_of_ones_own_clips_an_unmodified_script(tmp_path: Path) -> None:
    (tmp_path / "my_rules.py").write_text(OWN)
    flags = [
        "--grad-clip-module",
        "my_rules",
        "--grad-clip-mode",
        "halve",
        "--halve-strength",
        "0.25",
        "--save",
        tmp_path,
    ]
    done = torchrun(1, "-m", "dist_clip.megatron", SCRIPT, *flags, environment={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    state = torch.load(tmp_path / "rank0.pt", weights_only=False)["dist_clip"]
    assert json.loads(state["policies"][0]) == {"pattern": "*", "policy": "Halve", "strength": 0.25}


# ---- flags -----------------------------------------------------------------------------------------------------------


def parsed(*flags: str) -> argparse.Namespace:
    return clipping.add_clip_args(argparse.ArgumentParser()).parse_args(flags)


@pytest.mark.parametrize(
    ("flags", "policy"),
    [
        (["--grad-clip-mode", "global"], dist_clip.GlobalNorm(0.5)),
        (["--grad-clip-mode", "adagc"], dist_clip.AdaGC(max_norm=0.5)),
        (
            ["--grad-clip-mode", "adagc-shard", "--adagc-lambda-rel", "1.5", "--adagc-beta", "0.9",
             "--adagc-warmup-steps", "7", "--adagc-gamma-init", "median", "--adagc-eps", "1e-7"],
            dist_clip.AdaGC(1.5, 0.9, 7, 0.5, "shard", "median", 1e-7),
        ),
        (["--grad-clip-mode", "adagc-global"], dist_clip.AdaGC(max_norm=0.5, scope="global")),
        (["--grad-clip-mode", "zclip"], dist_clip.ZClip(max_norm=0.5)),
        (
            ["--grad-clip-mode", "zclip", "--zclip-alpha", "0.9", "--zclip-z-thresh", "3", "--zclip-warmup-steps", "9",
             "--zclip-mode", "percentile", "--zclip-clip-option", "mean", "--zclip-clip-factor", "0.7",
             "--zclip-skip-update-on-spike", "--zclip-eps", "1e-5"],
            dist_clip.ZClip(0.9, 3.0, 9, "percentile", "mean", 0.7, 0.5, True, 1e-5),
        ),
        (["--grad-clip-mode", "zclip-shard"], dist_clip.ZClip(max_norm=0.5, scope="shard")),
        (["--grad-clip-mode", "logclip"], dist_clip.LogClip(max_norm=0.5)),
        (
            ["--grad-clip-mode", "logclip-global", "--logclip-ratio", "3", "--logclip-power", "1", "--logclip-rate", "0.1",
             "--logclip-warmup-steps", "7", "--logclip-warmup-ratio", "10", "--logclip-patience", "30",
             "--logclip-post-max-norm", "2"],
            dist_clip.LogClip(3.0, 1.0, 0.1, 7, 0.5, "global", 10.0, 30, 2.0),
        ),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)  # fmt: skip
def test_flags_make_the_policy(flags: list[str], policy: dist_clip.Policy) -> None:
    assert clipping.policy_from_args(parsed(*flags), 0.5) == policy


def test_every_option_of_a_policy_has_a_flag() -> None:
    args = vars(parsed())
    for name, rule in registered().items():
        flags = {dest.removeprefix(f"{name}_") for dest in args if dest.startswith(f"{name}_")}
        assert flags == set(rule.__dataclass_fields__) - {"scope", "max_norm"}
        own = [
            clipping.policy_from_args(parsed("--grad-clip-mode", mode), 1.0)
            for mode in modes()
            if mode.startswith(name)
        ]
        assert {type(policy) for policy in own} == {rule}
        scopes = {policy.scope for policy in own if policy is not None}
        assert scopes == ({"tensor", "shard", "global"} if "scope" in rule.__dataclass_fields__ else {"global"})


def test_clip_grad_zero() -> None:
    """Megatron's way to switch clipping off."""
    assert clipping.policy_from_args(parsed("--grad-clip-mode", "zclip"), 0.0) == dist_clip.ZClip(max_norm=None)
    with pytest.raises(ValueError, match=r"--clip-grad, which must be above 0, got 0\.0"):
        clipping.policy_from_args(parsed("--grad-clip-mode", "adagc"), 0.0)


def test_no_flags_no_policy() -> None:
    assert clipping.policy_from_args(parsed(), 1.0) is None
    with pytest.raises(ValueError, match="--grad-clip-exclude without --grad-clip-mode"):
        clipping.policy_from_args(parsed("--grad-clip-exclude", "*.bias"), 1.0)


# ---- launch/train_megatron.py ----------------------------------------------------------------------------------------

SMALL = ["--hidden-size", 32, "--seq-length", 64, "--num-layers", 2, "--train-iters", 40, "--grad-clip-mode", "adagc"]
SMALL += ["--adagc-warmup-steps", 10, "--adagc-gamma-init", "median", "--cpu", "--lr", "6e-3", "--micro-batch-size", 4]
TP_PP = ["--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2, "--use-distributed-optimizer"]


def train(ranks: int, *arguments: Any) -> Any:
    done = torchrun(ranks, "-m", "launch.train_megatron", *SMALL, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("tensors and the global norm are right to 1e-05") == arguments.count("--verify")
    assert "differs from rank 0" not in done.stdout + done.stderr, "ranks save different common states"
    return read_run(Path(arguments[arguments.index("--out") + 1]))


def train_here(*arguments: str) -> None:
    """The same in a process that is there already, on this rank."""
    from launch import train_megatron

    from .setups import fresh

    fresh()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_megatron", *arguments])
        train_megatron.train(train_megatron.parse())


def resume(ranks: int, *arguments: Any) -> Any:
    pool(ranks, "megatron").run(train_here, *map(str, (*SMALL, *arguments)), timeout=240)
    return read_run(Path(arguments[arguments.index("--out") + 1]))


def test_training_on_real_text_and_resuming_half_way(tmp_path: Path) -> None:
    """TP2 x PP2, 40 steps; resumed on the same layout it is bitwise the same, and on another it trains the same."""
    save = tmp_path / "ckpt"
    straight = train(4, *TP_PP, "--verify", "--save", save, "--save-interval", 20, "--out", tmp_path / "straight")
    losses = straight.series("loss")
    assert len(losses) == 40
    assert losses[0] > 5
    assert sum(losses[-10:]) / 10 < 3.6, "nats per byte: it learns"
    assert max(straight.series("clipped_fraction")[10:]) > 0
    assert straight.header["policy"]["policy"] == "AdaGC"
    (save / "latest_checkpointed_iteration.txt").write_text("20")
    same = resume(4, *TP_PP, "--load", save, "--out", tmp_path / "same")
    assert same.series("loss") == losses[20:]
    assert same.series("grad_norm") == straight.series("grad_norm")[20:]
    assert same.series("smallest_scale") == straight.series("smallest_scale")[20:]
    other = resume(2, "--use-distributed-optimizer", "--load", save, "--out", tmp_path / "other")
    assert other.series("loss") == pytest.approx(losses[20:], abs=1e-4)
    assert other.series("grad_norm") == pytest.approx(straight.series("grad_norm")[20:], rel=1e-3)
    assert other.validation[-1]["loss"] == pytest.approx(straight.validation[-1]["loss"], abs=1e-4)


def test_a_mixture_of_experts(tmp_path: Path) -> None:
    moe = ["--num-experts", 4, "--expert-model-parallel-size", 2, "--use-distributed-optimizer"]
    run = train(2, *moe, "--bf16", "--verify", "--train-iters", 20, "--out", tmp_path)
    assert run.series("loss")[-1] < run.series("loss")[0] - 1
    assert sum("experts" in name for name in run.tensors[0]["norms"]) == 2 * 4 * 2  # layers x experts x matrices


def test_megatrons_own_clipping_is_the_default(tmp_path: Path) -> None:
    done = torchrun(
        1, "-m", "launch.train_megatron", "--cpu", "--train-iters", 4, "--out", tmp_path, "--hidden-size", 32
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_run(tmp_path).header["policy"]["policy"] == "Megatron's own"
    assert all(norm > 0 for norm in read_run(tmp_path).series("grad_norm"))
