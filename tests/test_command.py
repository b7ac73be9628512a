"""The command dist-clip: the report of a run with a fault names its culprit first, opens in a browser, and can be read."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tyro")
pytest.importorskip("plotly")
pytest.importorskip("tqdm")

import dist_clip
from dist_clip.command.app import main
from dist_clip.command.explain import explain
from dist_clip.command.figures import faults, heat, thinned
from dist_clip.command.page import render
from dist_clip.command.summary import events_of, summarize
from dist_clip.monitor import Run, read_run
from launch.clipping import ClipConfig
from launch.faults import FaultConfig
from launch.metrics import LogConfig
from launch.optim import OptimConfig
from launch.parallel import ParallelConfig
from launch.train import Config, train
from tests.harness import pool

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CULPRIT = "blocks.1.mlp.up.weight"
FAULT = FaultConfig(fault="grad", fault_step=120, fault_steps=3, fault_tensor=CULPRIT)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on two ranks of FSDP2, with garbage in one tensor's gradient at steps 120 to 122."""
    out = tmp_path_factory.mktemp("fault") / "fsdp"
    cfg = Config(
        optim=OptimConfig(steps=130, batch_size=4, validation_batches=1),
        clip=ClipConfig(clip="logclip", guard=("skipabove",), guard_options={"skipabove_max_norm": 2e6}),
        parallel=ParallelConfig("fsdp"),
        fault=FAULT,
        log=LogConfig(out=out, tensors_every=10, tensorboard=False, plot=False, progress=False),
    )
    pool(2).run(train, cfg, torch.device("cpu"))
    return out


@pytest.fixture(scope="module")
def page(faulty: Path) -> Path:
    main(["report", str(faulty)])
    return faulty / "report.html"


def test_the_culprit_of_a_fault_is_named_first(faulty: Path, page: Path) -> None:
    run = read_run(faulty)
    worst = summarize(run).events[0]
    assert (worst.first, worst.last) == (120, 122)
    assert worst.culprits[0]["name"] == CULPRIT
    assert worst.culprits[0]["ratio"] > 1e3
    assert {"tensor"} <= set(worst.reasons)
    text = page.read_text(encoding="utf-8")
    table = text[text.index('<section id="spikes">') :]
    first = re.search(r"<code>(.*?)</code>", table)
    assert first is not None
    assert first[1] == CULPRIT
    assert faults(run) == [(120, 122)]


def test_compare_names_the_worst_culprit(faulty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["compare", str(faulty), str(faulty / "log.jsonl")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["run", "rule", "steps"]
    for line in lines[2:4]:
        assert "LogClip" in line
        assert "130" in line
        assert CULPRIT in line


# ---- in a browser ----------------------------------------------------------------------------------------------------

CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (css) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = css; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (c) => {
    const [r, g, b] = c.slice(0, 3).map((v) => v / 255).map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const found = rgb(getComputedStyle(e).backgroundColor);
      if (found[3] > 250) return found;
    }
    return [255, 255, 255, 255];
  };
  const out = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !element.checkVisibility() || ["SCRIPT", "STYLE"].includes(element.tagName)) continue;
    const style = getComputedStyle(element), svg = element instanceof SVGElement;
    const [a, b] = [light(rgb(svg ? style.fill : style.color)), light(behind(element))];
    out.push([element.textContent.trim().slice(0, 40), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]);
  }
  return out;
}"""
"""The contrast of every piece of text with what is behind it, as WCAG defines it."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def opened(browser: Any, page: Path) -> Iterator[Callable[..., Any]]:
    """Opens the page in a mode. At the end, nothing may have been complained of, or asked for."""
    complaints: list[str] = []

    def open_(mode: str) -> Any:
        tab = browser.new_context(color_scheme=mode, viewport={"width": 1200, "height": 900}).new_page()
        tab.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: None if request.url.startswith("file:") else complaints.append(request.url))
        tab.goto(page.as_uri())
        tab.wait_for_selector("#clipped .main-svg")
        return tab

    yield open_
    assert complaints == []


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_the_page_opens_and_can_be_read(opened: Callable[..., Any], mode: str) -> None:
    tab = opened(mode)
    assert tab.title() == "fsdp: dist-clip report"
    for plot in ("course", "heat", "clipped"):
        box = tab.locator(f"#{plot} .main-svg").first.bounding_box()
        assert box["width"] > 800
        assert box["height"] > 150
    assert tab.locator("#course .scatterlayer .trace").count() >= 5
    # Plotly draws a heat map as an image.
    assert tab.locator("#heat .heatmaplayer image").count() == 1
    assert tab.locator("#clipped .barlayer path").count() >= 3
    assert tab.locator("#spikes li code").first.inner_text() == CULPRIT
    assert tab.evaluate("document.documentElement.dataset.mode") == mode
    texts = tab.evaluate(CONTRAST)
    assert len(texts) > 60
    assert [text for text in texts if text[1] < 4.5] == []
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_its_buttons_work(opened: Callable[..., Any]) -> None:
    tab = opened("light")
    tab.click("#mode")
    assert tab.evaluate("document.documentElement.dataset.mode") == "dark"
    assert min(text[1] for text in tab.evaluate(CONTRAST)) >= 4.5
    before = tab.evaluate(
        "[document.getElementById('heat').data[0].z[3][3], document.getElementById('heat').layout.yaxis.categoryarray]"
    )
    tab.click("[data-heat=norms]")
    tab.click("[data-rows='by kind']")
    after = tab.evaluate(
        "[document.getElementById('heat').data[0].z[3][3], document.getElementById('heat').layout.yaxis.categoryarray]"
    )
    assert before[0] != after[0]
    assert before[1] != after[1]
    assert sorted(before[1]) == sorted(after[1])
    kinds = [name.partition(".")[2].partition(".")[2] for name in after[1] if name.startswith("blocks")]
    assert kinds == sorted(kinds, key=kinds.index)
    assert len([i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]]) == len(set(kinds)) - 1
    # A cell says what it is about.
    box = tab.locator("#heat .heatmaplayer image").bounding_box()
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tab.wait_for_selector("#heat .hoverlayer text")
    assert "norm / level" in tab.locator("#heat .hoverlayer").text_content()


# ---- by hand ---------------------------------------------------------------------------------------------------------


def steps(losses: list[float], **more: Any) -> list[dict[str, Any]]:
    usual = {"grad_norm": 1.0, "grad_norm_clipped": 1.0, "clipped_fraction": 0.0, "skipped": False, "nonfinite": False}
    return [{"kind": "step", "step": i, "loss": loss, **usual, **more} for i, loss in enumerate(losses, start=1)]


def spike(step: int, name: str, ratio: float | None, reason: str = "tensor") -> dict[str, Any]:
    culprit = {"name": name, "norm": ratio, "level": 1.0, "ratio": ratio, "scale": 0.1}
    return {"kind": "spike", "step": step, "reasons": [reason], "culprits": [culprit]}


def test_spikes_are_joined_to_events_the_worst_first() -> None:
    found = [spike(3, "a", 20.0), spike(9, "b", 30.0, "loss"), spike(16, "c", 500.0), spike(17, "a", None)]
    run = Run({}, steps([2.0] * 8 + [3.0] + [2.0] * 11), [], [], None, found)
    events = events_of(run)
    assert [(event.first, event.last) for event in events] == [(3, 9), (16, 17)]
    assert [culprit["name"] for culprit in events[0].culprits] == ["b", "a"]
    assert events[0].reasons == ("tensor", "loss")
    assert (events[0].loss, events[0].grad_norm) == (3.0, 1.0)
    assert [event.first for event in summarize(run).events] == [16, 3]
    assert summarize(run).events[0].size == math.inf


def test_a_log_without_spikes_is_searched_for_them() -> None:
    losses = [2.0 + 0.01 * (-1) ** i for i in range(140)]
    losses[135] = 9.0
    records = steps(losses)
    records[30]["skipped"] = True
    run = Run({"policy": {"policy": "GlobalNorm", "max_norm": 1.0}}, records, [], [], None)
    assert [(event.first, event.reasons) for event in events_of(run)] == [(31, ("skipped",)), (136, ("loss",))]
    page = render(run, "an <older> log")
    assert "an &lt;older&gt; log" in page
    assert "no tensor stands out" in page
    assert "The log has no tables of tensors" in page
    with pytest.raises(ValueError, match="the log has no steps yet"):
        render(Run({}, [], [], [], None), "empty")


def test_long_runs_are_thinned_out_but_keep_their_extremes() -> None:
    values = [0.0] * 50_000
    values[12_345], values[40_001] = 7.0, -3.0
    kept = thinned(values)
    assert len(kept) <= 4100
    assert {0, 12_345, 40_001, 49_999} <= set(kept)
    assert thinned([1.0, 2.0]) == [0, 1]


def test_the_heat_map_joins_what_is_too_much() -> None:
    def table(step: int) -> dict[str, Any]:
        names = [f"layers.{i}.{kind}.weight" for i in range(150) for kind in ("q", "k", "v")]
        peaks = [8.0 if (name, step) == ("layers.7.k.weight", 33) else 1.0 for name in names]
        return {
            "step": step,
            "norms": dict.fromkeys(names, 1.0),
            "scales": dict.fromkeys(names, 0.5),
            "levels": [1.0] * 450,
            "peaks": peaks,
            "clipped": [1] * 450,
            "steps": 1,
        }

    found = heat(Run({}, [], [table(step) for step in range(1, 501)], [], None))
    assert found is not None
    (trace,) = found[0].data
    assert list(trace.y) == [f"layer {i}" for i in range(150)]
    assert len(trace.x) <= 240
    assert max(trace.z[7]) == 3.0  # log2 of 8
    assert max(max(row) for i, row in enumerate(trace.z) if i != 7) == 0.0
    assert trace.customdata[0][0][4] == "9 of 9"  # three steps of three tensors


def test_explain_says_what_options_do(tmp_path: Path, capsys: pytest.CaptureFixture[str], faulty: Path) -> None:
    text = explain("logclip ratio=3")
    assert text.startswith("LogClip: Clipping per tensor to a multiple of the tensor's usual norm")
    (ratio,) = [line for line in text.splitlines() if line.startswith("ratio ")]
    assert ratio.split()[:3] == ["ratio", "3", "2"]
    assert "how far above its level a norm may go" in ratio
    assert explain('{"name": "logclip", "ratio": 3}') == text
    (tmp_path / "config.json").write_text(
        json.dumps({"policy": {"name": "logclip", "ratio": 3}, "guard": ["skipstep"]})
    )
    assert explain(str(tmp_path / "config.json")) == text + "\n\n" + explain("skipstep")
    assert explain(str(faulty)).startswith(explain("logclip"))
    assert "SkipAbove" in explain(str(faulty))
    main(["explain"])
    shown = capsys.readouterr().out
    chosen = dist_clip.recommended()
    assert type(chosen["policy"]).__name__ in shown
    assert type(chosen["guard"]).__name__ in shown


def test_doctor_tries_a_clip(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    main(["doctor"])
    shown = capsys.readouterr().out
    assert torch.__version__ in shown
    assert re.search(r"^  cpu +.*: works; kernels: ", shown, re.MULTILINE)
    monkeypatch.setattr(dist_clip.GradClipper, "clip_", lambda self: (_ for _ in ()).throw(RuntimeError("no luck")))
    with pytest.raises(SystemExit) as stopped:
        main(["doctor"])
    assert stopped.value.code == 1
    assert "RuntimeError: no luck" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "/nonexistent/run"], "dist-clip: .*No such file"),
        (["compare", "/nonexistent/run"], "dist-clip: compare takes two runs or more"),
        (["explain", "nothing"], "dist-clip: no policy is called 'nothing'"),
        (["explain", "logclip reach=3"], "dist-clip: logclip has no option reach"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(arguments)


@pytest.mark.parametrize(("module", "message"), [("tyro", "dist-clip needs tyro"), ("plotly.offline", "needs plotly")])
def test_packages_that_are_missing_are_named(
    module: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, [{"kind": "run"}, *steps([1.0])])))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=message):
        main(["report", str(tmp_path)])


def test_verify_compares_norms_with_whole_gradients(capsys: pytest.CaptureFixture[str]) -> None:
    main(["verify", "--ranks", "2"])
    text = capsys.readouterr().out
    assert text.startswith("FSDP2 on 2 processes, gloo on cpu\n")
    assert "verify: all 3 tensors and the global norm are right" in text
    with pytest.raises(SystemExit, match="verify needs at least one rank, got 0"):
        main(["verify", "--ranks", "0"])


def test_verify_exits_with_1_where_a_norm_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dist_clip.command.verify.verify_here", lambda ranks: (f"wrong on {ranks}", False))
    with pytest.raises(SystemExit) as raised:
        main(["verify", "--ranks", "3"])
    assert raised.value.code == 1
    assert capsys.readouterr().out == "wrong on 3\n"
