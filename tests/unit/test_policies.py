"""Every policy through GradClipper on plain parameters, against the reference in plain Python floats (tests/reference.py).

Covers: GlobalNorm, AdaGC (three scopes, four gamma_init), LogClip (three scopes, with and without the global clip after
the rule), ZClip (three scopes, its modes, with and without max_norm, clip_factor, skip_update_on_spike), AutoClip and AGC
(three scopes) and MeasureOnly over 160 steps
of gradients set by hand: random norms, spikes, zeros, missing gradients, NaN, Inf, values of 1e-30 and 1e30; each way to
treat non-finite gradients; tensors that start with zero gradients; tensors first seen late; and what LogClip's constants
guarantee, as docs/algorithms.md derives it.

Tolerances: 1e-6 relative for norms, scales and state, which are fp32 scalars (half an ulp is 6e-8). AdaGC's reference
rounds gamma to fp32 after each step, as one fp32 scalar of state demands: without that the EMA itself wanders by up to
1e-6 in 100 steps. Gradients get 2e-6, because a scale within 1e-6 meets two more fp32 roundings. LogClip's level is a
product of moves of bounded size, so that a rounding to the other neighbour stays until norms within the bound take it
back: 2e-6, and its scale is a power of the level.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dist_clip
from dist_clip.memory.snapshot import snapshot
from dist_clip.policies import Policy, State, StepInputs
from tests import reference

RTOL = 1e-6
GRAD_RTOL = 2e-6
SUBNORMAL = 1e-38  # an fp32 gradient scaled to below this may lose bits or become 0
SHAPES = {"embed.weight": (7, 3), "attn.proj": (4, 4), "norm.bias": (5,), "scalar": (1,), "conv.kernel": (2, 3, 2)}
STEPS = 110
WARMUP = 20

Norms = dict[str, float]  # tensors with a gradient, by name
Scales = dict[str, float]


class Reference:
    """The rule of tests/reference.py with a policy's settings."""

    def __init__(self, policy: Any) -> None:
        self.rule = rule = reference.rule_of(policy)
        self.state_rtol = 2 * RTOL if isinstance(rule, reference.LogClip) else RTOL
        self.scale_rtol = self.state_rtol * max(1.0, getattr(rule, "power", 1.0))
        self.once = isinstance(rule, reference.OnceToN | reference.ZClip)
        self.names: set[str] = set()

    def step(self, norms: Norms) -> Scales:
        self.names |= norms.keys()
        return dict(self.rule.scales(norms))

    def state(self) -> dict[str, float]:
        names = {""} if self.once else self.names
        kept = {f"{slot}:{name}": x for name in names for slot, x in self.rule.memory(name).items() if slot != "count"}
        return {key: x for key, x in kept.items() if is_set(x)}


# ---- gradients set by hand -------------------------------------------------------------------------------------------

Draw = Callable[[random.Random, int], str]


def mild(rng: random.Random, step: int) -> str:
    """Spikes, zeros and missing gradients at any time; very small and very large ones once the warm-up is over."""
    kinds, weights = ["usual", "spike", "zero", "none"], [80, 6, 5, 5]
    if step > WARMUP + 8:
        kinds, weights = [*kinds, "tiny", "huge"], [*weights, 2, 2]
    return rng.choices(kinds, weights)[0]


def extreme(rng: random.Random, step: int) -> str:
    return rng.choices(["usual", "spike", "zero", "none", "tiny", "huge"], [70, 6, 6, 6, 6, 6])[0]


def dirty(rng: random.Random, step: int) -> str:
    if rng.random() < 0.03:
        return rng.choice(["nan", "inf", "-inf"])
    return mild(rng, step)


WHOLE_STEP = {5: "zero", 11: "none", 44: "none", 52: "zero", 61: "tiny", 75: "huge"}
WHOLE_STEP_DIRTY = {**WHOLE_STEP, 9: "nan", 66: "inf", 90: "nan"}


def make_grad(kind: str, shape: tuple[int, ...], gen: torch.Generator, rng: random.Random) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "zero":
        return torch.zeros(shape)
    direction = torch.randn(shape, generator=gen)
    norm = rng.lognormvariate(-0.5, 0.6)
    if kind == "spike":
        norm *= 10 ** rng.uniform(1, 4)
    grad = direction / direction.norm() * norm
    if kind == "tiny":
        return grad * 1e-30
    if kind == "huge":
        return grad * 1e30
    if kind in ("nan", "inf", "-inf"):
        grad.view(-1)[rng.randrange(grad.numel())] = float(kind)
    return grad


def label(what: str) -> Callable[[str], str]:
    return lambda message: f"{what}: {message}"


def exact_norm(grad: Tensor) -> float:
    return math.hypot(*grad.double().flatten().tolist())


class Trial:
    """A clipper and its reference, fed the same gradients step by step, and compared after each."""

    def __init__(self, policy: Any, nonfinite: str = "propagate", seed: int = 0) -> None:
        self.rng, self.gen = random.Random(seed), torch.Generator().manual_seed(seed)
        # A parameter of zeros is one of its own kind for rules that compare gradients with parameters.
        self.params = {
            name: nn.Parameter(
                torch.randn(shape, generator=torch.Generator().manual_seed(len(name))) * (name != "scalar")
            )
            for name, shape in SHAPES.items()
        }
        self.clipper = dist_clip.GradClipper(list(self.params.items()), policy, nonfinite=nonfinite)
        self.reference = Reference(policy)
        self.nonfinite = nonfinite
        self.t = 0
        if isinstance(self.reference.rule, reference.AGC):
            self.reference.rule.weigh({name: exact_norm(param.detach()) for name, param in self.params.items()})

    def kinds(self, step: int, draw: Draw, whole: dict[int, str]) -> dict[str, str]:
        return {name: whole.get(step) or draw(self.rng, step) for name in self.params}

    def step(self, kinds: dict[str, str]) -> Any:
        grads = {n: make_grad(k, SHAPES[n], self.gen, self.rng) for n, k in kinds.items()}
        for name, grad in grads.items():
            self.params[name].grad = None if grad is None else grad.clone()
        report = self.clipper.clip_()
        norms = {n: exact_norm(g) for n, g in grads.items() if g is not None}
        self.check(report, grads, norms)
        return report

    def expected(self, norms: Norms) -> Scales:
        bad = {n for n, x in norms.items() if not math.isfinite(x)}
        if bad and self.nonfinite == "skip":
            return {}
        self.t += 1
        if self.nonfinite == "zero":
            scales = self.reference.step({n: x for n, x in norms.items() if n not in bad})
            return {**scales, **dict.fromkeys(bad, 0.0)}
        return self.reference.step(norms)

    def check(self, report: Any, grads: dict[str, Tensor | None], norms: Norms) -> None:
        scales = self.expected(norms)
        where = f"step {self.t}"
        scale_rtol = self.reference.scale_rtol
        names = list(report.names)
        assert names == list(SHAPES)
        assert report.num_grads == len(norms)
        assert report.empty == (not norms)
        assert bool(report.nonfinite) == any(not math.isfinite(x) for x in norms.values()), where
        assert report.scales.dtype == report.tensor_norms.dtype == torch.float32
        for name, grad in grads.items():
            if grad is None:
                assert self.params[name].grad is None
                continue
            got_norm, n = report.tensor_norms[names.index(name)].item(), norms[name]
            assert got_norm == pytest.approx(n, rel=RTOL, nan_ok=True), f"{where}: norm of {name}"
            after = self.params[name].grad
            assert after is not None
            if not scales:  # skipped: bit for bit what it was, NaN included
                assert torch.equal(after.view(torch.int32), grad.view(torch.int32)), f"{where}: {name} was touched"
                continue
            if not math.isfinite(n) and self.nonfinite == "zero":
                assert torch.equal(after, torch.zeros_like(after)), f"{where}: {name} is not exactly 0"
                continue
            s = scales[name]
            if not math.isfinite(n):
                assert not after.isfinite().all(), f"{where}: {name} hides its NaN or Inf"
                continue
            if n > 0.0:
                assert report.scales[names.index(name)].item() == pytest.approx(
                    s, rel=scale_rtol, abs=SUBNORMAL, nan_ok=True
                ), f"{where}: scale of {name}"
            if not math.isnan(s):
                atol = SUBNORMAL * max(1.0, n)  # a scale below 1e-38 has few bits itself
                rtol = GRAD_RTOL - RTOL + scale_rtol
                torch.testing.assert_close(
                    after.double(), grad.double() * s, rtol=rtol, atol=atol, msg=label(f"{where}: {name}")
                )
        finite = {n: x for n, x in norms.items() if math.isfinite(x) or self.nonfinite != "zero"}
        assert report.global_norm is not None
        global_norm = pytest.approx(reference.total_norm(finite), rel=RTOL, nan_ok=True)
        assert report.global_norm.item() == global_norm, f"{where}: global norm"
        state = snapshot(self.clipper.memory)
        assert state["step"] == self.t
        want = self.reference.state()
        got = flat_state(state)
        assert got.keys() == want.keys(), f"{where}: {got} {want}"
        for key, value in want.items():
            rel, floor = self.reference.state_rtol, SUBNORMAL
            if key.startswith("var"):
                rel, floor = 4 * RTOL, 4 * RTOL * want[key.replace("var", "mean")] ** 2
            assert got[key] == pytest.approx(value, rel=rel, abs=floor), f"{where}: {key}"


def leaves(tree: Any, key: str) -> list[float]:
    """Every value under `key` in nested dicts and lists: where a policy keeps its global state is its own affair."""
    found: list[float] = []
    if isinstance(tree, dict):
        for k, v in tree.items():
            found += [float(v)] if k == key and not isinstance(v, dict | list) and v is not None else leaves(v, key)
    elif isinstance(tree, list | tuple):
        for v in tree:
            found += leaves(v, key)
    return found


def is_set(x: float) -> bool:
    """A slot that holds an observation; a clipper may leave an unseen tensor out, or store 0 or NaN for it."""
    return math.isfinite(x) and x != 0.0


def flat_state(state: dict[str, Any]) -> dict[str, float]:
    out = {}
    for slot in ("gamma", "level", "streak", "mean", "var"):
        for name, entry in state["tensors"].items():
            if slot in entry and is_set(float(entry[slot])):
                out[f"{slot}:{name}"] = float(entry[slot])
    for slot in ("gamma", "level", "streak", "mean", "var"):
        out |= {f"{slot}:": x for x in leaves(state["global"], slot) if is_set(x)}
    return out


def run(
    policy: Any,
    draw: Draw,
    whole: dict[int, str],
    nonfinite: str = "propagate",
    seed: int = 0,
    steps: int = STEPS,
) -> None:
    trial = Trial(policy, nonfinite, seed)
    for step in range(1, steps + 1):
        trial.step(trial.kinds(step, draw, whole))


STREAMS = {"mild": (mild, WHOLE_STEP), "extreme": (extreme, WHOLE_STEP)}
MODES = ["propagate", "zero", "skip"]


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("max_norm", [1.0, 0.3, 50.0])
def test_global_norm(max_norm: float, stream: str) -> None:
    run(dist_clip.GlobalNorm(max_norm=max_norm), *STREAMS[stream])


@pytest.mark.parametrize("nonfinite", MODES)
def test_global_norm_nonfinite(nonfinite: str) -> None:
    run(dist_clip.GlobalNorm(max_norm=0.5), dirty, WHOLE_STEP_DIRTY, nonfinite)


# What the record of a warm-up comes to is worked out alike at every scope.
ADAGC_CASES = [*(("tensor", init) for init in reference.GAMMA_INITS), ("shard", "median"), ("global", "mean")]


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize(("scope", "gamma_init"), ADAGC_CASES)
def test_adagc(scope: str, gamma_init: str, stream: str) -> None:
    settings = {"warmup_steps": WARMUP, "scope": scope, "gamma_init": gamma_init}
    run(dist_clip.AdaGC(**settings), *STREAMS[stream], seed=1)


@pytest.mark.parametrize("nonfinite", MODES)
@pytest.mark.parametrize(("scope", "gamma_init"), ADAGC_CASES)
def test_adagc_nonfinite(scope: str, gamma_init: str, nonfinite: str) -> None:
    settings = {"warmup_steps": WARMUP, "scope": scope, "gamma_init": gamma_init}
    run(dist_clip.AdaGC(**settings), dirty, WHOLE_STEP_DIRTY, nonfinite, seed=2)


@pytest.mark.parametrize(
    "settings",
    [
        {"lambda_rel": 2.0, "beta": 0.9, "max_norm": 5.0},
        {"lambda_rel": 0.8, "beta": 0.5, "max_norm": 0.1},
        {"eps": 1e-2, "beta": 0.95},
        {"warmup_steps": 1},
        {"warmup_steps": 0},
        *(
            {"warmup_steps": 0, "gamma_init": init, "scope": scope}
            for init in ("median", "mean")
            for scope in ("tensor", "global")
        ),
        {"warmup_steps": STEPS + 10},
        {"warmup_steps": 31, "gamma_init": "median"},
    ],
    ids=str,
)
def test_adagc_settings(settings: dict[str, Any]) -> None:
    settings = {"warmup_steps": WARMUP, **settings}
    run(dist_clip.AdaGC(**settings), *STREAMS["mild"], seed=3)


def test_adagc_defaults_are_the_papers() -> None:
    run(dist_clip.AdaGC(), *STREAMS["mild"], seed=4, steps=180)


ZCLIP_MODES = [
    {"mode": "zscore", "clip_option": "adaptive_scaling"},
    {"mode": "zscore", "clip_option": "mean"},
    {"mode": "percentile"},
]


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize(
    "extra", [{}, {"skip_update_on_spike": True}, {"max_norm": None}, {"max_norm": 4.0, "z_thresh": 1.5}], ids=str
)
@pytest.mark.parametrize("mode", ZCLIP_MODES, ids=lambda m: "-".join(m.values()))
def test_zclip(mode: dict[str, Any], extra: dict[str, Any], stream: str) -> None:
    settings = {**mode, **extra}
    run(dist_clip.ZClip(**settings), *STREAMS[stream], seed=5)


@pytest.mark.parametrize(
    "settings",
    [{"clip_factor": 0.7}, {"clip_factor": 1.3, "max_norm": None}, {"alpha": 0.8, "warmup_steps": 7, "eps": 0.1}],
    ids=str,
)
def test_zclip_settings(settings: dict[str, Any]) -> None:
    run(dist_clip.ZClip(**settings), *STREAMS["mild"], seed=6)


@pytest.mark.parametrize("nonfinite", MODES)
@pytest.mark.parametrize("mode", ZCLIP_MODES, ids=lambda m: "-".join(m.values()))
def test_zclip_nonfinite(mode: dict[str, Any], nonfinite: str) -> None:
    settings = {**mode, "warmup_steps": WARMUP}
    run(dist_clip.ZClip(**settings), dirty, WHOLE_STEP_DIRTY, nonfinite, seed=7)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("extra", [{}, {"mode": "percentile", "max_norm": None}], ids=str)
@pytest.mark.parametrize("scope", ["tensor", "shard"])
def test_zclip_for_each_tensor(scope: Any, extra: dict[str, Any], stream: str) -> None:
    ours = dist_clip.ZClip(scope=scope, warmup_steps=WARMUP, **extra)
    run(ours, *STREAMS[stream], seed=8)


@pytest.mark.parametrize("nonfinite", MODES)
def test_zclip_for_each_tensor_nonfinite(nonfinite: str) -> None:
    ours = dist_clip.ZClip(scope="tensor", warmup_steps=WARMUP)
    run(ours, dirty, WHOLE_STEP_DIRTY, nonfinite, seed=9)


# Each of them meets its patience within the run.
LOGCLIP_SETTINGS: list[dict[str, Any]] = [
    {},
    {"ratio": 1.2, "patience": 2},
    {"ratio": 1.05, "power": 1.0, "rate": 0.2, "patience": 0, "max_norm": 5.0},
    {"ratio": 4.0, "power": 3.5, "rate": 1.0, "warmup_ratio": 1.5},
    {"warmup_steps": 0, "ratio": 1.1, "patience": 1},
    {"warmup_steps": 1, "power": 0.5},
    {"warmup_steps": STEPS + 10},
    {"post_max_norm": 0.3},
]


def log_clip(scope: Any, settings: dict[str, Any]) -> dist_clip.LogClip:
    return dist_clip.LogClip(scope=scope, **{"warmup_steps": WARMUP, **settings})


LOGCLIP_CASES = [
    *(("tensor", settings) for settings in LOGCLIP_SETTINGS),
    *((scope, LOGCLIP_SETTINGS[k]) for scope in ("shard", "global") for k in (1, 4, -1)),
]


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize(("scope", "settings"), LOGCLIP_CASES, ids=str)
def test_logclip(scope: str, settings: dict[str, Any], stream: str) -> None:
    run(log_clip(scope, settings), *STREAMS[stream], seed=10)


@pytest.mark.parametrize("nonfinite", MODES)
@pytest.mark.parametrize("settings", [LOGCLIP_SETTINGS[1], LOGCLIP_SETTINGS[-1]], ids=str)
@pytest.mark.parametrize("scope", ["tensor", "shard", "global"])
def test_logclip_nonfinite(scope: str, settings: dict[str, Any], nonfinite: str) -> None:
    run(log_clip(scope, settings), dirty, WHOLE_STEP_DIRTY, nonfinite, seed=11)


def test_logclip_defaults() -> None:
    run(dist_clip.LogClip(), *STREAMS["mild"], seed=12, steps=180)


def decide(policy: Policy, state: State, norms: Tensor, total: Tensor | None, t: Tensor) -> tuple[Tensor, State]:
    """One step of a policy by itself, whose number the host knows."""
    return policy.step(state, StepInputs(norms, torch.ones_like(norms).long(), t, int(t) - 1, total))


AUTOCLIP_SETTINGS: list[dict[str, Any]] = [
    {},
    {"percentile": 50.0, "history": 16},
    {"percentile": 99.5, "history": 7, "scope": "tensor"},
    {"percentile": 0.0, "scope": "shard", "history": 40},
    {"percentile": 100.0, "history": 1},
    {"percentile": 33.3, "history": 30, "scope": "tensor"},
]


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("settings", AUTOCLIP_SETTINGS, ids=str)
def test_autoclip(settings: dict[str, Any], stream: str) -> None:
    run(dist_clip.AutoClip(**settings), *STREAMS[stream], seed=13)


@pytest.mark.parametrize("nonfinite", MODES)
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_autoclip_nonfinite(scope: Any, nonfinite: str) -> None:
    run(dist_clip.AutoClip(30.0, 20, scope), dirty, WHOLE_STEP_DIRTY, nonfinite, seed=14)


def test_autoclips_window_is_exact() -> None:
    """500 steps through a window of 100: the same norms as a list that drops its first, and numpy's percentile of them."""
    rng = random.Random(15)
    policy, theirs = dist_clip.AutoClip(history=100), reference.AutoClip(history=100)
    state = policy.init_state(1, torch.device("cpu"))
    clipped = 0
    for t in range(1, 501):
        norm = rng.choices([rng.lognormvariate(0, 1), 0.0, math.nan, math.inf], [90, 3, 3, 3])[0]
        scale, state = decide(policy, state, torch.tensor([norm], dtype=torch.float64), None, torch.tensor(t))
        expected = theirs.scales({"N": norm})["N"]
        assert scale.item() == pytest.approx(expected, rel=1e-14, nan_ok=True)
        assert sorted(state["norms"][state["norms"] > 0].tolist()) == sorted(theirs.history["N"])
        clipped += expected < 1
    assert clipped > 350


def test_autoclip_at_its_first_steps() -> None:
    """A NaN before any norm leaves the gradient as it is; a first norm is not clipped, and a larger second one is."""
    policy = dist_clip.AutoClip(percentile=50.0)
    state = policy.init_state(1, torch.device("cpu"))
    scales = []
    for t, norm in enumerate((math.nan, 0.0, 2.0, 4.0), start=1):
        scale, state = decide(policy, state, torch.tensor([norm], dtype=torch.float64), None, torch.tensor(t))
        scales.append(scale.item())
    assert scales == [1.0, 1.0, 1.0, pytest.approx(3.0 / 4.0, rel=1e-6)]
    assert state["count"].tolist() == [2]


AGC_SETTINGS: list[dict[str, Any]] = [
    {},
    {"lam": 0.3},
    {"lam": 0.16, "eps": 1.0, "scope": "shard"},
    {"lam": 0.1, "scope": "global"},
]


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("settings", AGC_SETTINGS, ids=str)
def test_agc(settings: dict[str, Any], stream: str) -> None:
    run(dist_clip.AGC(**settings), *STREAMS[stream], seed=16)


@pytest.mark.parametrize("nonfinite", MODES)
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_agc_nonfinite(scope: Any, nonfinite: str) -> None:
    run(dist_clip.AGC(0.1, scope=scope), dirty, WHOLE_STEP_DIRTY, nonfinite, seed=17)


def test_agc_equals_timms_on_one_row() -> None:
    """On a vector the unit of the paper is the whole tensor. Written out from timm's adaptive_clip_grad."""
    generator = torch.Generator().manual_seed(0)
    for size in (1e-6, 1e-3, 1.0, 30.0):
        param = nn.Parameter(torch.randn(50, generator=generator))
        param.grad = torch.randn(50, generator=generator) * size
        max_norm = param.detach().norm().clamp(min=1e-3) * 0.01
        grad_norm = param.grad.norm()
        clipped = param.grad * (max_norm / grad_norm.clamp(min=1e-6))
        expected = torch.where(grad_norm < max_norm, param.grad, clipped)
        dist_clip.GradClipper([param], dist_clip.AGC()).clip_()
        torch.testing.assert_close(param.grad, expected)


@pytest.mark.parametrize("nonfinite", MODES)
def test_measure_only(nonfinite: str) -> None:
    run(dist_clip.MeasureOnly(), dirty, WHOLE_STEP_DIRTY, nonfinite, seed=18)


# ---- what LogClip's constants guarantee ------------------------------------------------------------------------------


def follow(policy: dist_clip.LogClip, norms: list[float], level: float = 1.0) -> tuple[list[float], list[float]]:
    """Scales and levels of one element, long past its warm-up and at `level`, as it sees `norms`."""
    state = policy.init_state(1, torch.device("cpu"))
    state["level"] += level
    state["count"] += 1000
    t = torch.tensor(policy.warmup_steps + 1)
    scales, levels = [], []
    for norm in norms:
        scale, state = decide(policy, state, torch.tensor([norm], dtype=torch.float64), None, t)
        scales.append(scale.item())
        levels.append(state["level"].item())
    return scales, levels


def test_a_fault_within_the_patience_is_not_followed() -> None:
    """Whatever its size: ratio ** rate a step, 1.52 after 20 steps; and its gradients are scaled to next to nothing."""
    policy = dist_clip.LogClip()
    for size in (6.0, 1e2, 1e6):
        scales, levels = follow(policy, [size] * policy.patience)
        assert levels[19] == pytest.approx(2 ** (0.03 * 20), rel=1e-5)
        assert max(levels) <= 2 ** (0.03 * policy.patience) * (1 + 1e-5)
        assert scales[0] == pytest.approx((2 / size) ** 2)
        # A norm of r levels is let through as 4 / r levels: less, the larger the fault.
        assert scales[19] * size <= 4 * levels[18] ** 2 / size * (1 + 1e-5)


@pytest.mark.parametrize(("rise", "steps"), [(2.0, 0), (3.0, 20), (8.0, 55), (100.0, 60), (1e6, 63)])
def test_a_lasting_rise_is_let_through(rise: float, steps: int) -> None:
    scales, levels = follow(dist_clip.LogClip(), [rise] * 200)
    assert scales.index(1.0) == steps
    assert min(scales[steps:]) == 1.0
    assert levels[-1] > 0.4 * rise


def test_any_lasting_rise_is_let_through_within_the_patience_and_one_over_rate_steps() -> None:
    policy = dist_clip.LogClip()
    scales, _ = follow(policy, [1e30] * 100)
    assert scales.index(1.0) <= policy.patience + math.ceil(1 / policy.rate)


@pytest.mark.parametrize("growth", [1.01, 1.0205, 1.03, 1.05, 1.1, 1.5])
def test_growth_has_a_smallest_scale(growth: float) -> None:
    """Up to ratio ** rate a step nothing is clipped; above it the patience bounds how far the level can fall behind."""
    policy = dist_clip.LogClip()
    scales, _ = follow(policy, [growth**k for k in range(1, int(80 / math.log10(growth)) // 4)])
    if growth <= 2**0.03:
        assert min(scales) == 1.0
        return
    k = policy.patience
    bound = (growth ** (k + 1) / 2 ** (0.03 * k)) ** -2
    assert bound * (1 - 1e-4) <= min(scales) < 1
    assert 1.0 in scales[-2 * k :], "it is let through again and again"


def test_a_level_that_climbs_far_is_as_exact_as_any() -> None:
    """60 powers of ten in a few moves: a factor that is off in fp32 would show."""
    settings: dict[str, Any] = {"rate": 0.3, "patience": 0, "warmup_steps": 0}
    ours, theirs = dist_clip.LogClip(**settings), reference.LogClip(**settings)
    state = ours.init_state(1, torch.device("cpu"))
    for t, norm in enumerate([1e-30, 1e30, 1e30, 1e30, 1e30, 3e30], start=1):
        scale, state = decide(ours, state, torch.tensor([norm], dtype=torch.float64), None, torch.tensor(t))
        assert scale.item() == pytest.approx(theirs.scales({"w": norm})["w"], rel=RTOL)
        assert state["level"].item() == pytest.approx(theirs.memory("w")["level"], rel=RTOL)


def test_a_patience_that_never_ends_is_the_rule_without_repair() -> None:
    scales, _ = follow(dist_clip.LogClip(patience=10**9), [8.0] * 200)
    assert scales.index(1.0) == 67
    scales, _ = follow(dist_clip.LogClip(patience=10**9), [1.05**k for k in range(1, 1000)])
    assert scales[-1] < 1e-20


def test_a_level_too_low_after_a_short_warm_up_is_left_behind() -> None:
    """The dip: norms of 0.02 while it warms up, 0.5 for good after it. Without the repair it takes twice as long."""
    for patience, steps in ((50, 58), (10**9, 121)):
        a, b, clipper = two_tensors(dist_clip.LogClip(warmup_steps=25, max_norm=100.0, patience=patience))
        scales = []
        for t in range(1, 251):
            a.grad, b.grad = torch.full((4,), 0.01 if t <= 25 else 0.25), torch.full((9,), 0.01)
            scales.append(clipper.clip_().scales[0].item())
        assert scales[:25] == [1.0] * 25
        assert scales.index(1.0, 25) == 25 + steps
        assert min(scales[25 + steps :]) == 1.0


def test_what_a_late_element_saw_first_does_not_last() -> None:
    """It counts its own observations: its level is their mean at first, in bounded moves, and no norm of all steps'."""
    policy = dist_clip.LogClip(warmup_steps=0)
    state = policy.init_state(1, torch.device("cpu"))
    levels = []
    for k, norm in enumerate([0.0, 0.0, 8.0, 1.0, 1.0, 1.0], start=500):
        norms = torch.tensor([norm], dtype=torch.float64)
        scale, state = decide(policy, state, norms, None, torch.tensor(k))
        assert scale.item() == 1.0
        levels.append(state["level"].item())
    assert levels[:3] == [0.0, 0.0, 8.0]
    assert levels[3:] == pytest.approx([8 / 2 ** (1 / 2), 8 / 2 ** (1 / 2 + 1 / 3), 8 / 2 ** (1 / 2 + 1 / 3 + 1 / 4)])
    assert state["count"].item() == 4


def test_steps_without_an_observation_leave_the_streak_alone() -> None:
    policy = dist_clip.LogClip(warmup_steps=0, patience=3)
    state = policy.init_state(1, torch.device("cpu"))
    streaks = []
    for norm in (1.0, 9.0, 9.0, 0.0, math.nan, math.inf, 9.0, 1.0, 9.0):
        _, state = decide(policy, state, torch.tensor([norm], dtype=torch.float64), None, torch.tensor(9))
        streaks.append(state["streak"].item())
    assert streaks == [0, 1, 2, 2, 2, 2, 3, 0, 1]


@pytest.mark.parametrize("power", [2.0, 1.7])
def test_an_elements_bits_do_not_depend_on_its_place(power: float) -> None:
    """A tensor that two pipeline stages hold lies elsewhere in each stage's vector; its copies must not drift apart."""
    policy = dist_clip.LogClip(power=power, patience=2, warmup_steps=3, ratio=1.1)
    n = 1027
    gen = torch.Generator().manual_seed(0)
    alone = [policy.init_state(1, torch.device("cpu")) for _ in range(7)]
    places = [0, 1, 5, 510, 1023, 1025, 1026]
    together = policy.init_state(n, torch.device("cpu"))
    for t in range(1, 40):
        norms = torch.exp(torch.randn(n, generator=gen, dtype=torch.float64))
        total = norms.square().sum().sqrt() if t <= 3 else None
        scales, together = decide(policy, together, norms, total, torch.tensor(t))
        for k, place in enumerate(places):
            scale, alone[k] = decide(policy, alone[k], norms[place : place + 1], total, torch.tensor(t))
            assert scale.item() == scales[place].item()
            assert all(alone[k][slot].item() == together[slot][place].item() for slot in together)


# ---- the traps, one by one -------------------------------------------------------------------------------------------


def two_tensors(policy: Any, **kwargs: Any) -> tuple[nn.Parameter, nn.Parameter, dist_clip.GradClipper]:
    a, b = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(9))
    return a, b, dist_clip.GradClipper([("a", a), ("b", b)], policy, **kwargs)


def gamma(clipper: dist_clip.GradClipper, name: str) -> float:
    entry = snapshot(clipper.memory)["tensors"].get(name, {})
    return float(entry.get("gamma", math.nan))


@pytest.mark.parametrize("gamma_init", ["min", "median", "mean", "last"])
@pytest.mark.parametrize("scope", ["tensor", "shard"])
@pytest.mark.parametrize("zero_steps", [1, 5, 12])
def test_zero_first_gradients_never_freeze_a_tensor(zero_steps: int, scope: Any, gamma_init: Any) -> None:
    """The paper's code sets gamma to the first norm; a zero there makes the threshold zero for ever."""
    a, b, clipper = two_tensors(dist_clip.AdaGC(warmup_steps=8, scope=scope, gamma_init=gamma_init))
    for t in range(1, 41):
        a.grad = torch.zeros(4) if t <= zero_steps else torch.full((4,), 0.05)
        b.grad = torch.full((9,), 0.01)
        report = clipper.clip_()
        assert (report.scales > 0).all(), f"step {t}: {report.scales}"
        if t <= zero_steps:
            assert not is_set(gamma(clipper, "a")), "a zero norm is no observation"
        else:
            assert gamma(clipper, "a") == pytest.approx(0.1, rel=1e-6)
            assert report.scales[0].item() == 1.0
            torch.testing.assert_close(a.grad, torch.full((4,), 0.05))


def test_zero_first_gradients_never_freeze_a_global_gamma() -> None:
    a, b, clipper = two_tensors(dist_clip.AdaGC(warmup_steps=3, scope="global"))
    for t in range(1, 12):
        a.grad, b.grad = (torch.zeros(4), torch.zeros(9)) if t <= 6 else (torch.full((4,), 0.05), torch.zeros(9))
        assert clipper.clip_().scales[0].item() == 1.0
    torch.testing.assert_close(a.grad, torch.full((4,), 0.05))


@pytest.mark.parametrize("mode", ["zscore", "percentile"])
def test_zero_first_gradients_never_freeze_zclip(mode: Any) -> None:
    """A warm-up of nothing but zeros records nothing: mean 0 and variance 0 would clip every later gradient to 0."""
    a, b, clipper = two_tensors(dist_clip.ZClip(warmup_steps=4, mode=mode))
    for t in range(1, 30):
        a.grad = torch.zeros(4) if t <= 9 else torch.full((4,), 0.05)
        b.grad = torch.zeros(9)
        report = clipper.clip_()
        if t > 9:
            assert report.scales[0].item() == 1.0, f"step {t}"
            torch.testing.assert_close(a.grad, torch.full((4,), 0.05))


def test_a_zero_norm_in_the_middle_leaves_gamma_alone() -> None:
    a, b, clipper = two_tensors(dist_clip.AdaGC(warmup_steps=2))
    for t in range(1, 8):
        a.grad, b.grad = torch.zeros(4) if t > 3 else torch.full((4,), 0.05), torch.full((9,), 0.01)
        report = clipper.clip_()
    assert gamma(clipper, "a") == pytest.approx(0.1, rel=1e-6)
    assert report.scales[0].item() == 1.0
    assert not a.grad.any()


def test_a_missing_gradient_leaves_gamma_alone() -> None:
    a, b, clipper = two_tensors(dist_clip.AdaGC(warmup_steps=2))
    for t in range(1, 8):
        a.grad, b.grad = None if t > 3 else torch.full((4,), 0.05), torch.full((9,), 0.01)
        report = clipper.clip_()
        assert report.num_grads == (2 if t <= 3 else 1)
    assert gamma(clipper, "a") == pytest.approx(0.1, rel=1e-6)


@pytest.mark.parametrize("scope", ["tensor", "shard"])
def test_first_seen_after_warmup_is_unclipped_and_sets_gamma(scope: Any) -> None:
    a, b, clipper = two_tensors(dist_clip.AdaGC(warmup_steps=3, scope=scope))
    for _t in range(1, 6):
        b.grad = torch.full((9,), 0.01)
        clipper.clip_()
    a.grad = torch.full((4,), 50.0)
    report = clipper.clip_()
    assert report.scales[0].item() == 1.0
    torch.testing.assert_close(a.grad, torch.full((4,), 50.0))
    assert gamma(clipper, "a") == pytest.approx(100.0, rel=1e-6)
    a.grad = torch.full((4,), 100.0)  # from now on it is clipped like any other
    report = clipper.clip_()
    assert report.scales[0].item() == pytest.approx(1.04 * 100 / 200, rel=1e-6)
    assert gamma(clipper, "a") == pytest.approx(0.99 * 100 + 0.01 * 104, rel=1e-6)


def test_a_warmup_observation_that_underflows_is_none() -> None:
    """A neighbour's norm of 1e30 scales 1e-30 down to 1e-60, which fp32 can only store as 0: gamma must not become 0."""
    a, b, clipper = two_tensors(dist_clip.AdaGC(warmup_steps=2))
    a.grad, b.grad = torch.full((4,), 1e-30), torch.full((9,), 1e30)
    clipper.clip_()
    assert not is_set(gamma(clipper, "a"))
    for _ in range(4):
        a.grad, b.grad = torch.full((4,), 0.05), torch.full((9,), 0.01)
        report = clipper.clip_()
    assert report.scales[0].item() == 1.0
    assert gamma(clipper, "a") == pytest.approx(0.1, rel=1e-6)


@pytest.mark.parametrize("gamma_init", ["min", "median", "mean", "last"])
def test_an_underflowed_observation_does_not_erase_earlier_ones(gamma_init: Any) -> None:
    a, b, clipper = two_tensors(dist_clip.AdaGC(warmup_steps=10, gamma_init=gamma_init))
    for step in range(4):
        tiny = step == 2
        a.grad, b.grad = torch.full((4,), 1e-30 if tiny else 0.05), torch.full((9,), 1e30 if tiny else 0.01)
        clipper.clip_()
        assert gamma(clipper, "a") == pytest.approx(0.1, rel=1e-6), f"step {step}"


BAD = [float("nan"), float("inf"), float("-inf")]
ALL_POLICIES = {
    "GlobalNorm": lambda w: dist_clip.GlobalNorm(),
    "AdaGC-tensor": lambda w: dist_clip.AdaGC(warmup_steps=w),
    "AdaGC-shard": lambda w: dist_clip.AdaGC(warmup_steps=w, scope="shard"),
    "AdaGC-global": lambda w: dist_clip.AdaGC(warmup_steps=w, scope="global", gamma_init="median"),
    "LogClip-tensor": lambda w: dist_clip.LogClip(warmup_steps=w),
    "LogClip-shard": lambda w: dist_clip.LogClip(warmup_steps=w, scope="shard", post_max_norm=0.5),
    "LogClip-global": lambda w: dist_clip.LogClip(warmup_steps=w, scope="global"),
    "ZClip": lambda w: dist_clip.ZClip(warmup_steps=w),
    "ZClip-tensor": lambda w: dist_clip.ZClip(warmup_steps=w, scope="tensor"),
    "ZClip-percentile": lambda w: dist_clip.ZClip(warmup_steps=w, mode="percentile", max_norm=None),
}


def states_equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(states_equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(states_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Tensor):
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
            and torch.equal(a.isnan(), b.isnan())
        )
    return bool(a == b) or (a != a and b != b)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("warmup", [2, 30], ids=["after", "within"])
@pytest.mark.parametrize("policy", ALL_POLICIES)
def test_raise_names_the_tensor_and_touches_nothing(policy: str, warmup: int, bad: float) -> None:
    a, b, clipper = two_tensors(ALL_POLICIES[policy](warmup), nonfinite="raise")
    for _ in range(6):
        a.grad, b.grad = torch.randn(4), torch.randn(9)
        clipper.clip_()
    before = clipper.state_dict()
    a.grad, b.grad = torch.full((4,), 7.0), torch.full((9,), 7.0)
    b.grad[3] = bad
    grads = a.grad.clone(), b.grad.clone()
    with pytest.raises(dist_clip.NonFiniteGradError, match=r"\bb\b") as error:
        clipper.clip_()
    assert isinstance(error.value, RuntimeError)
    assert torch.equal(a.grad, grads[0])
    assert torch.equal(b.grad.nan_to_num(), grads[1].nan_to_num())
    assert states_equal(clipper.state_dict(), before)
    b.grad = torch.randn(9)
    clipper.clip_()  # and it goes on


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("warmup", [2, 30], ids=["after", "within"])
@pytest.mark.parametrize("policy", ALL_POLICIES)
def test_skip_leaves_the_whole_state_untouched(policy: str, warmup: int, bad: float) -> None:
    a, b, clipper = two_tensors(ALL_POLICIES[policy](warmup), nonfinite="skip")
    for _ in range(6):
        a.grad, b.grad = torch.randn(4), torch.randn(9)
        assert not clipper.clip_().nonfinite
    before = clipper.state_dict()
    a.grad, b.grad = torch.full((4,), 7.0), torch.full((9,), 7.0)
    b.grad[3] = bad
    report = clipper.clip_()
    assert bool(report.nonfinite)
    assert torch.equal(a.grad, torch.full((4,), 7.0))
    assert states_equal(clipper.state_dict(), before)


@pytest.mark.parametrize("bad", BAD)
def test_skip_above_also_keeps_zero_from_touching_a_bad_tensor(bad: float) -> None:
    """A step that is to be skipped is left as it is: also the gradient that would have been set to zero."""
    a, b = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(9))
    clipper = dist_clip.GradClipper(
        [("a", a), ("b", b)], dist_clip.GlobalNorm(1e9), nonfinite="zero", guard=dist_clip.SkipAbove(5.0)
    )
    for height, skipped in ((7.0, True), (1.0, False)):
        a.grad, b.grad = torch.full((4,), height), torch.full((9,), height)
        b.grad[3] = bad
        before = b.grad.clone()
        report = clipper.clip_()
        assert report.skip == skipped
        assert report.scales.tolist() == ([1, 1] if skipped else [1, 0])
        assert torch.equal(b.grad.nan_to_num(2.0), before.nan_to_num(2.0) if skipped else torch.zeros(9))


@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_tensor_leaves_the_others_alone_after_warmup(bad: float, nonfinite: Any) -> None:
    a, b, clipper = two_tensors(dist_clip.AdaGC(warmup_steps=2), nonfinite=nonfinite)
    for _ in range(6):
        a.grad, b.grad = torch.full((4,), 0.05), torch.full((9,), 0.01)
        clipper.clip_()
    gamma_b = gamma(clipper, "b")
    a.grad, b.grad = torch.full((4,), 0.2), torch.full((9,), 0.01)
    b.grad[3] = bad
    report = clipper.clip_()
    assert bool(report.nonfinite)
    assert report.scales[0].item() == pytest.approx(1.04 * 0.1 / (0.4 + 1e-6), rel=1e-6)
    torch.testing.assert_close(a.grad, torch.full((4,), 0.2) * 1.04 * 0.1 / 0.4, rtol=5e-6, atol=0.0)
    assert gamma(clipper, "b") == gamma_b
    if nonfinite == "zero":
        assert torch.equal(b.grad, torch.zeros(9))
        assert report.scales[1].item() == 0.0
    else:
        assert not b.grad.isfinite().all()
        s = report.scales[1].item()
        assert math.isnan(s) if math.isnan(bad) else s == 0.0


@pytest.mark.parametrize("bad", BAD)
def test_propagate_is_torchs_own_behaviour(bad: float) -> None:
    a, b, clipper = two_tensors(dist_clip.GlobalNorm(0.5))
    twins = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(9))]
    for p, twin in zip((a, b), twins, strict=True):
        p.grad, twin.grad = torch.ones_like(p), torch.ones_like(p)
    b.grad[3] = twins[1].grad[3] = bad
    clipper.clip_()
    torch.nn.utils.clip_grad_norm_(twins, 0.5)
    for p, twin in zip((a, b), twins, strict=True):
        torch.testing.assert_close(p.grad, twin.grad, equal_nan=True)


def test_the_step_counter_counts_calls() -> None:
    a, _b, clipper = two_tensors(dist_clip.AdaGC(warmup_steps=5))
    clipper.clip_()  # nothing to clip is still a call
    a.grad = torch.full((4,), math.nan)
    clipper.clip_()  # NaN under "propagate" is still a step
    assert clipper.state_dict()["step"] == 2


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_zclip_does_not_follow_a_lasting_rise(scope: dist_clip.Scope) -> None:
    """As docs/choosing.md says: norms that double for good are clipped for ever. LogClip follows them."""
    clipped = {}
    for policy in (dist_clip.ZClip(scope=scope, max_norm=None), dist_clip.LogClip(scope=scope, max_norm=1e6)):
        param = nn.Parameter(torch.zeros(4))
        clipper = dist_clip.GradClipper([("w", param)], policy)
        generator = torch.Generator().manual_seed(0)
        scales = []
        for step in range(600):
            spread = torch.exp(0.1 * torch.randn((), generator=generator))
            param.grad = torch.full((4,), 0.1 if step < 200 else 0.2) * spread
            scales.append(float(clipper.clip_().scales))
        clipped[type(policy).__name__] = sum(scale < 1 for scale in scales[500:])
    assert clipped == {"ZClip": 100, "LogClip": 0}
