"""Clipping and stepping inside backward: the same bits as after it, and an error for whatever cannot be clipped early."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dist_clip
from dist_clip.layouts import build_layout

STEPS = 30


class Model(nn.Module):
    """An embedding tied to the head, a branch that only every third batch takes, a scalar, and a frozen weight."""

    def __init__(self, use_reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(12, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.branch = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.use_reentrant = use_reentrant

    def forward(self, ids: Tensor, step: int) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + torch.dropout(torch.tanh(layer(x)), 0.1, True)
        if step % 3 == 2:
            x = x + self.branch(x) * self.scale
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1) * (20 if step % 7 == 6 else 1), ids.flatten())


def decayed(model: nn.Module) -> list[dict[str, Any]]:
    """Two param_groups."""
    params = [param for param in model.parameters() if param.requires_grad]
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0, "lr": 0.02},
    ]


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "fused": lambda model: torch.optim.AdamW(decayed(model), lr=0.01, fused=True),
    "foreach": lambda model: torch.optim.AdamW(decayed(model), lr=0.01, foreach=True),
    "loop": lambda model: torch.optim.AdamW(decayed(model), lr=0.01, foreach=False),
}

POLICIES: dict[str, Callable[[], dist_clip.Policy]] = {
    "AdaGC": lambda: dist_clip.AdaGC(warmup_steps=5),
    "AdaGC-median": lambda: dist_clip.AdaGC(warmup_steps=5, gamma_init="median"),
    "AdaGC-cold": lambda: dist_clip.AdaGC(warmup_steps=0),
    "LogClip": lambda: dist_clip.LogClip(warmup_steps=5, patience=3),
    "AGC": lambda: dist_clip.AGC(),
    "GlobalNorm": lambda: dist_clip.GlobalNorm(0.5),
    "post_max_norm": lambda: dist_clip.LogClip(warmup_steps=5, post_max_norm=0.3),
    "MeasureOnly": lambda: dist_clip.MeasureOnly(),
}


class Training:
    """One training. What clips and steps in backward here is written out, to be read beside the ordinary loop."""

    def __init__(self, policy: str, kind: str, **options: Any) -> None:
        self.model = Model()
        self.optimizer = OPTIMIZERS[kind](self.model)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        self.clipper = dist_clip.GradClipper(self.model, POLICIES[policy](), **options)
        self.reports: list[Any] = []
        self.phase = ""
        for param in self.model.parameters():
            if param.requires_grad:
                param.register_post_accumulate_grad_hook(self.hook)

    def hook(self, param: Tensor) -> None:
        if self.phase == "measure":
            self.clipper.measure_early_([param])
        if self.phase == "step":
            self.clipper.clip_early_([param])
            self.step_with(param)
        if self.phase:
            param.grad = None

    def step_with(self, param: Tensor) -> None:
        groups = self.optimizer.param_groups
        self.optimizer.param_groups = [{**g, "params": [p for p in g["params"] if p is param]} for g in groups]
        self.optimizer.step()
        self.optimizer.param_groups = groups

    def backward(self, step: int, phase: str) -> None:
        self.phase = phase
        torch.manual_seed(1000 + step)
        self.model(torch.randint(12, (2, 5)), step).backward()
        self.phase = ""

    def run(self, steps: range, *, early: bool) -> Training:
        for step in steps:
            if early:
                if not self.clipper.can_clip_early:
                    self.backward(step, "measure")
                self.backward(step, "step")
                report = self.clipper.clip_()
            else:
                self.backward(step, "")
                report = self.clipper.clip_()
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.schedule.step()
            self.reports.append(
                (
                    report.tensor_norms,
                    report.scales,
                    report.global_norm,
                    report.nonfinite,
                    torch.tensor(report.num_grads),
                )
            )
        return self

    def state(self) -> dict[str, Any]:
        parts = (self.model, self.optimizer, self.schedule, self.clipper)
        return copy.deepcopy({str(i): part.state_dict() for i, part in enumerate(parts)})

    def load(self, state: dict[str, Any]) -> Training:
        for i, part in enumerate((self.model, self.optimizer, self.schedule, self.clipper)):
            part.load_state_dict(state[str(i)])
        return self


def assert_same(got: Training, want: Training) -> None:
    torch.testing.assert_close(got.reports, want.reports, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(flat(got.state()), flat(want.state()), rtol=0, atol=0)
    assert float(torch.stack([scales.min() for _, scales, *_ in want.reports]).min()) < 1 or "Measure" in str(
        want.clipper.policy
    )


def flat(state: Any) -> dict[str, Tensor]:
    """All tensors and numbers of a state, by path."""
    found: dict[str, Tensor] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{path}/{key}", inner)
        elif isinstance(value, (list, tuple)):
            for i, inner in enumerate(value):
                walk(f"{path}/{i}", inner)
        elif isinstance(value, (Tensor, float, int, bool)):
            found[path] = torch.as_tensor(value)

    walk("", state)
    return found


# ---- the same bits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "kind"),
    [*((policy, "fused") for policy in POLICIES), *((p, k) for p in ("AdaGC", "LogClip") for k in ("foreach", "loop"))],
)
def test_stepping_in_backward_is_stepping_after_it(policy: str, kind: str) -> None:
    """Weights, the optimizer's and the clipper's state, norms, scales: bit for bit over 30 steps."""
    want = Training(policy, kind).run(range(STEPS), early=False)
    assert_same(Training(policy, kind).run(range(STEPS), early=True), want)


@pytest.mark.parametrize("early", [True, False])
def test_a_run_that_is_resumed_in_the_middle(early: bool) -> None:
    want = Training("LogClip", "fused").run(range(STEPS), early=False)
    state = Training("LogClip", "fused").run(range(14), early=early).state()
    resumed = Training("LogClip", "fused").load(state).run(range(14, STEPS), early=not early)
    torch.testing.assert_close(flat(resumed.state()), flat(want.state()), rtol=0, atol=0)


def test_a_nonfinite_gradient_becomes_zero_as_after_backward() -> None:
    def run(early: bool) -> Training:
        training = Training("AdaGC-cold", "loop", nonfinite="zero")
        spoil = {"on": False}
        training.model.layers[1].weight.register_hook(lambda grad: grad * (float("nan") if spoil["on"] else 1))
        for step in range(10):
            spoil["on"] = step == 6
            training.run(range(step, step + 1), early=early)
        assert bool(training.reports[6][3])
        return training

    assert_same(run(True), run(False))


def test_a_part_may_be_clipped_early_and_the_rest_after_backward() -> None:
    """With overrides as well: tensors of GlobalNorm cannot be clipped early, and others can."""

    def run(early: bool) -> list[Tensor]:
        training = Training("LogClip", "loop", overrides={"layers.*": dist_clip.GlobalNorm(0.1)})
        reports = []
        for step in range(12):
            training.backward(step, "")
            if early and training.clipper.can_clip_early:
                assert step >= 5
                training.clipper.clip_early_([training.model.embed.weight])
                training.clipper.clip_early_(p for p in training.model.branch.parameters() if p.grad is not None)
            reports.append(training.clipper.clip_().scales)
            training.optimizer.step()
            training.optimizer.zero_grad()
        return [*reports, *(param.detach() for param in training.model.parameters())]

    torch.testing.assert_close(run(True), run(False), rtol=0, atol=0)


@pytest.mark.report(
    "pytorch/torchtune#1934",
    "pytorch/torchtitan#990",
    situation="optimizers that step inside backward, with clipping",
    right="the training that clips after backward",
)
def test_a_dictionary_of_optimizers() -> None:
    """As torchtune makes them: one optimizer a tensor."""

    def run(early: bool) -> dict[str, Tensor]:
        model = Model()
        params = [param for param in model.parameters() if param.requires_grad]
        optimizers = {param: torch.optim.AdamW([param], lr=0.01) for param in params}
        clipper = dist_clip.GradClipper(model, dist_clip.LogClip(warmup_steps=0))

        def hook(param: Tensor) -> None:
            clipper.clip_early_([param])
            optimizers[param].step()
            optimizers[param].zero_grad()

        for param in params if early else ():
            param.register_post_accumulate_grad_hook(hook)
        for step in range(STEPS):
            torch.manual_seed(step)
            model(torch.randint(12, (2, 5)), step).backward()
            clipper.clip_()
            for optimizer in () if early else optimizers.values():
                optimizer.step()
                optimizer.zero_grad()
        return flat([model.state_dict(), clipper.state_dict(), [o.state_dict() for o in optimizers.values()]])

    torch.testing.assert_close(run(True), run(False), rtol=0, atol=0)


@pytest.mark.parametrize("attached", [True, False])
def test_gradients_that_stay_are_clipped_once(attached: bool) -> None:
    """Clipped in backward, stepped after it: also where the step of an attached optimizer calls clip_()."""

    def run(early: bool) -> list[Tensor]:
        training = Training("LogClip", "fused")
        if attached:
            training.clipper.attach(training.optimizer)
        for step in range(12):
            training.backward(step, "")
            if early and training.clipper.can_clip_early:
                training.clipper.clip_early_(training.model.parameters())
            if not attached:
                training.clipper.clip_()
            training.optimizer.step()
            training.optimizer.zero_grad()
        return [param.detach() for param in training.model.parameters()]

    torch.testing.assert_close(run(True), run(False), rtol=0, atol=0)


# ---- what cannot be clipped early --------------------------------------------------------------------------------------


def with_gradients(policy: dist_clip.Policy, **options: Any) -> tuple[nn.Sequential, dist_clip.GradClipper]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    clipper = dist_clip.GradClipper(model, policy, **options)
    model(torch.ones(2, 3)).square().sum().backward()
    return model, clipper


COLD = functools.partial(dist_clip.LogClip, warmup_steps=0)


@dataclasses.dataclass(frozen=True)
class ByTheMedian(dist_clip.Policy):
    """A rule that looks at all norms though it asks for none."""

    def step(self, state: Any, inputs: Any) -> Any:
        return (inputs.norms.median() / inputs.norms).clamp(max=1.0).nan_to_num(1.0), state


NEVER: dict[str, tuple[dist_clip.Policy, dict[str, Any], str]] = {
    "GlobalNorm": (
        dist_clip.GlobalNorm(),
        {},
        "'0.weight' cannot be clipped early: GlobalNorm clips by the norm of all",
    ),
    "ZClip": (dist_clip.ZClip(), {}, "'0.weight' cannot be clipped early: ZClip clips by the norm of all gradients"),
    "global": (COLD(scope="global"), {}, "LogClip clips by the norm of all gradients, which is known after backward"),
    "post_max_norm": (COLD(post_max_norm=1.0), {}, "LogClip's post_max_norm needs the norm of all gradients"),
    "median": (ByTheMedian(), {}, "ByTheMedian's scale of one tensor depends on the norms of others"),
    "guard": (COLD(), {"guard": dist_clip.SkipAbove(1.0)}, "SkipAbove decides on the step once all norms are known"),
    "skip": (COLD(), {"nonfinite": "skip"}, "nonfinite='skip' decides on the step once all norms are known"),
    "raise": (COLD(), {"nonfinite": "raise"}, "nonfinite='raise' decides on the step once all norms are known"),
    "scaler": (COLD(), {"scaler": torch.amp.GradScaler("cpu")}, "the GradScaler unscales gradients after backward"),
}


@pytest.mark.parametrize("case", NEVER)
def test_what_never_can_is_refused_with_the_reason(case: str) -> None:
    policy, options, message = NEVER[case]
    model, clipper = with_gradients(policy, **options)
    before = [param.grad.clone() for param in model.parameters() if param.grad is not None]
    assert not clipper.can_clip_early
    with pytest.raises(RuntimeError, match=message.replace("(", r"\(").replace("[", r"\[")) as caught:
        clipper.clip_early_(model.parameters())
    assert "clip_()" in str(caught.value)  # the way out
    torch.testing.assert_close([param.grad for param in model.parameters()], before, rtol=0, atol=0)


def test_a_warmup_is_refused_until_it_is_over() -> None:
    model, clipper = with_gradients(dist_clip.AdaGC(warmup_steps=2))
    for step in range(2):
        assert not clipper.can_clip_early
        with pytest.raises(
            RuntimeError, match=rf"'0.weight' cannot be clipped early at step {step + 1}: AdaGC needs the norm of all"
        ):
            clipper.clip_early_(model.parameters())
        clipper.clip_()
        model.zero_grad()
        model(torch.ones(2, 3)).sum().backward()
    assert clipper.can_clip_early
    clipper.clip_early_(model.parameters())


def test_a_tensor_is_clipped_once_a_step() -> None:
    model, clipper = with_gradients(COLD())
    clipper.clip_early_([model[0].weight])
    with pytest.raises(
        RuntimeError, match=r"'0\.weight' was clipped early already in this step: its gradient came in parts"
    ):
        clipper.clip_early_(model.parameters())
    with pytest.raises(RuntimeError, match=r"'0\.bias' was clipped early already in this step"):
        clipper.clip_early_([model[0].bias, model[0].bias])
    assert clipper.clip_().num_grads == 4


def test_a_gradient_that_arrives_again_is_an_error() -> None:
    """Accumulation: of a gradient that was kept, and of one that was stepped with and set to None."""
    for freed in (True, False):
        model, clipper = with_gradients(COLD())
        clipper.clip_early_(model.parameters())
        if freed:
            model.zero_grad()
        model(torch.ones(2, 3)).sum().backward()
        with pytest.raises(RuntimeError, match=r"the gradient of '0.weight' was written to after clip_early_\(\)"):
            clipper.clip_()
        assert clipper.steps == 0


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_weight_that_two_checkpoints_share(use_reentrant: bool) -> None:
    """Reentrant checkpoints call its hook twice, each time with a part of the gradient; others once."""
    layer = nn.Linear(3, 3)
    clipper = dist_clip.GradClipper(layer, COLD())
    layer.weight.register_post_accumulate_grad_hook(lambda param: clipper.clip_early_([param]))
    x = torch.ones(2, 3, requires_grad=True)
    for _ in range(2):
        x = checkpoint(layer, x, use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match=r"use checkpoint\(use_reentrant=False\)") if use_reentrant else no_error():
        x.sum().backward()


@contextlib.contextmanager
def no_error() -> Iterator[None]:
    yield


def test_a_call_outside_of_a_step_is_refused() -> None:
    model, clipper = with_gradients(COLD())
    clipper.clip_()
    with pytest.raises(RuntimeError, match=r"'0.weight' was clipped by clip_\(\) already, and no backward came since"):
        clipper.clip_early_(model.parameters())
    model, clipper = with_gradients(COLD())
    model.zero_grad()
    with pytest.raises(RuntimeError, match="got 4 parameters, and none has a gradient: call it in backward"):
        clipper.clip_early_(model.parameters())
    with pytest.raises(RuntimeError, match="got 0 parameters, and none has a gradient"):
        clipper.clip_early_(iter(()))


def test_a_call_outside_of_a_step_is_refused_late_in_a_run_as_well() -> None:
    """The clipper looks at a loop's first steps; from the first clip_early_ on it looks at all."""
    model, clipper = with_gradients(COLD())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        clipper.clip_early_([model[0].weight])
        clipper.clip_()
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"'1\.bias' was clipped by"):
        clipper.clip_early_([model[1].bias])


def test_unknown_parameters_are_refused_and_excluded_ones_left_out() -> None:
    model, clipper = with_gradients(COLD(), exclude=["1.*"])
    with pytest.raises(dist_clip.LayoutError, match=r"does not know \(number 1, Parameter of shape \[7\]\)"):
        clipper.clip_early_([model[0].weight, nn.Parameter(torch.ones(7))])
    clipper.clip_early_(model[1].parameters())
    clipper.clip_early_(model.parameters())
    assert clipper.clip_().num_grads == 2


def test_gradients_that_do_not_fit_are_refused() -> None:
    model, clipper = with_gradients(COLD())
    for gradients in ([], [torch.ones(2)], [None]):
        with pytest.raises(ValueError, match="gradients= must hold the gradient of each parameter"):
            clipper.clip_early_([model[0].weight], gradients=gradients)
    with pytest.raises(RuntimeError, match="cannot be written to in place"):
        clipper.clip_early_([model[0].weight], gradients=[torch.ones(1).expand(4, 3)])


def test_gradients_may_be_passed_before_they_are_in_grad() -> None:
    model, clipper = with_gradients(dist_clip.AGC())
    other, ordinary = with_gradients(dist_clip.AGC())
    params = list(model.parameters())
    passed = [param.grad.clone() for param in params if param.grad is not None]
    model.zero_grad()
    clipper.clip_early_(params, gradients=passed)
    for param, grad in zip(params, passed, strict=True):
        param.grad = grad.clone()  # a write, as DDP's copy of its bucket
    report, want = clipper.clip_(), ordinary.clip_()
    assert torch.equal(report.scales, want.scales)
    assert want.scales.min() < 1
    torch.testing.assert_close([p.grad for p in params], [p.grad for p in other.parameters()], rtol=0, atol=0)


def test_the_middle_of_a_step_cannot_be_saved_but_can_be_left() -> None:
    model, clipper = with_gradients(COLD())
    state = clipper.state_dict()
    clipper.clip_early_([model[1].weight])
    for method in ("state_dict", "verify", "refresh"):
        with pytest.raises(
            RuntimeError, match=rf"{method}\(\) was called in the middle of a step: 1 tensors .* '1.weight'"
        ):
            getattr(clipper, method)()
    with pytest.raises(RuntimeError, match=r"state_dict\(\) was called in the middle of a step"):
        clipper.packed().state_dict()
    clipper.load_state_dict(state)  # goes back to before the step
    clipper.state_dict()
    model.zero_grad()
    model(torch.ones(2, 3)).sum().backward()
    clipper.clip_early_([model[1].weight])
    assert clipper.clip_().num_grads == 4
    clipper.state_dict()


def test_two_backwards_of_one_step_must_be_of_the_same_batch() -> None:
    model, clipper = with_gradients(dist_clip.GlobalNorm())
    clipper.measure_early_(model.parameters())
    with pytest.raises(
        RuntimeError, match=r"'0\.weight' was measured already in this step: its gradient came in parts"
    ):
        clipper.measure_early_(model.parameters())
    model[0].weight.grad = None
    clipper.clip_early_(param for param in model.parameters() if param.grad is not None)
    with pytest.raises(RuntimeError, match=r"'0.weight' was measured .* and has no gradient to clip now"):
        clipper.clip_()
    model, clipper = with_gradients(dist_clip.GlobalNorm())
    clipper.measure_early_([model[0].weight])
    with pytest.raises(
        RuntimeError, match=r"'0\.bias' has a gradient in the second backward of this step, and had none"
    ):
        clipper.clip_early_(model.parameters())


def test_what_looks_at_each_tensor_alone() -> None:
    from dist_clip.policies import registered
    from dist_clip.policies.trial import acts_on_each_alone

    rules = {name: rule() for name, rule in registered().items()}
    assert all(acts_on_each_alone(rule) for rule in rules.values() if rule.scope == "tensor")
    assert not acts_on_each_alone(ByTheMedian())


# ---- those who step in backward without it -----------------------------------------------------------------------------


def told(train: Callable[[], None]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("which", ["all", "some", "early", "muon"])
def test_steps_with_gradients_that_no_clip_saw_are_told(which: str) -> None:
    """A hook a tensor that steps and frees, for all tensors or for one; not where the hook clips, nor for Muon's zeros."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    unused = nn.Parameter(torch.ones(2))
    model.register_parameter("unused", unused)
    clipper = dist_clip.GradClipper(model, COLD())
    stepped = {
        "all": list(model.parameters()),
        "early": list(model.parameters()),
        "some": [model[0].weight],
        "muon": [],
    }[which]
    optimizers = {param: torch.optim.SGD([param], lr=0.01) for param in model.parameters()}

    def hook(param: Tensor) -> None:
        if which == "early":
            clipper.clip_early_([param])
        optimizers[param].step()
        param.grad = None

    for param in stepped:
        param.register_post_accumulate_grad_hook(hook)

    def train() -> None:
        for _ in range(12):
            model(torch.ones(2, 3)).square().sum().backward()
            clipper.clip_()
            if which == "muon":
                unused.grad = torch.zeros_like(unused)
                with torch.no_grad():
                    unused.mul_(0.99)
            for param, optimizer in optimizers.items():
                if all(param is not one for one in stepped):
                    optimizer.step()
            model.zero_grad()

    texts = told(train)
    if which in ("early", "muon"):
        assert texts == []
        return
    assert len(texts) == 1
    shown = "4 tensors such as '0.weight'" if which == "all" else "1 tensors such as '0.weight'"
    assert texts[0].startswith(f"{shown} were stepped with gradients that no clip saw")
    assert "clip_early_([param])" in texts[0]


def test_an_attached_optimizer_that_steps_in_backward_is_told_what_to_do() -> None:
    model = nn.Linear(3, 2)
    optimizers = {param: torch.optim.SGD([param], lr=0.01) for param in model.parameters()}
    clipper = dist_clip.GradClipper(model, COLD())
    clipper.attach(*optimizers.values())
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda param: optimizers[param].step())
    with pytest.raises(
        RuntimeError, match=r"called inside backward\(\), .* clipper.clip_early_\(\[param\]\) in the hook"
    ):
        model(torch.ones(1, 3)).sum().backward()


def test_megatron_is_refused() -> None:
    """Its clippers read the layout by a reader of the framework's."""

    class Reader:
        def __init__(self, model: nn.Module) -> None:
            self.model = model

        def read_layout(self, skip: Callable[[str], bool]) -> Any:
            return build_layout(self.model, skip=skip)

    model = nn.Linear(3, 2)
    clipper = dist_clip.GradClipper(Reader(model), COLD())
    assert not clipper.can_clip_early
    with pytest.raises(RuntimeError, match="Megatron's optimizers reduce gradients, and copy them to their own, after"):
        clipper.clip_early_(model.parameters())
