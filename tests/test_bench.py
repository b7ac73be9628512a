"""scripts/bench.py: a quick run in a process of its own, tables that say what the JSON says, a baseline that is the rule.

No time is asserted: on a shared machine any bound fails now and then. Counts are, as they do not depend on the machine.
The baseline's arithmetic is fp32 and the reference's float64: 1e-5 after 12 steps.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")
pytest.importorskip("zclip")
pytest.importorskip("pytorch_optimizer")

from dist_clip.policies import registered
from scripts.bench import SECTIONS
from scripts.benchmark import gpu
from scripts.benchmark.local import FLOOR, TORCH
from scripts.benchmark.official import OfficialSchedule, Piece
from scripts.benchmark.output import MARKERS, markdown
from scripts.benchmark.processes import OFFICIAL
from scripts.benchmark.timing import Candidate, Timing, count, interleaved, peak_bytes, ratio_rows
from tests import reference
from tests.harness import pool

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/performance.md"
RECORDED = {"cpu": ROOT / "docs/data/bench/bench.json", "cuda": ROOT / "docs/data/bench/bench-cuda.json"}
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a quick run."""
    out = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "scripts.bench", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def rows(results: dict[str, Any], section: str) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in results["sections"][section]["rows"]}


def test_a_quick_run_has_every_section(quick: Path) -> None:
    results = load(quick / "bench.json")
    assert list(results["sections"]) == list(SECTIONS)
    for name, section in results["sections"].items():
        assert section["rows"], name
        for row in section["rows"]:
            assert set(section["columns"]) <= set(row), name
    for key in ("torch", "dist_clip", "zclip", "pytorch_optimizer", "threads", "cores", "load_low", "load_high"):
        assert key in results["meta"], key
    assert {TORCH, FLOOR, "AdaGC, 5 % clipped"} <= set(rows(results, "gpt2"))
    for cls in registered().values():
        assert f"{cls.__name__}, 0 % clipped" in rows(results, "gpt2")
        assert f"{cls.__name__}, 100 % clipped" in rows(results, "gpt2")
        for section in ("costs", "dtensor", "tensor_parallel", "end_to_end"):
            assert cls.__name__ in rows(results, section)
    assert (quick / "tables.md").read_text() == markdown(results)
    for plot in ("bench-local.png", "bench-dtensor.png", "bench-tensor-parallel.png"):
        assert (quick / plot).stat().st_size < 150_000


def test_counts_of_a_quick_run(quick: Path) -> None:
    """What does not depend on the machine."""
    results = load(quick / "bench.json")
    parallel = rows(results, "tensor_parallel")
    tensors = results["sections"]["tensor_parallel"]["facts"]["tensors"]
    assert parallel[OFFICIAL]["collectives"] == tensors + 1
    assert parallel["AdaGC"]["collectives"] == 1
    assert parallel['AdaGC scope="shard"']["collectives"] == 0
    watched = rows(results, "desync")
    assert watched["detect_desync=True"]["collectives"] == watched["without"]["collectives"]
    state = {name: row["state_bytes_per_tensor"] for name, row in rows(results, "costs").items()}
    assert all(state[name] <= 16 for name in ("AdaGC", "LogClip", 'AdaGC scope="global"'))


# ---- every number in the tables is one of the JSON's -----------------------------------------------------------------


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for part in value.values():
            yield from leaves(part)
    elif isinstance(value, list):
        for part in value:
            yield from leaves(part)
    else:
        yield value


def numbers(text: str) -> list[float]:
    return [float(found.replace(",", "").rstrip(",")) for found in NUMBER.findall(text)]


def unaccounted(text: str, results: dict[str, Any]) -> list[float]:
    """Numbers of the text that are neither in a string of the JSON nor, to the digits shown, one of its numbers."""
    known: set[float] = set()
    values = []
    for leaf in [*leaves(results), *(s["columns"] for s in results["sections"].values())]:
        if isinstance(leaf, str):
            known |= set(numbers(leaf))
        elif isinstance(leaf, (int, float)):
            values.append(float(leaf))

    def shown(number: float) -> bool:
        return number in known or any(abs(number - value) <= 0.0051 * abs(value) for value in values)

    return [number for number in numbers(text) if not shown(number)]


def test_every_number_comes_from_the_json(quick: Path) -> None:
    results = load(quick / "bench.json")
    text = (quick / "tables.md").read_text()
    body = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    assert len(numbers(body)) > 200
    assert unaccounted(body, results) == []
    assert unaccounted(body + "\n| 123456.5 |", results) == [123456.5], "the check is blind"


def test_the_table_shows_the_row_it_is_about(quick: Path) -> None:
    results = load(quick / "bench.json")
    results["sections"]["gpt2"]["rows"][0]["wall_ms"] = 123456.0
    changed = [line for line in markdown(results).splitlines() if "123,456" in line]
    assert len(changed) == 1
    assert results["sections"]["gpt2"]["rows"][0]["name"] in changed[0]


NOT_RUN_YET = ("gpu_published_many", "gpu_published_one")
"""Sections for which there was no GPU since they were written. docs/performance.md says so."""


@pytest.mark.pages
@pytest.mark.parametrize("device", RECORDED)
def test_the_page_shows_what_was_recorded(device: str) -> None:
    recorded = load(RECORDED[device])
    assert not recorded["meta"]["quick"]
    sections = SECTIONS if device == "cpu" else [name for name in gpu.SECTIONS if name not in NOT_RUN_YET]
    assert list(recorded["sections"]) == list(sections)
    begin, end = MARKERS[device]
    pasted = PAGE.read_text().split(begin)[1].split(end)[0]
    assert pasted.strip() == markdown(recorded).strip()


# ---- the official schedule --------------------------------------------------------------------------------------------

STEPS, WARMUP = 12, 4
SHAPES = {"w": (8, 6), "norm": (6,), "v": (4, 4)}
SHARDED = {"w": True, "norm": False, "v": True}


def whole_gradient(name: str, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + list(SHAPES).index(name))
    size = 8.0 if step in (WARMUP + 3, WARMUP + 6) and name != "norm" else 1.0
    return size * torch.randn(SHAPES[name], generator=generator)


def official_steps() -> list[dict[str, list[list[float]] | list[float]]]:
    """On one of the ranks: clipped pieces after each step."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    params = {}
    for name, shape in SHAPES.items():
        local = (shape[0] // world, *shape[1:]) if SHARDED[name] else shape
        params[name] = torch.zeros(local, requires_grad=True)
    rule = OfficialSchedule([Piece(params[n], SHARDED[n]) for n in SHAPES], warmup_steps=WARMUP, max_norm=2.0)
    out = []
    for step in range(1, STEPS + 1):
        for name, param in params.items():
            whole = whole_gradient(name, step)
            param.grad = whole.chunk(world)[rank].clone() if SHARDED[name] else whole
        rule.step()
        out.append({name: param.grad.tolist() for name, param in params.items()})  # type: ignore[union-attr]
    return out


@pytest.mark.parametrize("world", [1, 2])
def test_the_official_schedule_is_the_rule(world: int) -> None:
    ranks = pool(world).run(official_steps)
    rule = reference.AdaGC(warmup_steps=WARMUP, max_norm=2.0)
    clipped_after_warmup = 0
    for step in range(1, STEPS + 1):
        grads = {name: whole_gradient(name, step) for name in SHAPES}
        scales = rule.scales({name: reference.l2_norm(grad) for name, grad in grads.items()})
        clipped_after_warmup += step > WARMUP and min(scales.values()) < 1
        for name, grad in grads.items():
            pieces = [torch.tensor(rank[step - 1][name]) for rank in ranks]
            got = torch.cat(pieces) if SHARDED[name] else pieces[0]
            torch.testing.assert_close(got, grad * scales[name], rtol=1e-5, atol=1e-6, msg=f"step {step}: {name}")
            if not SHARDED[name]:
                assert all(torch.equal(piece, pieces[0]) for piece in pieces)
    assert clipped_after_warmup >= 2, "the data does not reach the rule"


# ---- how things are measured ------------------------------------------------------------------------------------------


def test_repeats_are_interleaved_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []
    candidates = {n: Candidate(lambda n=n: calls.append(n), lambda n=n: calls.append(f"({n})")) for n in "ab"}  # type: ignore[misc]
    assert set(interleaved(candidates, 2)) == {"a", "b"}
    assert calls == ["(a)", "a", "(b)", "b"] * 3


def test_ratios() -> None:
    table = ratio_rows({"slow": Timing(8.0, 6.0), "fast": Timing(2.0, 3.0)}, reference="slow", floor="fast")
    assert table[1] == {
        "name": "fast", "wall_ms": 2.0, "cpu_ms": 3.0, "wall_ratio": 0.25, "cpu_ratio": 0.5, "floor_ratio": 1.0
    }  # fmt: skip
    assert table[0]["floor_ratio"] == 2.0


def test_operators_are_counted_without_views() -> None:
    x = torch.zeros(4, 4)
    assert count(lambda: x.view(-1).t().add(1).mul_(2)).operators == 2


def test_peak_memory() -> None:
    def run() -> None:
        first = torch.zeros(1000)
        del first
        torch.zeros(2000) + 1

    assert 16_000 <= peak_bytes(run) < 20_000
