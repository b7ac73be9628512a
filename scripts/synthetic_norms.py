"""What guards and rules do with norms that are made up: 20 tensors whose norms scatter, and then change.

    python -m scripts.synthetic_norms       # the tables of docs/guards.md and docs/choosing.md

Only what changes is chosen; the clipper, its guards and its policies are those that a training has.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

import dist_clip
from dist_clip.policies.base import State, observed
from scripts.stability.report import paste
from scripts.stability.tables import table

GUARDS_PAGE, RULES_PAGE = Path("docs/guards.md"), Path("docs/choosing.md")
TENSORS = 20
SEEDS = (0, 1)


@dataclasses.dataclass(frozen=True)
class FirstForm(dist_clip.Guard):
    """The guard on the median that was tried before `MedianGuard`: a level that falls slower than it rises.

    It takes the norms for the usual ones after 25 skips in a row. Not part of the library; docs/guards.md compares the two.

    Args:
        bounded: whether one step moves a level by no more than the threshold; then skipped steps move it as well.
    """

    bounded: bool = True
    threshold: float = 3.0
    up: float = 0.01
    down: float = 0.002
    warmup_steps: int = 100
    patience: int = 25

    tensor_slots = ("level", "observations")

    def init_state(self, n: int, device: torch.device) -> State:
        return {
            "level": torch.zeros(n, device=device),
            "observations": torch.zeros(n, dtype=torch.int32, device=device),
            "run": torch.zeros((), dtype=torch.int32, device=device),
        }

    def tally(self, state: State, norms: Tensor) -> Tensor:
        counts = (state["observations"] >= self.warmup_steps) & (norms != 0)
        above = counts & torch.logical_not(norms <= self.threshold * state["level"].double())
        return torch.stack([above, counts]).double()

    def step(self, state: State, inputs: dist_clip.GuardInputs) -> tuple[Tensor, State]:
        above, counted = inputs.tallies.unbind()
        bad = 2 * above > counted
        renew = bad & (state["run"] >= self.patience)
        skip = bad & ~renew
        level, n = state["level"].double(), state["observations"] + 1
        ratio, first = inputs.norms / level, n <= self.warmup_steps
        rate = torch.where(ratio > 1, self.up, self.down)
        rate = torch.where(first, torch.clamp(1 / n.double(), min=self.up), rate)
        if self.bounded:
            ratio = torch.where(first, ratio, ratio.clamp(1 / self.threshold, self.threshold))
        moved = torch.where(level > 0, level * torch.exp(rate * torch.log(ratio)), inputs.norms)
        moved = torch.where(renew, inputs.norms, moved).float()
        seen = observed(inputs.norms.float()) & observed(moved)
        if not self.bounded:
            seen = seen & ~skip
        return skip, {
            "level": torch.where(seen, moved, state["level"]),
            "observations": torch.where(seen, n, state["observations"]),
            "run": torch.where(skip, state["run"] + 1, 0).int(),
        }


def norms(seed: int, scatter: float) -> Iterator[Tensor]:
    """Norms of the tensors around usual ones of their own, step by step; the logarithm scatters by `scatter`."""
    rng = random.Random(seed)
    usual = torch.tensor([10.0 ** rng.uniform(-2, 1) for _ in range(TENSORS)])
    while True:
        yield usual * torch.tensor([rng.lognormvariate(0, scatter) for _ in range(TENSORS)])


def reports(
    policy: dist_clip.Policy, guard: dist_clip.Guard | None, steps: Iterable[Tensor]
) -> Iterator[dist_clip.ClipReport]:
    """Clip gradients of these norms, step by step."""
    params = [torch.zeros(1, requires_grad=True) for _ in range(TENSORS)]
    clipper = dist_clip.GradClipper(params, policy, guard=guard, check_replicas=False)
    for step in steps:
        for param, norm in zip(params, step, strict=True):
            param.grad = norm.reshape(1).clone()
        yield clipper.clip_()


# ---- guards: how many steps are skipped ------------------------------------------------------------------------------

FORMS: dict[str, Callable[[], dist_clip.Guard]] = {
    "`MedianGuard()`": dist_clip.MedianGuard,
    "first form": FirstForm,
    "the same, moves not bounded": lambda: FirstForm(bounded=False),
}
SETTLED = 300
CASES: dict[str, list[float]] = {
    "6 times as large for 12 steps": [6] * 12 + [1] * 150,
    "6 times as large for 50 steps": [6] * 50 + [1] * 150,
    "1e4 times as large for 50 steps": [1e4] * 50 + [1] * 150,
    "8 times as large for good": [8] * 400,
    "1e3 times as large for good": [1e3] * 400,
    "a fiftieth for 60 steps, then 4 times the usual for 30": [0.02] * 60 + [4] * 30 + [1] * 200,
    "a millionth for 60 steps, then as usual": [1e-6] * 60 + [1] * 200,
    "a fiftieth for 500 steps, then as usual": [0.02] * 500 + [1] * 300,
    "every second batch 8 times as large, 1500 steps": [8, 1] * 750,
    "every tenth batch 8 times as large, 1500 steps": [8, *[1] * 9] * 150,
}


def skipped(guard: dist_clip.Guard, factors: Sequence[float], seed: int) -> int:
    """Steps skipped of those whose norms are the usual ones times these factors."""
    usual = norms(seed, 0.2)
    steps = (next(usual) * factor for factor in [*[1.0] * SETTLED, *factors])
    found = [bool(report.skip) for report in reports(dist_clip.MeasureOnly(), guard, steps)]
    return sum(found[SETTLED:])


def guards_table() -> str:
    lines = [
        [case, *(", ".join(str(skipped(make(), factors, seed)) for seed in SEEDS) for make in FORMS.values())]
        for case, factors in CASES.items()
    ]
    return table(["norms", *FORMS], lines)


# ---- rules: how much of a lasting rise is clipped --------------------------------------------------------------------

RULES: dict[str, dist_clip.Policy] = {
    "`ZClip(max_norm=None)`": dist_clip.ZClip(max_norm=None),
    '`ZClip(max_norm=None, scope="tensor")`': dist_clip.ZClip(max_norm=None, scope="tensor"),
    '`ZClip(max_norm=None, scope="tensor", mode="percentile")`': dist_clip.ZClip(
        max_norm=None, scope="tensor", mode="percentile"
    ),
    "`LogClip()`": dist_clip.LogClip(),
}
RISES = (1.5, 2.0, 10.0)
BEFORE, AFTER = 500, 1500


def clipped(policy: dist_clip.Policy, rise: float, seed: int = 0) -> tuple[float, float]:
    """Share of the tensors clipped in the steps after the norms rose for good, and the mean scale of those clipped."""
    usual = norms(seed, 0.1)
    steps = (next(usual) * (1.0 if step < BEFORE else rise) for step in range(BEFORE + AFTER))
    made = itertools.islice(reports(policy, None, steps), BEFORE, None)
    scales = torch.stack([report.scales for report in made])
    below = scales < 1
    return float(below.float().mean()), float(scales[below].mean()) if bool(below.any()) else 1.0


def rules_table() -> str:
    lines = []
    for name, policy in RULES.items():
        found = [clipped(policy, rise) for rise in RISES]
        lines.append([name, *(f"{share:.1%}, to {scale:.2f}" if share else "none" for share, scale in found)])
    return table(["rule", *(f"norms times {rise:g}" for rise in RISES)], lines)


def sections() -> dict[Path, dict[str, str]]:
    """All that is generated: page -> section -> text."""
    return {GUARDS_PAGE: {"guard-forms": guards_table()}, RULES_PAGE: {"lasting-rise": rules_table()}}


def main() -> None:
    torch.set_num_threads(1)
    for page, made in sections().items():
        paste(made, page)
        print(page)


if __name__ == "__main__":
    main()
