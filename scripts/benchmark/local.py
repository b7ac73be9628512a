"""One process, tensors that are whole: every policy against torch, the zclip package and the memory's bandwidth."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
import zclip
from pytorch_optimizer import AdaGC as PackageAdaGC
from torch import Tensor, nn

import dist_clip
from scripts.benchmark.timing import FLOOR_COLUMN, RATIO_COLUMNS, Candidate, Section, interleaved, ratio_rows, settle
from scripts.policies import compared, label, make

TORCH = "torch clip_grad_norm_, foreach"
FLOOR = "read the same bytes once (sum of one flat tensor)"
NO_LIMIT = 1e30
SPIKE = 16.0
"""Times its usual norm is what every rule clips."""
RATIO = 100.0
MODES = compared("adagc-global")

Shapes = list[tuple[int, ...]]


def gpt2_shapes(layers: int = 12, dim: int = 768, vocab: int = 50257, context: int = 1024) -> Shapes:
    """Parameters of GPT-2, tied embeddings once: 148 tensors, 124 million elements, by default."""
    block = [(dim,), (dim,), (dim, 3 * dim), (3 * dim,), (dim, dim), (dim,)]
    block += [(dim,), (dim,), (dim, 4 * dim), (4 * dim,), (4 * dim, dim), (dim,)]
    return [(vocab, dim), (context, dim), *(shape for _ in range(layers) for shape in block), (dim,), (dim,)]


Dtypes = tuple[torch.dtype, ...]


class Gradients:
    """Parameters with gradients, and the originals to put back. A parameter's norm is `RATIO` times its gradient's."""

    def __init__(self, shapes: Shapes, device: str = "cpu", dtypes: Dtypes = (torch.float32,)) -> None:
        """Make gradients of these shapes, whose dtypes take turns."""
        torch.manual_seed(0)
        self.originals: list[Tensor] = [torch.empty(0)] * len(shapes)
        self.flats: list[Tensor] = []
        for turn, dtype in enumerate(dtypes):
            sizes = [math.prod(shape) for shape in shapes[turn :: len(dtypes)]]
            flat = torch.randn(sum(sizes), device=device).mul_(1e-3).to(dtype)
            self.flats.append(flat)
            for i, part in enumerate(torch.split(flat, sizes)):
                place = turn + i * len(dtypes)
                self.originals[place] = part.view(shapes[place])
        self.params = [nn.Parameter(torch.full_like(original, 1e-3 * RATIO)) for original in self.originals]
        for param, original in zip(self.params, self.originals, strict=True):
            param.grad = original.clone()
        self.named = [(f"p{i}", param) for i, param in enumerate(self.params)]
        self.norm = float(torch.stack([g.double().norm() for g in self.originals]).norm())

    @property
    def nbytes(self) -> int:
        return sum(flat.nbytes for flat in self.flats)

    @property
    def numel(self) -> int:
        return sum(flat.numel() for flat in self.flats)

    def sums(self) -> list[Tensor]:
        """Read all of them once, as one flat tensor of each dtype."""
        return [flat.sum() for flat in self.flats]

    def restore(self, spikes: int = 0) -> None:
        """Put the original gradients back, `spikes` of them, evenly spread, times `SPIKE`."""
        grads: list[Tensor] = [param.grad for param in self.params]  # type: ignore[misc]
        torch._foreach_copy_(grads, self.originals)
        if spikes:
            torch._foreach_mul_([grads[i * len(grads) // spikes] for i in range(spikes)], SPIKE)


def clipper(gradients: Gradients, policy: dist_clip.Policy, kernels: str | None = None) -> dist_clip.GradClipper:
    """A clipper past its policy's warm-up, on which nothing was clipped."""
    made = dist_clip.GradClipper(gradients.named, policy, kernels=kernels)
    gradients.restore()
    settle(made.clip_, gradients.params)
    return made


def steady(mode: str, max_norm: float = NO_LIMIT) -> dist_clip.Policy:
    """The policy with a short warm-up, after which it clips spikes, and norms above `max_norm` if it has one."""
    return make(mode, warmup_steps=2, max_norm=max_norm, percentile=0.0, lam=SPIKE**0.5 / RATIO)


@dataclasses.dataclass(frozen=True)
class Share:
    """A policy's clipper, and gradients of which it clips a known share.

    Attributes:
        name: of the row.
        spikes: how many gradients are raised.
    """

    name: str
    clipper: dist_clip.GradClipper
    spikes: int

    def check(self) -> None:
        """Raise unless the last call clipped what the name says."""
        report = self.clipper.last_report
        assert report is not None
        clipped = round(float(report.clipped_fraction) * len(report.names))
        if clipped != self.spikes:
            raise AssertionError(f"{self.name}: {clipped} tensors were clipped, expected {self.spikes}")


def shares(mode: str, gradients: Gradients, kernels: str | None = None) -> list[Share]:
    """Nothing clipped, 5 % of the tensors, all of them; a rule for the global norm clips all or nothing."""
    every = len(gradients.params)
    wanted = {"0 %": 0, "5 %": max(1, round(0.05 * every)), "100 %": every}
    if steady(mode).scope == "global":
        del wanted["5 %"]
    by = "" if kernels is None else f", {kernels}"
    return [
        Share(
            f"{label(mode)}, {share} clipped{by}",
            clipper(gradients, steady(mode, 1.5 * gradients.norm), kernels),
            spikes,
        )
        for share, spikes in wanted.items()
    ]


def package_zclip(gradients: Gradients, max_norm: float) -> Callable[[], object]:
    rule = zclip.ZClip(warmup_steps=2, max_grad_norm=max_norm)
    model = nn.ParameterList(gradients.params)
    gradients.restore()
    for _ in range(3):
        rule.step(model)
    return lambda: rule.step(model)


def compare(title: str, about: str, shapes: Shapes, repeats: int, dtypes: Dtypes = (torch.float32,)) -> Section:
    """The table of one list of shapes: nothing clipped, 5 % of the tensors, all of them."""
    gradients = Gradients(shapes, dtypes=dtypes)
    params = gradients.params

    def nothing(run: Callable[[], object]) -> Candidate:
        return Candidate(run, gradients.restore)

    ours = [share for mode in MODES for share in shares(mode, gradients)]
    candidates = {
        TORCH: nothing(lambda: torch.nn.utils.clip_grad_norm_(params, NO_LIMIT, foreach=True)),
        "torch clip_grad_norm_, one by one": nothing(
            lambda: torch.nn.utils.clip_grad_norm_(params, NO_LIMIT, foreach=False)
        ),
        "zclip package, 0 % clipped": nothing(package_zclip(gradients, NO_LIMIT)),
        "zclip package, 100 % clipped": nothing(package_zclip(gradients, gradients.norm / 2)),
        **{one.name: Candidate(one.clipper.clip_, functools.partial(gradients.restore, one.spikes)) for one in ours},
        "dist_clip.clip_grad_norm_": nothing(lambda: dist_clip.clip_grad_norm_(params, NO_LIMIT)),
        FLOOR: nothing(gradients.sums),
    }
    rows = ratio_rows(interleaved(candidates, repeats), TORCH, FLOOR)
    for one in ours:
        one.check()
    facts = {"tensors": len(shapes), "elements": gradients.numel, "repeats": repeats}
    return Section(title, about, RATIO_COLUMNS | FLOOR_COLUMN, rows, facts)


ABOUT = (
    "torch scales every gradient on every call, also by 1, so what it is given does not change its time. Rules for the "
    "global norm clip all tensors or none."
)


def gpt2(quick: bool) -> Section:
    shapes = gpt2_shapes(layers=2, vocab=2048) if quick else gpt2_shapes()
    size = "cut to 2 layers" if quick else "124M"
    return compare(f"GPT-2, {size}", ABOUT, shapes, 3 if quick else 11)


def small(quick: bool) -> Section:
    n = 300 if quick else 2000
    return compare(f"{n} tensors of 1,000 elements", ABOUT, [(1000,)] * n, 5 if quick else 41)


def large(quick: bool) -> Section:
    n, size = (2, 1_000_000) if quick else (10, 10_000_000)
    return compare(f"{n} tensors of {size:,} elements", ABOUT, [(size,)] * n, 3 if quick else 9)


def published_shapes(quick: bool) -> Shapes:
    """500 matrices of 225,181,696 elements together, the first workload of NeMo-Automodel's pull request 3685.

    It names the number of matrices and of elements, and that dtypes are mixed, but no single shape: these are nearly
    equal. On an H100 it reports 3.73 ms for norm and scaling by Triton, and 3.93 by Transformer Engine.
    """
    if quick:
        return [(64, 80)] * 20
    return [(656, 686)] * 499 + [(225_181_696 - 499 * 656 * 686, 1)]


def published(quick: bool) -> Section:
    shapes = published_shapes(quick)
    return compare(
        f"Published: {len(shapes)} matrices", ABOUT, shapes, 3 if quick else 7, (torch.float32, torch.bfloat16)
    )


def optimizer(quick: bool) -> Section:
    """pytorch_optimizer's AdaGC is Adam and clipping in one: held against clipping, then Adam."""
    shapes = gpt2_shapes(layers=1, vocab=2048) if quick else gpt2_shapes()
    gradients = Gradients(shapes)

    def fresh() -> list[nn.Parameter]:
        """Parameters with memory, for an optimizer to change, and gradients shared by all candidates."""
        params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
        for param, shared in zip(params, gradients.params, strict=True):
            param.grad = shared.grad
        return params

    package = PackageAdaGC(fresh(), warmup_steps=2, lambda_abs=NO_LIMIT, weight_decay=0.0)
    params = fresh()
    adam = torch.optim.Adam(params, foreach=True)
    clip = dist_clip.GradClipper([(f"p{i}", p) for i, p in enumerate(params)], steady("adagc"))
    for _ in range(3):
        package.step()
    settle(clip.clip_, params)

    def ours() -> None:
        clip.clip_()
        adam.step()

    def torchs() -> None:
        torch.nn.utils.clip_grad_norm_(params, NO_LIMIT, foreach=True)
        adam.step()

    reference = "torch clip_grad_norm_, then torch.optim.Adam"
    candidates = {
        reference: Candidate(torchs),
        "dist_clip AdaGC, then torch.optim.Adam": Candidate(ours),
        "pytorch_optimizer's AdaGC (Adam included)": Candidate(package.step),
        "torch.optim.Adam alone": Candidate(adam.step),
    }
    repeats = 3 if quick else 5
    return Section(
        "AdaGC with Adam",
        "Whole optimizer steps on the shapes above, nothing clipped, foreach everywhere: pytorch_optimizer's AdaGC is Adam "
        "and clipping in one and cannot be timed apart.",
        RATIO_COLUMNS,
        ratio_rows(interleaved(candidates, repeats), reference),
        {"tensors": len(shapes), "elements": gradients.numel, "repeats": repeats},
    )
