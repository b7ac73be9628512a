"""dist_clip in torchtitan's own trainer. scripts/test_torchtitan.sh runs this; CI has no torchtitan."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import harness
import pytest
import torch

pytest.importorskip("torchtitan")

ADAGC = {"policy": {"name": "adagc", "gamma_init": "median", "warmup_steps": 6}}
SKIPPING = {"policy": "logclip max_norm=0.73", "guard": "skipabove max_norm=1.5"}
LAYOUTS = {
    "fsdp": ["--parallelism.data_parallel_shard_degree", "2"],
    "tp": ["--parallelism.tensor_parallel_degree", "2"],
    "pp": ["--parallelism.pipeline_parallel_degree", "2"],
}
MORE_LAYOUTS = {
    "ddp": ["--parallelism.data_parallel_replicate_degree", "2", "--parallelism.data_parallel_shard_degree", "1"],
    "interleaved": [*LAYOUTS["pp"], "--parallelism.pipeline_parallel_schedule", "Interleaved1F1B"],
    "fsdp+tp": [*LAYOUTS["fsdp"], *LAYOUTS["tp"]],
    "fsdp+pp": [*LAYOUTS["fsdp"], *LAYOUTS["pp"]],
}
CHECKPOINTS = ["--checkpoint.enable"]


def run(size: int, function: str, *args: Any, **kwargs: Any) -> list[Any]:
    """Call a function of runs.py on `size` ranks, which torchtitan's changes to the process concern alone."""
    return harness.pool(size, "torchtitan").run(_call, function, args, kwargs)


def _call(function: str, args: Any, kwargs: Any) -> Any:
    from . import runs

    return getattr(runs, function)(*args, **kwargs)


def train(size: int, way: str, folder: Path, clip: Any = None, *arguments: str, **kwargs: Any) -> list[Any]:
    return run(size, "train", way, str(folder), clip, *arguments, **kwargs)


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Parameters and the optimizer's state are bitwise the same."""
    assert found["parameters"].keys() == wanted["parameters"].keys()
    for name, value in wanted["parameters"].items():
        assert torch.equal(found["parameters"][name], value), name
    assert len(found["moments"]) == len(wanted["moments"]) > 0
    assert all(map(torch.equal, found["moments"], wanted["moments"]))


@pytest.mark.parametrize("way", ["override", "trainer"])
@pytest.mark.parametrize(
    ("clip", "accumulate"), [(ADAGC, 1), (ADAGC, 2), (SKIPPING, 1)], ids=["", "accumulate", "skips"]
)
def test_one_process_is_a_plain_loop(way: str, clip: Any, accumulate: int, tmp_path: Path) -> None:
    batch = ["--training.global_batch_size", str(4 * accumulate)]
    [found] = train(1, way, tmp_path, clip, *batch)
    [wanted] = run(1, "plain_loop", clip, accumulate=accumulate)
    assert_same(found, wanted)
    assert len(found["reports"]) == len(wanted["reports"]) == 12
    for mine, plain in zip(found["reports"], wanted["reports"], strict=True):
        assert torch.equal(mine["scales"], plain["scales"])
        assert mine["skip"] == plain["skip"]
    assert any((mine["scales"] < 1).any() for mine in found["reports"])
    assert any(mine["skip"] for mine in found["reports"]) == (clip is SKIPPING)


@pytest.mark.parametrize("layout", [None, *LAYOUTS, *MORE_LAYOUTS])
def test_a_global_clip_is_torchtitans_own(layout: str | None, tmp_path: Path) -> None:
    """The oracle is torchtitan with --training.max_norm, in which dist_clip has no part."""
    arguments = {**LAYOUTS, **MORE_LAYOUTS}.get(layout or "", [])
    size = 1 if layout is None else 4 if "+" in layout else 2
    native = train(size, "plain", tmp_path / "native", None, *arguments, "--training.max_norm", "0.73")
    for way in ["trainer"] if LAYOUTS["pp"][0] in arguments else ["override", "trainer"]:
        ours = train(size, way, tmp_path / way, {"policy": "global max_norm=0.73"}, *arguments)
        for rank in range(size):
            for mine, theirs in zip(ours[rank]["logged"], native[rank]["logged"], strict=True):
                assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-6)
            for name, value in native[rank]["parameters"].items():
                torch.testing.assert_close(ours[rank]["parameters"][name], value, rtol=0, atol=1e-6)
    norms = [row["grad_norm"] for row in native[0]["logged"]]
    assert max(norms) > 0.8  # something was clipped


@pytest.mark.parametrize("way", ["override", "trainer"])
@pytest.mark.parametrize("layout", [None, *LAYOUTS])
def test_resuming_is_exact(layout: str | None, way: str, tmp_path: Path) -> None:
    """Within AdaGC's warm-up of 6 steps, and after it. torchtitan makes the optimizers' states by steps that are none."""
    if (layout, way) == ("pp", "override"):
        pytest.skip("the override does not know the pipeline's group")
    size, arguments = (1, []) if layout is None else (2, LAYOUTS[layout])
    arguments = [*arguments, *CHECKPOINTS, *(["--checkpoint.async_mode", "async"] if layout == "fsdp" else [])]
    clip = {**ADAGC, "guard": "median"}
    whole = train(size, way, tmp_path / "whole", clip, *arguments)
    for step in (4, 8):
        folder = tmp_path / f"from{step}"
        shutil.copytree(tmp_path / "whole/checkpoint" / f"step-{step}", folder / "checkpoint" / f"step-{step}")
        resumed = train(size, way, folder, clip, *arguments)
        for found, wanted in zip(resumed, whole, strict=True):
            assert found["steps_at_load"] == step
            assert len(found["reports"]) == 12 - step
            assert_same(found, wanted)
            for mine, before in zip(found["reports"], wanted["reports"][step:], strict=True):
                assert torch.equal(mine["scales"], before["scales"])
            assert found["state"]["step"] == wanted["state"]["step"] == 12
            assert repr(found["state"]) == repr(wanted["state"])


def test_the_native_clip_is_refused(tmp_path: Path) -> None:
    text = r"torchtitan clips too, with --training\.max_norm=1\.0.*Set --training\.max_norm=inf"
    for way in ("override", "trainer"):
        with pytest.raises(harness.WorkerError, match=text):
            train(1, way, tmp_path, ADAGC, "--training.max_norm", "1.0")


def test_one_clip_and_not_two(tmp_path: Path) -> None:
    with pytest.raises(harness.WorkerError, match="ClipTrainer clips already"):
        train(1, "trainer", tmp_path, ADAGC, overrides=("dist_clip.torchtitan.clip",))


@pytest.mark.parametrize("way", ["override", "trainer"])
def test_what_is_logged(way: str, tmp_path: Path) -> None:
    """grad_norm is the norm before the clip."""
    [found] = train(1, way, tmp_path, ADAGC)
    assert len(found["logged"]) == len(found["reports"]) == 12
    for row, report in zip(found["logged"], found["reports"], strict=True):
        norm = math.sqrt(sum(float(each) ** 2 for each in report["norms"]))
        after = math.sqrt(sum(float(a * b) ** 2 for a, b in zip(report["norms"], report["scales"], strict=True)))
        assert row["grad_norm"] == row["clip/grad_norm"] == pytest.approx(norm)
        assert row["clip/grad_norm_after"] == pytest.approx(after)
        assert row["clip/min_scale"] == pytest.approx(float(report["scales"].min()))
        assert row["clip/fraction"] == pytest.approx(float((report["scales"] < 1).float().mean()))
        assert row["clip/skipped"] == row["clip/nonfinite"] == 0
    assert any(row["clip/grad_norm_after"] < row["grad_norm"] for row in found["logged"])


@pytest.mark.parametrize("way", ["override", "trainer"])
def test_an_inf_stays_in_its_tensor(way: str, tmp_path: Path) -> None:
    """torchtitan's own clip at max_norm=inf, if it ran before ours, would make all gradients NaN."""
    name = "layers.0.feed_forward.w2.weight"
    [found] = train(1, way, tmp_path, {**ADAGC, "nonfinite": "zero"}, spoil={3: name})
    report = found["reports"][2]
    faulty = [each for each, norm in zip(report["names"], report["norms"], strict=True) if not norm.isfinite()]
    assert faulty == [name]
    assert all(value.isfinite().all() for value in found["parameters"].values())


@pytest.mark.parametrize("way", ["override", "trainer"])
def test_a_run_that_begins_to_clip(way: str, tmp_path: Path) -> None:
    """A checkpoint without a clipper's state goes on with one, and is then resumed as usual."""
    train(1, "plain", tmp_path, None, *CHECKPOINTS, "--training.steps", "4")
    with pytest.raises(harness.WorkerError, match="dist_clip"):
        train(1, way, tmp_path, ADAGC, *CHECKPOINTS, "--training.steps", "8")
    fresh = ADAGC if way == "trainer" else {**ADAGC, "fresh": True}
    arguments = ["--checkpoint.exclude_from_loading", "dist_clip"] if way == "trainer" else []
    [found] = train(1, way, tmp_path, fresh, *CHECKPOINTS, *arguments, "--training.steps", "8")
    assert found["state"]["step"] == 4
    [found] = train(1, way, tmp_path, ADAGC, *CHECKPOINTS)
    assert found["steps_at_load"] == 4
    assert found["state"]["step"] == 8


def test_a_pipeline_needs_the_trainer(tmp_path: Path) -> None:
    with pytest.raises(harness.WorkerError, match=r"dist_clip\.torchtitan\.ClipTrainer knows"):
        train(2, "override", tmp_path, ADAGC, *LAYOUTS["pp"])


@pytest.mark.parametrize("layout", [None, *LAYOUTS])
def test_guards_see_the_loss_that_is_logged(layout: str | None, tmp_path: Path) -> None:
    """Summed over ranks and micro-batches by torchtitan; the same under every layout."""
    size, arguments = (1, []) if layout is None else (2, LAYOUTS[layout])
    ranks = 2 if layout == "fsdp" else 1
    batch = ["--training.global_batch_size", str(4 * ranks * (2 if layout != "pp" else 1))]
    found = train(size, "trainer", tmp_path, {"policy": "logclip", "guard": "skipstep window=12"}, *arguments, *batch)
    logged = [row["loss_metrics/global_avg_loss"] for row in found[-1]["logged"]]
    for rank in found:
        seen = rank["state"]["guards"]["0"]["model"]["losses"]
        assert seen.tolist() == pytest.approx(logged, rel=1e-6)


def test_the_page_s_samples_run(tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "docs/frameworks/torchtitan.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:bash|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        [row] = run(1, "follow_the_page", block, str(tmp_path))
        assert row["step"] == 3
        assert row["clip/grad_norm"] == row["grad_norm"] > 0


def test_examples_in_docstrings_run() -> None:
    assert run(1, "run_docstrings")[0] > 10
